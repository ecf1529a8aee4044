"""Features of recordings to a file, for tools that know nothing of this one.

Legend: n rows (recordings or windows), D features.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import safetensors.numpy
from pydantic import Field

from ssl_c2f.core.files import write_bytes, write_csv
from ssl_c2f.core.options import UserError
from ssl_c2f.data.recordings import open_manifest
from ssl_c2f.models.heads import Layer, Readout
from ssl_c2f.tasks.inference import RecordingOptions, open_inference, open_weights

ENDINGS = (".npz", ".safetensors", ".csv")


class EmbedOptions(RecordingOptions):
    """`ssl_c2f embed`."""

    out: str = Field(description="file.npz, file.safetensors or file.csv")
    readout: Readout = Field("mean", description="of the tokens of a window; bands: a mean for each frequency row")
    layer: Layer = Field("last", description="whose tokens: last, a block's number, or the mean of all blocks")
    windows: bool = Field(False, description="a row for each window, with its start; else their mean per recording")


def embed(ckpt: Path, options: EmbedOptions) -> Path:
    """Write the features of recordings, with their paths and labels, and return the file.

    Raises:
        UserError: another ending, nothing that can be read, or the file cannot be written.
    """
    file = Path(options.out)
    if file.suffix not in ENDINGS:
        raise UserError(f"out: {file} should end in {', '.join(ENDINGS)}")
    weights, everything = open_weights(ckpt, options.weights), open_manifest(options.data)
    recordings = everything.only(everything.in_folds(options.folds, "folds"))
    inference = open_inference(weights, options, recordings, options.data)
    rows = inference.run(
        lambda batch: inference.objective.embed(batch, options.readout, options.layer), "embedding windows"
    )
    values, index = (rows.values, rows.clip) if options.windows else rows.by_clip()
    clips = [recordings.clips[i] for i in index.tolist()]
    starts = rows.start.numpy() if options.windows else np.array([clip.start for clip in clips])
    write_features(
        file, values.numpy().astype(np.float32), [clip.path for clip in clips],
        [";".join(clip.labels) for clip in clips],
        starts if options.windows or recordings.has_stretches else None,
        {"checkpoint": weights.origin, "readout": options.readout, "layer": str(options.layer),
         "resolution": options.resolution},
    )
    print(f"{len(values)} x {values.shape[1]} features of {len(set(index.tolist()))} recordings: {file}")
    return file


def write_features(
    file: Path, features: np.ndarray, paths: Sequence[str], labels: Sequence[str], start: np.ndarray | None,
    facts: Mapping[str, str],
) -> None:
    """Write (n, D) float32 features whole or not at all.

    npz: arrays features, paths, labels and start_seconds. safetensors: features and start_seconds; paths and labels are
    JSON lists in its metadata. csv: path, label, start_seconds, f0, f1, ...
    """
    starts = {} if start is None else {"start_seconds": start.astype(np.float32)}
    match file.suffix:
        case ".npz":
            buffer = io.BytesIO()
            np.savez(buffer, features=features, paths=np.array(paths), labels=np.array(labels), **starts, **facts)  # type: ignore[arg-type]
            write_bytes(file, buffer.getvalue())
        case ".safetensors":
            metadata = {**facts, "paths": json.dumps(list(paths)), "labels": json.dumps(list(labels))}
            tensors = {"features": np.ascontiguousarray(features), **starts}
            write_bytes(file, safetensors.numpy.save(tensors, metadata))
        case ".csv":
            columns = ["path", "label", *starts, *(f"f{i}" for i in range(features.shape[1]))]
            write_csv(file, columns, (
                (path, label, *([] if start is None else [f"{start[i]:g}"]), *map(str, features[i]))
                for i, (path, label) in enumerate(zip(paths, labels, strict=True))
            ))
