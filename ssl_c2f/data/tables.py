"""Tables of recordings as people have them: CSV, TSV or JSONL with any columns, the usual names of which are known."""

from __future__ import annotations

import csv
import json
import math
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as brief
from typing import Any, TextIO

from ssl_c2f.core.options import UserError

TRAIN, VALIDATION, TEST = 1, 2, 3  # the folds that stand for a split
SPLITS = {
    **dict.fromkeys(("train", "training", "trn"), TRAIN),
    **dict.fromkeys(("val", "valid", "validation", "dev", "development"), VALIDATION),
    **dict.fromkeys(("test", "testing", "tst", "eval", "evaluation"), TEST),
}
# What a column is for: the names that people give it, the first one that a table has being taken.
NAMES: Mapping[str, Sequence[str]] = {
    "path": ("path", "file", "filename", "file_name", "filepath", "file_path", "audio", "audio_path", "audio_file",
             "wav"),
    "labels": ("labels", "label", "category", "class", "class_name", "species", "tags", "tag"),
    "fold": ("fold",),
    "split": ("split", "subset"),
    "start": ("start", "begin", "onset"),
    "end": ("end", "offset", "stop"),
    "group": ("group",),
}
_OURS = ("num_samples", "sample_rate", "channels", "shard", "offset", "size")  # what `write_manifest` adds
_LONGEST = 4096  # characters of a path or a label
_ENDINGS = (".csv", ".tsv", ".jsonl")
_WRONG = re.compile(r"[|]|,(?! )")  # of separators; class names such as "Speech, male" hold a comma and a space


@dataclass(frozen=True)
class Row:
    """One row of a table, understood."""

    path: str
    labels: tuple[str, ...]
    fold: int | None
    start: float
    end: float | None
    group: str | None
    num_samples: int
    sample_rate: int
    channels: int
    shard: str | None
    offset: int
    size: int


@dataclass(frozen=True)
class Table:
    """The rows of a table."""

    rows: tuple[Row, ...]
    is_split: bool  # into training, validation and test, which are folds 1, 2 and 3
    ignored: tuple[str, ...]  # columns that mean nothing here


def read_table(file: Path, columns: Mapping[str, str] | None = None, separator: str | None = None) -> Table:
    """What a table lists, whether it is there or not.

    Args:
        columns: what a column is for (a key of `NAMES`) -> its name, where that is not a usual one.
        separator: of several labels in one cell; None: `;`, and a label that looks like two of another is asked about.

    Raises:
        UserError: no such file, no column of file names, or a row that cannot be understood; says where.
    """
    names, rows = _read(file)
    if not rows:
        raise UserError(f"{file}: lists no clips")
    used = _columns(file, names, columns or {})
    ours = {"num_samples", "sample_rate", "channels"} <= used.keys()  # what `write_manifest` wrote is taken literally
    kept: dict[tuple[str, float, float | None], Row] = {}
    for line, cells in rows:
        try:
            row = _row(cells, used, separator or ";", ours)
        except ValueError as error:
            raise UserError(f"{file}, line {line}: {error}") from None
        key = (row.path, row.start, row.end)
        if key not in kept:
            kept[key] = row
        elif kept[key] != row:  # a stretch that is listed once for each of its labels has them all
            same = kept[key].fold == row.fold and kept[key].group == row.group
            labels = tuple(dict.fromkeys((*kept[key].labels, *row.labels)))
            if not same or row.shard:
                raise UserError(f"{file}, line {line}: {row.path} is listed twice, with another fold, split or group")
            kept[key] = _with_labels(kept[key], labels)
    if separator is None and not ours:
        _ask_about_separators(file, kept.values())
    ignored = tuple(name for name in names if name not in used.values())
    return Table(tuple(kept.values()), "split" in used and "fold" not in used, ignored)


def _with_labels(row: Row, labels: tuple[str, ...]) -> Row:
    return Row(**{**vars(row), "labels": labels})


def _columns(file: Path, names: Sequence[str], given: Mapping[str, str]) -> dict[str, str]:
    """What each column that is used is for -> its name in the table."""
    if unknown := sorted(given.keys() - NAMES.keys() - {"label"}):
        raise UserError(f"data.columns: no {unknown[0]!r} in a table; there are {', '.join(NAMES)}")
    given = {"labels" if use == "label" else use: name for use, name in given.items()}
    for use, name in given.items():
        if name not in names:
            raise UserError(f"data.columns: {file} has no column {name!r} for {use}; it has {', '.join(names)}")
    plain = {_plain(name): name for name in reversed(names)}
    used = dict(given)
    shards = "shard" in plain
    for use, usual in NAMES.items():
        found = next((plain[name] for name in usual if name in plain and not (shards and name == "offset")), None)
        if use not in used and found is not None and found not in used.values():
            used[use] = found
    used |= {name: name for name in _OURS if name in names and (name != "offset" or shards)}
    if "path" not in used:
        raise UserError(
            f"{file}: no column of file names among {', '.join(names)[:300]}; say which: data.columns={{path: NAME}}"
        )
    return used


def _plain(name: str) -> str:
    """`Begin Time (s)` -> begin: as `NAMES` has it."""
    words = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    return re.sub(r"(_(time|seconds|sec|s))+$", "", words)


