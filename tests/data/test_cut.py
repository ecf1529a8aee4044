"""Views of clips: where their frames and mel bins come from, and that they depend on their clip alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from batches import GEOMETRY, sounds
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssl_c2f.core import draws
from ssl_c2f.curriculum.phases import Masking
from ssl_c2f.data.augment import AugmentOptions
from ssl_c2f.data.front_end import FrontEnd, Statistics
from ssl_c2f.data.views import colour, cut, mix

STRONG = AugmentOptions(
    time_stretch=(0.7, 1.4), mel_stretch=(0.8, 1.1), mel_shift=0.1, gain_db=6, tilt_db=3, mix_prob=1.0
)
MASKING = Masking("uniform", 0.5, (1, 2), num_masks=2, view_seconds=0.25)


def ramp(frames: int, mels: int, along: str) -> Tensor:
    """(1, T, F) whose values are the numbers of the frames, or of the mel bins."""
    values = torch.arange(float(frames))[:, None] if along == "time" else torch.arange(float(mels))[None]
    return values.expand(frames, mels)[None]


def keys(count: int, name: str = "a") -> Tensor:
    return draws.key(name, torch.arange(count))


def test_without_changes_a_view_of_the_whole_clip_is_the_clip() -> None:
    spec = torch.randn(3, 20, 8)
    view, frames = cut(spec, torch.full((3,), 20), keys(3), 20, AugmentOptions())
    torch.testing.assert_close(view, spec)
    assert frames.tolist() == [20, 20, 20]


@settings(max_examples=20)
@given(st.integers(1, 60), st.integers(5, 40))
def test_a_view_is_a_stretch_of_the_real_frames_at_a_rate_within_bounds(real: int, size: int) -> None:
    """Behind the clip's end stands another value, which no view may have seen."""
    clips = 64
    spec = ramp(80, 8, "time").repeat(clips, 1, 1)
    spec[:, real:] = 1e3
    o = AugmentOptions(time_stretch=(0.7, 1.4))
    view, frames = cut(spec, torch.full((clips,), real), keys(clips), size, o)
    assert frames.min() >= 1 and frames.max() <= size
    for row, length in zip(view[:, :, 3], frames.tolist(), strict=True):
        assert row[:length].max() <= real - 1 + 1e-2 and (row[length:] == 0).all()
        inside = row[:length][(row[:length] > 0.01) & (row[:length] < real - 1.01)]
        if len(inside) > 1:
            rate = inside.diff()
            assert rate.min() >= 0.7 - 1e-3 and rate.max() <= 1.4 + 1e-3 and rate.max() - rate.min() < 1e-2
    if real >= 1.4 * size:
        assert (frames == size).all()
    assert (frames * 1.4 + 1.4 >= min(real, 0.7 * size)).all()  # no more is left out than must be


def test_stretches_fill_their_range_and_places_the_clip() -> None:
    spec = ramp(100, 8, "time").repeat(2000, 1, 1)
    view, _ = cut(spec, torch.full((2000,), 100), keys(2000), 40, AugmentOptions(time_stretch=(0.7, 1.4)))
    rate = view[:, 20, 0] - view[:, 19, 0]
    assert rate.min() < 0.72 and rate.max() > 1.38 and abs(float(rate.mean()) - 1.05) < 0.02
    assert view[:, 1, 0].min() < 2 and view[:, -2, 0].max() > 96


def test_the_mel_range_is_stretched_and_shifted_within_bounds() -> None:
    spec = ramp(10, 64, "mel").repeat(500, 1, 1)
    o = AugmentOptions(mel_stretch=(0.8, 0.9), mel_shift=0.05)
    view, _ = cut(spec, torch.full((500,), 10), keys(500), 10, o)
    slope, middle = view[:, 5, 33] - view[:, 5, 32], view[:, 5, 31:33].mean(1)
    assert 0.8 - 1e-3 <= slope.min() < 0.81 and 0.89 < slope.max() <= 0.9 + 1e-3
    assert (middle - 31.5).abs().max() <= 0.05 * 64 + 1e-3 and (middle - 31.5).abs().max() > 0.045 * 64


def test_gain_and_tilt_have_the_deviations_asked_for() -> None:
    nats = 10 / torch.log(torch.tensor(10.0))
    added = colour(keys(20000), 9, AugmentOptions(gain_db=6, tilt_db=3))[:, 0] * nats
    torch.testing.assert_close(added.mean(1).std(), torch.tensor(6.0), rtol=0.05, atol=0)
    torch.testing.assert_close(((added[:, -1] - added[:, 0]) / 2).std(), torch.tensor(3.0), rtol=0.05, atol=0)


