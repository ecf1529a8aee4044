"""Probes: what a linear classifier and nearest neighbours make of frozen features, fold by fold, beside yardsticks.

Legend: B batch, T frames, F mel bins, n clips, m queries, D features, C classes.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from ssl_c2f.core import draws
from ssl_c2f.core.files import write_json
from ssl_c2f.core.options import UserError
from ssl_c2f.core.progress import Count, table
from ssl_c2f.data.front_end import Batch
from ssl_c2f.data.recordings import open_manifest
from ssl_c2f.models.heads import Layer, Readout
from ssl_c2f.objectives import Objective
from ssl_c2f.tasks.evaluate import finite, shown
from ssl_c2f.tasks.inference import Inference, RecordingOptions, open_inference, open_weights, results_of
from ssl_c2f.train import metrics, publish

Reader = Callable[[Batch], Mapping[str, Tensor]]  # readouts by name, of a batch of windows
CHOSEN = "best on the training folds"
_INNER = 3  # parts of the training folds in which the regularisation is chosen


class ProbeOptions(RecordingOptions):
    """`ssl_c2f probe`."""

    out: str | None = Field(None, description="folder of probe.json; by default RUN/probe/NAME-OF-THE-DATA")
    baseline: bool = Field(True, description="also probe the mean and deviation of the log-mel values of each mel bin")
    random: bool = Field(True, description="also probe an encoder of the same shape with random weights")
    strengths: tuple[float, ...] = Field(
        (1e-4, 1e-3, 1e-2, 1e-1, 1.0), min_length=1, description="C of the regression; chosen on training folds"
    )
    knn: int = Field(10, ge=1, description="neighbours")
    readouts: tuple[Readout, ...] = Field(("mean", "mean_std", "bands", "bands_std"), min_length=1)
    layers: tuple[Layer, ...] = Field(("last",), min_length=1, description="last, a block's number, mean of all blocks")
    splits: int = Field(5, ge=2, description="folds that are made where the recordings have none")
    seed: int = Field(0, ge=0, description="of those folds and of the random encoder")


def probe(ckpt: Path, options: ProbeOptions) -> dict[str, Any]:
    """Probe a checkpoint's frozen features on labelled recordings: prints, writes and returns the scores.

    Features are averages over the windows of a recording, standardised with the training folds' mean and deviation.

    Raises:
        UserError: fewer than two classes or folds, or nothing that can be read.
    """
    weights, everything = open_weights(ckpt, options.weights), open_manifest(options.data)
    multi = everything.is_multi_label  # then one without labels is a negative of all classes
    chosen = everything.in_folds(options.folds, "folds")
    recordings = everything.only(i for i in chosen if everything.clips[i].labels or multi)
    if len(recordings.classes) < 2:
        raise UserError(f"{recordings.root}: a probe needs recordings of at least two classes")
    inference = open_inference(weights, options, recordings, options.data)
    features, found = _features(inference, _readers(inference, options))
    labels = recordings.labels(found)
    folds, split = choose_folds([recordings.clips[i].fold for i in found.tolist()], labels, options)
    rows = _probe_all(features, labels, folds, options)
    result: dict[str, Any] = finite({
        "checkpoint": weights.origin, "resolution": options.resolution, "clips": len(found),
        "classes": list(recordings.classes), "split": split, "rows": rows, "bad_files": dict(inference.bad),
    })
    folder = Path(options.out) if options.out else results_of(weights, "probe", options.data)
    write_json(folder / "probe.json", result)
    print_probe(result)
    publish.show_scores(weights.origin, folder, "probe", result)
    print(folder)
    return result


def _readers(inference: Inference, options: ProbeOptions) -> dict[str, Reader]:
    """What is probed, the encoders with the same readouts each."""
    wanted = list(itertools.product(options.layers, options.readouts))

    def reader(objective: Objective) -> Reader:
        return lambda batch: {_title(*key): x for key, x in objective.embeddings(batch, wanted).items()}

    readers = {"checkpoint": reader(inference.objective)}
    if options.random:
        with torch.random.fork_rng():
            torch.manual_seed(draws.seed(options.seed, "random encoder"))
            weights, front_end = inference.weights, inference.runner.front_end
            untrained = weights.recipe.build(front_end.geometry, len(weights.classes)).to(front_end.device).eval()
        readers["random encoder"] = reader(untrained)
    if options.baseline:
        readers["log-mel"] = log_mel_statistics
    return readers


def _title(layer: Layer, readout: Readout) -> str:
    return readout.replace("_std", "+std") + ("" if layer == "last" else f", layer {layer}")


def log_mel_statistics(batch: Batch) -> dict[str, Tensor]:
    """Means (B, F) of each mel bin over the real frames, which are bands already, and with deviations (B, 2 F)."""
    real = (torch.arange(batch.spec.shape[1], device=batch.spec.device) < batch.num_frames[:, None])[..., None]
    count = real.sum(1)
    mean = (batch.spec * real).sum(1) / count
    variance = ((batch.spec - mean[:, None]).square() * real).sum(1) / count
    return {"mean": mean, "mean+std": torch.cat([mean, variance.sqrt()], dim=1)}


def _features(inference: Inference, readers: Mapping[str, Reader]) -> tuple[dict[tuple[str, str], Tensor], Tensor]:
    """(n, D) of each reader and readout, all from one pass over the recordings, and (n,) which clips."""
    widths: dict[tuple[str, str], int] = {}

    def read(batch: Batch) -> Tensor:
        parts = {(name, kind): x.float() for name, reader in readers.items() for kind, x in reader(batch).items()}
        widths.update({name: part.shape[1] for name, part in parts.items()})
        return torch.cat(list(parts.values()), dim=1)

    rows, found = inference.run(read, "reading features").by_clip()
    return dict(zip(widths, torch.split(rows, list(widths.values()), dim=1), strict=True)), found


def choose_folds(given: Sequence[int | None], labels: Tensor, options: ProbeOptions) -> tuple[Tensor, str]:
    """(n,) the fold of each clip, and in words where it is from.

    Raises:
        UserError: too few clips to split.
    """
    numbers = [fold for fold in given if fold is not None]
    if len(numbers) == len(given) and len(set(numbers)) > 1:
        return torch.tensor(numbers), f"the recordings' own {len(set(numbers))} folds"
    if len(given) < options.splits:
        raise UserError(f"{len(given)} labelled recordings are too few for {options.splits} folds: set splits")
    return deal(labels, options.splits, options.seed), f"{options.splits} stratified folds, seed {options.seed}"


def deal(labels: Tensor, k: int, seed: int) -> Tensor:
    """(n, C) labels -> (n,) a fold from 1 to k for each clip: shuffled, then dealt out class by class.

    A clip with several labels counts as of its rarest one.
    """
    rarity = labels.sum(0).expand_as(labels).masked_fill(labels == 0, float("inf"))
    shuffled = draws.uniform(draws.key(seed, torch.arange(len(labels)), "fold"), 1)[:, 0].argsort()
    order = shuffled[rarity.argmin(1)[shuffled].argsort(stable=True)]
    folds = torch.empty(len(labels), dtype=torch.int64)
    folds[order] = torch.arange(len(labels)) % k + 1
    return folds


def _probe_all(
    features: Mapping[tuple[str, str], Tensor], labels: Tensor, folds: Tensor, options: ProbeOptions
) -> list[dict[str, Any]]:
    """A row for each readout, and one for the readout that is best on the training folds, fold by fold."""
    by_readout: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    with Count("fitting probes") as count:
        for name, x in features.items():
            there = sorted(set(folds.tolist()))
            by_readout[name] = {fold: probe_fold(x, labels, folds, fold, options) for fold in there}
            count.update(len(by_readout), len(features))
    rows = []
    for kind in dict.fromkeys(kind for kind, _ in features):
        found = {readout: folds_of for (of, readout), folds_of in by_readout.items() if of == kind}
        rows += [{"features": kind, "readout": readout, **_spread(each)} for readout, each in found.items()]
        if len(found) > 1:
            best = {}
            for fold in there:
                readout = max(found, key=lambda name: found[name][fold]["inner"])  # of equals the first
                best[fold] = {**found[readout][fold], "readout": readout}
            rows.append({"features": kind, "readout": CHOSEN, **_spread(best)})
    return rows


def probe_fold(x: Tensor, labels: Tensor, folds: Tensor, fold: int, options: ProbeOptions) -> dict[str, Any]:
    """Scores on one fold of probes that were fitted, standardised and regularised on the other folds alone; `inner` is
    the linear one's in cross-validation within those."""
    train, test = folds != fold, folds == fold
    single = bool((labels.sum(1) == 1).all())
    strength, inner = choose_strength(x[train], labels[train], folds[train], options, single)
    a, b = standardise(x[train], x[test])
    linear = linear_scores(a, labels[train], b, [strength], single)[0]
    nearest = metrics.knn_scores(b, a, labels[train], options.knn)
    return {
        "linear": _score(linear, labels[test], single), "knn": _score(nearest, labels[test], single), "C": strength,
        "inner": inner, "clips": int(test.sum()), "metric": "accuracy" if single else "map",
    }


