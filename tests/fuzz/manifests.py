"""Manifests that are damaged, lying or extreme: 200 of them from one seed."""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Draw = random.Random
RECORDINGS = ("a.wav", "b.wav", "sub/c.wav")  # what lies beside the manifest
VALUES: tuple[Any, ...] = (
    None, "", " ", "x", "x" * 5000, -1, 0, 1, 0.5, 1e308, 10**18, 10**400, True, [], ["dog"], [1], {}, {"a": [{}]},
    "../x.wav", "/etc/passwd", "a.wav\0", "a\nb", "\udcff", "\ud800", "=1+1", "<b>", "٣", "²", "1e3", "n" * 300,
    "a.wav", "sub", "sub/../a.wav", "fifo", "link", "loop", ".",
)
KEYS = ("path", "label", "labels", "fold", "num_samples", "sample_rate", "channels", "shard", "offset", "size", "odd")


@dataclass(frozen=True)
class Hostile:
    name: str
    data: bytes


def files(count: int, seed: int = 0) -> Iterator[Hostile]:
    """The first `count` manifests; every kind comes again and again, with other draws."""
    for i in range(count):
        draw = Draw(f"{seed} {i}")
        kind = KINDS[i % len(KINDS)]
        ending, data = kind(draw)
        yield Hostile(f"{i:03}-{kind.__name__}.{ending}", data)


def rows() -> list[dict[str, Any]]:
    return [{"path": path, "label": "dog" if i else "cat", "fold": i + 1} for i, path in enumerate(RECORDINGS)]


def as_jsonl(listed: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in listed).encode()


def as_csv(listed: list[dict[str, Any]]) -> bytes:
    table = io.StringIO()
    writer = csv.DictWriter(table, list(dict.fromkeys(key for row in listed for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(listed)
    return table.getvalue().encode("utf-8", "surrogatepass")


Made = tuple[str, bytes]


def value_in_json(draw: Draw) -> Made:
    listed = rows()
    listed[draw.randrange(3)][draw.choice(KEYS)] = draw.choice(VALUES)
    return "jsonl", as_jsonl(listed)


def value_in_csv(draw: Draw) -> Made:
    listed = rows()
    listed[draw.randrange(3)][draw.choice(KEYS)] = draw.choice(VALUES)
    return "csv", as_csv(listed)


def length(draw: Draw) -> Made:
    """The audio's facts, which spare a look at its header, are lies."""
    listed = rows()
    facts = {key: draw.choice((0, 1, 7, 100, 8000, 10**6, 10**9, 10**18)) for key in KEYS[4:7]}
    listed[draw.randrange(3)] |= facts
    return draw.choice((("jsonl", as_jsonl(listed)), ("csv", as_csv(listed))))


def shard(draw: Draw) -> Made:
    """Shards that are none, and places in them that are not there."""
    listed = rows()
    place: dict[str, Any] = {key: draw.choice((0, 1, -1, 44, 512, 10**6, 10**18)) for key in ("offset", "size")}
    place["shard"] = draw.choice(("a.wav", "no.tar", "sub", "fifo", "../x", 5, ["a"], "."))
    listed[draw.randrange(3)] |= place
    return "jsonl", as_jsonl(listed)


def deep(draw: Draw) -> Made:
    depth = draw.choice((10, 900, 5000, 200_000))
    inner = "[" * depth + "]" * depth if draw.random() < 0.5 else '{"a":' * depth + "1" + "}" * depth
    return "jsonl", f'{{"path": "a.wav"}}\n{{"path": "b.wav", "{draw.choice(KEYS[1:])}": {inner}}}\n'.encode()


def large(draw: Draw) -> Made:
    """A label of 10 MB, and 10,000 labels."""
    listed = rows()
    listed[0]["label"] = draw.choice(("l" * 10**7, ";".join(f"label {i}" for i in range(10_000)), "é" * 10**6))
    listed[1]["path"] = draw.choice(("b.wav", "p" * 10**6))
    return draw.choice((("jsonl", as_jsonl(listed)), ("csv", as_csv(listed))))


def flipped(draw: Draw) -> Made:
    ending, whole = draw.choice((("jsonl", as_jsonl(rows())), ("csv", as_csv(rows()))))
    data = bytearray(whole)
    for _ in range(draw.choice((1, 4, 30))):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return ending, bytes(data)


def cut(draw: Draw) -> Made:
    ending, data = draw.choice((("jsonl", as_jsonl(rows())), ("csv", as_csv(rows()))))
    return ending, data[: draw.randrange(len(data))] + draw.choice((b"", b'"', b"\r", b"\0\0\0\0", b"\xff\xfe"))


def form(draw: Draw) -> Made:
    """Other encodings, orders, and line ends; twice the same; nothing; no text."""
    text, listed = as_csv(rows()).decode(), rows()
    return draw.choice((
        ("csv", text.encode("utf-16")), ("csv", b"\xef\xbb\xbf" + text.encode()),
        ("csv", text.replace("\n", "\r").encode()), ("csv", text.replace(",", ";").encode()),
        ("csv", text.encode() * 2), ("csv", b""), ("csv", b"path\n"),
        ("csv", b"path,path\na.wav,b.wav\n"), ("csv", b",\n,\n"), ("csv", draw.randbytes(500)),
        ("csv", b"path\n\"a.wav"), ("jsonl", b"[]\n"), ("jsonl", b"1\n"), ("jsonl", b"null\n"),
        ("jsonl", draw.randbytes(500)),
        ("jsonl", b"\n\n\n"), ("jsonl", as_jsonl(listed + listed)), ("jsonl", json.dumps(listed).encode()),
        ("txt", text.encode()),
        ("jsonl", b'{"path": "a.wav", "path": "b.wav"}\n'), ("jsonl", b'{"path": "a.wav", "fold": NaN}\n'),
    ))


KINDS: tuple[Callable[[Draw], Made], ...] = (
    value_in_json, value_in_csv, length, shard, deep, large, flipped, cut, form, value_in_json, value_in_csv, length,
)
