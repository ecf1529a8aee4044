"""Writes an encoder into the package: the newest weights of a run in half precision, which --ckpt then knows by name.

    ssl_c2f pretrain configs/pretrain/c2f_nano.yaml data.root=FOLDER run_dir=runs/c2f_nano
    python benchmarks/release.py runs/c2f_nano c2f_nano

Decoder and projection go with the encoder, so that `pretrain init=c2f_nano` continues where the run ended. Names of the
folders that it was trained on do not: they are no classes.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch

from ssl_c2f.core.files import write_bytes, write_json
from ssl_c2f.core.options import UserError
from ssl_c2f.train.weights import RELEASED, load_weights


def release(run: Path, name: str) -> Path:
    """Write the weights of `run` as the released encoder `name`; returns its folder.

    Raises:
        UserError: no weights there, or they do not fit into half precision.
    """
    weights, folder = load_weights(run), RELEASED / name
    halves = {key: tensor.half() for key, tensor in weights.tensors.items()}
    if wrong := [key for key, tensor in halves.items() if not torch.isfinite(tensor).all()]:
        raise UserError(f"{run}: {wrong[0]} is too large for half precision")
    write_bytes(folder / "model.safetensors", safetensors.torch.save(halves))
    write_json(folder / "state.json", replace(weights, classes=()).to_json())
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    print(release(**vars(parser.parse_args())))
