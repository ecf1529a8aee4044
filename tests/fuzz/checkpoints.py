"""Checkpoints whose state or tensors are damaged, lying or extreme: 300 of them from one seed and a good one."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

Draw = random.Random
Files = dict[str, bytes]  # name -> content of a checkpoint's folder
VALUES: tuple[Any, ...] = (
    None, "", "x", "x" * 5000, -1, 0, 1, 3, 0.5, 1e308, float("nan"), float("inf"), 10**9, 10**18, 10**400, True, [],
    [1, 2], ["a"], {}, {"a": {}}, [[[]]], "../../x", "\udcff", "<script>",
)
LARGE = (10**6, 10**9, 10**18, 2**63)


@dataclass(frozen=True)
class Hostile:
    name: str
    files: Files


def folders(good: Files, count: int, seed: int = 0) -> Iterator[Hostile]:
    """The first `count` checkpoints; every kind comes again and again, with other draws."""
    for i in range(count):
        draw = Draw(f"{seed} {i}")
        kind = KINDS[i % len(KINDS)]
        files = dict(good)
        if kind not in (bits, cut, gone):  # from elsewhere, or of before there were checksums
            del files["checksums.json"]
        yield Hostile(f"{i:03}-{kind.__name__}", kind(draw, files))


def leaves(tree: Any, place: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The place of everything in a tree of JSON, containers too."""
    if place:
        yield place
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from leaves(value, (*place, key))


def _changed(files: Files, draw: Draw, change: Callable[[Any, Any], None], where: str = "") -> Files:
    """With `change(container, key)` done to one of the state's places that begin with `where`."""
    state = json.loads(files["state.json"])
    place = draw.choice([place for place in leaves(state) if not where or place[0] == where])
    holder = state
    for key in place[:-1]:
        holder = holder[key]
    change(holder, place[-1])
    return files | {"state.json": json.dumps(state).encode()}


def value(draw: Draw, files: Files) -> Files:
    return _changed(files, draw, lambda holder, key: holder.__setitem__(key, copy.deepcopy(draw.choice(VALUES))))


def large_number(draw: Draw, files: Files) -> Files:
    """A number of the geometry or of the options that would fill the memory."""
    state = json.loads(files["state.json"])
    numbers = [p for p in leaves(state) if p[0] in ("geometry", "options") and type(_at(state, p)) is int]
    place = draw.choice(numbers)
    _at(state, place[:-1])[place[-1]] = draw.choice(LARGE)
    return files | {"state.json": json.dumps(state).encode()}


def statistics(draw: Draw, files: Files) -> Files:
    """Mean and deviation that nothing can be divided by."""
    state = json.loads(files["state.json"])
    chosen = draw.choice([*state["statistics"].values()])
    chosen[draw.choice(("mean", "std", "factor"))] = draw.choice((float("nan"), float("inf"), 0.0, -1.0, 1e308, 1e-308))
    return files | {"state.json": json.dumps(state).encode()}


def missing(draw: Draw, files: Files) -> Files:
    return _changed(files, draw, lambda holder, key: holder.pop(key))


def added(draw: Draw, files: Files) -> Files:
    def add(holder: Any, key: Any) -> None:
        holder.insert(0, "more") if isinstance(holder, list) else holder.__setitem__("more", 1)

    return _changed(files, draw, add)


def state_bytes(draw: Draw, files: Files) -> Files:
    data = bytearray(files["state.json"])
    for _ in range(draw.choice((1, 5))):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    other = draw.choice((b"", b"{}", b"[]", b"null", b"\xff\xfe", b"[" * 10**5, bytes(data), bytes(data), bytes(data)))
    return files | {"state.json": other}


def tensor(draw: Draw, files: Files) -> Files:
    """One tensor is not what it was: numbers that are none, another shape or type, gone."""
    tensors = safetensors.torch.load(files["model.safetensors"])
    name = draw.choice(sorted(tensors))
    old = tensors.pop(name)
    new: Tensor | None = draw.choice(tensors_like)(old)
    tensors |= {} if new is None else {name: new}
    return files | {"model.safetensors": safetensors.torch.save(tensors)}


def _with_one(old: Tensor, value: float) -> Tensor:
    new = old.clone().float().flatten()
    new[:1] = value
    return new.view(old.shape)


tensors_like: tuple[Callable[[Tensor], Tensor | None], ...] = (
    lambda old: None, lambda old: _with_one(old, float("nan")), lambda old: _with_one(old, float("inf")),
    lambda old: torch.full_like(old, float("nan")), lambda old: old[:0].clone(), lambda old: old.flatten().clone(),
    lambda old: old[None].clone(), lambda old: old.to(torch.float16), lambda old: old.to(torch.int64),
    lambda old: torch.full_like(old, 3e38), lambda old: torch.zeros(3, 5, 7),
)


def more_tensors(draw: Draw, files: Files) -> Files:
    tensors = safetensors.torch.load(files["model.safetensors"])
    tensors[draw.choice(("more", "a/../b"))] = torch.ones(2)
    return files | {"model.safetensors": safetensors.torch.save(tensors)}


def tensor_header(draw: Draw, files: Files) -> Files:
    """The head of the safetensors file: its length, a name, a shape, an offset."""
    data = files["model.safetensors"]
    size = struct.unpack("<Q", data[:8])[0]
    head = bytearray(data[8 : 8 + size])
    if draw.random() < 0.3:
        return files | {"model.safetensors": struct.pack("<Q", draw.choice((0, 1, size - 1, 10**9, 2**63))) + data[8:]}
    digits = [i for i, byte in enumerate(head) if chr(byte).isdigit()]
    head[draw.choice(digits)] = ord(draw.choice("0123456789-"))
    return files | {"model.safetensors": data[:8] + bytes(head) + data[8 + size :]}


def bits(draw: Draw, files: Files) -> Files:
    name = draw.choice(sorted(files))
    data = bytearray(files[name])
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return files | {name: bytes(data)}


def cut(draw: Draw, files: Files) -> Files:
    name = draw.choice(sorted(files))
    return files | {name: files[name][: draw.randrange(len(files[name]))]}


def gone(draw: Draw, files: Files) -> Files:
    files.pop(draw.choice(sorted(files)))
    return files


def _at(tree: Any, place: tuple[str | int, ...]) -> Any:
    for key in place:
        tree = tree[key]
    return tree


KINDS: tuple[Callable[[Draw, Files], Files], ...] = (
    value, large_number, statistics, missing, added, state_bytes, tensor, more_tensors, tensor_header, bits, cut, gone,
    value, large_number, tensor,
)