def test_power_is_mixed_by_shares() -> None:
    a, b = torch.rand(2, 5, 3) + 0.1, torch.rand(2, 5, 3) + 0.1  # power
    std, share = 2.5, torch.tensor([0.3, 0.0])
    mixed = (mix(a.log() / std, torch.tensor([5, 5]), b.log() / std, torch.tensor([5, 5]), share, std) * std).exp()
    torch.testing.assert_close(mixed, torch.stack([0.7 * a[0] + 0.3 * b[0], a[1]]))
    short = (mix(a.log() / std, torch.tensor([5, 4]), b.log() / std, torch.tensor([2, 5]), share, std) * std).exp()
    torch.testing.assert_close(short[0, 2:], 0.7 * a[0, 2:])
    assert short[1, 4].eq(1).all() and not mixed[1, 4].eq(1).any()  # behind both ends


def views_of(items: Any, masking: Masking = MASKING) -> Any:
    front_end = FrontEnd(GEOMETRY, Statistics(0.0, 4.0))
    partner = sounds([len(items.index) * [4000]][0], seed=1)
    object.__setattr__(items, "partner", partner)
    return front_end(items, masking, STRONG)


def test_views_of_a_clip_differ_and_are_the_same_again() -> None:
    one, again = views_of(sounds([8000, 3000])), views_of(sounds([8000, 3000]))
    assert torch.equal(one.spec, again.spec) and torch.equal(one.masks[1].kept, again.masks[1].kept)
    assert not torch.equal(one.spec[:2], one.spec[2:]) and one.spec.shape == (4, one.geometry.num_frames, 16)
    other = views_of(sounds([8000, 3000], seed=2))
    assert not torch.equal(other.masks[0].kept, one.masks[0].kept)


def test_one_view_in_place_of_a_clip_is_augmentation() -> None:
    """Without masks of views, every clip is changed in one way; another clip in the background brings no label."""
    front_end, items = FrontEnd(GEOMETRY, Statistics(0.0, 4.0)), sounds([8000, 3000])
    object.__setattr__(items, "partner", sounds([8000, 8000], seed=1))
    plain = front_end(items)
    assert torch.equal(plain.spec, front_end(items, None, AugmentOptions()).spec)
    loud = front_end(items, None, AugmentOptions(gain_db=6))
    apart = (loud.spec - plain.spec)[:, :3]
    torch.testing.assert_close(apart, apart[:, :1, :1].expand_as(apart))
    assert apart[0, 0, 0] != apart[1, 0, 0] and (loud.spec[plain.spec == 0] == 0).all()
    mixed = front_end(items, None, AugmentOptions(mix_prob=1.0))
    assert torch.equal(mixed.labels, items.labels) and torch.equal(mixed.num_frames, plain.num_frames)
    assert not torch.allclose(mixed.spec, plain.spec) and (mixed.spec[plain.spec == 0] == 0).all()
    turned = front_end(items, None, AugmentOptions(time_shift=True))
    for a, b, n in zip(turned.spec, plain.spec, plain.num_frames.tolist(), strict=True):
        assert any(torch.equal(a[:n], b[:n].roll(-k, 0)) for k in range(n)) and torch.equal(a[n:], b[n:])


def test_a_background_is_in_one_view_at_most() -> None:
    from ssl_c2f.data.front_end import _background

    share = _background(keys(1000), 3, AugmentOptions(mix_prob=0.6)).view(3, 1000)
    assert ((share > 0).sum(0) <= 1).all() and 0.55 < (share > 0).any(0).float().mean() < 0.65
    assert share.max() <= 0.4


@pytest.mark.parametrize("view", [0, 1])
def test_what_a_view_keeps_may_have_a_shape_of_its_own(view: int) -> None:
    masking = Masking("uniform", 0.5, (1, 1), num_masks=2, view_seconds=0.25, shapes=("time", "frequency"))
    batch = views_of(sounds([8000, 8000]), masking)
    g = batch.geometry
    masked = batch.masks[view].masked.view(2, g.grid_f, g.columns).float()
    part = masked.mean(1 if view == 0 else 2)
    assert ((part == 0) | (part == 1)).float().mean() > 0.6  # whole columns in one, whole rows in the other
