"""Clips per second of CPU time from files to normalised input, beside the pipeline of published code.

    python benchmarks/data.py [--rounds 9] [--clips 16] [--only wav] [--out data.json]

Published (AST, SSAST, AudioMAE): read the whole file, subtract its mean, `torchaudio.compliance.kaldi.fbank`, pad,
normalise, clip by clip, at the file's own rate. Ours: decode a crop, resample to 16 kHz where the file has another
rate, filterbank of the batch. One thread; clips of 10.24 s; all candidates of a format take turns in each round.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
import torch
from rounds import interleaved, median, ratio, table
from torch.nn import functional
from torchaudio.compliance import kaldi

from ssl_c2f.curriculum.geometry import AudioOptions, Compression, Geometry, make_geometry
from ssl_c2f.data.augment import AugmentOptions
from ssl_c2f.data.dataset import Source, TrainingClips, collate, fill_cache
from ssl_c2f.data.front_end import FrontEnd, Items, Statistics
from ssl_c2f.data.manifest import Manifest, scan
from ssl_c2f.data.shards import write_shards

AUDIO = AudioOptions(clip_seconds=10.24)
FRAMES = 1024
FORMATS = {  # name -> (ending, rate, channels)
    "wav 16 kHz": ("wav", 16000, 1), "wav 44.1 kHz stereo": ("wav", 44100, 2),
    "flac 16 kHz": ("flac", 16000, 1), "flac 44.1 kHz stereo": ("flac", 44100, 2), "ogg 44.1 kHz": ("ogg", 44100, 1),
}


def write_sounds(folder: Path, ending: str, rate: int, channels: int, count: int) -> Path:
    """Recordings of 10.24 s of noise whose loudness wanders; 16 bit."""
    folder.mkdir(parents=True)
    for i in range(count):
        generator = np.random.default_rng(i)
        samples = generator.standard_normal((round(10.24 * rate), channels)) * 0.1
        samples *= 0.2 + np.sin(np.arange(len(samples)) * 7 / rate)[:, None] ** 2
        with soundfile.SoundFile(folder / f"{i:03}.{ending}", "w", rate, channels) as file:
            for block in range(0, len(samples), 2**14):  # libsndfile overflows its stack on a long Vorbis write
                file.write(samples[block : block + 2**14].astype(np.float32))
    return folder


def published(manifest: Manifest) -> Callable[[], object]:
    def load(path: Path) -> torch.Tensor:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
        waveform = torch.from_numpy(samples.T)
        waveform = waveform - waveform.mean()
        spec = kaldi.fbank(
            waveform, htk_compat=True, sample_frequency=rate, use_energy=False, window_type="hanning",
            num_mel_bins=128, dither=0.0, frame_shift=10,
        )
        spec = functional.pad(spec, (0, 0, 0, FRAMES - len(spec)))[:FRAMES]
        return (spec + 4.27) / (2 * 4.57)

    return lambda: torch.stack([load(manifest.root / clip.path) for clip in manifest.clips])


def geometry(compression: Compression, factor: int) -> Geometry:
    return make_geometry(AUDIO, compression, (16, 16), factor, multiple=64)


def ours(source: Source) -> Callable[[], object]:
    """One epoch: crops, batch, filterbank, compression, normalisation."""
    count = len(source.manifest.clips)
    clips = TrainingClips(source, list(range(count)), 0, AugmentOptions())
    front_end = FrontEnd(source.geometry, Statistics(-4.27, 4.57, 2.0))

    def epoch() -> object:
        items = collate([clips[i] for i in range(count)])
        assert isinstance(items, Items)
        return front_end(items)

    return epoch


def measure(folder: Path, name: str, count: int, rounds: int) -> list[list[object]]:
    manifest = scan(write_sounds(folder / "sounds", *FORMATS[name], count))
    fine = geometry("frame_shift", 1)
    log_mel = FrontEnd(fine, Statistics(0.0, 1.0)).log_mel
    shards = write_shards(manifest, folder / "shards", 1.0)
    cached = fill_cache(Source(manifest, fine), range(count), log_mel, 4.0)
    work = {
        "published": published(manifest), "ours": ours(Source(manifest, fine)),
        "ours, from a shard": ours(Source(shards, fine)),
        "ours, frame shift 2": ours(Source(manifest, geometry("frame_shift", 2))),
        "ours, frame shift 4": ours(Source(manifest, geometry("frame_shift", 4))),
        "ours, mean pooling 4": ours(Source(manifest, geometry("pool_mean", 4))),
        "ours, log-mel cache": ours(cached),
    }
    times = interleaved(work, rounds)
    return [[name, case, count / median(times, case), 1 / ratio(times, case, "published")] for case in work]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--clips", type=int, default=16, help="of each format, which are one batch")
    parser.add_argument("--only", default="", help="formats whose name holds this")
    parser.add_argument("--out", type=Path, default=None, help="write the figures as JSON")
    a = parser.parse_args()
    torch.set_num_threads(1)
    columns, rows = ("format", "pipeline", "clips/s", "times published"), []
    for name in (name for name in FORMATS if a.only in name):
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(Path(folder), name, a.clips, a.rounds)
    print(table(columns, rows))
    if a.out:
        a.out.write_text(json.dumps([dict(zip(columns, row, strict=True)) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
