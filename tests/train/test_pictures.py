"""Pictures of spectrograms: every cell has the right place and colour."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from tiny_runs import run_options

from ssl_c2f.curriculum.phases import Masking
from ssl_c2f.data.corpus import Corpus
from ssl_c2f.data.front_end import Batch
from ssl_c2f.data.runner import Runner
from ssl_c2f.data.statistics import InputStatistics
from ssl_c2f.objectives import Objective
from ssl_c2f.train.pictures import LEVELS, NOTHING, chosen_clips, film_strip, palette, png, save_pictures, value_range

CPU = torch.device("cpu")


def pixels(content: bytes) -> np.ndarray:
    """(F, T, 3), row 0 on top."""
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def test_louder_is_always_lighter_and_nothing_is_grey() -> None:
    colours = palette()[:LEVELS] / 255
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(luminance) > 0).all()
    steps = np.diff(np.cbrt(luminance))  # roughly what the eye sees
    assert steps.max() < 3 * np.median(steps)
    assert luminance[0] < 0.01 and luminance[-1] > 0.8
    assert tuple(palette()[-1]) == NOTHING
    assert np.abs(palette()[:LEVELS].astype(int) - NOTHING).max(1).min() > 20  # no level looks like nothing


def test_time_runs_right_and_frequency_up() -> None:
    spec = torch.zeros(5, 3)  # (T, F)
    spec[4, 2], spec[0, 0] = 1.0, torch.nan
    image = pixels(png(spec, 0.0, 1.0))
    assert image.shape == (3, 5, 3)
    assert tuple(image[0, 4]) == tuple(palette()[LEVELS - 1])
    assert tuple(image[2, 0]) == NOTHING
    assert tuple(image[1, 1]) == tuple(palette()[0])


@given(arrays(np.float32, (7, 4), elements=st.floats(width=32)))
def test_any_values_give_a_picture(values: np.ndarray) -> None:
    spec = torch.from_numpy(values)
    low, high = value_range(spec)
    assert low <= high
    image = pixels(png(spec, low, high))
    grey = (image == NOTHING).all(-1)[::-1].T
    assert (grey == np.isnan(values)).all()


def test_long_clips_are_cut_down_to_what_a_screen_shows() -> None:
    assert pixels(png(torch.rand(30_000, 4), 0, 1)).shape == (4, 1200, 3)


@pytest.fixture(scope="module")
def corpus(sounds: Path) -> Corpus:
    return Corpus.open(run_options(sounds).data, 0)


def runner(corpus: Corpus, objective: Objective) -> Runner:
    return Runner(corpus, InputStatistics(corpus).front_end(objective.geometry), 2)


def example(sounds: Path, corpus: Corpus, phase: int) -> tuple[Objective, Batch]:
    options = run_options(sounds)
    torch.manual_seed(0)
    objective = options.build(options.geometries[phase], corpus.num_classes).eval()
    masking, clips = Masking("uniform", 0.75, (3, 5)), corpus.held_out[:2]
    return objective, next(runner(corpus, objective).batches(clips, per_clip=1, masking=masking))


@pytest.mark.parametrize("phase", [0, 2])
def test_a_strip_shows_what_was_kept_and_rebuilds_the_rest(sounds: Path, corpus: Corpus, phase: int) -> None:
    objective, batch = example(sounds, corpus, phase)
    strip = {name: pixels(content) for name, content in film_strip(objective, batch).items()}
    assert list(strip) == [f"{i}-{view}" for i in range(2) for view in ("input", "kept", "reconstruction")]
    frames = int(batch.num_frames[0])
    masked = batch.masks[0].masked[0].reshape(batch.geometry.grid)
    masked = masked.repeat_interleave(batch.geometry.patch_f, 0).repeat_interleave(batch.geometry.patch_t, 1)
    hidden = masked[:, :frames].flip(0).numpy()
    assert strip["0-input"].shape == (batch.geometry.num_mels, frames, 3)
    assert ((strip["0-kept"] == NOTHING).all(-1) == hidden).all()
    for view in ("kept", "reconstruction"):  # one scale for all views of a clip
        assert (strip[f"0-{view}"][~hidden] == strip["0-input"][~hidden]).all()
    assert (strip["0-reconstruction"][hidden] != strip["0-input"][hidden]).any()


def test_every_phase_shows_the_same_clips(sounds: Path, corpus: Corpus, tmp_path: Path) -> None:
    facts = []
    for phase in (0, 2):
        objective, _ = example(sounds, corpus, phase)
        objective.train()
        before = torch.get_rng_state()
        reads = runner(corpus, objective)
        files = save_pictures(tmp_path / str(phase), objective, reads, Masking("time", 0.5, (3, 5)), count=2)
        assert objective.training and torch.equal(before, torch.get_rng_state())
        facts.append(json.loads((tmp_path / str(phase) / "pictures.json").read_text()))
        assert len(files) == 6 and all(file.read_bytes().startswith(b"\x89PNG") for file in files.values())
        sound, rate = soundfile.read(tmp_path / str(phase) / "0.mp3")
        assert rate == 16000 and abs(len(sound) / rate - 0.8) < 0.2 and np.abs(sound).max() > 0.01
    coarse, fine = facts
    assert [c["clip"] for c in coarse["clips"]] == [c["clip"] for c in fine["clips"]]
    assert (coarse["frame_ms"], fine["frame_ms"]) == (40.0, 10.0)
    assert coarse["mask_shape"] == "time"
    held_out = {corpus.manifest.clips[i].path for i in corpus.held_out}
    assert {c["clip"] for c in coarse["clips"]} <= held_out


def test_there_are_never_more_clips_than_there_are(sounds: Path, corpus: Corpus) -> None:
    assert len(set(chosen_clips(corpus, 1000))) == len(corpus.held_out)
    assert len(set(chosen_clips(corpus, 3))) == 3
