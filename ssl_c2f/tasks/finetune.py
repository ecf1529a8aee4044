"""Fine-tuning: a head on a pretrained encoder, trained and scored fold by fold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from ssl_c2f.curriculum.geometry import other_frequencies
from ssl_c2f.curriculum.transfer import transfer
from ssl_c2f.data.corpus import Corpus
from ssl_c2f.data.front_end import FrontEnd
from ssl_c2f.data.manifest import Manifest
from ssl_c2f.data.recordings import hold_out, split
from ssl_c2f.data.runner import Runner
from ssl_c2f.data.statistics import InputStatistics
from ssl_c2f.data.tables import TEST
from ssl_c2f.objectives.supervised import Supervised, SupervisedOptions
from ssl_c2f.tasks.evaluate import print_scores, write_scores
from ssl_c2f.tasks.inference import open_weights
from ssl_c2f.tasks.probe import ProbeOptions, choose_folds, choose_strength, linear_fits
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
    start: Literal["random", "probe"] = Field(
        "random", description="of the head: random weights, or a logistic regression on the frozen encoder's features"
    )
    from_scratch: bool = Field(False, description="the same network with random weights: what pretraining is worth")
    objective: SupervisedOptions = SupervisedOptions()  # type: ignore[assignment]

    @model_validator(mode="after")
    def _one_split(self) -> FinetuneOptions:
        if self.data.val_folds:
            raise ValueError("data.val_folds: fine-tuning holds out each fold in turn; choose them with folds=[1,2]")
        return self


def checkpoint_defaults(weights: Weights) -> Mapping[str, Any]:
    """What a fine-tuning run takes over from its checkpoint, and that it is to be scored where there are no folds."""
    return weights.recipe.model_dump(mode="json", include={"audio", "model", "compression"}) | UNSPLIT


UNSPLIT = {"data": {"val_fraction": 0.2}}


def finetune(ckpt: Path, options: FinetuneOptions, stop: Stop | None = None, *, report: bool = True) -> Path:
    """Fine-tune on every fold that is not done yet, score the held-out clips, and return the folder with scores.json.

    Without `report` it only trains: for jobs that share the folder, each with a fold of its own.

    Raises:
        UserError: the encoder does not fit the checkpoint, a fold does not exist, a clip has no label.
    """
    weights, stop = open_weights(ckpt, options.weights), stop or Stop()
    if note := other_frequencies(weights.recipe.audio, options.audio):
        print(note)
    factor = weights.factor
    if options.statistics == "measure":
        weights = replace(weights, statistics={})
    folder = Path(options.run_dir) if options.run_dir else weights.results.finetuning(options.name).path
    check_origin(folder, weights.origin)
    is_main = distributed.init(options.train.device).is_main
    everything = Corpus.open(options.data, options.seed, RunFolder(folder).bad_files if is_main else None)
    if is_main:
        print("".join(f"{note}\n" for note in everything.manifest.notes), end="")
    scored: dict[int | None, tuple[Tensor, Tensor]] = {}
    for fold in folds_of(options, everything.manifest):
        path = folder if fold is None else RunFolder(folder).fold(fold).path
        own = {} if fold is None else {"val_folds": (fold,), "val_fraction": 0.0}
        part = options.model_copy(update={"data": options.data.model_copy(update=own)})
        training, held_out, test = parts_of(everything.manifest, part)
        corpus = replace(everything, training=training, held_out=held_out)
        if is_main:
            _say_parts(everything.manifest, fold, training, test)
        statistics = InputStatistics(corpus, weights.statistics, RunFolder(path), factor)
        initial = None if options.from_scratch else weights
        if initial and options.start == "probe" and not RunFolder(path).newest():
            initial = with_fitted_head(initial, part, statistics)
        group = publish.group_of(weights.origin)
        engine.run(part, path, initial=initial, statistics=statistics, stop=stop, kind="finetune", group=group)
        if test and report:
            scored[fold] = _score(part, path, corpus, test)
    if scored:
        _report(folder, everything.manifest, scored, weights, options)
    return folder


def with_fitted_head(weights: Weights, options: FinetuneOptions, statistics: InputStatistics) -> Weights:
    """The weights with a head that is the linear probe of their frozen features on the training clips: fine-tuning
    starts from what the probe knows, and the first steps do not wash out the encoder for a head that knows nothing
    (Kumar et al., "Fine-Tuning can Distort Pretrained Features", ICLR 2022)."""
    corpus, device = statistics.corpus, distributed.init(options.train.device).device
    classes, single = corpus.manifest.classes, options.objective.labels == "single"
    with torch.random.fork_rng([]):
        model = options.build(options.fine_geometry, len(classes))
    fitted, _ = transfer(weights.tensors, weights.geometry, model.state_dict(), options.fine_geometry)
    model.load_state_dict(fitted)
    model = model.to(device).eval()
    assert isinstance(model, Supervised)
    front_end = statistics.front_end(options.fine_geometry).to(device)
    runner = Runner(corpus, front_end, options.evaluation.batch_size)
    x, found = runner.run(model.head_features, corpus.training).by_clip()
    labels = corpus.manifest.labels(found)
    folds = [corpus.manifest.clips[i].fold for i in found.tolist()]
    parts = choose_folds(folds, labels, ProbeOptions(splits=2))[0]
    strength, _ = choose_strength(x, labels, parts, ProbeOptions(), single)
    mean, std = x.mean(0), x.std(0, correction=0).clamp(min=1e-6)
    weight, bias = linear_fits((x - mean) / std, labels, [strength], single)[0]
    head = {"head.classifier.weight": weight / std, "head.classifier.bias": bias - (weight / std) @ mean}
    norm = {f"head.norm.{name}": value.detach().cpu() for name, value in model.head.norm.state_dict().items()}
    kept = {name: value for name, value in weights.tensors.items() if not name.startswith("head.")}
    return replace(weights, tensors={**kept, **norm, **head})


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
    there = manifest.folds
    if options.folds == "auto":
        return [*there] if len(there) > 1 and not manifest.is_split else [None]
    if missing := set(options.folds) - set(there):
        raise UserError(f"folds: no clip of {manifest.root} is in fold {min(missing)}; there are {there}")
    return [*options.folds]


def parts_of(manifest: Manifest, options: FinetuneOptions) -> tuple[list[int], list[int], list[int]]:
    """Clips to train on, to validate with meanwhile, and to score at the end. The last two are the same but where a
    table names its validation and its test clips."""
    training, held_out = split(manifest, options.data)
    if options.data.val_folds:
        return training, held_out, held_out
    if manifest.is_split:
        return training, held_out, manifest.in_folds([TEST], "test") if TEST in manifest.folds else held_out
    held_out = hold_out(manifest, options.data.val_fraction, options.seed)
    return sorted({*range(len(manifest.clips))} - {*held_out}), held_out, held_out


def _say_parts(manifest: Manifest, fold: int | None, training: Sequence[int], test: Sequence[int]) -> None:
    """What is held out where no fold says it, and the classes that a score says nothing of."""
    if not test:
        print("every recording is trained on: there will be no score (data.val_fraction=0.2 holds a fifth out)")
        return
    if fold is None and not manifest.is_split:
        print(f"the recordings have no folds: {len(test)} of {len(manifest.clips)} clips are held out, class by class "
              "(data.val_fraction)")
    where = "" if fold is None else f"fold {fold}: "
    for name, clips in (("train on", training), ("score", test)):
        there = {label for i in clips for label in manifest.clips[i].labels}
        if missing := [label for label in manifest.classes if label not in there]:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            print(f"{where}no clip to {name} of {', '.join(missing[:5])}{more}")


def _score(options: FinetuneOptions, path: Path, corpus: Corpus, clips: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(n, C) scores of the clips, and (n,) which of them could be read."""
    device, tuned = distributed.init(options.train.device).device, load_weights(path, options.weights)
    model = tuned.at_full_resolution(device)
    front_end = FrontEnd(tuned.recipe.fine_geometry, tuned.fine_statistics).to(device)
    assert isinstance(model, Supervised)
    return Runner(corpus, front_end, options.evaluation.batch_size).run(model.scores, clips).by_clip()


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
