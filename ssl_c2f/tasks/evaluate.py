"""Scoring a classifier on labelled recordings, and writing scores so that they can be read again.

OUT/
  scores.json      accuracy with interval, recall per class, confusion matrix; or mAP with interval, AUC, d' and
                   precision per class
  predictions.csv  path, label, predicted, and a score for each class

Legend: n clips, C classes.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import Field
from torch import Tensor

from ssl_c2f.core.files import read_json, write_csv, write_json
from ssl_c2f.core.options import UserError
from ssl_c2f.core.progress import table
from ssl_c2f.data.manifest import Manifest, fingerprint
from ssl_c2f.data.recordings import DataOptions, hold_out, open_manifest, split
from ssl_c2f.objectives.supervised import SupervisedOptions
from ssl_c2f.tasks.inference import RecordingOptions, open_inference, open_weights, results_of
from ssl_c2f.train import metrics, publish
from ssl_c2f.train.weights import Weights

_MOST_COLUMNS = 20  # classes whose confusion matrix still fits a terminal


class EvaluateOptions(RecordingOptions):
    """`ssl_c2f evaluate`."""

    out: str | None = Field(None, description="folder of the scores; by default RUN/evaluation/NAME-OF-THE-DATA")


def evaluate(ckpt: Path, options: EvaluateOptions) -> dict[str, Any]:
    """Score a supervised checkpoint on labelled recordings: prints, writes and returns the scores.

    Raises:
        UserError: no classifier in the checkpoint, a label that it does not know, no labelled recording to be read.
    """
    weights, everything = open_weights(ckpt, options.weights, classifier=True), open_manifest(options.data)
    chosen = everything.in_folds(options.folds, "folds")
    multi = isinstance(weights.recipe.objective, SupervisedOptions) and weights.recipe.objective.labels == "multi"
    labelled = [i for i in chosen if multi or everything.clips[i].labels]  # without labels: a negative of all classes
    if unlabelled := len(chosen) - len(labelled):
        print(f"without a label, and so left out: {unlabelled} of {len(chosen)} recordings")
    recordings = replace(everything.only(labelled), classes=weights.classes)
    _check_labels(recordings)
    inference = open_inference(weights, options, recordings, options.data)
    scores, found = inference.run(inference.classifier.scores, "scoring windows").by_clip()
    seen = seen_in_training(weights, everything, labelled)
    if seen:
        print(f"note: the model was trained on {seen} of these {len(labelled)} recordings")
    suffix = "".join(f"-fold-{fold}" for fold in options.folds)
    suffix += "-trained" if options.resolution == "trained" else ""
    default = results_of(weights, "evaluation", options.data)
    folder = Path(options.out) if options.out else default.with_name(default.name + suffix)
    result = write_scores(folder, recordings, found, scores, {
        "checkpoint": weights.origin, "resolution": options.resolution, "only_folds": list(options.folds),
        "seen_in_training": seen, "unlabelled": unlabelled, "bad_files": dict(inference.bad),
    })
    print_scores(result)
    publish.show_scores(weights.origin, folder, "evaluate", result)
    print(folder)
    return result


def seen_in_training(weights: Weights, manifest: Manifest, clips: Sequence[int]) -> int:
    """How many of the clips the checkpoint's run was trained on; 0 where it was trained on another set."""
    run = weights.results
    facts = read_json(run.recordings)
    try:
        config = yaml.safe_load(run.config.read_text())
        data = DataOptions.model_validate(config["data"], strict=False)
    except (OSError, ValueError, KeyError, TypeError):  # a checkpoint without its run
        return 0
    if facts.get("fingerprint") != fingerprint(manifest):
        return 0
    if "from_scratch" in config and not data.val_folds and not manifest.is_split:  # fine-tuned without folds
        training = {*range(len(manifest.clips))} - {*hold_out(manifest, data.val_fraction, config["seed"])}
    else:
        training = {*split(manifest, data)[0]}
    return len(training & set(clips))


def _check_labels(recordings: Manifest) -> None:
    classes = recordings.classes
    for clip in recordings.clips:
        if unknown := set(clip.labels) - set(classes):
            known = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
            raise UserError(f"{clip.path}: the model does not know the label {min(unknown)!r} (it knows {known})")


