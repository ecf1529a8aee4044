"""Crops, windows, replacements for bad files and mixup partners are the same in any process and order."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ssl_c2f.core.options import UserError
from ssl_c2f.core.run_folder import RunFolder
from ssl_c2f.curriculum.geometry import AudioOptions, Compression, Geometry, make_geometry
from ssl_c2f.data.augment import AugmentOptions
from ssl_c2f.data.corpus import BadFiles, Corpus
from ssl_c2f.data.dataset import (
    Item,
    Source,
    TrainingClips,
    Windows,
    collate,
    fill_cache,
    in_batches,
    make_loader,
    segments_of,
)
from ssl_c2f.data.decode import AudioError
from ssl_c2f.data.front_end import FrontEnd, Items, Statistics
from ssl_c2f.data.manifest import Clip, Manifest
from ssl_c2f.data.recordings import DataOptions, open_manifest, split
from ssl_c2f.data.statistics import InputStatistics

RATE = 8000
AUDIO = AudioOptions(sample_rate=RATE, num_mels=16, clip_seconds=0.5)
COMPRESSIONS: tuple[Compression, ...] = get_args(Compression)
SECONDS = {"a/exact": 0.5, "a/long": 3.3, "a/tiny": 0.015, "b/long": 2.1, "b/short": 0.2, "c/very_long": 42.0}
PLAIN = AugmentOptions()
MIX = AugmentOptions(mixup_prob=0.5)


def geometry(compression: Compression = "frame_shift", factor: int = 2) -> Geometry:
    return make_geometry(AUDIO, compression, (8, 4), factor)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise of several lengths, one at another rate, and one that turns out to be no number."""
    folder, rng = tmp_path_factory.mktemp("noise"), np.random.default_rng(0)
    for name, seconds in SECONDS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        rate = 11025 if name == "b/long" else RATE
        soundfile.write(folder / f"{name}.wav", 0.3 * rng.standard_normal(round(seconds * rate)), rate)
    (folder / "z").mkdir()
    soundfile.write(folder / "z/bad.wav", np.full(RATE, np.nan, np.float32), RATE, subtype="FLOAT")
    return folder


@pytest.fixture(scope="module")
def manifest(root: Path) -> Manifest:
    found = open_manifest(DataOptions(root=str(root)))
    assert [clip.path for clip in found.clips] == [f"{name}.wav" for name in SECONDS] + ["z/bad.wav"]
    return found


def cached(source: Source) -> Source:
    front_end = FrontEnd(source.geometry, Statistics(0.0, 1.0))
    return fill_cache(source, range(len(source.manifest.clips)), front_end.log_mel, 1.0)


def same(a: Item, b: Item) -> bool:
    if (a.partner is None) != (b.partner is None) or (a.partner and b.partner and not same(a.partner, b.partner)):
        return False
    tensors = all(torch.equal(x, y) for x, y in ((a.crop.audio, b.crop.audio), (a.key, b.key), (a.labels, b.labels)))
    return tensors and (a.crop.num_samples, a.clip, a.share, a.bad) == (b.crop.num_samples, b.clip, b.share, b.bad)


