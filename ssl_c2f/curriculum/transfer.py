"""Transfer of weights from one geometry to another: between phases, and from pretraining to fine-tuning.

Legend: D width, P values of a patch (index f patch_t + t), N tokens (index f T' + t).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_c2f.core.options import UserError
from ssl_c2f.curriculum.geometry import Geometry, stage_grid

Action = Literal["copied", "resized", "reinitialised", "dropped"]


@dataclass(frozen=True)
class Moved:
    """What became of one tensor."""

    name: str
    action: Action
    detail: str = ""


@dataclass(frozen=True)
class TransferReport:
    """What became of every tensor, in the order of the target."""

    moved: tuple[Moved, ...]

    def count(self) -> dict[str, int]:
        return dict(Counter(m.action for m in self.moved))

    def lines(self) -> list[str]:
        """A summary, a line for each resized tensor, and one for each module that was reinitialised or dropped."""
        lines = ["transfer: " + ", ".join(f"{n} {action}" for action, n in self.count().items())]
        lines += [f"  resized {m.name}: {m.detail}" for m in self.moved if m.action == "resized"]
        for action in ("reinitialised", "dropped"):
            modules = Counter(m.name.partition(".")[0] for m in self.moved if m.action == action)
            lines += [f"  {action} {module}: {n} tensors" for module, n in modules.items()]
        return lines

    def to_dict(self) -> dict[str, Any]:
        return {"count": self.count(), "tensors": [asdict(m) for m in self.moved]}


def transfer(
    state: Mapping[str, Tensor], source: Geometry, target: Mapping[str, Tensor], geometry: Geometry
) -> tuple[dict[str, Tensor], TransferReport]:
    """Fit a state dict to a model of another geometry.

    Patch kernels are PI-resized. The rows of reconstruction heads (`to_patch`) are resized like the patch that they
    reconstruct; those of heads whose output is multiplied with a patch (`to_match`) are PI-resized like kernels.
    Learned positions are interpolated in physical time; sine-cosine positions are not in the state, since a model
    computes its own. Relative position biases are interpolated where the grid clips a window.

    Args:
        state: tensors of the model that was trained in `source`.
        target: the state dict of the freshly initialised model in `geometry`; tensors without a counterpart keep
            these values (reinitialised).

    Raises:
        UserError: a tensor of the encoder or the teacher, on either side, can be neither copied nor resized. A model
            without a teacher may take the encoder of one that has a teacher.
    """
    moved: list[Moved] = []
    result: dict[str, Tensor] = {}
    for name, wanted in target.items():
        value, detail = _fit(name, state.get(name), source, geometry)
        if value is not None and name.endswith("relative_position_bias_table"):
            value, detail = _fit_biases(value, wanted, source, geometry, _stage(name, target))
        if value is not None and value.shape != wanted.shape:
            detail = f"checkpoint has {tuple(value.shape)}, the model {tuple(wanted.shape)}"
            value = None
        if value is None and name.startswith(("encoder.", "teacher.")):
            raise UserError(f"the {name.partition('.')[0]} does not fit the checkpoint: {name}: {detail}")
        action: Action = "reinitialised" if value is None else "resized" if detail else "copied"
        moved.append(Moved(name, action, detail))
        result[name] = (wanted if value is None else value).detach().clone()
    dropped = [name for name in state if name not in target]
    whole = ("encoder.", "teacher.") if any(name.startswith("teacher.") for name in target) else ("encoder.",)
    if lost := next((name for name in dropped if name.startswith(whole)), None):
        raise UserError(f"the {lost.partition('.')[0]} does not fit the checkpoint: {lost}: not in the model")
    moved += [Moved(name, "dropped", str(tuple(state[name].shape))) for name in dropped]
    return result, TransferReport(tuple(moved))


def _fit(name: str, tensor: Tensor | None, source: Geometry, target: Geometry) -> tuple[Tensor | None, str]:
    """The tensor in the target's geometry, and how it was resized (if it was); or None, and why."""
    if tensor is None:
        return None, "not in the checkpoint"
    old, new = (source.patch_f, source.patch_t), (target.patch_f, target.patch_t)
    patches = f"patch {old[0]}x{old[1]} -> {new[0]}x{new[1]}"
    if name.endswith("patch_embed.weight") and old != new:
        return resize_kernel(tensor, old, new), f"{patches}, pseudo-inverse"
    if name.endswith(("to_patch.weight", "to_patch.bias")) and old != new:
        return resize_head(tensor, old, new), f"{patches}, area"
    if name.endswith(("to_match.weight", "to_match.bias")) and old != new:
        return resize_match(tensor, old, new), f"{patches}, pseudo-inverse"
    if name.endswith("positions") and not _same_places(source, target):
        return interpolate_positions(tensor, source, target), f"grid {source.grid} -> {target.grid}, in physical time"
    return tensor, ""


def _stage(name: str, names: Container[str]) -> int:
    """The stage of a tensor of block i of a hierarchical encoder: how often tokens were merged up to it."""
    place, _, rest = name.rpartition("blocks.")
    return sum(f"{place}merges.{i}.norm.weight" in names for i in range(int(rest.partition(".")[0]) + 1))