def choose_strength(
    x: Tensor, labels: Tensor, folds: Tensor, options: ProbeOptions, single: bool
) -> tuple[float, float]:
    """The C that is best in cross-validation, and its score; whole folds are held out, so what belongs together stays
    so."""
    strengths = sorted(options.strengths)
    whole = sorted(set(folds.tolist()))
    groups = torch.tensor([whole.index(fold) % _INNER for fold in folds.tolist()])
    if len(whole) == 1:
        groups = deal(labels, _INNER, options.seed)
    scores = torch.zeros(len(strengths), *labels.shape)
    for group in sorted(set(groups.tolist())):
        held_out = groups == group
        a, b = standardise(x[~held_out], x[held_out])
        scores[:, held_out] = torch.stack(linear_scores(a, labels[~held_out], b, strengths, single))
    values = torch.tensor([_score(each, labels, single) for each in scores]).nan_to_num(0.0)
    best = int(values.argmax())  # of equals the strongest regularisation
    return strengths[best], float(values[best])


def standardise(train: Tensor, *others: Tensor) -> list[Tensor]:
    """All of them with the mean and deviation of `train`; what is constant there is only centred."""
    mean, std = train.mean(0), train.std(0, correction=0)
    scale = torch.where(std > 1e-6 * mean.abs().clamp(min=1e-6), std, 1.0)
    return [(x - mean) / scale for x in (train, *others)]


