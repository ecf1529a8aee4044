"""Random numbers that depend on a key alone.

A number is a hash of integers (seed, epoch, clip index, view, purpose), so it is the same whichever process, worker or
device computes it, in whatever order, and after any interruption. The hash is the finaliser of SplitMix64 (Steele, Lea,
Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), computed in wrapping int64 arithmetic on tensors.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

_GOLDEN = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
_MIX_2 = -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's own is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def _mix_integer(x: int) -> int:
    """`_mix` of a Python integer: ten times as fast as with a tensor of one number."""
    x %= 2**64
    x = (x ^ (x >> 30)) * _MIX_1 % 2**64
    x = (x ^ (x >> 27)) * _MIX_2 % 2**64
    x ^= x >> 31
    return x - 2**64 if x >> 63 else x


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # compilation would stop at zlib
def _number(name: str) -> int:
    return zlib.crc32(name.encode())


def _hash(*parts: int | str | Tensor) -> int:
    state = 0
    for part in parts:
        state = _mix_integer(state * 31 + (_number(part) if isinstance(part, str) else int(part)) + _GOLDEN)
    return state


def key(*parts: int | str | Tensor) -> Tensor:
    """Hash integers, names and int64 tensors (broadcast against each other) into int64 keys of their common shape.

    >>> key(0, torch.arange(4), "mask").shape
    torch.Size([4])
    """
    tensors = [i for i, part in enumerate(parts) if isinstance(part, Tensor)]
    if not tensors:
        return torch.tensor(_hash(*parts), dtype=torch.int64)
    first = parts[tensors[0]]
    state = torch.full((), _hash(*parts[: tensors[0]]), dtype=torch.int64, device=first.device)  # type: ignore[union-attr]
    for part in parts[tensors[0] :]:
        state = _mix(state * 31 + (_number(part) if isinstance(part, str) else part) + _GOLDEN)
    return state


def uniform(keys: Tensor, n: int) -> Tensor:
    """`n` independent float32 draws in [0, 1) for each key: (...,) int64 -> (..., n)."""
    counter = torch.arange(1, n + 1, device=keys.device, dtype=torch.int64) * _GOLDEN
    bits = _shift(_mix(keys[..., None] + counter), 40)  # the 24 bits that a float32 holds exactly
    return bits.to(torch.float32) * 2.0**-24


def integers(keys: Tensor, high: Tensor | int) -> Tensor:
    """One integer in [0, high) for each key; `high` may be a tensor of the keys' shape.

    Take another key than for `uniform`: both read the same bits.
    """
    bits = _shift(_mix(keys + _GOLDEN), 33)  # 31 bits: the modulo bias is below high / 2^31
    return bits % high


def integer(high: int, *parts: int | str | Tensor) -> int:
    """`integers(key(*parts), high)` of numbers, which need no tensors: in a tenth of the time."""
    return (_mix_integer(_hash(*parts) + _GOLDEN) % 2**64 >> 33) % high


def seed(*parts: int | str) -> int:
    """A non-negative 63-bit seed for a generator that wants one number."""
    return _hash(*parts) & 0x7FFFFFFFFFFFFFFF
