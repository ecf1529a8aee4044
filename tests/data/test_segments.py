"""Long recordings give as many crops in an epoch as they hold; stretches of recordings are read from start to end."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ssl_c2f.core import draws
from ssl_c2f.core.options import UserError
from ssl_c2f.curriculum.geometry import AudioOptions, make_geometry
from ssl_c2f.data.augment import AugmentOptions
from ssl_c2f.data.corpus import Corpus
from ssl_c2f.data.dataset import Item, Source, TrainingClips, Windows, amount, clips_per_epoch, fill_cache, segments_of
from ssl_c2f.data.front_end import FrontEnd, Statistics
from ssl_c2f.data.manifest import Clip, Manifest, fingerprint, read_manifest, write_manifest
from ssl_c2f.data.recordings import DataOptions, grouped, split
from ssl_c2f.data.sampler import clip_at
from ssl_c2f.data.shards import write_shards
from ssl_c2f.data.statistics import InputStatistics

RATE = 8000
G = make_geometry(AudioOptions(sample_rate=RATE, num_mels=16, clip_seconds=0.5), "frame_shift", (8, 4), 2)
PLAIN = AugmentOptions()


def listed(*seconds: float) -> Source:
    """A source of recordings that are no files."""
    clips = [Clip(f"{i}.wav", (), None, round(s * RATE), RATE, 1) for i, s in enumerate(seconds)]
    return Source(Manifest(Path("."), tuple(clips), ()), G)


# --- segments


@given(seconds=st.lists(st.floats(0.1, 6.0), min_size=1, max_size=6), data=st.data())
def test_a_recording_has_as_many_segments_as_it_holds_crops(seconds: list[float], data: st.DataObject) -> None:
    source = listed(*seconds)
    clips = sorted(data.draw(st.sets(st.integers(0, len(seconds) - 1), min_size=1)))
    segments = segments_of(source.first_segments, clips).tolist()
    assert segments == sorted(set(segments)) and len(segments) == clips_per_epoch(source.manifest, clips, G)
    of = Counter(source.random_start(segment, torch.tensor(0))[0] for segment in segments)
    assert of == {clip: max(source.length(clip) // G.clip_samples, 1) for clip in clips}


def test_ten_minutes_are_58_clips() -> None:
    audio = AudioOptions(clip_seconds=10.24)
    clips = (Clip("a.wav", (), None, 600 * RATE, RATE, 1), Clip("b.wav", (), None, 9, RATE, 1))
    manifest = Manifest(Path("."), clips, ())
    geometry = make_geometry(audio, "frame_shift", (16, 16))
    assert clips_per_epoch(manifest, [0, 1], geometry) == 59
    assert amount(manifest, [0], geometry) == "0.17 h of audio in 1 recordings: 58 clips of 10.24 s per epoch"


@given(seconds=st.floats(0.5, 20.0), epochs=st.integers(1, 3))
def test_crops_of_an_epoch_begin_in_every_part_of_a_recording(seconds: float, epochs: int) -> None:
    """Starts of consecutive segments are consecutive, meet without a gap, and reach the last possible one."""
    source = listed(0.2, seconds)
    segments = segments_of(source.first_segments, [1]).tolist()
    places = max(source.length(1) - G.clip_samples, 0) // G.crop_step + 1
    seen = [{source.random_start(s, torch.tensor(key))[1] // G.crop_step for key in range(60)} for s in segments]
    ends = [(i * places // len(segments), (i + 1) * places // len(segments)) for i in range(len(segments))]
    assert all(low <= min(found) and max(found) < high for found, (low, high) in zip(seen, ends, strict=True))
    assert ends[0][0] == 0 and ends[-1][1] == places


def test_over_an_epoch_each_segment_is_seen_once_and_over_a_hundred_every_part_evenly() -> None:
    source, seed = listed(0.4, 30.0), 3
    segments = segments_of(source.first_segments, [0, 1])
    starts: list[int] = []
    for epoch in range(100):
        order = [clip_at(seed, epoch * len(segments) + i, len(segments)) for i in range(len(segments))]
        assert {e for e, _ in order} == {epoch}
        assert sorted(segments[place] for _, place in order) == segments.tolist()
        for _, place in order:
            segment = int(segments[place])
            clip, start = source.random_start(segment, draws.key(seed, epoch, segment))
            starts += [start] if clip else []
    assert len(starts) == 100 * 60
    places = (source.length(1) - G.clip_samples) // G.crop_step + 1
    counts = np.histogram(starts, bins=20, range=(0, places * G.crop_step))[0]
    assert abs(counts / len(starts) - 1 / 20).max() < 0.005, counts  # drawn freely, one would expect up to 0.008
    assert len(set(starts)) > 0.75 * places


# --- stretches of recordings


@pytest.fixture
def annotated(tmp_path: Path) -> Path:
    """A long recording and a short one, and a table of stretches: some overlap, one ends behind its recording."""
    rng = np.random.default_rng(0)
    for name, seconds, rate in (("long", 20.0, RATE), ("odd", 3.0, 11025)):
        noise = 0.3 * rng.standard_normal(round(seconds * rate))
        soundfile.write(tmp_path / f"{name}.wav", noise, rate, subtype="FLOAT")
    (tmp_path / "table.csv").write_text(
        "path,start,end,label,group\n"
        "long.wav,1.5,2.9,bird,north\nlong.wav,2.0,2.2,frog,north\nlong.wav,19.5,25,bird,north\n"
        "odd.wav,0.5,,frog,south\nlong.wav,30,31,bird,north\n"
    )
    return tmp_path


def test_stretches_are_read_from_start_to_end(annotated: Path) -> None:
    found = read_manifest(annotated / "table.csv")
    assert [(clip.path, clip.start, round(clip.seconds, 6)) for clip in found.clips] == [
        ("long.wav", 1.5, 1.4), ("long.wav", 2.0, 0.2), ("long.wav", 19.5, 0.5), ("odd.wav", 0.5, 2.5),
    ]
    assert found.bad == (("long.wav", "ends at 20 s, before a stretch of it begins (from 30 s to 31 s)"),)
    plain = Source(found, G)
    long = torch.from_numpy(soundfile.read(annotated / "long.wav", dtype="float32")[0])
    assert clips_per_epoch(found, range(4), G) == 2 + 1 + 1 + 5
    wanted = [long[12000:23200], long[16000:17600], long[156000:]]
    for clip, stretch in enumerate(wanted):
        assert torch.equal(_covered(plain, clip), stretch)
    assert len(_covered(plain, 3)) == 2.5 * RATE
    # a crop is padded where its stretch ends, though the recording goes on
    assert plain.crop(1, 0).num_samples == 1600 and not plain.crop(1, 0).audio[1600:].any()  # type: ignore[index]
    kept = fill_cache(plain, range(4), FrontEnd(G, Statistics(0.0, 1.0)).log_mel, 1.0)
    assert [len(kept.cache[i]) for i in range(4)] == [G.raw_frames(plain.length(i)) for i in range(4)]
    fresh = FrontEnd(G, Statistics(0.0, 1.0)).log_mel(wanted[0][None])[0]
    torch.testing.assert_close(kept.cache[0], fresh, rtol=0, atol=1e-3)


def _covered(source: Source, clip: int) -> Tensor:
    windows = Windows(source, [clip], 0)
    items = [windows[i] for i in range(len(windows))]
    return torch.cat([item.crop.audio[: item.crop.num_samples] for item in items if isinstance(item, Item)])  # type: ignore[index]


def test_training_crops_stay_within_their_stretch(annotated: Path) -> None:
    found = read_manifest(annotated / "table.csv")
    data = TrainingClips(Source(found, G), range(4), 0, PLAIN)
    long = soundfile.read(annotated / "long.wav", dtype="float32")[0]
    for item in (data[i] for i in range(27)):
        audio = item.crop.audio[: item.crop.num_samples].numpy()  # type: ignore[index]
        if item.clip < 3:
            at = np.flatnonzero(long == audio[0])
            row = found.clips[item.clip]
            assert any(row.start * RATE <= i and i + len(audio) <= (row.start + row.seconds) * RATE for i in at)


def test_a_fraction_splits_neither_recordings_nor_groups(annotated: Path) -> None:
    rows = [
        Clip(f"site{site}/{i}.wav", (), None, 10 * RATE, RATE, 1, start=float(start))
        for site in range(12) for i in range(5) for start in range(4)
    ]
    manifest, options = Manifest(Path("."), tuple(rows), ()), DataOptions(val_fraction=0.3)
    for found, of in ((manifest, lambda c: c.path), (grouped(manifest, r"^site\d+"), lambda c: c.path.split("/")[0])):
        sides = [{of(found.clips[i]) for i in side} for side in split(found, options)]
        assert sides[0] and sides[1] and not sides[0] & sides[1]
    assert {clip.group for clip in grouped(manifest, r"site(\d)/").clips} == {*map(str, range(10)), None}
    for pattern, message in (("(", "group_pattern=\\(: "), ("north", "matches no path, for example not 'site0/0.wav'")):
        with pytest.raises(UserError, match=message):
            grouped(manifest, pattern)


def test_tables_of_stretches_are_written_and_read_back(annotated: Path) -> None:
    found = read_manifest(annotated / "table.csv")
    for name in ("again.csv", "again.jsonl"):
        write_manifest(found, annotated / name)
        assert read_manifest(annotated / name).clips == found.clips
    whole = replace(found, clips=(replace(found.clips[0], start=0.0, end=None, group=None),))
    assert fingerprint(whole) != fingerprint(replace(found, clips=found.clips[:1]))
    for row, message in (
        ("long.wav,3,2,a,", "line 2: end 2 is not after start 3"),
        ("long.wav,x,2,a,", "start 'x' is not a number of seconds"),
        ("long.wav,1,2,a,x\nlong.wav,1.0,2,b,y", "listed twice, with another fold, split or group"),
    ):
        (annotated / "wrong.csv").write_text(f"path,start,end,label,group\n{row}\n")
        with pytest.raises(UserError, match=message):
            read_manifest(annotated / "wrong.csv")


def test_a_shard_holds_a_recording_once_however_many_its_stretches(annotated: Path) -> None:
    found = read_manifest(annotated / "table.csv")
    packed = write_shards(found, annotated / "shards", 1e-6)
    assert sum(file.stat().st_size for file in (annotated / "shards").glob("*.tar")) < 1_000_000
    for clip in range(4):
        assert torch.equal(_covered(Source(packed, G), clip), _covered(Source(found, G), clip))


def test_statistics_of_few_long_recordings_are_measured_on_many_windows(tmp_path: Path) -> None:
    """Nine tenths of it are as good as silent: one window would be one of these, or not."""
    wave = np.random.default_rng(0).standard_normal(20 * RATE).clip(-3, 3) / 4
    wave[: 18 * RATE] *= 1e-4
    soundfile.write(tmp_path / "a.wav", wave, RATE, subtype="FLOAT")
    corpus = Corpus.open(DataOptions(root=str(tmp_path)), 0)
    spec = FrontEnd(G, Statistics(0.0, 1.0)).log_mel(torch.from_numpy(wave).float()[None])
    assert corpus.clips_per_epoch(G) == 40
    assert InputStatistics(corpus).of(G).mean == pytest.approx(float(spec.mean()), abs=0.1)
