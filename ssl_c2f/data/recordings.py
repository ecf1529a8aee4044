"""The recordings of a run: the options that name them, which are trained on or held out, how often each is drawn."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ssl_c2f.core import draws
from ssl_c2f.core.options import Options, UserError
from ssl_c2f.data.decode import Channel
from ssl_c2f.data.manifest import Manifest, read_manifest, scan
from ssl_c2f.data.tables import TEST, VALIDATION


class DataOptions(Options):
    """Where the recordings are, which of them are held out, and how they are read."""

    root: str | None = Field(None, description="folder of recordings; with a manifest, what its paths are relative to")
    manifest: str | None = Field(None, description="CSV, TSV or JSONL table of recordings, labels and folds")
    labels: Literal["auto", "path", "folder", "top", "none"] = Field(
        "auto", description="of a folder: which folder names are labels; auto: the whole path below the root, but in "
        "pretraining only where the names look like labels"
    )
    columns: dict[str, str] = Field({}, description="of a table, where names are unusual: {path: wav, labels: kind}")
    separator: str | None = Field(None, min_length=1, description="of several labels in one cell of a table; else ;")
    fold_pattern: str | None = Field(None, description="regular expression whose one group is a file name's fold")
    val_folds: tuple[int, ...] = Field((), description="folds held out for validation")
    val_fraction: float = Field(0.0, ge=0, lt=1, description="fraction held out where no folds are; chosen by path, "
                                "in fine-tuning class by class")
    balance: Literal["none", "sqrt", "full"] = Field(
        "none", description="how often clips of rare classes are drawn: full: every class equally often; sqrt: halfway"
    )
    group_pattern: str | None = Field(
        None, description="regular expression; recordings in whose paths it (or its group) finds the same stay together"
    )
    channel: Channel = Field("mean", description="of several: their mean, one, or the loudest of what is read")
    workers: int = Field(0, ge=0, description="loader processes; unused when the spectrograms are cached")
    cache_gb: float = Field(4.0, ge=0, description="keep spectrograms in memory if they fit, per process; 0 never does")
    max_bad_files: int = Field(100, ge=0, description="unreadable files that are skipped before the run stops")
    statistics_clips: int = Field(2000, ge=1, description="clips that mean and deviation are measured on")


def open_manifest(options: DataOptions, progress: Callable[[int, int], object] | None = None) -> Manifest:
    """The manifest that the options name. Raises UserError."""
    root = Path(options.root) if options.root else None
    if options.manifest:
        found = read_manifest(
            Path(options.manifest), root, columns=options.columns, separator=options.separator, progress=progress
        )
    elif root is None:
        raise UserError("no audio: give data.root=FOLDER or data.manifest=FILE")
    else:
        labels = "path" if options.labels == "auto" else options.labels
        found = scan(root, fold_pattern=options.fold_pattern, labels=labels, progress=progress)
    return found if options.group_pattern is None else grouped(found, options.group_pattern)


def grouped(manifest: Manifest, pattern: str) -> Manifest:
    """The manifest with the group of each path that a regular expression matches.

    Raises:
        UserError: it is none, or matches no path.
    """
    try:
        matches = [re.search(pattern, clip.path) for clip in manifest.clips]
    except re.error as error:
        raise UserError(f"data.group_pattern={pattern}: {error}") from None
    if not any(matches):
        raise UserError(f"data.group_pattern={pattern}: matches no path, for example not {manifest.clips[0].path!r}")
    names = [match and (match[1] if match.re.groups else match[0]) for match in matches]
    return replace(manifest, clips=tuple(map(lambda clip, name: replace(clip, group=name), manifest.clips, names)))


def split(manifest: Manifest, options: DataOptions) -> tuple[list[int], list[int]]:
    """Clips to train on and clips held out. A fraction never splits a recording, nor a group.

    Raises:
        UserError: a fold that no clip has, or nothing left to train on.
    """
    everything: Sequence[int] = range(len(manifest.clips))
    if manifest.is_split and not options.val_folds:  # the table says it
        folds = [clip.fold for clip in manifest.clips]
        held_out = [i for i in everything if folds[i] == VALIDATION]
        everything = [i for i in everything if folds[i] != TEST]
    elif options.val_folds:
        held_out = manifest.in_folds(options.val_folds, "data.val_folds")
    else:
        limit = int(options.val_fraction * 2**32)
        digests = (hashlib.sha256(os.fsencode(clip.unit)).digest() for clip in manifest.clips)
        held_out = [i for i, digest in enumerate(digests) if int.from_bytes(digest[:4], "big") < limit]
    training = sorted(set(everything) - set(held_out))
    if not training:
        raise UserError(f"no clip of {manifest.root} is left to train on: all are held out")
    return training, held_out


def hold_out(manifest: Manifest, fraction: float, seed: int) -> list[int]:
    """About a fraction of the recordings of each class, all clips of a recording or a group together.

    A recording counts as of the rarest of its labels.
    """
    counts = Counter(label for clip in manifest.clips for label in clip.labels)
    units: dict[str, set[str]] = {}
    for clip in manifest.clips:
        units.setdefault(clip.unit, set()).update(clip.labels)
    chance = draws.uniform(draws.key(seed, torch.arange(len(units)), "hold out"), 1)[:, 0].tolist()
    rarest = [min(labels, key=lambda label: (counts[label], label), default="") for labels in units.values()]
    order = sorted(range(len(units)), key=lambda i: (rarest[i], chance[i]))
    # every so many of the recordings in order of their class: of no class one more or less than its part
    chosen = {unit for place, unit in enumerate(order) if int((place + 1) * fraction) > int(place * fraction)}
    names = {name for i, name in enumerate(units) if i in chosen}
    return [i for i, clip in enumerate(manifest.clips) if clip.unit in names]


def balanced_weights(manifest: Manifest, clips: Sequence[int], kind: Literal["sqrt", "full"]) -> Tensor:
    """(n,) how often to draw each of n clips, in proportion: by the rarest of its labels. Those without labels count
    as one class."""
    labels = [manifest.clips[i].labels or ("",) for i in clips]
    counts = Counter(label for each in labels for label in each)
    rarity = torch.tensor([1 / min(counts[label] for label in each) for each in labels], dtype=torch.float64)
    return rarity.sqrt() if kind == "sqrt" else rarity
