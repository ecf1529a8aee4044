"""Pooling along time: which frames are pooled into which cell."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_c2f.curriculum.compress import pool_time

Kind = Literal["mean", "max"]
kinds = pytest.mark.parametrize("kind", ["mean", "max"])


@kinds
@settings(max_examples=50, deadline=None)
@given(time=st.integers(1, 20), kernel=st.integers(1, 8), mels=st.integers(1, 3), data=st.data())
def test_each_cell_pools_its_real_frames(kind: Kind, time: int, kernel: int, mels: int, data: st.DataObject) -> None:
    real = data.draw(st.lists(st.integers(1, time), min_size=1, max_size=3))
    spec = torch.randn(len(real), time, mels)
    pooled = pool_time(spec, torch.tensor(real), kernel, kind)
    assert pooled.shape == (len(real), math.ceil(time / kernel), mels)
    for clip, result, end in zip(spec, pooled, real, strict=True):
        for cell, start in zip(result, range(0, time, kernel), strict=True):
            frames = clip[start : min(start + kernel, end)]
            expected = torch.zeros(mels) if len(frames) == 0 else frames.mean(0) if kind == "mean" else frames.amax(0)
            torch.testing.assert_close(cell, expected)


@kinds
def test_padding_changes_nothing(kind: Kind) -> None:
    spec = -1 - torch.rand(1, 8, 2)  # below 0, so that padding with zeros would win a maximum
    dirty = torch.cat((spec[:, :5], torch.full((1, 9, 2), torch.nan)), dim=1)
    clean = pool_time(spec[:, :5], torch.tensor([5]), 4, kind)
    padded = pool_time(dirty, torch.tensor([5]), 4, kind)
    torch.testing.assert_close(padded, torch.cat((clean, torch.zeros(1, 2, 2)), dim=1))


def test_ramp() -> None:
    ramp = torch.arange(12.0).view(1, 6, 2)  # frame t, bin f holds 2 t + f
    assert pool_time(ramp, torch.tensor([5]), 2, "mean").tolist() == [[[1, 2], [5, 6], [8, 9]]]
    assert pool_time(ramp, torch.tensor([5]), 2, "max").tolist() == [[[2, 3], [6, 7], [8, 9]]]


@kinds
def test_a_kernel_of_one_is_the_identity(kind: Kind) -> None:
    spec = torch.randn(2, 7, 3)
    assert torch.equal(pool_time(spec, torch.tensor([7, 7]), 1, kind), spec)
