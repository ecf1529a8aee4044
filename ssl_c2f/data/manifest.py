"""Which recordings a data set holds: found in a folder, or listed in a CSV or JSONL file.

Axes: n clips, C classes.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from reprlib import repr as brief
from typing import Literal

import torch
from torch import Tensor

from ssl_c2f.core.files import write_text
from ssl_c2f.core.options import UserError
from ssl_c2f.core.threads import in_threads
from ssl_c2f.data.containers import FOREIGN, INSTALL, endings
from ssl_c2f.data.decode import AudioError, Header, Member, can_be, read_header
from ssl_c2f.data.tables import TEST, TRAIN, VALIDATION, Table, read_table

_SPLIT_NAMES = {TRAIN: "train", VALIDATION: "val", TEST: "test"}
_ESC_FOLD = r"^(\d)-\d+-[A-Z]"  # the file names of ESC-10 and ESC-50: 1-100032-A-0.wav is in fold 1

FolderLabels = Literal["path", "folder", "top", "none"]
Progress = Callable[[int, int], object]  # called with (files read, files in all)


@dataclass(frozen=True)
class Clip:
    """One recording, or a stretch of it. `num_samples` counts the whole file at its own `sample_rate`."""

    path: str  # relative to the manifest's root, with forward slashes; in a shard, the name that it had
    labels: tuple[str, ...] = ()  # empty: unlabelled
    fold: int | None = None
    num_samples: int = 0
    sample_rate: int = 0
    channels: int = 0
    shard: str | None = None  # the file, relative to the root, that holds its bytes; None: the file at `path`
    offset: int = 0
    size: int = 0
    start: float = 0.0  # seconds into the recording
    end: float | None = None  # None: to its end
    group: str | None = None  # a site or a recorder, whose recordings are all trained on or all held out

    @property
    def seconds(self) -> float:
        """Its length; a stretch ends with its recording at the latest."""
        whole = self.num_samples / self.sample_rate
        return (whole if self.end is None else min(self.end, whole)) - self.start

    @property
    def unit(self) -> str:
        """What is never split between training and validation: its group, else its recording."""
        return self.group or self.path

    def place(self, root: Path) -> Path | Member:
        """Where its bytes are."""
        return Member(root / self.shard, self.offset, self.size) if self.shard else root / self.path


@dataclass(frozen=True)
class Manifest:
    """The usable clips under `root`, sorted by path and time, their sorted classes, and (path, reason) of bad files."""

    root: Path
    clips: tuple[Clip, ...]
    classes: tuple[str, ...]
    bad: tuple[tuple[str, str], ...] = ()
    is_split: bool = False  # folds 1, 2 and 3 are training, validation and test
    notes: tuple[str, ...] = ()  # what a user should know of how it was read

    @property
    def is_multi_label(self) -> bool:
        """Whether any clip has several labels: then one without labels is a negative of all."""
        return any(len(clip.labels) > 1 for clip in self.clips)

    def labels(self, clips: Sequence[int] | Tensor) -> Tensor:
        """(n, C) of 0 and 1 for the clips of n indices."""
        labels = torch.zeros(len(clips), len(self.classes))
        for row, clip in zip(labels, clips, strict=True):
            row[[self._column[label] for label in self.clips[int(clip)].labels]] = 1.0
        return labels

    @cached_property
    def _column(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.classes)}

    @cached_property
    def has_stretches(self) -> bool:
        """Whether any clip is not a whole recording."""
        return any(clip.start or clip.end is not None for clip in self.clips)

    @cached_property
    def folds(self) -> list[int]:
        """The folds that there are, ascending. A clip may be in none."""
        return sorted({clip.fold for clip in self.clips if clip.fold is not None})

    def in_folds(self, folds: Collection[int], option: str) -> list[int]:
        """Indices of the clips in the folds that an option names; of all clips, if it names none.

        Raises:
            UserError: a fold that no clip is in.
        """
        if missing := set(folds) - set(self.folds):
            raise UserError(f"{option}: no clip of {self.root} is in fold {min(missing)}; there are {self.folds}")
        return [i for i, clip in enumerate(self.clips) if not folds or clip.fold in folds]

    def only(self, clips: Iterable[int]) -> Manifest:
        """The clips of these indices, and the classes that they have.

        Raises:
            UserError: there are none.
        """
        chosen = tuple(self.clips[i] for i in clips)
        if not chosen:
            raise UserError(f"no recording of {self.root} is left to work on")
        return replace(self, clips=chosen, classes=classes_of(chosen))


def classes_of(clips: Iterable[Clip]) -> tuple[str, ...]:
    return tuple(sorted({label for clip in clips for label in clip.labels}))


def scan(
    root: Path, *, fold_pattern: str | None = None, labels: FolderLabels = "path", progress: Progress | None = None
) -> Manifest:
    """Every audio file under `root` that is not hidden.

    Args:
        labels: of its folder, what the label is: its path below `root`, its own name alone (`folder`), the name of the
            topmost (`top`), nothing. A file in `root` itself has none.
        fold_pattern: its one group matches the fold in the file name; without, ESC's naming is recognised where every
            file follows it.

    Raises:
        UserError: no such folder, no usable audio in it, or a pattern that finds no fold.
    """
    files, left_out = audio_in(root)
    folds = _folds([file.name for file in files], fold_pattern)
    parts = [file.parent.parts for file in files]
    chosen = {"path": slice(None), "folder": slice(-1, None), "top": slice(1), "none": slice(0)}[labels]
    names = [(Path(*part[chosen]).as_posix(),) if part[chosen] else () for part in parts]
    found = checked(root, list(map(Clip, map(Path.as_posix, files), names, folds)), progress)
    return replace(found, notes=(left_out,)) if left_out else found


def look_like_labels(manifest: Manifest) -> bool:
    """Whether folder names tell what is heard: several folders, few for the recordings that they hold, and not dates or
    numbers, which tell when or where it was recorded."""
    counts = Counter(label for clip in manifest.clips for label in clip.labels)
    numbered = sum(bool(re.search(r"\d{4}|^\W*\d[\W\d]*$", Path(label).name)) for label in counts)
    few = len(counts) * 3 <= sum(counts.values())
    return len(counts) > 1 and few and min(counts.values()) > 1 and 2 * numbered < len(counts)


def audio_in(root: Path) -> tuple[list[Path], str]:
    """The audio files under a folder that are not hidden, relative to it and sorted; a line on other files, if any.

    Raises:
        UserError: no such folder, or no audio in it.
    """
    if not root.is_dir():
        raise UserError(f"{root}: " + ("not a folder" if root.exists() else "no such folder"))
    known, files, others = endings(), list[Path](), Counter[str]()
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if not name.startswith(".")]
        for file in (Path(folder, name) for name in names if not name.startswith(".")):
            ending = file.suffix.lower()
            if ending not in known:
                others[ending or "(no ending)"] += 1
            elif file.is_file():
                files.append(file.relative_to(root))
    note = _left_out(others)
    if not files:
        looked = f"{root}: no audio found (looked for {', '.join(sorted(known))})"
        raise UserError(f"{looked}; {note}" if note else looked)
    return sorted(files), note


def _left_out(others: Counter[str]) -> str:
    if not others:
        return ""
    foreign = {ending: count for ending, count in others.items() if ending in FOREIGN}
    most = {**foreign, **dict(others.most_common(5))}
    counts = ", ".join(f"{count} {ending}" for ending, count in most.items())
    rest = sum(others.values()) - sum(most.values())
    more = f" and {rest} others" if rest else ""
    return f"not read: {counts}{more}" + (f" ({INSTALL} reads {', '.join(sorted(foreign))})" if foreign else "")


def read_manifest(
    file: Path, root: Path | None = None, *, columns: Mapping[str, str] | None = None, separator: str | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """The clips that a CSV, TSV or JSONL file lists, with paths relative to `root` (default: the file's own folder).

    Columns, by these or other usual names (`tables.NAMES`): path; labels (several: separated by ';', or a list in
    JSONL); fold, or split (train, val, test); start and end, seconds into the recording, which may have several rows,
    overlapping or not; group; and, to spare reading every header, all of num_samples, sample_rate and channels. Clips
    in shards have shard, offset and size. All but path are optional. Missing audio is `bad`, and so is a stretch that
    begins behind the end of its recording.

    Raises:
        UserError: no such file, not in this form (says where), or no usable audio.
    """
    clips, table = listed_in(file, root, columns, separator)
    found = replace(checked(root or file.parent, clips, progress), is_split=table.is_split)
    notes = [f"{file}: columns that are not used: {', '.join(table.ignored)[:300]}"] if table.ignored else []
    if found.is_split:
        counts = Counter(clip.fold for clip in found.clips)
        parts = [f"{counts[fold]} {name}" for fold, name in _SPLIT_NAMES.items() if counts[fold]]
        notes.append(f"{file}: split {', '.join(parts)}; test clips are never trained on or validated with")
    return replace(found, notes=tuple(notes))


def listed_in(
    file: Path, root: Path | None = None, columns: Mapping[str, str] | None = None, separator: str | None = None
) -> tuple[list[Clip], Table]:
    """The clips that a table lists, whether they are there or not, and the table. Raises UserError as `read_table`."""
    table = read_table(file, columns, separator)
    base = (root or file.parent).resolve().as_posix().rstrip("/") + "/"
    rows = ({**vars(row), "path": row.path.removeprefix(base)} for row in table.rows)  # absolute ones below the root
    return [Clip(**row) for row in rows], table


def write_manifest(manifest: Manifest, file: Path) -> None:
    """Write the clips as CSV or JSONL, by the file's ending; `read_manifest` gives them back.

    Raises:
        UserError: another ending, or a label that CSV cannot hold.
    """
    rows = [asdict(clip) for clip in manifest.clips]
    if manifest.is_split:
        rows = [{**row, "split": _SPLIT_NAMES.get(row["fold"])} for row in rows]
        rows = [{name: value for name, value in row.items() if name != "fold"} for row in rows]
    if file.suffix == ".jsonl":
        write_text(file, "".join(json.dumps(row) + "\n" for row in rows))
        return
    if file.suffix != ".csv":
        raise UserError(f"{file}: a manifest ends in .csv or .jsonl")
    if odd := [name for name in manifest.classes if ";" in name or name != name.strip()]:
        raise UserError(f"{file}: label {brief(odd[0])} does not fit into CSV; write .jsonl")
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "labels": ";".join(row["labels"])} for row in rows)
    write_text(file, table.getvalue())


def fingerprint(manifest: Manifest) -> str:
    """A SHA-256 of the clips, whatever their order and wherever they are: at other roots, in shards or not."""
    where, later = ("shard", "offset", "size"), {"start": 0.0, "end": None, "group": None}  # as before these came
    rows = sorted(
        json.dumps({k: v for k, v in asdict(clip).items() if k not in where and not (k in later and v == later[k])})
        for clip in manifest.clips
    )
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def _folds(names: Sequence[str], pattern: str | None) -> list[int | None]:
    try:
        matches = [re.search(pattern or _ESC_FOLD, name) for name in names]
        folds = [int(match[1]) if match else None for match in matches]
    except (re.error, IndexError, ValueError, TypeError):
        raise UserError(f"fold pattern {pattern!r}: needs one group that matches a number") from None
    if pattern is None:
        return folds if None not in folds else [None] * len(names)
    if not any(matches):
        raise UserError(f"fold pattern {pattern!r}: matches no file name, for example not {names[0]!r}")
    return folds


def checked(root: Path, listed: Sequence[Clip], progress: Progress | None = None) -> Manifest:
    """The manifest of listed clips: bad files set apart, missing headers read (on threads: they wait for the disk).

    Raises:
        UserError: none can be used.
    """

    def check(clip: Clip) -> Header | AudioError:
        try:
            place = clip.place(root)
            known = Header(clip.num_samples, clip.sample_rate, clip.channels)
            return known if can_be(place, known) else read_header(place)
        except AudioError as error:
            return error

    files = {(clip.shard, clip.offset, clip.path): clip for clip in listed}  # one row of each: a header is read once
    headers: dict[tuple[str | None, int, str], Header | AudioError] = {}
    found = in_threads(check, list(files.values()), 16)
    for done, (key, header) in enumerate(zip(files, found, strict=True), 1):
        headers[key] = header
        if progress:
            progress(done, len(files))
    clips, bad = list[Clip](), set[tuple[str, str]]()
    for clip in listed:
        header = headers[clip.shard, clip.offset, clip.path]
        if isinstance(header, AudioError):
            bad.add((clip.path, header.reason))
            continue
        clip = replace(clip, **header._asdict())
        if clip.seconds > 0:
            clips.append(clip)
        else:
            ends = header.num_samples / header.sample_rate
            bad.add((clip.path, f"ends at {ends:g} s, before a stretch of it begins" + _times(clip)))
    if not clips:
        path, reason = min(bad)
        where = f"{root}: " if root.parts else ""
        raise UserError(f"{where}none of {len(bad)} recordings can be read; {path}: {reason}")
    clips.sort(key=lambda clip: (clip.path, clip.start, clip.seconds))
    return Manifest(root, tuple(clips), classes_of(clips), tuple(sorted(bad)))


def _times(clip: Clip) -> str:
    end = "its end" if clip.end is None else f"{clip.end:g} s"
    return f" (from {clip.start:g} s to {end})" if clip.start or clip.end is not None else ""


def _is_jsonl(file: Path) -> bool:
    if file.suffix not in (".csv", ".jsonl"):
        raise UserError(f"{file}: a manifest ends in .csv or .jsonl")
    return file.suffix == ".jsonl"
