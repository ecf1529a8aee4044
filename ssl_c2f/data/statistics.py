"""Input statistics: mean and standard deviation of the log-mel values, one pair for each geometry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from ssl_c2f.core import draws
from ssl_c2f.core.files import read_json, write_json
from ssl_c2f.core.options import UserError
from ssl_c2f.core.run_folder import RunFolder
from ssl_c2f.curriculum.geometry import Geometry
from ssl_c2f.data.corpus import Corpus
from ssl_c2f.data.front_end import FrontEnd, Statistics
from ssl_c2f.data.runner import Runner


@dataclass
class InputStatistics:
    """Those that come with a checkpoint, else those that the run has kept, else measured on the training clips."""

    corpus: Corpus
    given: Mapping[str, Statistics] = field(default_factory=dict)  # of a checkpoint, by `Geometry.digest`
    run: RunFolder | None = None  # where measured ones are kept
    factor: float = 1.0  # of the standard deviation, where it is measured; 2 behind published weights
    _found: dict[str, Statistics] = field(default_factory=dict)

    def of(self, geometry: Geometry) -> Statistics:
        """Raises UserError: the recordings are silent."""
        digest = geometry.digest()
        if digest in self.given:
            return self.given[digest]
        if digest not in self._found:
            file = self.run.statistics(digest) if self.run else None
            kept = _kept(file) if file else None
            self._found[digest] = kept or self._measure(geometry)
            if file and not kept:
                write_json(file, asdict(self._found[digest]))
        return self._found[digest]

    def front_end(self, geometry: Geometry) -> FrontEnd:
        return FrontEnd(geometry, self.of(geometry))

    def _measure(self, geometry: Geometry) -> Statistics:
        """Over the real frames of one window of each clip, or of more where there are fewer clips than wanted."""
        corpus = self.corpus
        order = draws.key(corpus.seed, torch.tensor(corpus.training), "statistics").argsort()
        clips = [corpus.training[i] for i in order[: corpus.options.statistics_clips]]
        total = torch.zeros(3, dtype=torch.float64)
        each = max(corpus.options.statistics_clips // len(clips), 1)
        for batch in Runner(corpus, FrontEnd(geometry, Statistics(0.0, 1.0)), 32).batches(clips, per_clip=each):
            real = torch.arange(batch.spec.shape[1]) < batch.num_frames[:, None]
            values = batch.spec[real].double()
            total += torch.stack([torch.tensor(float(values.numel())), values.sum(), values.square().sum()])
        count, mean, square = total[0], total[1] / total[0], total[2] / total[0]
        std = (square - mean.square()).clamp(min=0).sqrt()
        if not count or not std > 1e-3:  # rounding leaves a little of nothing
            raise UserError(f"no sound in {corpus.manifest.root}: the spectrograms of its clips are all alike")
        return Statistics(float(mean), float(std), self.factor)


def _kept(file: Path) -> Statistics | None:
    """What a file holds; None if it is not there or damaged, and then they are measured."""
    try:
        kept = Statistics(**read_json(file))
        kept.check()
        return kept
    except (TypeError, ValueError):
        return None
