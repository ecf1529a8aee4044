"""Public data sets as they unpack, and the manifests that their own lists of labels and splits make.

Folds are the official ones where the set has folds; where it has splits they are numbered: 1 training, 2 validation,
3 test. Recordings that a table lists but nobody has (AudioSet and VGGSound lose some every year) are counted and left
out.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ssl_c2f.core.options import UserError
from ssl_c2f.data.containers import endings
from ssl_c2f.data.manifest import Clip, Manifest, Progress, checked
from ssl_c2f.data.tables import TEST, TRAIN, VALIDATION


@dataclass(frozen=True)
class PublicSet:
    """How a set is laid out: where it comes from, and its clips (read from a folder)."""

    source: str
    clips: Callable[[Path], Iterator[Clip]]


def build(name: str, root: Path, *, progress: Progress | None = None) -> tuple[Manifest, int]:
    """The manifest of a public set that was unpacked in `root`, and how many of its recordings are not there.

    Raises:
        UserError: no such set or folder, a table of it is missing or of another form, or none of its audio is there.
    """
    if name not in SETS:
        raise UserError(f"data build {name}: unknown set (known: {', '.join(SETS)})")
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; get {name} from {SETS[name].source}")
    try:
        listed = list(SETS[name].clips(root))
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: not there; is {root} {name} as {SETS[name].source} has it?") from None
    except (KeyError, ValueError, TypeError, csv.Error) as error:
        raise UserError(f"{root}: a table of {name} is of another form than expected ({error!r})") from None
    there = [clip for clip in listed if (root / clip.path).is_file()]
    if not there:
        raise UserError(f"{root}: none of the {len(listed)} recordings that {name} lists is there")
    return checked(root, there, progress), len(listed) - len(there)


def download_speech_commands(root: Path) -> None:
    """Fetch and unpack Speech Commands (2.3 GB) with torchaudio, which checks what it fetched."""
    from torchaudio.datasets import SPEECHCOMMANDS

    root.mkdir(parents=True, exist_ok=True)
    SPEECHCOMMANDS(root, download=True)


def _table(file: Path, columns: list[str] | None = None, skip: int = 0) -> list[dict[str, str]]:
    """The rows of a CSV file, whose first line names the columns unless they are given."""
    with file.open(encoding="utf-8", newline="") as lines:
        for _ in range(skip):
            next(lines)
        return list(csv.DictReader(lines, columns, skipinitialspace=True))


def _esc(only_ten: bool) -> Callable[[Path], Iterator[Clip]]:
    def clips(root: Path) -> Iterator[Clip]:
        for row in _table(root / "meta" / "esc50.csv"):
            if row["esc10"] == "True" or not only_ten:
                yield Clip(f"audio/{row['filename']}", (row["category"],), int(row["fold"]))

    return clips


def _urbansound8k(root: Path) -> Iterator[Clip]:
    for row in _table(root / "metadata" / "UrbanSound8K.csv"):
        yield Clip(f"audio/fold{row['fold']}/{row['slice_file_name']}", (row["class"],), int(row["fold"]))


def _speech_commands(root: Path) -> Iterator[Clip]:
    """Also as torchaudio unpacks it, two folders further down. Background noise is no command."""
    below = Path("SpeechCommands", "speech_commands_v0.02")
    base = root / below if (root / below).is_dir() else root
    folds = dict.fromkeys((base / "validation_list.txt").read_text().split(), VALIDATION)
    folds |= dict.fromkeys((base / "testing_list.txt").read_text().split(), TEST)
    for file in sorted(base.glob("[!_.]*/*.wav")):
        name = file.relative_to(base).as_posix()
        yield Clip(file.relative_to(root).as_posix(), (file.parent.name,), folds.get(name, TRAIN))


def _fsd50k(root: Path) -> Iterator[Clip]:
    splits = {"train": TRAIN, "val": VALIDATION, "eval": TEST}
    for part in ("dev", "eval"):
        for row in _table(root / "FSD50K.ground_truth" / f"{part}.csv"):
            path = f"FSD50K.{part}_audio/{row['fname']}.wav"
            yield Clip(path, tuple(row["labels"].split(",")), splits[row.get("split", "eval")])


def _audioset(root: Path) -> Iterator[Clip]:
    """Its tables name segments, not files: any file below the folder whose name holds the video's id is taken.

    Names such as Y--4gqARaEJE_0.000_10.000.wav, --4gqARaEJE.flac and --4gqARaEJE_30000.wav all occur.
    """
    names = {row["mid"]: row["display_name"] for row in _table(root / "class_labels_indices.csv")}
    files = _by_video(root)
    for table, fold in (("balanced_train", TRAIN), ("unbalanced_train", TRAIN), ("eval", TEST)):
        file = root / f"{table}_segments.csv"
        if table == "unbalanced_train" and not file.exists():  # two million clips that many do without
            continue
        for row in _table(file, ["id", "start", "end", "labels"], skip=3):
            labels = tuple(names[mid] for mid in row["labels"].split(","))
            yield Clip(files.get(row["id"], f"{row['id']} (missing)"), labels, fold)


def _vggsound(root: Path) -> Iterator[Clip]:
    files = _by_video(root)
    for row in _table(root / "vggsound.csv", ["id", "start", "label", "split"]):
        name = f"{row['id']}_{int(row['start']):06}"
        path = files.get(name) or files.get(row["id"], f"{name} (missing)")
        yield Clip(path, (row["label"],), {"train": TRAIN, "test": TEST}[row["split"]])


def _by_video(root: Path) -> dict[str, str]:
    """Audio files below a folder by whole name, and by the video id of eleven characters that they begin with."""
    found: dict[str, str] = {}
    known = endings()
    for file in sorted(root.rglob("*")):
        if file.suffix.lower() in known:
            path, stem = file.relative_to(root).as_posix(), file.stem
            stem = stem[1:] if stem.startswith("Y") and len(stem) > 11 and stem[12:13] in ("", "_") else stem
            found[stem] = path
            found.setdefault(stem[:11], path)
    return found


def _voxceleb1(root: Path) -> Iterator[Clip]:
    """Speaker identification: its list numbers the splits as we do, and the speaker is the first folder."""
    for line in (root / "iden_split.txt").read_text().splitlines():
        fold, name = line.split()
        yield Clip(f"wav/{name}", (name.partition("/")[0],), int(fold))


SETS = {
    "esc50": PublicSet("github.com/karolpiczak/ESC-50", _esc(only_ten=False)),
    "esc10": PublicSet("github.com/karolpiczak/ESC-50", _esc(only_ten=True)),
    "urbansound8k": PublicSet("urbansounddataset.weebly.com", _urbansound8k),
    "speech_commands": PublicSet("tensorflow.org/datasets/catalog/speech_commands (version 0.02)", _speech_commands),
    "fsd50k": PublicSet("zenodo.org/records/4060432", _fsd50k),
    "audioset": PublicSet("research.google.com/audioset", _audioset),
    "vggsound": PublicSet("www.robots.ox.ac.uk/~vgg/data/vggsound", _vggsound),
    "voxceleb1": PublicSet("www.robots.ox.ac.uk/~vgg/data/voxceleb", _voxceleb1),
}
