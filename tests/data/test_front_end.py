"""The front end: from audio to the batch that an objective gets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssl_c2f.core import draws
from ssl_c2f.curriculum.compress import pool_time
from ssl_c2f.curriculum.geometry import AudioOptions, Compression, Geometry, make_geometry
from ssl_c2f.curriculum.phases import Masking
from ssl_c2f.data.augment import AugmentOptions, mixup_share, spec_augment
from ssl_c2f.data.front_end import Batch, FrontEnd, Items, Statistics
from ssl_c2f.data.masks import num_masked
from ssl_c2f.models.patches import patchify

AUDIO = AudioOptions(sample_rate=8000, num_mels=16, clip_seconds=1.0)
SAMPLES = 8000
COMPRESSIONS: tuple[Compression, ...] = get_args(Compression)
each_compression = pytest.mark.parametrize("compression", COMPRESSIONS)
PLAIN = Statistics(0.0, 1.0)

lengths = st.lists(st.integers(1, SAMPLES), min_size=1, max_size=4)


def geometry(compression: Compression = "frame_shift", factor: int = 2) -> Geometry:
    return make_geometry(AUDIO, compression, (8, 4), factor, multiple=48)


def sounds(num_samples: list[int], seed: int = 0) -> Items:
    count = len(num_samples)
    audio = torch.randn(count, SAMPLES, generator=torch.Generator().manual_seed(seed))
    index = torch.arange(count) + 10 * seed
    labels = torch.nn.functional.one_hot(index % 3, 3).float()
    return Items(audio, torch.tensor(num_samples), index, draws.key(index), labels)


def alone(items: Items, clip: int) -> Items:
    rows: dict[str, Any] = {n: v[clip : clip + 1] for n, v in vars(items).items() if isinstance(v, Tensor)}
    return replace(items, **rows, partner=items.partner and alone(items.partner, clip))


@settings(max_examples=30)
@given(num_samples=lengths, compression=st.sampled_from(COMPRESSIONS), factor=st.integers(1, 4))
def test_the_input_is_the_normalised_spectrogram_of_what_is_real(
    num_samples: list[int], compression: Compression, factor: int
) -> None:
    g, items = geometry(compression, factor), sounds(num_samples)
    batch = FrontEnd(g, Statistics(-3.0, 2.0, 1.5))(items)
    assert batch.spec.shape == (len(num_samples), g.num_frames, 16)
    fbank = FrontEnd(g, PLAIN).fbank
    for clip, samples in enumerate(num_samples):
        audio = torch.zeros(1, max(samples, g.window))
        audio[:, :samples] = items.audio[clip, :samples]
        expected = fbank(audio if samples >= g.window else items.audio[clip : clip + 1, : g.window])
        if g.pool > 1:
            expected = pool_time(expected, torch.tensor([expected.shape[1]]), g.pool, g.pool_kind)  # type: ignore[arg-type]
        real = expected.shape[1]
        assert int(batch.num_frames[clip]) == real == g.frames(samples)
        torch.testing.assert_close(batch.spec[clip, :real], (expected[0] + 3) / 3, rtol=0, atol=1e-4)
        assert not batch.spec[clip, real:].any()
    assert torch.equal(batch.index, items.index) and torch.equal(batch.labels, items.labels)


@each_compression
def test_spectrograms_from_the_cache_give_the_same_batch(compression: Compression) -> None:
    g, items = geometry(compression), sounds([8000, 3000, 250, 10])
    front_end = FrontEnd(g, Statistics(-3.0, 2.0))
    again = replace(items, audio=None, log_mel=front_end.log_mel(items.audio))
    assert again.log_mel.shape == (4, g.raw_frames(SAMPLES), 16)
    torch.testing.assert_close(front_end(again).spec, front_end(items).spec)


@each_compression
@settings(max_examples=25)
@given(at=st.floats(0.1, 0.9), factor=st.integers(1, 4))
def test_a_click_lands_in_the_token_of_its_time(compression: Compression, at: float, factor: int) -> None:
    g = geometry(compression, factor)
    items = sounds([SAMPLES])
    audio = 1e-4 * items.audio
    width = 200 + 80 * factor  # a window and a frame shift, so that some frame lies within it
    start = round(at * (SAMPLES - width))
    audio[:, start : start + width] += items.audio[:, :width]
    loud = patchify(FrontEnd(g, Statistics(-30.0, 1.0))(replace(items, audio=audio)).spec, g).amax(-1).view(g.grid)
    column = int(loud.mean(0).argmax())
    first = column * g.patch_t * g.crop_step  # the samples that the token's frames see
    last = first + (g.patch_t * g.pool - 1) * g.hop + g.window
    assert start < last and start + width > first


def test_a_tone_lands_in_the_token_of_its_pitch() -> None:
    g = geometry()
    time = torch.arange(SAMPLES) / g.sample_rate
    for row, hertz in enumerate((300.0, 3000.0)):
        items = replace(sounds([SAMPLES]), audio=torch.sin(2 * torch.pi * hertz * time)[None])
        tokens = patchify(FrontEnd(g, PLAIN)(items).spec, g).mean(-1).view(g.grid)
        assert (tokens.argmax(0) == row).all()


@settings(max_examples=30)
@given(num_samples=lengths, compression=st.sampled_from(COMPRESSIONS))
def test_padding_is_flagged_by_token(num_samples: list[int], compression: Compression) -> None:
    g = geometry(compression)
    batch = FrontEnd(g, PLAIN)(sounds(num_samples))
    columns = [g.tokens_t(g.frames(n)) for n in num_samples]
    assert batch.short == (min(columns) < g.columns)
    if batch.valid is None:
        assert not batch.short
        return
    for valid, real in zip(batch.valid.view(-1, *g.grid), columns, strict=True):
        assert valid[:, :real].all() and not valid[:, real:].any()


@settings(max_examples=30)
@given(num_samples=lengths, views=st.integers(1, 2), ratio=st.floats(0.1, 0.9))
def test_masks_belong_to_clips(num_samples: list[int], views: int, ratio: float) -> None:
    g, items = geometry(), sounds(num_samples)
    front_end, masking = FrontEnd(g, PLAIN), Masking("cluster", ratio, (2, 3), views)
    batch = front_end(items, masking)
    assert len(batch.masks) == views and not front_end(items).masks
    for clip, samples in enumerate(num_samples):
        own = front_end(alone(items, clip), masking)
        for mask, single in zip(batch.masks, own.masks, strict=True):
            assert torch.equal(mask.masked[clip], single.masked[0]) and torch.equal(mask.kept[clip], single.kept[0])
            real = g.grid_f * g.tokens_t(g.frames(samples))
            assert int(mask.masked[clip].sum()) == num_masked(real, ratio)
    if views == 2 and min(num_samples) > 4000:
        assert not torch.equal(batch.masks[0].masked, batch.masks[1].masked)


# --- mixup


def test_a_mix_is_between_both_clips() -> None:
    items, partner = sounds([8000, 2000, 8000]), sounds([5000, 8000, 8000], seed=1)
    share = torch.tensor([0.7, 0.2, 1.0])
    front_end = FrontEnd(geometry(), Statistics(-3.0, 2.0))
    batch = front_end(replace(items, partner=partner, share=share))
    own, other = front_end(items), front_end(partner)
    expected = share[:, None, None] * own.spec + (1 - share)[:, None, None] * other.spec
    torch.testing.assert_close(batch.spec, expected)
    torch.testing.assert_close(batch.labels, share[:, None] * items.labels + (1 - share)[:, None] * partner.labels)
    longer = [own.num_frames[0], other.num_frames[1], own.num_frames[2]]
    assert torch.equal(batch.num_frames, torch.stack(longer))
    assert torch.equal(batch.spec[2], own.spec[2])  # one that is not mixed is not touched
    assert torch.equal(batch.index, items.index) and torch.equal(batch.keys, items.keys)
    # nor is its length its partner's
    unmixed = front_end(replace(items, partner=partner, share=torch.ones(3)))
    assert torch.equal(unmixed.num_frames, own.num_frames)


@given(key=st.integers(-(2**63), 2**63 - 1), prob=st.floats(0.0, 1.0), alpha=st.floats(0.2, 20.0))
def test_shares(key: int, prob: float, alpha: float) -> None:
    options = AugmentOptions(mixup_prob=prob, mixup_alpha=alpha)
    share = mixup_share(torch.tensor(key), options)
    assert 0 <= share <= 1 and share == mixup_share(torch.tensor(key), options)
    if prob == 0:
        assert share == 1


def test_shares_follow_beta() -> None:
    options = AugmentOptions(mixup_prob=0.3, mixup_alpha=10.0)
    shares = torch.tensor([mixup_share(draws.key(i), options) for i in range(1000)])
    mixed = shares[shares < 1]
    assert len(mixed) / 1000 == pytest.approx(0.3, abs=0.05)
    assert float(mixed.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(mixed.var()) == pytest.approx(1 / (4 * 21), rel=0.3)


# --- SpecAugment


@settings(max_examples=40)
@given(
    num_frames=st.lists(st.integers(1, 30), min_size=1, max_size=4), freq=st.integers(0, 20), time=st.integers(0, 40),
    seed=st.integers(0, 1000),
)
def test_bands_are_hidden_within_the_real_frames(num_frames: list[int], freq: int, time: int, seed: int) -> None:
    frames = torch.tensor(num_frames)
    keys = draws.key(seed, torch.arange(len(num_frames)))
    hidden = spec_augment(torch.ones(len(num_frames), 30, 16), frames, keys, freq, time) == 0
    for clip, real in zip(hidden, num_frames, strict=True):
        rows, bins = clip.all(1), clip.all(0)
        if rows.all():  # every bin is in the band
            continue
        assert torch.equal(clip, rows[:, None] | bins)
        for band, longest in ((rows, min(time, real)), (bins, min(freq, 16))):
            width = int(band.sum())
            assert width <= longest
            where = band.nonzero().flatten()
            assert not width or int(where[-1] - where[0]) == width - 1  # in one piece
        assert not rows[real:].any()


def test_bands_are_anywhere_and_of_any_width() -> None:
    keys = draws.key(torch.arange(20000))
    hidden = spec_augment(torch.ones(20000, 20, 16), torch.full((20000,), 20), keys, 8, 5) == 0
    for band, longest in ((hidden.all(2), 5), (hidden.all(1), 8)):
        widths = band.sum(1).bincount(minlength=longest + 1) / 20000
        assert len(widths) == longest + 1
        assert widths.min() > 0.8 / (longest + 1)
        share = band.float().mean(0)
        assert share.min() > 0.04 and (share - share.flip(0)).abs().max() < 0.02


@pytest.mark.parametrize("factor", [1, 4])
def test_the_hidden_stretch_lasts_as_long_in_every_phase(factor: int) -> None:
    g, items = geometry("pool_mean", factor), sounds([SAMPLES] * 100)
    front_end = FrontEnd(g, Statistics(-30.0, 1.0))  # so that nothing is 0 by itself
    options = AugmentOptions(time_mask_seconds=0.32)
    batch: Batch = front_end(items, None, options)
    longest = int((batch.spec[:, : g.frames(SAMPLES)] == 0).all(2).sum(1).max())
    assert longest * g.pool * g.hop / g.sample_rate == pytest.approx(0.32)
    assert torch.equal(front_end(items, None, AugmentOptions()).spec, front_end(items).spec)
    again = front_end(alone(items, 7), None, options).spec[0]
    torch.testing.assert_close(again, batch.spec[7])


@each_compression
@pytest.mark.parametrize("factor", [1, 2, 4])
def test_a_block_in_seconds_lasts_as_long_in_every_phase(compression: Compression, factor: int) -> None:
    """0.32 s are 8 tokens of 40 ms; blocks that are given in tokens last four times as long in the coarsest phase."""
    g = geometry(compression, factor)
    masking = Masking("cluster", 8 // factor / g.num_tokens, (1, 1), seconds=(0.32, 0.32))
    masked = FrontEnd(g, PLAIN)(sounds([SAMPLES] * 4), masking).masks[0].masked.view(-1, *g.grid)
    assert masked.any(1).sum(1).tolist() == [8 // factor] * 4
    assert masked.any(2).sum(1).tolist() == [1] * 4
    assert g.tokens_in(0.32) == 8 // factor and g.tokens_in(1e-6) == 1


def test_items_move_with_their_partners() -> None:
    items = replace(sounds([100]), partner=sounds([100], seed=1), share=torch.tensor([0.5]), bad=(("a", "b"),))
    moved = items.to(torch.device("meta"))
    assert moved.partner is not None and moved.share is not None
    assert {moved.audio.device.type, moved.share.device.type, moved.partner.labels.device.type} == {"meta"}
    assert moved.bad == items.bad
