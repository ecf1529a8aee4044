"""Clips for training and windows for evaluation.

Legend: B batch, S samples, T frames, F mel bins, C classes.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from ssl_c2f.core import draws
from ssl_c2f.core.files import one_line
from ssl_c2f.core.options import UserError
from ssl_c2f.core.threads import in_threads
from ssl_c2f.curriculum.geometry import Geometry
from ssl_c2f.data.augment import AugmentOptions, mixup_share
from ssl_c2f.data.decode import AudioError, Channel, Place, read_audio, resampled_length
from ssl_c2f.data.front_end import Items
from ssl_c2f.data.manifest import Manifest
from ssl_c2f.data.recordings import balanced_weights
from ssl_c2f.data.sampler import clip_at

_REPLACEMENTS = 100  # other clips tried in place of an unreadable one
_CHUNK = 4096  # frames of a long recording that are computed at a time
_THREADS = 16  # that do so at most: each holds a piece of a recording at its own rate


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
    channel: Channel = "mean"

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
        num = min(num, last - first - start)
        return read_audio(self.place(clip), self.geometry.sample_rate, first + start, num, self.channel)

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
    computed = in_threads(compute, clips, min(os.cpu_count() or 1, _THREADS))
    for done, (clip, spec) in enumerate(zip(clips, computed, strict=True), 1):
        if isinstance(spec, AudioError):
            damaged[clip] = spec
        else:
            cache[clip] = spec
        if progress:
            progress(done, len(clips))
    return replace(source, cache=cache, damaged=damaged)


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


def make_loader(dataset: Dataset[Any], batches: Iterable[Any], workers: int) -> Iterator[Items | BadItems | UserError]:
    """The collated batches. The global generator is left alone (torch's own loader draws its workers' seed from it).

    Workers are forked where that is possible: they start at once, and `run` and `signals` look after them at the fork.

    Raises:
        UserError: a worker cannot be started, or died.
    """
    context = "fork" if workers and sys.platform == "linux" else None
    loader: DataLoader[Items] = DataLoader(
        dataset, batch_sampler=batches, collate_fn=_collate_to_share if workers else collate, num_workers=workers,
        generator=torch.Generator(), pin_memory=torch.cuda.is_available(), multiprocessing_context=context,
    )
    running: Any = None
    try:
        if workers:  # where locks cannot be made, torch's loader fails half-made, and noisily
            multiprocessing.get_context(context).Lock()
        running = iter(loader)
        yield from running
    except (OSError, RuntimeError) as error:
        if not workers or not (isinstance(error, OSError) or "DataLoader worker" in str(error)):
            raise
        raise UserError(f"loader processes do not work here ({one_line(error)}): {_WITHOUT}") from None
    finally:  # one that waits for a disk would be waited for
        for worker in getattr(running, "_workers", ()):
            worker.terminate()


_WITHOUT = "data.workers=0 does without them; they need shared memory (/dev/shm)"


def _collate_to_share(items: Sequence[Item | tuple[str, str]] | UserError) -> Items | BadItems | UserError:
    """In a worker: what is sent to the main process lies in shared memory. Where that is full, torch's own way of
    putting it there fails in a thread that nobody hears, and the main process would wait for ever."""
    batch = collate(items)
    try:
        part = batch if isinstance(batch, Items) else None
        while part is not None:
            for value in vars(part).values():
                if isinstance(value, Tensor) and value.numel():
                    value.share_memory_()  # type: ignore[no-untyped-call]
            part = part.partner
    except (OSError, RuntimeError) as error:
        return UserError(f"a batch does not fit into shared memory ({one_line(error)[:120]}): {_WITHOUT}")
    return batch


def spread(clips: Sequence[int], most: int) -> Sequence[int]:
    """At most so many of the clips, evenly over their order (which is by path, and so by label)."""
    if len(clips) <= most:
        return clips
    return [clips[(2 * i + 1) * len(clips) // (2 * most)] for i in range(most)]


def in_batches(count: int, size: int) -> list[range]:
    """0 ... count - 1 in consecutive batches."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]