def _row(cells: Mapping[str, Any], used: Mapping[str, str], separator: str, literally: bool) -> Row:
    """Raises ValueError: what is wrong with the row."""
    of = {use: cells.get(name) for use, name in used.items()}
    path = of["path"]
    if not isinstance(path, str) or not path.strip():
        raise ValueError(f"no {used['path']}")
    labels, shard = _labels(of.get("labels") or cells.get("label"), separator), of.get("shard") or None  # JSON: either
    if not isinstance(shard, str | None):
        raise ValueError(f"shard {brief(shard)} is not text")
    for name, text in (("path", path), *(("label", label) for label in labels), ("shard", shard or "")):
        _check_name(name, text)
    start, end = _seconds(used, of, "start") or 0.0, _seconds(used, of, "end")
    if end is not None and end <= start:
        raise ValueError(f"end {end:g} is not after start {start:g}")
    return Row(
        path=path if literally else posixpath.normpath(path.strip().replace("\\", "/")),
        labels=labels,
        fold=_fold(of), start=start, end=end, group=str(of.get("group") or "") or None,
        num_samples=_whole("num_samples", of.get("num_samples")) or 0,
        sample_rate=_whole("sample_rate", of.get("sample_rate")) or 0,
        channels=_whole("channels", of.get("channels")) or 0, shard=shard,
        offset=_whole("offset", of.get("offset")) or 0, size=_whole("size", of.get("size")) or 0,
    )


def _labels(value: object, separator: str) -> tuple[str, ...]:
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        return tuple(name.strip() for name in value.split(separator) if name.strip())
    names = [value] if isinstance(value, int) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str | int) for name in names):
        raise ValueError(f"labels {brief(value)} are not text")
    return tuple(map(str, names))


def _check_name(key: str, text: str) -> None:
    """Raises ValueError: longer than a name is, or what no file can hold."""
    if len(text) > _LONGEST:
        raise ValueError(f"{key} {brief(text)} has {len(text)} characters, more than {_LONGEST}")
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise ValueError(f"{key} {brief(text)} is no text") from None


def _fold(of: Mapping[str, Any]) -> int | None:
    if "fold" in of:
        return _whole("fold", of["fold"])
    name = of.get("split")
    if name is None or name == "":
        return None
    if str(name).strip().lower() not in SPLITS:
        raise ValueError(f"split {brief(name)} is none of train, val (valid, dev) and test (eval)")
    return SPLITS[str(name).strip().lower()]


def _seconds(used: Mapping[str, str], of: Mapping[str, Any], use: str) -> float | None:
    value = of.get(use)
    if value is None or value == "":
        return None
    try:
        seconds = float(str(value))
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < math.inf:
        raise ValueError(f"{used[use]} {brief(value)} is not a number of seconds")
    return seconds


def _whole(name: str, value: object) -> int | None:
    if value is None or value == "":
        return None
    text = "" if isinstance(value, dict | list) else str(value).strip().removesuffix(".0")  # spreadsheets: 1.0
    if not text.isdecimal():
        raise ValueError(f"{name} {brief(value)} is not a whole number")
    if len(text) > 19 or int(text) >= 2**63:  # what a file can be long, and a tensor can hold
        raise ValueError(f"{name} {brief(value)} is too large")
    return int(text)


def _ask_about_separators(file: Path, rows: Any) -> None:
    """`a,rain` in one cell is two labels more often than one with a comma in its name; only the user knows."""
    known = {label for row in rows for label in row.labels}
    for label in sorted(known):
        parts = [part.strip() for part in re.split(r"[,|]", label)]
        if len(parts) > 1 and (_WRONG.search(label) or any(part in known for part in parts)):
            mark = "|" if "|" in label else ","
            raise UserError(
                f"{file}: label {label[:80]!r}: one label, or several? data.separator='{mark}' splits it, "
                "data.separator=';' keeps it whole"
            )


def _read(file: Path) -> tuple[list[str], list[tuple[int, Mapping[str, Any]]]]:
    """The names of the columns, and the rows, each with the number of the line that it ends on."""
    if file.suffix.lower() not in _ENDINGS:
        raise UserError(f"{file}: a table of recordings ends in {', '.join(_ENDINGS)}")
    read: Callable[[TextIO], Iterator[tuple[int, Mapping[str, Any]]]]
    read = _json_rows if file.suffix.lower() == ".jsonl" else _csv_rows
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:  # -sig: spreadsheets write a byte order mark
            rows = list(read(lines))
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise UserError(f"{file}: {str(error)[:200]}") from None
    return list(dict.fromkeys(name for _, row in rows for name in row)), rows


def _csv_rows(lines: TextIO) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Separated by what the header has most of: commas, semicolons (where commas are decimal points) or tabs."""
    header = lines.readline()
    lines.seek(0)
    reader = csv.DictReader(lines, delimiter=max(",;\t", key=header.count), strict=True)
    for row in reader:
        if None in row:
            raise ValueError(f"line {reader.line_num}: more cells than columns")
        yield reader.line_num, row


def _json_rows(lines: TextIO) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number}: not JSON ({error})") from None
        if row is not None and not isinstance(row, dict):
            raise ValueError(f"line {number}: not a JSON object")
        if row:
            yield number, row
