"""Geometries: their sizes agree with each other and with the output of the filterbank."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ssl_c2f.curriculum.compress import pool_time
from ssl_c2f.curriculum.geometry import (
    AudioOptions,
    Compression,
    Geometry,
    make_geometries,
    make_geometry,
    other_frequencies,
)
from ssl_c2f.data.spectrogram import Fbank

COMPRESSIONS: tuple[Compression, ...] = get_args(Compression)
each_compression = pytest.mark.parametrize("compression", COMPRESSIONS)

audios = st.builds(
    AudioOptions,
    sample_rate=st.sampled_from([8000, 16000, 22050]),
    clip_seconds=st.floats(0.1, 2.0),
    num_mels=st.sampled_from([16, 48]),
    hop_ms=st.sampled_from([5.0, 10.0, 12.5]),
    window_ms=st.sampled_from([10.0, 25.0]),
    window=st.sampled_from(["fixed", "grow"]),
)
factors = st.integers(1, 6)
patches = st.tuples(st.sampled_from([4, 8, 16]), st.integers(1, 9))
phases = st.lists(st.tuples(factors, st.none() | patches), min_size=1, max_size=4)


def fine_frames(g: Geometry) -> int:
    """Fine frames that the grid covers."""
    hop = g.unit_samples
    return g.grid_t * g.patch_t * g.pool * g.hop // hop


@given(audio=audios, compression=st.sampled_from(COMPRESSIONS), patch=patches, phases=phases)
def test_all_phases_cover_the_same_span(
    audio: AudioOptions, compression: Compression, patch: tuple[int, int],
    phases: list[tuple[int, tuple[int, int] | None]],
) -> None:
    geometries = make_geometries(audio, compression, patch, [*phases, (1, None)])
    first = geometries[0]
    for g in geometries:
        assert g.grid_t * g.patch_t == g.num_frames
        assert g.grid_f * g.patch_f == g.num_mels
        assert g.num_frames * g.pool * g.hop == first.num_frames * first.pool * first.hop  # samples
        rows, columns = (p.double() for p in g.positions())
        assert (len(rows), len(columns)) == (g.grid_f, g.grid_t)
        # the middle and the edges of the grid, in the unit of positions
        for places, others in zip((rows, columns), first.positions(), strict=True):
            edges, other = (float(x[0] + x[-1]) for x in (places, others.double()))
            assert edges == pytest.approx(other, abs=1e-3)
            step = float(places[1] - places[0]) if len(places) > 1 else None
            if step:
                assert len(places) * step == pytest.approx(float(places[-1] - places[0]) + step, rel=1e-4)
        assert 1 <= g.columns <= g.grid_t  # no real frame is lost
        assert g.frames(g.clip_samples) <= g.num_frames
        assert g.num_tokens == math.prod(g.grid)
    # no more padding than the common multiple asks for
    fine = geometries[-1]
    step = math.lcm(patch[1], *((own or patch)[1] * factor for factor, own in phases))
    assert fine.num_frames - fine.frames(fine.clip_samples) < step


@given(audio=audios, compression=st.sampled_from(COMPRESSIONS), patch=patches, factor=factors)
def test_column_j_stands_in_the_middle_of_the_fine_columns_that_it_covers(
    audio: AudioOptions, compression: Compression, patch: tuple[int, int], factor: int
) -> None:
    coarse, fine = make_geometries(audio, compression, patch, [(factor, None), (1, None)])
    columns = coarse.positions()[1]
    assert columns.tolist() == [factor * j + (factor - 1) / 2 for j in range(coarse.grid_t)]
    assert torch.equal(columns, fine.positions()[1].view(-1, factor).mean(1))
    assert torch.equal(coarse.positions()[0], torch.arange(float(coarse.grid_f)))


@given(audio=audios, compression=st.sampled_from(COMPRESSIONS), times=st.integers(1, 3), factor=factors)
def test_wider_patches_stand_in_the_middle_of_the_patches_that_they_cover(
    audio: AudioOptions, compression: Compression, times: int, factor: int
) -> None:
    wide, fine = make_geometries(audio, compression, (4, 3), [(factor, (8, 3 * times)), (1, None)])
    for places, covered in zip(wide.positions(), fine.positions(), strict=True):
        torch.testing.assert_close(places, covered.view(len(places), -1).mean(1))


@settings(max_examples=60)
@given(
    audio=audios, compression=st.sampled_from(COMPRESSIONS), patch=patches, factor=factors,
    lengths=st.lists(st.integers(1, 30000), min_size=1, max_size=3),
)
def test_real_frames_are_those_that_the_filterbank_makes(
    audio: AudioOptions, compression: Compression, patch: tuple[int, int], factor: int, lengths: list[int]
) -> None:
    g = make_geometry(audio, compression, patch, factor)
    fbank = Fbank(g.sample_rate, g.hop, g.window, 4, g.f_min, g.f_max)
    for samples in lengths:
        spec = fbank(torch.zeros(1, max(samples, g.window)))  # shorter recordings are padded to one window
        assert spec.shape[1] == g.raw_frames(samples)
        if g.pool > 1:
            spec = pool_time(spec, torch.tensor([spec.shape[1]]), g.pool, "mean")
        assert spec.shape[1] == g.frames(samples)
        assert g.tokens_t(g.frames(samples)) == math.ceil(spec.shape[1] / g.patch_t)
    batch = torch.tensor(lengths)
    assert g.frames(batch).tolist() == [g.frames(n) for n in lengths]
    assert g.tokens_t(g.frames(batch)).tolist() == [g.tokens_t(g.frames(n)) for n in lengths]


@given(audio=audios, patch=patches, factor=factors, samples=st.integers(1, 30000))
def test_compressions_agree_on_which_columns_are_real(
    audio: AudioOptions, patch: tuple[int, int], factor: int, samples: int
) -> None:
    assume(audio.window == "fixed")
    fine = make_geometry(audio, "patch", patch)
    columns = math.ceil(fine.frames(samples) / (patch[1] * factor))
    for compression in COMPRESSIONS:
        g = make_geometry(audio, compression, patch, factor)
        assert g.tokens_t(g.frames(samples)) == columns


@pytest.mark.parametrize(
    ("compression", "hop", "pool", "kind", "patch_t", "frames"),
    [
        ("frame_shift", 640, 1, "none", 16, 256),
        ("pool_mean", 160, 4, "mean", 16, 256),
        ("pool_max", 160, 4, "max", 16, 256),
        ("patch", 160, 1, "none", 64, 1024),
    ],
)
def test_ten_seconds_at_factor_four(
    compression: Compression, hop: int, pool: int, kind: str, patch_t: int, frames: int
) -> None:
    g = make_geometry(AudioOptions(clip_seconds=10.24), compression, (16, 16), 4)
    assert (g.hop, g.pool, g.pool_kind, g.patch_t, g.num_frames) == (hop, pool, kind, patch_t, frames)
    assert g.grid == (8, 16) and g.num_tokens == 128 and g.time_factor == 4
    assert g.window == 400 and g.f_max == 8000
    assert g.crop_step == hop * pool == 640 or compression == "patch"
    assert make_geometry(AudioOptions(clip_seconds=10.24), compression, (16, 16)).num_tokens == 512


def test_a_window_may_grow_with_the_frame_shift_alone() -> None:
    audio = AudioOptions(window="grow")
    assert make_geometry(audio, "frame_shift", (16, 16), 4).window == 1600
    assert make_geometry(audio, "pool_mean", (16, 16), 4).window == 400


@each_compression
def test_impossible_patches_raise(compression: Compression) -> None:
    with pytest.raises(ValueError, match="patch_f 24 does not divide num_mels 128"):
        make_geometry(AudioOptions(), compression, (24, 16), 2)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"f_min": 9000.0}, "f_min 9000"),
        ({"f_min": 300.0, "f_max": 200.0}, "f_min 300 < f_max 200"),
        ({"f_max": 8001.0}, "8000 Hz"),
        ({"clip_seconds": 0.02}, "shorter than one window"),
        ({"hop_ms": 0.05}, "less than one sample"),
        ({"window_ms": 0.1}, "less than two samples"),
    ],
)
def test_impossible_audio_is_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        AudioOptions(**wrong)


def test_statistics_are_named_by_what_the_spectrogram_depends_on() -> None:
    g = make_geometry(AudioOptions(), "pool_mean", (16, 16), 2)
    same = [replace(g, patch_t=8), replace(g, clip_samples=1), replace(g, time_factor=9, unit_samples=1)]
    other = [
        replace(g, hop=320), replace(g, window=800), replace(g, num_mels=64), replace(g, f_min=1.0), replace(g, pool=4),
        replace(g, f_max=7000.0), replace(g, sample_rate=8000), replace(g, pool_kind="max"),
    ]
    assert {x.digest() for x in same} == {g.digest()}
    assert len({x.digest() for x in [g, *other]}) == len(other) + 1


@given(audio=audios, compression=st.sampled_from(COMPRESSIONS), patch=patches, factor=factors)
def test_a_geometry_survives_json(
    audio: AudioOptions, compression: Compression, patch: tuple[int, int], factor: int
) -> None:
    g = make_geometry(audio, compression, patch, factor)
    assert g.columns  # a cached value is no part of it
    assert Geometry(**json.loads(json.dumps(g.to_dict()))) == g


def test_mel_rows_that_mean_other_frequencies_are_said() -> None:
    before = AudioOptions(sample_rate=16000)
    assert other_frequencies(before, before.model_copy(update={"clip_seconds": 1.0, "f_max": 8000.0})) == ""
    note = other_frequencies(before, AudioOptions(sample_rate=8000, num_mels=64))
    assert "audio.sample_rate 16000, now 8000; audio.num_mels 128, now 64; audio.f_max 8000, now 4000: mel rows" in note
