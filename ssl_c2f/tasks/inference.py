"""Using a checkpoint: open it, and run it over the windows that cover recordings.

Legend: B batch, D values that are read off a window.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor

from ssl_c2f.core import distributed
from ssl_c2f.core.options import Options, UserError
from ssl_c2f.core.progress import Count
from ssl_c2f.data.corpus import Corpus
from ssl_c2f.data.front_end import Batch
from ssl_c2f.data.manifest import Manifest
from ssl_c2f.data.recordings import DataOptions
from ssl_c2f.data.runner import Rows, Runner
from ssl_c2f.data.statistics import InputStatistics
from ssl_c2f.objectives import Objective
from ssl_c2f.objectives.supervised import Supervised
from ssl_c2f.train.weights import Weights, Which, load_weights


class InferenceOptions(Options):
    """How a checkpoint is used."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    batch_size: int = Field(32, ge=1, description="windows at a time")
    weights: Which = Field("auto", description="auto: the moving average where there is one")
    resolution: Literal["full", "trained"] = Field(
        "full", description="full: time factor 1, as in validation; trained: that of the checkpoint's phase"
    )


class RecordingOptions(InferenceOptions):
    """How a checkpoint is used on a set of recordings."""

    data: DataOptions = DataOptions()
    folds: tuple[int, ...] = Field((), description="only the recordings of these folds")

    @model_validator(mode="after")
    def _all_are_used(self) -> RecordingOptions:
        if self.data.val_folds or self.data.val_fraction:
            raise ValueError("data.val_folds and data.val_fraction split nothing here: choose folds with folds=[5]")
        return self


@dataclass(frozen=True)
class Inference:
    """Trained weights in a geometry, and the recordings that they are used on."""

    weights: Weights
    objective: Objective
    runner: Runner

    def run(self, read: Callable[[Batch], Tensor], title: str) -> Rows:
        """The values (B, D) that `read` gives for each batch of windows; what cannot be read is named on stderr.

        Raises:
            UserError: nothing can be read, or more cannot be than data.max_bad_files.
        """
        corpus = self.runner.corpus
        with Count("reading recordings") as count:
            corpus.progress = count.update
            corpus.source(self.runner.front_end.geometry)  # fills the cache
        with Count(title) as count:
            rows = self.runner.run(read, corpus.training, progress=count.update)
        for path, reason in self.bad.items():
            print(f"skipped {path}: {reason}", file=sys.stderr)
        if self.bad:
            print(f"unreadable files skipped: {len(self.bad)}", file=sys.stderr)
        return rows

    @property
    def classifier(self) -> Supervised:
        assert isinstance(self.objective, Supervised)
        return self.objective

    @property
    def recordings(self) -> Manifest:
        return self.runner.corpus.manifest

    @property
    def bad(self) -> Mapping[str, str]:
        """Files that cannot be read: path -> reason."""
        return self.runner.corpus.bad.seen


def open_weights(ckpt: Path, which: Which = "auto", *, classifier: bool = False) -> Weights:
    """The weights, with what there is to say about them printed.

    Raises:
        UserError: no such checkpoint, or no `classifier` in it though one is needed.
    """
    weights = load_weights(ckpt, which)
    for line in weights.notes:
        print(line)
    name = weights.recipe.objective.name
    if classifier and (name != "supervised" or not weights.classes):
        raise UserError(
            f"{weights.origin} is {'an encoder alone' if name == 'supervised' else f'of objective {name}'} and has no "
            "classifier: ssl_c2f finetune makes one (ssl_c2f probe scores its features)"
        )
    return weights


def open_inference(weights: Weights, options: InferenceOptions, recordings: Manifest, data: DataOptions) -> Inference:
    """Raises UserError: no such device, or more unreadable files than data.max_bad_files."""
    print("".join(f"{note}\n" for note in recordings.notes), end="")
    device, corpus = distributed.init(options.device).device, Corpus.whole(recordings, data)
    geometry = weights.geometry if options.resolution == "trained" else weights.recipe.fine_geometry
    front_end = InputStatistics(corpus, weights.statistics).front_end(geometry).to(device)
    return Inference(weights, weights.objective(geometry, device), Runner(corpus, front_end, options.batch_size))


def results_of(weights: Weights, kind: str, data: DataOptions) -> Path:
    """Where results of a checkpoint on a set of recordings go by default."""
    name = Path(data.manifest).stem if data.manifest else Path(data.root or ".").resolve().name or "recordings"
    return weights.results.path / kind / name
