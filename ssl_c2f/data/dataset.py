"""Clips for training and windows for evaluation.

Legend: B batch, S samples, T frames, F mel bins, C classes.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from ssl_c2f.core import draws
from ssl_c2f.core.options import Options, UserError
from ssl_c2f.curriculum.geometry import Geometry
from ssl_c2f.data.augment import AugmentOptions, mixup_share
from ssl_c2f.data.decode import AudioError, Place, read_audio, resampled_length
from ssl_c2f.data.front_end import Items
from ssl_c2f.data.manifest import Manifest, read_manifest, scan
from ssl_c2f.data.sampler import clip_at
from ssl_c2f.data.tables import TEST, VALIDATION

_REPLACEMENTS = 100  # other clips tried in place of an unreadable one
_CHUNK = 4096  # frames of a long recording that are computed at a time
_THREADS = 16  # that do so at most: each holds a piece of a recording at its own rate


class DataOptions(Options):
    """Where the recordings are, which of them are held out, and how they are read."""

    root: str | None = Field(None, description="folder of recordings; with a manifest, what its paths are relative to")
    manifest: str | None = Field(None, description="CSV, TSV or JSONL table of recordings, labels and folds")
    labels: Literal["auto", "path", "folder", "top", "none"] = Field(
        "auto", description="of a folder: which folder names are labels; auto: the whole path below the root, but in "
        "pretraining only where the names look like labels"
    )
    columns: dict[str, str] = Field({}, description="of a table, where names are unusual: {path: wav, labels: kind}")
    separator: str | None = Field(None, min_length=1, description="of several labels in one cell of a table; else ;")
    fold_pattern: str | None = Field(None, description="regular expression whose one group is a file name's fold")
    val_folds: tuple[int, ...] = Field((), description="folds held out for validation")
    val_fraction: float = Field(0.0, ge=0, lt=1, description="fraction held out where no folds are; chosen by path, "
                                "in fine-tuning class by class")
    balance: Literal["none", "sqrt", "full"] = Field(
        "none", description="how often clips of rare classes are drawn: full: every class equally often; sqrt: halfway"
    )
    group_pattern: str | None = Field(
        None, description="regular expression; recordings in whose paths it (or its group) finds the same stay together"
    )
    workers: int = Field(0, ge=0, description="loader processes; unused when the spectrograms are cached")
    cache_gb: float = Field(4.0, ge=0, description="keep spectrograms in memory if they fit, per process; 0 never does")
    max_bad_files: int = Field(100, ge=0, description="unreadable files that are skipped before the run stops")
    statistics_clips: int = Field(2000, ge=1, description="clips that mean and deviation are measured on")


def open_manifest(options: DataOptions, progress: Callable[[int, int], object] | None = None) -> Manifest:
    """The manifest that the options name. Raises UserError."""
    root = Path(options.root) if options.root else None
    if options.manifest:
        found = read_manifest(
            Path(options.manifest), root, columns=options.columns, separator=options.separator, progress=progress
        )
    elif root is None:
        raise UserError("no audio: give data.root=FOLDER or data.manifest=FILE")
    else:
        labels = "path" if options.labels == "auto" else options.labels
        found = scan(root, fold_pattern=options.fold_pattern, labels=labels, progress=progress)
    return found if options.group_pattern is None else grouped(found, options.group_pattern)


def grouped(manifest: Manifest, pattern: str) -> Manifest:
    """The manifest with the group of each path that a regular expression matches.

    Raises:
        UserError: it is none, or matches no path.
    """
    try:
        matches = [re.search(pattern, clip.path) for clip in manifest.clips]
    except re.error as error:
        raise UserError(f"data.group_pattern={pattern}: {error}") from None
    if not any(matches):
        raise UserError(f"data.group_pattern={pattern}: matches no path, for example not {manifest.clips[0].path!r}")
    names = [match and (match[1] if match.re.groups else match[0]) for match in matches]
    return replace(manifest, clips=tuple(map(lambda clip, name: replace(clip, group=name), manifest.clips, names)))


def split(manifest: Manifest, options: DataOptions) -> tuple[list[int], list[int]]:
    """Clips to train on and clips held out. A fraction never splits a recording, nor a group.

    Raises:
        UserError: a fold that no clip has, or nothing left to train on.
    """
    everything: Sequence[int] = range(len(manifest.clips))
    if manifest.is_split and not options.val_folds:  # the table says it
        folds = [clip.fold for clip in manifest.clips]
        held_out = [i for i in everything if folds[i] == VALIDATION]
        everything = [i for i in everything if folds[i] != TEST]
    elif options.val_folds:
        held_out = manifest.in_folds(options.val_folds, "data.val_folds")
    else:
        limit = int(options.val_fraction * 2**32)
        digests = (hashlib.sha256(os.fsencode(clip.unit)).digest() for clip in manifest.clips)
        held_out = [i for i, digest in enumerate(digests) if int.from_bytes(digest[:4], "big") < limit]
    training = sorted(set(everything) - set(held_out))
    if not training:
        raise UserError(f"no clip of {manifest.root} is left to train on: all are held out")
    return training, held_out


def hold_out(manifest: Manifest, fraction: float, seed: int) -> list[int]:
    """About a fraction of the recordings of each class, all clips of a recording or a group together.

    A recording counts as of the rarest of its labels.
    """
    counts = Counter(label for clip in manifest.clips for label in clip.labels)
    units: dict[str, set[str]] = {}
    for clip in manifest.clips:
        units.setdefault(clip.unit, set()).update(clip.labels)
    chance = draws.uniform(draws.key(seed, torch.arange(len(units)), "hold out"), 1)[:, 0].tolist()
    rarest = [min(labels, key=lambda label: (counts[label], label), default="") for labels in units.values()]
    order = sorted(range(len(units)), key=lambda i: (rarest[i], chance[i]))
    # every so many of the recordings in order of their class: of no class one more or less than its part
    chosen = {unit for place, unit in enumerate(order) if int((place + 1) * fraction) > int(place * fraction)}
    names = {name for i, name in enumerate(units) if i in chosen}
    return [i for i, clip in enumerate(manifest.clips) if clip.unit in names]


def balanced_weights(manifest: Manifest, clips: Sequence[int], kind: Literal["sqrt", "full"]) -> Tensor:
    """(n,) how often to draw each of n clips, in proportion: by the rarest of its labels. Those without labels count
    as one class."""
    labels = [manifest.clips[i].labels or ("",) for i in clips]
    counts = Counter(label for each in labels for label in each)
    rarity = torch.tensor([1 / min(counts[label] for label in each) for each in labels], dtype=torch.float64)
    return rarity.sqrt() if kind == "sqrt" else rarity


def clips_per_epoch(manifest: Manifest, clips: Sequence[int], geometry: Geometry) -> int:
    """Crops that an epoch takes of some clips: one of each segment."""
    return len(segments_of(first_segments(manifest, geometry), clips))


def amount(manifest: Manifest, clips: Sequence[int], geometry: Geometry) -> str:
    """How much audio some clips are, in words."""
    chosen = [manifest.clips[i] for i in clips]
    hours, files = sum(clip.seconds for clip in chosen) / 3600, len({clip.path for clip in chosen})
    rows = f" ({len(chosen):,} stretches)" if manifest.has_stretches else ""
    count, seconds = clips_per_epoch(manifest, clips, geometry), geometry.clip_samples / geometry.sample_rate
    return f"{hours:.2f} h of audio in {files:,} recordings{rows}: {count:,} clips of {seconds:g} s per epoch"


class Crop(NamedTuple):
    """A clip of a recording: its waveform, or its log-mel where that is cached."""

    audio: Tensor | None  # (S,)
    log_mel: Tensor | None  # (T, F), not pooled
    num_samples: int  # real ones; the rest is padding


@dataclass(frozen=True)
class Source:
    """Crops of a manifest's clips in one geometry: cut from cached spectrograms, or decoded when they are asked for."""

    manifest: Manifest
    geometry: Geometry
    cache: dict[int, Tensor] = field(default_factory=dict)  # clip -> (T, F) log-mel of the whole recording, unpooled
    damaged: dict[int, AudioError] = field(default_factory=dict)  # why clips are missing from the cache

    def _span(self, clip: int) -> tuple[int, int]:
        """Where a clip begins and ends in its file, in samples at the geometry's rate."""
        row, rate = self.manifest.clips[clip], self.geometry.sample_rate
        whole = resampled_length(row.num_samples, row.sample_rate, rate)
        first = min(round(row.start * rate), whole - 1)
        return first, whole if row.end is None else min(max(round(row.end * rate), first + 1), whole)

    def length(self, clip: int) -> int:
        """Samples of a clip at the geometry's rate, as its header says."""
        first, last = self._span(clip)
        return last - first

    def read(self, clip: int, start: int, num: int) -> Tensor:
        """At most `num` samples of a clip from sample `start` on: (S,). Raises AudioError."""
        first, last = self._span(clip)
        return read_audio(self.place(clip), self.geometry.sample_rate, first + start, min(num, last - first - start))

    @cached_property
    def first_segments(self) -> np.ndarray:
        """(n + 1,) how many segments there are before each clip, and in all."""
        return first_segments(self.manifest, self.geometry)

    def random_start(self, segment: int, key: Tensor) -> tuple[int, int]:
        """The clip that a segment is part of, and a sample from which a crop covers about this segment.

        The places where a crop of the clip may start are dealt out evenly among its segments.
        """
        clip = int(np.searchsorted(self.first_segments, segment, "right")) - 1
        first, last = self.first_segments[clip : clip + 2].tolist()
        step, index, count = self.geometry.crop_step, segment - first, last - first
        places = max(self.length(clip) - self.geometry.clip_samples, 0) // step + 1
        begin, end = index * places // count, (index + 1) * places // count
        return clip, (begin + int(draws.integers(draws.key(key, "crop"), max(end - begin, 1)))) * step

    def crop(self, clip: int, start: int) -> Crop:
        """What there is from sample `start` on, padded with 0 to a clip's length.

        Raises:
            AudioError: the file cannot be read.
        """
        g = self.geometry
        if clip in self.damaged:  # samples of its good parts would not go with the others' spectrograms
            raise AudioError(self.place(clip), self.damaged[clip].reason)  # anew: tracebacks grow
        if clip in self.cache:
            num_frames = g.raw_frames(g.clip_samples)
            frames = self.cache[clip][start // g.hop : start // g.hop + num_frames]
            if not len(frames):
                raise AudioError(self.place(clip), f"ends before sample {start}")
            log_mel = F.pad(frames, (0, 0, 0, num_frames - len(frames)))
            return Crop(None, log_mel, min(self.length(clip) - start, g.clip_samples))
        audio = self.read(clip, start, g.clip_samples)
        return Crop(F.pad(audio, (0, g.clip_samples - len(audio))), None, len(audio))

    def place(self, clip: int) -> Place:
        return self.manifest.clips[clip].place(self.manifest.root)


def first_segments(manifest: Manifest, geometry: Geometry) -> np.ndarray:
    """(n + 1,) how many segments there are before each of n clips, and in all: a clip longer than a crop is as many
    segments as it holds crops, any other one."""
    seconds = geometry.clip_samples / geometry.sample_rate
    return np.cumsum([0, *(max(int(clip.seconds / seconds + 1e-6), 1) for clip in manifest.clips)])


def segments_of(first: np.ndarray, clips: Sequence[int]) -> np.ndarray:
    """The segments of some clips, `first_segments` given: each of them gives one crop in an epoch."""
    begin, count = first[clips], np.diff(first)[clips]
    return np.repeat(begin - np.cumsum(count) + count, count) + np.arange(count.sum())


def fill_cache(
    source: Source, clips: Iterable[int], log_mel: Callable[[Tensor], Tensor], gigabytes: float,
    progress: Callable[[int, int], object] | None = None,
) -> Source:
    """The source with the spectrograms of `clips` in memory, or unchanged if they do not fit.

    Args:
        log_mel: (1, S) -> (1, T, F) without pooling. Why it cannot be had of a file is kept, for `crop` to raise.
    """
    clips, g = sorted(clips), source.geometry
    if sum(g.raw_frames(source.length(clip)) for clip in clips) * g.num_mels * 4 > gigabytes * 1e9:
        return source

    def compute(clip: int) -> Tensor | AudioError:
        try:
            # Piece by piece: hours of many channels at a high rate are far larger than their spectrogram.
            starts = range(0, g.raw_frames(source.length(clip)) * g.hop, _CHUNK * g.hop)
            return torch.cat([
                log_mel(source.read(clip, s, (_CHUNK - 1) * g.hop + g.window)[None])[0] for s in starts
            ])
        except AudioError as error:
            return error

    cache: dict[int, Tensor] = {}
    damaged: dict[int, AudioError] = {}
    with ThreadPoolExecutor(min(os.cpu_count() or 1, _THREADS)) as pool:
        for done, (clip, spec) in enumerate(zip(clips, pool.map(compute, clips), strict=True), 1):
            if isinstance(spec, AudioError):
                damaged[clip] = spec
            else:
                cache[clip] = spec
            if progress:
                progress(done, len(clips))
    return Source(source.manifest, g, cache, damaged)


BadItems = tuple[tuple[str, str], ...]  # (path, reason) of a batch of which nothing could be read


class Item(NamedTuple):
    """One clip on its way to a batch."""

    crop: Crop
    clip: int
    key: Tensor
    labels: Tensor
    partner: Item | None = None
    share: float = 1.0
    bad: tuple[tuple[str, str], ...] = ()


class TrainingClips(Dataset[Item]):
    """The endless stream of training samples: item p is the p-th sample of the run, whoever asks for it and when.

    An epoch is one crop of each segment of the clips, drawn from (seed, epoch, segment).

    A batch for which nothing readable is found is a UserError, handed over and not raised: what a worker raises comes
    to the main process as a traceback in a string.
    """

    def __init__(
        self, source: Source, clips: Sequence[int], seed: int, augment: AugmentOptions,
        balance: Literal["none", "sqrt", "full"] = "none",
    ) -> None:
        self.source, self.seed, self.augment = source, seed, augment
        self.segments = segments_of(source.first_segments, clips)
        self.weights: Tensor | None = None
        if balance != "none":
            of = np.searchsorted(source.first_segments, self.segments, "right") - 1
            self.weights = balanced_weights(source.manifest, of.tolist(), balance)

    def __getitem__(self, position: int) -> Item:
        epoch, place = clip_at(self.seed, position, len(self.segments), self.weights)
        segment = int(self.segments[place])
        # a segment that is drawn several times in an epoch gives another crop each time
        again = () if self.weights is None else (position,)
        key = draws.key(self.seed, epoch, segment, *again)
        item = self._readable(segment, key)
        share = mixup_share(key, self.augment)
        if self.augment.mixup_prob == 0 and self.augment.mix_prob == 0:
            return item
        if share == 1.0 and self.augment.mix_prob == 0:  # its own partner: batches mix all their clips or none
            return item._replace(partner=item)
        partner = self._readable(self._other(draws.key(key, "partner")), draws.key(key, "partner crop"))
        return item._replace(partner=partner, share=share, bad=item.bad + partner.bad)

    def __getitems__(self, batch: Sequence[int]) -> list[Item] | UserError:
        try:
            return [self[position] for position in batch]
        except UserError as error:
            return UserError(str(error))  # without its traceback, which cannot be sent

    def _other(self, key: Tensor) -> int:
        return int(self.segments[int(draws.integers(key, len(self.segments)))])

    def _readable(self, segment: int, key: Tensor) -> Item:
        """A random crop of the segment, or of others drawn from its key while the recording cannot be read."""
        bad: list[tuple[str, str]] = []
        for attempt in range(_REPLACEMENTS):
            clip, start = self.source.random_start(segment, key)
            try:
                crop = self.source.crop(clip, start)
                return Item(crop, clip, key, self.source.manifest.labels([clip])[0], bad=tuple(bad))
            except AudioError as error:
                bad.append((self.source.manifest.clips[clip].path, error.reason))
                segment = self._other(draws.key(key, "replacement", attempt))
        raise UserError(f"{len(bad)} clips in a row cannot be read, the last is {bad[-1][0]}: {bad[-1][1]}")


class Windows(Dataset[Item | tuple[str, str]]):
    """Consecutive windows of clips, in order; an unreadable one is (path, reason).

    Windows of a full clip's length cover a clip to its end, the last one padded; at most `per_clip` of them are taken,
    spread evenly, without that last one.
    """

    def __init__(self, source: Source, clips: Sequence[int], seed: int, per_clip: int | None = None) -> None:
        self.source, self.seed = source, seed
        self.windows = [(clip, start) for clip in clips for start in self._starts(clip, per_clip)]

    def _starts(self, clip: int, per_clip: int | None) -> list[int]:
        g = self.source.geometry
        length = max(g.clip_samples // g.crop_step, 1) * g.crop_step
        count = 1 + max(self.source.length(clip) - g.window, 0) // length  # every window has a frame of its own
        if per_clip is None or count <= per_clip:
            return [i * length for i in range(count)]
        return [(2 * i + 1) * (count - 1) // (2 * per_clip) * length for i in range(per_clip)]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, window: int) -> Item | tuple[str, str]:
        clip, start = self.windows[window]
        try:
            crop = self.source.crop(clip, start)
        except AudioError as error:
            return self.source.manifest.clips[clip].path, error.reason
        return Item(crop, clip, draws.key(self.seed, clip, start), self.source.manifest.labels([clip])[0])


def collate(items: Sequence[Item | tuple[str, str]] | UserError) -> Items | BadItems | UserError:
    """Stack what could be read; if nothing could, what was wrong."""
    if isinstance(items, UserError):
        return items
    good = [item for item in items if isinstance(item, Item)]
    bad = tuple(item for item in items if not isinstance(item, Item))
    if not good:
        return bad
    partners = [item.partner for item in good if item.partner is not None]
    partner = collate(partners)
    audio, log_mel, num_samples = zip(*(item.crop for item in good), strict=True)
    return Items(
        audio=None if audio[0] is None else torch.stack(audio),
        log_mel=None if log_mel[0] is None else torch.stack(log_mel),
        num_samples=torch.tensor(num_samples),
        index=torch.tensor([item.clip for item in good]),
        keys=torch.stack([item.key for item in good]),
        labels=torch.stack([item.labels for item in good]),
        partner=partner if isinstance(partner, Items) else None,
        share=torch.tensor([item.share for item in good]) if partners else None,
        bad=bad + tuple(pair for item in good for pair in item.bad),
    )


def make_loader(dataset: Dataset[Any], batches: Iterable[Any], workers: int) -> DataLoader[Items]:
    """A loader that leaves the global generator alone (torch's own draws its workers' seed from it).

    Workers are forked where that is possible: they start at once, and `run` and `signals` look after them at the fork.
    """
    context = "fork" if workers and sys.platform == "linux" else None
    return DataLoader(
        dataset, batch_sampler=batches, collate_fn=collate, num_workers=workers, generator=torch.Generator(),
        pin_memory=torch.cuda.is_available(), multiprocessing_context=context,
    )


def spread(clips: Sequence[int], most: int) -> Sequence[int]:
    """At most so many of the clips, evenly over their order (which is by path, and so by label)."""
    if len(clips) <= most:
        return clips
    return [clips[(2 * i + 1) * len(clips) // (2 * most)] for i in range(most)]


def in_batches(count: int, size: int) -> list[range]:
    """0 ... count - 1 in consecutive batches."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]