def linear_scores(
    x: Tensor, labels: Tensor, queries: Tensor, strengths: Sequence[float], single: bool
) -> list[Tensor]:
    """Logistic regression on (n, D) and (n, C) -> for each of its C, ascending, (m, C) probabilities of (m, D) queries.
    """
    logits = [queries @ weight.T + bias for weight, bias in linear_fits(x, labels, strengths, single)]
    return [each.softmax(1) if single else each.sigmoid() for each in logits]


def linear_fits(
    x: Tensor, labels: Tensor, strengths: Sequence[float], single: bool
) -> list[tuple[Tensor, Tensor]]:
    """Weights (C, D) and biases (C,) of logistic regression on (n, D) and (n, C), for each strength, ascending.

    One regression for all classes if every clip has a `single` label, else one for each class.
    """
    if single:
        return _regression(x, labels.argmax(1), strengths, labels.shape[1])
    columns = [_regression(x, column.long(), strengths, 2) for column in labels.T]
    return [
        tuple(torch.stack([path[i][part][1] - path[i][part][0] for path in columns]) for part in (0, 1))  # type: ignore[misc]
        for i in range(len(strengths))
    ]


_NEVER = -1e4  # logit of a class without examples


def _regression(
    x: Tensor, target: Tensor, strengths: Sequence[float], num_classes: int
) -> list[tuple[Tensor, Tensor]]:
    """(n, D), (n,) class numbers -> for each C, weights (num_classes, D) and biases (num_classes,) of the logits."""
    fits = [(torch.zeros(num_classes, x.shape[1]), torch.full((num_classes,), _NEVER)) for _ in strengths]
    there = sorted(set(target.tolist()))
    if len(there) == 1:
        for _, bias in fits:
            bias[there] = 0.0
        return fits
    model = LogisticRegression(max_iter=2000, tol=1e-3, warm_start=True)
    for strength, (weight, bias) in zip(strengths, fits, strict=True):
        model.set_params(C=strength).fit(x.numpy(), target.numpy())
        found = tuple(torch.from_numpy(np.asarray(part)).float() for part in (model.coef_, model.intercept_))
        if len(there) == 2:  # one logit, of the second class
            found = tuple(torch.cat([torch.zeros_like(part), part]) for part in found)
        weight[there], bias[there] = found
    return fits


def _score(scores: Tensor, labels: Tensor, single: bool) -> float:
    return metrics.accuracy(scores, labels) if single else metrics.multi_label(scores, labels)["map"]


def _spread(by_fold: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Mean over the folds, deviation between them, and each of them."""
    summary: dict[str, Any] = {"metric": next(iter(by_fold.values()))["metric"]}
    for kind in ("linear", "knn"):
        values = [fold[kind] for fold in by_fold.values() if fold[kind] == fold[kind]]
        summary[kind] = {
            "mean": statistics.fmean(values) if values else None,
            "std": statistics.stdev(values) if len(values) > 1 else None,
        }
    return summary | {"folds": {str(fold): dict(values) for fold, values in by_fold.items()}}


def print_probe(result: Mapping[str, Any]) -> None:
    """Print what `probe` returned."""
    metric = {"accuracy": "accuracy", "map": "mAP"}[result["rows"][0]["metric"]]
    rows = [
        (row["features"], row["readout"],
         *(f"{shown(row[kind]['mean'])} ± {shown(row[kind]['std'])}" for kind in ("linear", "knn")))
        for row in result["rows"]
    ]
    table(f"{metric} of frozen features, mean ± deviation over {result['split']} ({result['clips']} recordings)",
          ("features", "readout", "linear", "kNN"), rows)
