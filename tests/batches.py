"""Small batches of noise, as the objectives get them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from ssl_c2f.core import draws
from ssl_c2f.curriculum.geometry import AudioOptions, Geometry, make_geometry
from ssl_c2f.curriculum.phases import Masking
from ssl_c2f.data.front_end import Batch, FrontEnd, Items, Statistics
from ssl_c2f.models.vit import ViTOptions

AUDIO = AudioOptions(num_mels=16, clip_seconds=0.5)
MODEL = ViTOptions(width=16, depth=2, heads=2)
GEOMETRY = make_geometry(AUDIO, "frame_shift", (8, 4), 2)
FULL = AUDIO.clip_seconds * AUDIO.sample_rate
MASKING = Masking("uniform", 0.6, (2, 3))
CLASSES = 4
lengths = st.lists(st.integers(500, int(FULL)), min_size=1, max_size=3)  # samples of the clips of a batch


def sounds(num_samples: list[int], seed: int = 0) -> Items:
    """Clips of noise with these numbers of samples."""
    audio = torch.randn(len(num_samples), int(FULL), generator=torch.Generator().manual_seed(seed))
    index = torch.arange(len(num_samples))
    return Items(
        audio=audio, num_samples=torch.tensor(num_samples), index=index, keys=draws.key(seed, index),
        labels=torch.eye(CLASSES)[index % CLASSES],
    )


def some(items: Items, which: slice) -> Items:
    """The clips of a slice."""
    rows: dict[str, Any] = {name: value[which] for name, value in vars(items).items() if isinstance(value, Tensor)}
    return replace(items, **rows)


def batch_of(items: Items, masking: Masking | None = MASKING, geometry: Geometry = GEOMETRY) -> Batch:
    batch: Batch = FrontEnd(geometry, Statistics(0.0, 4.0))(items, masking)
    return batch


def each_alone(items: Items, masking: Masking | None = MASKING) -> Iterator[Batch]:
    """Each clip in a batch of its own, with a loud constant after its end instead of zeros."""
    for i, end in enumerate(items.num_samples.tolist()):
        one = some(items, slice(i, i + 1))
        one.audio[:, end:] = 100.0
        yield batch_of(one, masking)


def with_other_padding(batch: Batch) -> Batch:
    """The same batch with other values in all frames that share no patch with audio."""
    frames = torch.arange(batch.spec.shape[1])
    padding = (frames >= batch.num_frames[:, None] + batch.geometry.patch_t)[..., None]
    assert padding.any()
    return replace(batch, spec=batch.spec.masked_fill(padding, 50.0))


def gradients(model: torch.nn.Module, batch: Batch) -> Tensor:
    """All gradients of the loss, in one vector."""
    model.zero_grad()
    model(batch).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def patchify_back(patches: Tensor, batch: Batch) -> Batch:
    """The batch with the spectrogram that consists of these patches (B, N, patch_f * patch_t)."""
    g = batch.geometry
    spec = batch.spec.clone()
    grid = patches.view(-1, g.grid_f, g.columns, g.patch_f, g.patch_t)
    spec[:, : g.columns * g.patch_t] = grid.permute(0, 2, 4, 1, 3).flatten(3).flatten(1, 2)
    return replace(batch, spec=spec)