def summarise(scores: Tensor, labels: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    """What (n, C) scores are worth, (n, C) labels of 0 and 1 given; NaN is what is undefined.

    Where every clip has one label: accuracy, its Wilson interval, recall per class, confusion matrix (rows: labels).
    Otherwise: mAP, its bootstrap interval, AUC, d' and average precision per class.
    """
    result: dict[str, Any] = {"clips": len(scores), "classes": list(classes)}
    result |= metrics.score(scores, labels)
    if "accuracy" in result:
        confusion = metrics.confusion_matrix(scores, labels)
        result["interval"] = list(metrics.wilson_interval(int(confusion.trace()), len(scores)))
        recall = (confusion.diagonal() / confusion.sum(1)).tolist()
        result["recall"] = dict(zip(classes, recall, strict=True))
        result["confusion"] = confusion.tolist()
        return result
    if math.isfinite(result["map"]):
        result["interval"] = list(metrics.map_interval(result["map"], scores, labels))
    columns = [metrics.multi_label(scores[:, [i]], labels[:, [i]])["map"] for i in range(len(classes))]
    result["average_precision"] = dict(zip(classes, columns, strict=True))
    return result


def write_scores(
    folder: Path, recordings: Manifest, clips: Tensor, scores: Tensor, extra: Mapping[str, Any]
) -> dict[str, Any]:
    """Write scores.json (with `extra` in it) and predictions.csv; returns what scores.json holds.

    Args:
        clips: (n,) which of the recordings. scores: (n, C) their probabilities.

    Raises:
        UserError: the folder cannot be written.
    """
    classes = recordings.classes
    result: dict[str, Any] = finite(summarise(scores, recordings.labels(clips), classes) | dict(extra))
    write_json(folder / "scores.json", result)
    where = ["start_seconds", "end_seconds"] if recordings.has_stretches else []
    rows = [
        (clip.path, *([f"{clip.start:g}", f"{clip.start + clip.seconds:g}"] if where else []),
         ";".join(name for name in classes if name in clip.labels),
         ";".join(predicted(row, classes, "accuracy" not in result)), *(f"{value:.6f}" for value in row))
        for clip, row in zip((recordings.clips[i] for i in clips.tolist()), scores.tolist(), strict=True)
    ]
    columns = ["path", *where, "label", "predicted", *(f"score_{name}" for name in classes)]
    write_csv(folder / "predictions.csv", columns, rows)
    return result


def predicted(scores: Sequence[float], classes: Sequence[str], several: bool) -> list[str]:
    """The class of the highest score; with several labels per clip, those of 0.5 and more."""
    if several:
        return [name for name, score in zip(classes, scores, strict=True) if score >= 0.5]
    return [classes[max(range(len(classes)), key=lambda i: scores[i])]]


def print_scores(result: Mapping[str, Any]) -> None:
    """Print what `write_scores` returned: the score, the scores of folds where it has them, and what is confused."""
    names = {"accuracy": "accuracy", "map": "mAP", "auc": "AUC", "d_prime": "d'"}
    values = [f"{title} {shown(result[name])}" for name, title in names.items() if name in result]
    if "interval" in result:
        low, high = result["interval"]
        values[0] += f" (95 % interval {low:.4f} to {high:.4f})"
    print(", ".join(values) + f" on {result['clips']} recordings")
    folds = result.get("folds")
    if isinstance(folds, Mapping) and folds:
        metric = "accuracy" if "accuracy" in result else "map"
        there = [v[metric] for v in folds.values() if v.get(metric) is not None]
        each = ", ".join(f"fold {fold} {shown(values_of.get(metric))}" for fold, values_of in folds.items())
        print(each + (f"; mean {statistics.fmean(there):.4f} ± {statistics.pstdev(there):.4f}" if there else ""))
    if "confusion" in result:
        print_confusion(result["classes"], result["confusion"])
    else:
        table("average precision", ("class", "precision"),
              [(name, shown(value)) for name, value in result["average_precision"].items()])


def print_confusion(classes: Sequence[str], confusion: Sequence[Sequence[int]]) -> None:
    """A table of (C, C) counts; of many classes, what is confused most often."""
    if len(classes) <= _MOST_COLUMNS:
        rows = [
            (i, name, *(count or "." for count in row), shown(row[i] / sum(row) if sum(row) else None))
            for i, (name, row) in enumerate(zip(classes, confusion, strict=True))
        ]
        table("confusion: rows what it is, columns what was predicted",
              ("", "class", *map(str, range(len(classes))), "recall"), rows)
        return
    counts = torch.tensor(confusion).fill_diagonal_(0).flatten()
    worst = counts.sort(descending=True, stable=True)
    pairs = [(int(n), *divmod(int(i), len(classes))) for n, i in zip(*worst, strict=True) if n][:_MOST_COLUMNS]
    table("confused most often", ("class", "taken for", "clips"), [(classes[a], classes[b], n) for n, a, b in pairs])


def finite(value: Any) -> Any:
    """JSON has no NaN: None in its place."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def shown(value: float | None) -> str:
    """A score for people to read."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.4f}"
