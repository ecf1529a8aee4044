"""Fine-tuning: a head on a pretrained encoder, trained and scored fold by fold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ssl_c2f.core import distributed
from ssl_c2f.core.files import read_json
from ssl_c2f.core.options import UserError
from ssl_c2f.core.run_folder import RunFolder
from ssl_c2f.core.signals import Stop
from ssl_c2f.data.corpus import Corpus
from ssl_c2f.data.dataset import split
from ssl_c2f.data.front_end import FrontEnd
from ssl_c2f.data.manifest import Manifest
from ssl_c2f.data.runner import Runner
from ssl_c2f.data.statistics import InputStatistics
from ssl_c2f.objectives.supervised import Supervised, SupervisedOptions
from ssl_c2f.tasks.evaluate import print_scores, write_scores
from ssl_c2f.tasks.inference import open_weights
from ssl_c2f.train import engine, metrics, publish
from ssl_c2f.train.recipe import RunOptions
from ssl_c2f.train.weights import Weights, Which, load_weights


class FinetuneOptions(RunOptions):
    """`ssl_c2f finetune`. Audio, model and compression are the checkpoint's unless they are given."""

    run_dir: str | None = Field(None, description="by default RUN/finetune/NAME")
    name: str = Field("default", pattern=r"^[A-Za-z0-9_.-]+$")
    folds: Literal["auto"] | tuple[int, ...] = Field("auto", description="folds to hold out in turn; auto: all")
    weights: Which = Field("auto", description="auto: the moving average where there is one")
    statistics: Literal["checkpoint", "measure"] = Field("checkpoint", description="whose mean and deviation")
    from_scratch: bool = Field(False, description="the same network with random weights: what pretraining is worth")
    objective: SupervisedOptions = SupervisedOptions()  # type: ignore[assignment]

    @model_validator(mode="after")
    def _one_split(self) -> FinetuneOptions:
        if self.data.val_folds:
            raise ValueError("data.val_folds: fine-tuning holds out each fold in turn; choose them with folds=[1,2]")
        return self


def checkpoint_defaults(weights: Weights) -> Mapping[str, Any]:
    """What a fine-tuning run takes over from its checkpoint."""
    return weights.recipe.model_dump(mode="json", include={"audio", "model", "compression"})


def finetune(ckpt: Path, options: FinetuneOptions, stop: Stop | None = None, *, report: bool = True) -> Path:
    """Fine-tune on every fold that is not done yet, score the held-out clips, and return the folder with scores.json.

    Without `report` it only trains: for jobs that share the folder, each with a fold of its own.

    Raises:
        UserError: the encoder does not fit the checkpoint, a fold does not exist, a clip has no label.
    """
    weights, stop = open_weights(ckpt, options.weights), stop or Stop()
    factor = weights.factor
    if options.statistics == "measure":
        weights = replace(weights, statistics={})
    folder = Path(options.run_dir) if options.run_dir else weights.results.finetuning(options.name).path
    check_origin(folder, weights.origin)
    is_main = distributed.init(options.train.device).is_main
    everything = Corpus.open(options.data, options.seed, RunFolder(folder).bad_files if is_main else None)
    scored: dict[int | None, tuple[Tensor, Tensor]] = {}
    for fold in folds_of(options, everything.manifest):
        path = folder if fold is None else RunFolder(folder).fold(fold).path
        data = options.data.model_copy(update={"val_folds": () if fold is None else (fold,)})
        part = options.model_copy(update={"data": data})
        training, held_out = split(everything.manifest, data)
        corpus = replace(everything, training=training, held_out=held_out)
        statistics = InputStatistics(corpus, weights.statistics, RunFolder(path), factor)
        initial = None if options.from_scratch else weights
        group = publish.group_of(weights.origin)
        engine.run(part, path, initial=initial, statistics=statistics, stop=stop, kind="finetune", group=group)
        if held_out and report:
            scored[fold] = _score(part, path, corpus)
    if report and not scored:
        print("no score: no recording was held out (they have no folds); data.val_fraction=0.2 holds a share out")
    if scored:
        _report(folder, everything.manifest, scored, weights, options)
    return folder


def check_origin(folder: Path, origin: str) -> None:
    """Refuse to add folds to a fine-tuning that began with other weights: their scores would be told as one.

    Raises:
        UserError: naming both.
    """
    run = RunFolder(folder)
    for phase in (phase for part in (run, *run.folds()) for phase in part.phases()[:1]):
        before = read_json(phase.transfer).get("from", origin)
        if _within_run(Path(before)) != _within_run(Path(origin)):
            raise UserError(
                f"{folder} was fine-tuned from {before}, and this is {origin}: choose another name=, or delete it"
            )


def _within_run(origin: Path) -> Path:
    """Where a checkpoint is in its run, which may have been moved since."""
    run = RunFolder.of(origin)
    return origin.relative_to(run.path if run else origin.parent)


def folds_of(options: FinetuneOptions, manifest: Manifest) -> list[int | None]:
    """The folds to hold out in turn; [None] where the recordings have none.

    Raises:
        UserError: a fold that no clip has.
    """
    there = sorted({clip.fold for clip in manifest.clips if clip.fold is not None})
    if options.folds == "auto":
        return [*there] if len(there) > 1 else [None]
    if missing := set(options.folds) - set(there):
        raise UserError(f"folds: no clip of {manifest.root} is in fold {min(missing)}; there are {there}")
    return [*options.folds]


def _score(options: FinetuneOptions, path: Path, corpus: Corpus) -> tuple[Tensor, Tensor]:
    """(n, C) scores of the fold's held-out clips, and (n,) which clips they are."""
    device, tuned = distributed.init(options.train.device).device, load_weights(path, options.weights)
    model = tuned.at_full_resolution(device)
    front_end = FrontEnd(tuned.recipe.fine_geometry, tuned.fine_statistics).to(device)
    assert isinstance(model, Supervised)
    return Runner(corpus, front_end, options.evaluation.batch_size).run(model.scores, corpus.held_out).by_clip()


def _report(
    folder: Path, recordings: Manifest, scored: Mapping[int | None, tuple[Tensor, Tensor]], weights: Weights,
    options: FinetuneOptions,
) -> None:
    """Scores over all held-out clips together and per fold: printed, and in scores.json and predictions.csv."""
    if not distributed.init(options.train.device).is_main:
        return
    by_fold = {fold: metrics.score(scores, recordings.labels(clips)) for fold, (scores, clips) in scored.items()}
    scores, clips = (torch.cat(parts) for parts in zip(*scored.values(), strict=True))
    result = write_scores(folder, recordings, clips, scores, {
        "checkpoint": weights.origin, "from_scratch": options.from_scratch,
        "folds": {str(fold): values for fold, values in by_fold.items() if fold is not None},
    })
    print_scores(result)
    publish.show_scores(weights.origin, folder, "finetune", result, options.tracking)
