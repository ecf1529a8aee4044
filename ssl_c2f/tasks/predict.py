"""Labels of recordings that are named on the command line, and how they change over time.

Legend: C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pydantic import Field

from ssl_c2f.core.files import write_csv, write_json
from ssl_c2f.core.options import UserError
from ssl_c2f.core.progress import table
from ssl_c2f.data.manifest import Clip, Manifest, audio_in, checked, listed_in
from ssl_c2f.data.recordings import DataOptions
from ssl_c2f.tasks.evaluate import predicted
from ssl_c2f.tasks.inference import Inference, InferenceOptions, open_inference, open_weights


class PredictOptions(InferenceOptions):
    """`ssl_c2f predict`."""

    top: int = Field(3, ge=1, description="labels that are shown for each row")
    timeline: bool = Field(False, description="a row for each window of a recording instead of one for all of it")
    out: str | None = Field(None, description="write all scores to this .csv or .json file instead of showing the best")
    workers: int = Field(0, ge=0, description="loader processes")


@dataclass(frozen=True)
class Prediction:
    """Scores of a recording, or of a window of it."""

    path: str
    start_seconds: float
    end_seconds: float
    predicted: list[str]
    scores: dict[str, float]


def predict(ckpt: Path, files: Sequence[Path], options: PredictOptions) -> list[Prediction]:
    """Label files, and all audio in folders. What cannot be read is named, counted and skipped.

    Raises:
        UserError: no classifier in the checkpoint, nothing to label, or none of it can be read.
    """
    if options.out and Path(options.out).suffix not in (".csv", ".json"):
        raise UserError(f"out: {options.out} should end in .csv or .json")
    recordings, weights = listed(files), open_weights(ckpt, options.weights, classifier=True)
    # Every recording is read once, so there is nothing to cache; what is skipped is never too much.
    most = len(recordings.clips) + len(recordings.bad)
    data = DataOptions(cache_gb=0.0, workers=options.workers, max_bad_files=most)
    predictions = _predictions(open_inference(weights, options, recordings, data), options.timeline)
    if options.out:
        write_predictions(Path(options.out), predictions)
        print(f"{len(predictions)} rows: {options.out}")
    else:
        _show(predictions, options)
    return predictions


def listed(files: Sequence[Path]) -> Manifest:
    """The files, the audio in the folders and what manifests (.csv, .jsonl) list, each once and in this order.

    Raises:
        UserError: a folder without audio, nothing at all, or nothing that can be read.
    """
    found = list(dict.fromkeys(clip for file in files for clip in _in(file)))
    if not found:
        raise UserError("nothing to predict: name recordings or folders")
    manifest = checked(Path(), found)
    order = {(clip.path, clip.start, clip.end): i for i, clip in enumerate(found)}
    return replace(
        manifest, clips=tuple(sorted(manifest.clips, key=lambda clip: order[clip.path, clip.start, clip.end]))
    )


def _in(file: Path) -> list[Clip]:
    """The recordings that one argument names, with paths as it says them."""
    if file.is_dir():
        return [Clip((file / path).as_posix()) for path in audio_in(file)[0]]
    if file.suffix in (".csv", ".jsonl"):
        return [
            replace(clip, path=(file.parent / clip.path).as_posix(), shard=clip.shard and str(file.parent / clip.shard))
            for clip in listed_in(file)[0]
        ]
    return [Clip(file.as_posix())]


def _predictions(inference: Inference, timeline: bool) -> list[Prediction]:
    classifier, geometry = inference.classifier, inference.runner.front_end.geometry
    rows = inference.run(classifier.scores, "labelling windows")
    window, classes = geometry.clip_samples / geometry.sample_rate, inference.weights.classes
    several = classifier.options.labels == "multi"
    values, index = (rows.values, rows.clip) if timeline else rows.by_clip()
    starts = rows.start.tolist() if timeline else [inference.recordings.clips[i].start for i in index.tolist()]
    predictions = []
    for scores, i, start in zip(values.tolist(), index.tolist(), starts, strict=True):
        clip = inference.recordings.clips[i]
        last = clip.start + clip.seconds
        end = min(start + window, last) if timeline else last
        best = predicted(scores, classes, several)
        predictions.append(Prediction(clip.path, start, end, best, dict(zip(classes, scores, strict=True))))
    return predictions


def write_predictions(file: Path, predictions: Sequence[Prediction]) -> None:
    """All scores as .csv (path, start_seconds, end_seconds, predicted, score_CLASS ...) or .json (objects)."""
    if file.suffix == ".json":
        write_json(file, [asdict(row) for row in predictions])
        return
    scores = [f"score_{name}" for name in predictions[0].scores]
    write_csv(file, ["path", "start_seconds", "end_seconds", "predicted", *scores], (
        (p.path, f"{p.start_seconds:.3f}", f"{p.end_seconds:.3f}", ";".join(p.predicted),
         *(f"{score:.6f}" for score in p.scores.values()))
        for p in predictions
    ))


def _show(predictions: Sequence[Prediction], options: PredictOptions) -> None:
    def best(row: Prediction) -> str:
        ranked = sorted(row.scores.items(), key=lambda item: -item[1])[: options.top]
        return ", ".join(f"{name} {score:.3f}" for name, score in ranked)

    if options.timeline:
        rows = [(p.path, f"{p.start_seconds:.2f}", f"{p.end_seconds:.2f}", best(p)) for p in predictions]
        table(f"{len(rows)} windows", ("recording", "from", "to", "labels (score)"), rows)
    else:
        short = [(p.path, best(p)) for p in predictions]
        table(f"{len(short)} recordings", ("recording", "labels (score)"), short)