def _fit_biases(
    table: Tensor, wanted: Tensor, source: Geometry, target: Geometry, stage: int
) -> tuple[Tensor | None, str]:
    """The biases for the window of `wanted`, and how they were resized (if they were); or None, and why."""
    try:
        old = window_of(len(table), stage_grid(source, stage))
        new = window_of(len(wanted), stage_grid(target, stage))
    except ValueError as error:
        return None, str(error)
    if old == new:
        return table, ""
    return resize_biases(table, old, new), f"window {old[0]}x{old[1]} -> {new[0]}x{new[1]}, linear"


def window_of(table_length: int, grid: tuple[int, int]) -> tuple[int, int]:
    """The window, clipped to the grid, that has so many relative position biases.

    Raises:
        ValueError: there is no such window.
    """
    for size in range(1, max(grid) + 1):
        height, width = (min(size, side) for side in grid)
        if (2 * height - 1) * (2 * width - 1) == table_length:
            return height, width
    raise ValueError(f"{table_length} relative positions fit no window in a grid of {grid[0]}x{grid[1]}")


def _places(geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Centres of the real rows and columns, as fractions of the mel bins and in seconds."""
    rows, columns = (places.double() + 0.5 for places in geometry.positions())
    seconds = columns[: geometry.columns] * geometry.unit_samples / geometry.sample_rate
    return rows * geometry.unit_mels / geometry.num_mels, seconds


def _same_places(a: Geometry, b: Geometry) -> bool:
    return a.grid == b.grid and all(torch.allclose(x, y) for x, y in zip(_places(a), _places(b), strict=True))


def resize_matrix(old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """(P_new, P_old) float64: the linear map that resizes a patch by averaging areas (repeating, where it grows)."""
    unit = torch.eye(old[0] * old[1], dtype=torch.float64).reshape(-1, 1, *old)
    return F.interpolate(unit, size=new, mode="area").reshape(len(unit), -1).T


def resize_kernel(weight: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """(D, P_old) -> (D, P_new) such that a resized patch times the resized kernel is the same embedding.

    PI-resize of FlexiViT (Beyer et al., CVPR 2023, eq. 4): the pseudo-inverse of the resizing. Exact where the patch
    grows; the least-squares best where it shrinks.
    """
    inverse: Tensor = torch.linalg.pinv(resize_matrix(old, new))
    return (weight.double() @ inverse.to(weight.device)).to(weight.dtype)


def resize_head(tensor: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """(P_old, ...) -> (P_new, ...): the head reconstructs the same patch at another size."""
    return (resize_matrix(old, new).to(tensor.device) @ tensor.double()).to(tensor.dtype)


def resize_match(tensor: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """(P_old, ...) -> (P_new, ...) such that the head's output times a resized patch is the same number.

    Exact where the patch grows; the least-squares best where it shrinks, as for a kernel.
    """
    inverse: Tensor = torch.linalg.pinv(resize_matrix(old, new))
    return (inverse.T.to(tensor.device) @ tensor.double()).to(tensor.dtype)


def resize_biases(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """((2 h - 1) (2 w - 1), heads) -> the same of another window (h, w): linear between relative positions.

    A window covers the same area however many tokens it has: its largest offsets correspond to each other, and offset 0
    to offset 0. (Swin, Liu et al., ICCV 2021, fine-tunes with other windows by interpolating bicubically, which
    overshoots where a table of a small window grows.)
    """
    grid = table.double().reshape(2 * old[0] - 1, 2 * old[1] - 1, -1)
    rows, columns = (
        _linear_map(_offsets(a), _offsets(b)).to(table.device) for a, b in zip(old, new, strict=True)
    )
    return torch.einsum("ij,jkh,lk->ilh", rows, grid, columns).flatten(0, 1).to(table.dtype)


def _offsets(side: int) -> Tensor:
    """Offsets between the tokens of a window's side, as fractions of the largest."""
    return torch.arange(1 - side, side, dtype=torch.float64) / max(side - 1, 1)


def interpolate_positions(table: Tensor, source: Geometry, target: Geometry) -> Tensor:
    """(N_old, D) -> (N_new, D), linear between the physical centres of the old cells, constant beyond the outermost."""
    rows, columns = (
        _linear_map(old, new).to(table.device) for old, new in zip(_places(source), _places(target), strict=True)
    )
    grid = table.double().reshape(*source.grid, -1)
    return torch.einsum("ij,jkd,lk->ild", rows, grid, columns).flatten(0, 1).to(table.dtype)


def _linear_map(old: Tensor, new: Tensor) -> Tensor:
    """(new, old) float64 weights of linear interpolation at `new` between the ascending `old`, constant beyond them."""
    if len(old) == 1:
        return torch.ones(len(new), 1, dtype=torch.float64)
    new = new.clamp(float(old[0]), float(old[-1]))
    left = torch.searchsorted(old, new, right=True).sub(1).clamp(0, len(old) - 2)
    fraction = (new - old[left]) / (old[left + 1] - old[left])
    weights = torch.zeros(len(new), len(old), dtype=torch.float64)
    weights.scatter_(1, left[:, None], (1 - fraction)[:, None])
    return weights.scatter_(1, left[:, None] + 1, fraction[:, None])
