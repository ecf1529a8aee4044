"""The recordings of a run: what is trained on, what is held out, and their spectrograms and statistics per geometry."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from ssl_c2f.core import draws
from ssl_c2f.core.files import append_line, read_jsonl, write_text
from ssl_c2f.core.options import UserError
from ssl_c2f.core.run_folder import RunFolder
from ssl_c2f.curriculum.geometry import Geometry
from ssl_c2f.data.dataset import DataOptions, Source, Windows, fill_cache, in_batches, make_loader, open_manifest, split
from ssl_c2f.data.front_end import FrontEnd, Items, Statistics
from ssl_c2f.data.manifest import Manifest


@dataclass
class BadFiles:
    """Counts unreadable files and names each once in bad_files.jsonl."""

    file: Path | None
    limit: int
    seen: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.file:
            self.seen |= {row["path"]: row["reason"] for row in read_jsonl(self.file)}

    def add(self, bad: Sequence[tuple[str, str]]) -> None:
        """Raises UserError beyond the limit."""
        for path, reason in bad:
            if path not in self.seen:
                self.seen[path] = reason
                if self.file:
                    append_line(self.file, json.dumps({"path": path, "reason": reason}))
        if bad and len(self.seen) > self.limit:
            path, reason = bad[-1]
            raise UserError(
                f"{len(self.seen)} unreadable files, more than data.max_bad_files={self.limit}; "
                f"the last is {path}: {reason}"
            )


@dataclass
class Corpus:
    """Everything is made when it is first asked for, once per geometry."""

    manifest: Manifest
    training: list[int]
    held_out: list[int]
    options: DataOptions
    seed: int
    bad: BadFiles
    folder: Path | None = None  # where statistics are kept
    main: bool = True  # whether this process writes them
    given: dict[str, Statistics] = field(default_factory=dict)  # statistics that come with a checkpoint, by digest
    factor: float = 1.0  # of the deviation in statistics that are measured; 2 behind published weights
    progress: Callable[[int, int], object] | None = None  # of filling the cache: (clips done, clips)
    _sources: dict[str, Source] = field(default_factory=dict)
    _statistics: dict[str, Statistics] = field(default_factory=dict)

    @classmethod
    def open(cls, options: DataOptions, seed: int, folder: Path | None, *, main: bool = True) -> Corpus:
        """Raises UserError: no audio, or an option that does not fit it."""
        manifest = open_manifest(options)
        bad = BadFiles(RunFolder(folder).bad_files if folder and main else None, options.max_bad_files)
        bad.add(manifest.bad)
        return cls(manifest, *split(manifest, options), options, seed, bad, folder, main)

    @property
    def num_classes(self) -> int:
        return len(self.manifest.classes)

    def source(self, geometry: Geometry) -> Source:
        """The clips in a geometry, cached where they fit. What is cached is not pooled yet, so all factors share it."""
        digest = replace(geometry, pool=1, pool_kind="none").digest()
        if digest not in self._sources:
            source = Source(self.manifest, geometry)
            plain = FrontEnd(geometry, Statistics(0.0, 1.0))
            self._sources[digest] = fill_cache(
                source, range(len(self.manifest.clips)), plain.log_mel, self._free(), self.progress
            )
        cached = self._sources[digest]
        return Source(self.manifest, geometry, cached.cache, cached.damaged)

    def _free(self) -> float:
        """GB that are left for caching."""
        specs = (spec for source in self._sources.values() for spec in source.cache.values())
        return self.options.cache_gb - sum(4 * spec.numel() for spec in specs) / 1e9

    def forget(self) -> None:
        """Drop the cached spectrograms."""
        self._sources.clear()

    def statistics(self, geometry: Geometry) -> Statistics:
        """Mean and deviation of the log-mel values of the training clips, over real frames only."""
        digest = geometry.digest()
        file = RunFolder(self.folder).statistics(digest) if self.folder else None
        if digest in self.given:
            return self.given[digest]
        if digest not in self._statistics and file and file.exists():
            self._statistics[digest] = Statistics(**json.loads(file.read_text()))
        if digest not in self._statistics:
            self._statistics[digest] = self._measure(geometry)
            if file and self.main:
                write_text(file, json.dumps(asdict(self._statistics[digest])) + "\n")
        return self._statistics[digest]

    def front_end(self, geometry: Geometry) -> FrontEnd:
        return FrontEnd(geometry, self.statistics(geometry))

    def _measure(self, geometry: Geometry) -> Statistics:
        order = draws.key(self.seed, torch.tensor(self.training), "statistics").argsort()
        clips = [self.training[i] for i in order[: self.options.statistics_clips]]
        windows = Windows(self.source(geometry), clips, self.seed, per_clip=1)
        plain = FrontEnd(geometry, Statistics(0.0, 1.0))
        total = torch.zeros(3, dtype=torch.float64)
        for items in make_loader(windows, in_batches(len(windows), 32), self.workers(geometry)):
            if not isinstance(items, Items):
                continue
            spec, num_frames = plain.spectrogram(items.audio, items.num_samples)
            real = torch.arange(spec.shape[1]) < num_frames[:, None]
            values = spec[real].double()
            total += torch.stack([torch.tensor(float(values.numel())), values.sum(), values.square().sum()])
        count, mean, square = total[0], total[1] / total[0], total[2] / total[0]
        std = (square - mean.square()).clamp(min=0).sqrt()
        if not count or not std > 1e-3:  # rounding leaves a little of nothing
            raise UserError(f"no sound in {self.manifest.root}: the spectrograms of its clips are all alike")
        return Statistics(float(mean), float(std), self.factor)

    def workers(self, geometry: Geometry) -> int:
        """Loader processes worth having: none, where all there is to do is to slice the cache."""
        return 0 if self.source(geometry).cache else self.options.workers

    def windows(self, geometry: Geometry, clips: Sequence[int], per_clip: int | None = None) -> Windows:
        return Windows(self.source(geometry), clips, self.seed, per_clip)