# --- crops


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("window", ["fixed", "grow"])
def test_crops_of_the_cache_are_crops_of_the_files(manifest: Manifest, compression: Compression, window: str) -> None:
    g = make_geometry(AUDIO.model_copy(update={"window": window}), compression, (8, 4), 3)
    plain = Source(manifest, g)
    kept, front_end = cached(plain), FrontEnd(g, Statistics(0.0, 1.0))
    assert set(kept.cache) == set(range(len(SECONDS)))  # all but the unreadable one
    for clip in kept.cache:
        assert len(kept.cache[clip]) == g.raw_frames(plain.length(clip))
        last = max(plain.length(clip) - g.clip_samples, 0) // g.crop_step
        for start in {0, last // 2 * g.crop_step, last * g.crop_step}:
            batches = []
            for source in (plain, kept):
                items = collate([Item(source.crop(clip, start), clip, torch.tensor(0), torch.zeros(0))])
                assert isinstance(items, Items)
                batches.append(front_end(items))
            assert torch.equal(batches[0].num_frames, batches[1].num_frames)
            torch.testing.assert_close(batches[0].spec, batches[1].spec, rtol=0, atol=1e-3)


def test_a_file_with_one_damaged_stretch_is_left_out_of_a_cached_set(tmp_path: Path) -> None:
    """Its good stretches would come as samples, and a batch holds either samples or spectrograms."""
    samples = np.random.default_rng(0).standard_normal(5 * RATE).astype(np.float32)
    soundfile.write(tmp_path / "good.wav", samples, RATE, subtype="FLOAT")
    samples[-100:] = np.nan
    soundfile.write(tmp_path / "bad.wav", samples, RATE, subtype="FLOAT")
    found = corpus(tmp_path)
    assert found.manifest.clips[0].path == "bad.wav"
    assert Source(found.manifest, geometry()).crop(0, 0).num_samples == RATE // 2
    with pytest.raises(AudioError, match="NaN"):
        found.source(geometry()).crop(0, 0)
    items = [TrainingClips(found.source(geometry()), [0, 1], 0, PLAIN)[i] for i in range(6)]
    batch = collate(items)
    assert isinstance(batch, Items) and batch.index.tolist() == [1] * 6 and len(batch.bad) >= 3


def test_what_does_not_fit_is_not_cached(manifest: Manifest) -> None:
    source = Source(manifest, geometry())
    frames = sum(source.geometry.raw_frames(source.length(clip)) for clip in range(3))
    need = frames * AUDIO.num_mels * 4 / 1e9
    log_mel = FrontEnd(source.geometry, Statistics(0.0, 1.0)).log_mel
    seen: list[tuple[int, int]] = []
    assert fill_cache(source, range(3), log_mel, need * 0.99, lambda *x: seen.append(x)) is source and not seen
    kept = fill_cache(source, range(3), log_mel, need * 1.01, lambda *x: seen.append(x))
    assert sum(len(spec) for spec in kept.cache.values()) == frames
    assert seen == [(1, 3), (2, 3), (3, 3)]


@given(seconds=st.floats(0.01, 5.0), compression=st.sampled_from(COMPRESSIONS), factor=st.integers(1, 5))
def test_random_crops_lie_within_the_recording(seconds: float, compression: Compression, factor: int) -> None:
    g = geometry(compression, factor)
    source = listed(g, round(seconds * RATE))
    spare = source.length(0) - g.clip_samples
    segments = segments_of(source.first_segments, [0]).tolist()
    starts = {source.random_start(s, torch.tensor(key))[1] for key in range(40) for s in segments}
    assert all(0 <= start <= max(spare, 0) and start % g.crop_step == 0 for start in starts)
    assert starts == {0} if spare < g.crop_step else True
    if spare > 20 * g.crop_step:
        assert min(starts) < spare / 3 and max(starts) > spare * 2 / 3


def listed(g: Geometry, *lengths: int) -> Source:
    """A source of clips that are no files."""
    clips = [Clip(f"{i}.wav", (), None, n, g.sample_rate, 1) for i, n in enumerate(lengths)]
    return Source(Manifest(Path("."), tuple(clips), ()), g)


# --- windows


@given(
    samples=st.integers(1, 60000), compression=st.sampled_from(COMPRESSIONS), factor=st.integers(1, 4),
    window=st.sampled_from(["fixed", "grow"]),
)
def test_windows_cover_a_clip_to_its_end(samples: int, compression: Compression, factor: int, window: str) -> None:
    g = make_geometry(AUDIO.model_copy(update={"window": window}), compression, (8, 4), factor)
    starts = [start for _, start in Windows(listed(g, samples), [0], 0).windows]
    assert starts[0] == 0 and all(start % g.crop_step == 0 for start in starts)
    assert all(0 < b - a <= g.clip_samples for a, b in pairwise(starts))  # no gap
    end = starts[-1] + g.clip_samples
    assert samples - end < g.window  # what is left is too short for a frame
    assert len(starts) == 1 or starts[-1] + g.window <= samples  # the last one has a frame


@given(samples=st.lists(st.integers(1, 60000), min_size=1, max_size=3), per_clip=st.integers(1, 4))
def test_at_most_so_many_windows_of_a_clip(samples: list[int], per_clip: int) -> None:
    source = listed(geometry(), *samples)
    clips = list(range(len(samples)))
    everything, some = (Windows(source, clips, 0, limit).windows for limit in (None, per_clip))
    assert len(set(some)) == len(some) and set(some) <= set(everything) and some == sorted(some)
    for clip in clips:
        there, taken = ([start for c, start in windows if c == clip] for windows in (everything, some))
        assert len(taken) == min(len(there), per_clip)
        if len(there) > per_clip:
            assert taken[-1] < there[-1]  # the last one is mostly padding
            middle = (there[0] + there[-2]) / 2
            step = there[1] - there[0]
            assert abs(sum(taken) / len(taken) - middle) <= step


def test_windows_are_read_in_order_and_what_cannot_be_read_is_named(manifest: Manifest) -> None:
    source = Source(manifest, geometry())
    windows = Windows(source, [6, 0, 1], seed=3)
    found = [windows[i] for i in range(len(windows))]
    assert found[:2] == [("z/bad.wav", "NaN or infinite samples")] * 2
    items = [item for item in found if isinstance(item, Item)]
    assert [item.clip for item in items] == [0] + [1] * 7
    whole = torch.cat([item.crop.audio[: item.crop.num_samples] for item in items[1:]])
    assert len(whole) == source.length(1)
    assert torch.equal(whole, torch.from_numpy(soundfile.read(source.place(1), dtype="float32")[0]))
    assert len({int(item.key) for item in items}) == len(items)  # each window has a mask of its own
    batch = collate(found)
    assert isinstance(batch, Items) and batch.bad == (("z/bad.wav", "NaN or infinite samples"),) * 2
    assert batch.partner is None and batch.share is None
    assert not isinstance(collate(found[:2]), Items)


# --- training samples


@pytest.mark.parametrize("augment", [PLAIN, MIX], ids=["plain", "mixup"])
def test_a_sample_is_a_function_of_its_position(manifest: Manifest, augment: AugmentOptions) -> None:
    source, clips = Source(manifest, geometry()), [0, 1, 2, 3, 4]
    data = TrainingClips(source, clips, 1, augment)
    first = [data[i] for i in range(12)]
    again = TrainingClips(source, clips, 1, augment)
    assert all(same(first[i], again[i]) for i in reversed(range(12)))
    first = [data[i] for i in range(26)]
    once = [0, 1, 1, 1, 1, 1, 1, 2, 3, 3, 3, 3, 4]  # as many crops in an epoch as a recording holds
    assert sorted(item.clip for item in first[:13]) == once == sorted(item.clip for item in first[13:])
    assert all(torch.equal(item.labels, manifest.labels([item.clip])[0]) for item in first)
    crops = {int(item.key): item.crop.audio for item in first if item.clip == 1}
    assert len({tuple(crop[:9].tolist()) for crop in crops.values()}) == len(crops) == 12
    other = TrainingClips(source, clips, 2, augment)
    assert not any(same(first[i], other[i]) for i in range(12))


def test_labels_are_those_of_the_clip(manifest: Manifest) -> None:
    assert manifest.classes == ("a", "b", "c", "z")
    assert manifest.labels(range(7)).tolist() == [[1, 0, 0, 0]] * 3 + [[0, 1, 0, 0]] * 2 + [[0, 0, 1, 0], [0, 0, 0, 1]]
    both = replace(manifest.clips[0], labels=("a", "z"))
    none = replace(manifest.clips[0], labels=())
    some = replace(manifest, clips=(both, none))
    assert some.labels([0, 1]).tolist() == [[1, 0, 0, 1], [0, 0, 0, 0]]


def test_unreadable_files_are_replaced_the_same_way_each_time_and_reported(manifest: Manifest) -> None:
    source, clips = Source(manifest, geometry()), [0, 3, 6]
    data = TrainingClips(source, clips, 0, PLAIN)
    items = [data[i] for i in range(35)]
    assert all(same(item, data[i]) for i, item in enumerate(items))
    replaced = [item for item in items if item.bad]
    assert len(replaced) == 10  # twice in an epoch of 1 + 4 + 2 segments
    assert all(set(item.bad) == {("z/bad.wav", "NaN or infinite samples")} for item in replaced)
    assert {item.clip for item in replaced} == {0, 3}  # not always the same one
    assert all(item.crop.audio.isfinite().all() and item.labels[3] == 0 for item in items)
    assert all(torch.equal(item.labels, manifest.labels([item.clip])[0]) for item in replaced)
    batch = collate(replaced)
    assert isinstance(batch, Items) and batch.bad == tuple(pair for item in replaced for pair in item.bad)


def test_nothing_but_unreadable_files_is_an_error(manifest: Manifest) -> None:
    data = TrainingClips(Source(manifest, geometry()), [6], 0, PLAIN)
    with pytest.raises(UserError, match=r"100 clips in a row cannot be read, the last is z/bad\.wav: NaN"):
        data[0]


def test_mixup_takes_partners_from_the_training_clips(manifest: Manifest) -> None:
    source, clips = Source(manifest, geometry()), [0, 1, 3, 6]
    plain, data = TrainingClips(source, clips, 0, PLAIN), TrainingClips(source, clips, 0, MIX)
    items = [data[i] for i in range(120)]
    for i, item in enumerate(items):
        assert item.partner is not None and item.partner.partner is None
        alone = plain[i]
        assert same(item._replace(partner=None, share=1.0, bad=()), alone._replace(bad=()))  # mixing redraws nothing
        if item.share == 1.0:
            assert torch.equal(item.partner.crop.audio, item.crop.audio)
        assert item.bad == alone.bad + (item.partner.bad if item.share < 1 else ())
    mixed = [item for item in items if item.share < 1]
    assert 40 < len(mixed) < 80 and all(0 < item.share < 1 for item in mixed)
    assert {item.partner.clip for item in mixed if item.partner} == {0, 1, 3}
    same_clip = [item for item in mixed if item.partner and item.partner.clip == item.clip == 1]
    assert same_clip and not any(torch.equal(item.partner.crop.audio, item.crop.audio) for item in same_clip)
    batch = collate(items[:10])
    assert isinstance(batch, Items) and batch.partner is not None and batch.share is not None
    assert batch.share.tolist() == pytest.approx([item.share for item in items[:10]])
    assert torch.equal(batch.partner.labels, torch.stack([item.partner.labels for item in items[:10] if item.partner]))


# --- loaders


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_workers_change_nothing_and_the_global_generator_is_left_alone(manifest: Manifest) -> None:
    source = Source(manifest, geometry())
    data = TrainingClips(source, [0, 1, 2, 3, 6], 0, MIX)
    batches = [[0, 1, 2], [3, 4], [5, 6, 7, 8], [9]]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    loaded = [list(make_loader(data, batches, workers)) for workers in (0, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert [len(items.index) for items in loaded[0]] == [3, 2, 4, 1]
    for one, other in zip(*loaded, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))
        assert one.bad == other.bad


def tensors(items: Items) -> Iterator[Tensor]:
    yield from (value for value in vars(items).values() if isinstance(value, Tensor))
    if items.partner:
        yield from tensors(items.partner)


@given(count=st.integers(0, 50), size=st.integers(1, 9))
def test_in_batches(count: int, size: int) -> None:
    batches = in_batches(count, size)
    assert [i for batch in batches for i in batch] == list(range(count))
    assert all(len(batch) == size for batch in batches[:-1]) and all(0 < len(batch) <= size for batch in batches)


# --- what is held out


@given(folds=st.lists(st.integers(1, 3), min_size=1, max_size=12), held=st.sets(st.integers(1, 3), max_size=2))
def test_folds_are_held_out(folds: list[int], held: set[int]) -> None:
    clips = tuple(Clip(f"{i}.wav", (), fold, 1, RATE, 1) for i, fold in enumerate(folds))
    options = DataOptions(val_folds=tuple(held))
    if held - set(folds):
        with pytest.raises(UserError, match=f"val_folds: no clip of . is in fold {min(held - set(folds))}"):
            split(Manifest(Path("."), clips, ()), options)
    elif held == set(folds):
        with pytest.raises(UserError, match="left to train on"):
            split(Manifest(Path("."), clips, ()), options)
    else:
        training, held_out = split(Manifest(Path("."), clips, ()), options)
        assert sorted(training + held_out) == list(range(len(clips)))
        assert {folds[i] for i in held_out} == held and not {folds[i] for i in training} & held


def test_a_share_is_held_out_by_path() -> None:
    """A clip stays on its side when others come."""
    clips = tuple(Clip(f"{i:04d}.wav", (), None, 1, RATE, 1) for i in range(1000))
    training, held_out = split(Manifest(Path("."), clips, ()), DataOptions(val_fraction=0.2))
    assert 160 < len(held_out) < 240 and sorted(training + held_out) == list(range(1000))
    _, fewer = split(Manifest(Path("."), clips[:500], ()), DataOptions(val_fraction=0.2))
    assert fewer == [i for i in held_out if i < 500]
    assert split(Manifest(Path("."), clips, ()), DataOptions())[1] == []


# --- the corpus


def corpus(root: Path, **options: object) -> Corpus:
    return Corpus.open(DataOptions.model_validate({"root": str(root), **options}), 0)


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("cache_gb", [0.0, 1.0])
def test_statistics_are_those_of_real_values(
    root: Path, tmp_path: Path, compression: Compression, cache_gb: float
) -> None:
    g = geometry(compression)
    found = corpus(root, cache_gb=cache_gb)
    plain, values = FrontEnd(g, Statistics(0.0, 1.0)), []
    windows = Windows(Source(found.manifest, g), range(len(SECONDS)), 0)
    for item in (windows[i] for i in range(len(windows))):
        assert isinstance(item, Item)
        audio = item.crop.audio[: item.crop.num_samples]  # without its padding
        values.append(plain.compress(plain.log_mel(audio[None]), torch.tensor([item.crop.num_samples])).flatten())
    expected = torch.cat(values).double()
    run = RunFolder(tmp_path)
    statistics = InputStatistics(found, run=run).of(g)
    assert statistics.mean == pytest.approx(float(expected.mean()), abs=1e-4)
    assert statistics.std == pytest.approx(float(expected.std(correction=0)), abs=1e-4)
    # they are kept with the run, and those that come with a checkpoint go before
    (file,) = (tmp_path / "statistics").iterdir()
    file.write_text(json.dumps({"mean": 1.5, "std": 2.0, "factor": 1.0}))
    assert InputStatistics(found, run=run).of(g) == Statistics(1.5, 2.0)
    assert InputStatistics(found, {g.digest(): Statistics(7.0, 1.0)}, run).of(g) == Statistics(7.0, 1.0)


def test_silence_has_no_statistics(tmp_path: Path) -> None:
    for name, seconds in (("a", 0.7), ("b", 1.1)):
        soundfile.write(tmp_path / f"{name}.wav", np.zeros(round(seconds * RATE)), RATE)
    with pytest.raises(UserError, match="no sound in"):
        InputStatistics(corpus(tmp_path)).of(geometry())


def test_pooled_phases_share_the_spectrograms(root: Path) -> None:
    found = corpus(root)
    sources = [found.source(geometry("pool_mean", factor)) for factor in (4, 2, 1)]
    assert all(source.cache is sources[0].cache for source in sources)
    assert [source.geometry.pool for source in sources] == [4, 2, 1]
    assert found.source(geometry("frame_shift", 2)).cache is not sources[0].cache
    assert found.workers(geometry()) == 0
    assert corpus(root, cache_gb=0.0, workers=3).workers(geometry()) == 3


def test_bad_files_are_counted_once_and_remembered(tmp_path: Path) -> None:
    file = tmp_path / "bad_files.jsonl"
    bad = BadFiles(file, 2)
    bad.add([("a.wav", "truncated"), ("a.wav", "truncated")])
    bad = BadFiles(file, 2)  # as after a restart
    bad.add([("a.wav", "truncated"), ("b.wav", "no samples")])
    assert [json.loads(line)["path"] for line in file.read_text().splitlines()] == ["a.wav", "b.wav"]
    with pytest.raises(UserError, match=r"3 unreadable files, more than data.max_bad_files=2; .* c.wav: damaged"):
        bad.add([("c.wav", "damaged")])
