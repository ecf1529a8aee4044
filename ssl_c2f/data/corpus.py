"""The recordings of a run: which are trained on, which are held out, and their audio in any geometry."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ssl_c2f.core.files import append_line, read_jsonl
from ssl_c2f.core.options import UserError
from ssl_c2f.curriculum.geometry import Geometry
from ssl_c2f.data.dataset import Source, Windows, clips_per_epoch, fill_cache
from ssl_c2f.data.front_end import FrontEnd, Statistics
from ssl_c2f.data.manifest import Manifest, look_like_labels
from ssl_c2f.data.recordings import DataOptions, open_manifest, split


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
    """A manifest, its split, and the clips in each geometry, which are cached where they fit into memory."""

    manifest: Manifest
    training: list[int]
    held_out: list[int]
    options: DataOptions
    seed: int
    bad: BadFiles
    progress: Callable[[int, int], object] | None = None  # of filling the cache: (clips done, clips)
    _sources: dict[str, Source] = field(default_factory=dict)

    @classmethod
    def open(
        cls, options: DataOptions, seed: int, bad_files: Path | None = None, *, labels_needed: bool = True
    ) -> Corpus:
        """The recordings that the options name; unreadable ones are kept in the file `bad_files`.

        Where no labels are needed, folder names that do not look like labels are not taken as such.

        Raises:
            UserError: no audio, or an option that does not fit it.
        """
        manifest = open_manifest(options)
        if not labels_needed and not options.manifest and options.labels == "auto" and manifest.classes:
            manifest = _without_odd_labels(manifest)
        bad = BadFiles(bad_files, options.max_bad_files)
        bad.add(manifest.bad)
        return cls(manifest, *split(manifest, options), options, seed, bad)

    @classmethod
    def whole(cls, manifest: Manifest, options: DataOptions) -> Corpus:
        """All of a manifest, nothing held out. Raises UserError: more unreadable files than data.max_bad_files."""
        bad = BadFiles(None, options.max_bad_files)
        bad.add(manifest.bad)
        return cls(manifest, list(range(len(manifest.clips))), [], options, 0, bad)

    def clips_per_epoch(self, geometry: Geometry) -> int:
        """Crops that an epoch takes of the training clips: one of each segment."""
        return clips_per_epoch(self.manifest, self.training, geometry)

    @property
    def num_classes(self) -> int:
        return len(self.manifest.classes)

    def source(self, geometry: Geometry) -> Source:
        """The clips in a geometry. What is cached is not pooled yet, so all pooling factors share it."""
        digest = replace(geometry, pool=1, pool_kind="none").digest()
        if digest not in self._sources:
            source = Source(self.manifest, geometry, channel=self.options.channel)
            plain = FrontEnd(geometry, Statistics(0.0, 1.0))
            self._sources[digest] = fill_cache(
                source, range(len(self.manifest.clips)), plain.log_mel, self._free(), self.progress
            )
        return replace(self._sources[digest], geometry=geometry)

    def _free(self) -> float:
        """GB that are left for caching."""
        specs = (spec for source in self._sources.values() for spec in source.cache.values())
        return self.options.cache_gb - sum(4 * spec.numel() for spec in specs) / 1e9

    def forget(self) -> None:
        """Drop the cached spectrograms."""
        self._sources.clear()

    def workers(self, geometry: Geometry) -> int:
        """Loader processes worth having: none where all there is to do is to slice the cache."""
        return 0 if self.source(geometry).cache else self.options.workers

    def windows(self, geometry: Geometry, clips: Sequence[int], per_clip: int | None = None) -> Windows:
        return Windows(self.source(geometry), clips, self.seed, per_clip)


def _without_odd_labels(manifest: Manifest) -> Manifest:
    count = len(manifest.classes)
    if look_like_labels(manifest):
        note = f"{count} folder names are taken as labels for the kNN score (data.labels=none: they are not)"
        return replace(manifest, notes=(*manifest.notes, note))
    clips = tuple(replace(clip, labels=()) for clip in manifest.clips)
    note = f"{count} folder names do not look like labels and are not taken as such (data.labels=path: they are)"
    return replace(manifest, clips=clips, classes=(), notes=(*manifest.notes, note))
