"""Using a checkpoint: open it, and run it over the windows that cover recordings.

Legend: W windows, n clips, D values that are read off a window.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ssl_c2f.core import distributed
from ssl_c2f.core.options import Options, UserError
from ssl_c2f.core.progress import Count
from ssl_c2f.curriculum.geometry import Geometry
from ssl_c2f.data.corpus import BadFiles, Corpus
from ssl_c2f.data.dataset import DataOptions
from ssl_c2f.data.front_end import Batch
from ssl_c2f.data.manifest import Manifest
from ssl_c2f.data.runner import Rows, Runner
from ssl_c2f.data.statistics import InputStatistics
from ssl_c2f.objectives import Objective
from ssl_c2f.train.weights import Weights, Which, load_weights, results_folder


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
class Model:
    """Trained weights, ready to be used in a geometry."""

    objective: Objective
    geometry: Geometry
    weights: Weights
    device: torch.device
    batch_size: int

    @property
    def classes(self) -> tuple[str, ...]:
        """What it tells apart; empty unless it has a classifier."""
        return self.weights.classes if self.weights.recipe.objective.name == "supervised" else ()


def open_model(ckpt: Path, options: InferenceOptions) -> Model:
    """Raises UserError: no such checkpoint, or no such device."""
    weights, device = load_weights(ckpt, options.weights), distributed.init(options.device).device
    for line in weights.notes:
        print(line)
    geometry = weights.geometry if options.resolution == "trained" else weights.recipe.fine_geometry
    return Model(weights.objective(geometry, device), geometry, weights, device, options.batch_size)


def run_of(weights: Weights) -> Path:
    """The folder that results of a checkpoint go to (see `results_folder`)."""
    return results_folder(Path(weights.origin))


def in_folds(manifest: Manifest, folds: Sequence[int]) -> list[int]:
    """The clips of these folds; all, if none is named. Raises UserError: a fold that no clip has."""
    there = {clip.fold for clip in manifest.clips}
    if missing := set(folds) - there:
        known = sorted(fold for fold in there if fold is not None)
        raise UserError(f"folds: no clip of {manifest.root} is in fold {min(missing)}; there are {known}")
    return [i for i, clip in enumerate(manifest.clips) if not folds or clip.fold in folds]


def open_runner(
    manifest: Manifest, clips: Sequence[int], data: DataOptions, model: Model, classes: Sequence[str] | None = None
) -> Runner:
    """Reads the chosen recordings as the model needs them. Columns of labels are `classes`, by default their own.

    Raises:
        UserError: none is chosen, or more unreadable files than data.max_bad_files.
    """
    if not clips:
        raise UserError(f"no recording of {manifest.root} is left to work on")
    chosen = tuple(manifest.clips[i] for i in clips)
    if classes is None:
        classes = sorted({label for clip in chosen for label in clip.labels})
    bad = BadFiles(None, data.max_bad_files)
    bad.add(manifest.bad)
    corpus = Corpus(replace(manifest, clips=chosen, classes=tuple(classes)), list(range(len(chosen))), [], data, 0, bad)
    front_end = InputStatistics(corpus, model.weights.statistics).front_end(model.geometry).to(model.device)
    return Runner(corpus, front_end, model.batch_size)


def run_windows(runner: Runner, read: Callable[[Batch], Tensor], title: str) -> Rows:
    """`Runner.run` over all recordings, with its progress shown."""
    corpus = runner.corpus
    with Count("reading recordings") as count:
        corpus.progress = count.update
        corpus.source(runner.front_end.geometry)  # fills the cache
    with Count(title) as count:
        return runner.run(read, corpus.training, progress=count.update)


def tell_bad(bad: Mapping[str, str]) -> dict[str, str]:
    """Name the unreadable files (path -> reason) on stderr, and give them back."""
    for path, reason in bad.items():
        print(f"skipped {path}: {reason}", file=sys.stderr)
    if bad:
        print(f"unreadable files skipped: {len(bad)}", file=sys.stderr)
    return dict(bad)
