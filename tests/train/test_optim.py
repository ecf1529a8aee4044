"""Each parameter is in one group, with the right weight decay and learning rate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ssl_c2f.curriculum.geometry import AudioOptions, make_geometry
from ssl_c2f.models.vit import ViTOptions
from ssl_c2f.objectives.mae import MAEOptions
from ssl_c2f.objectives.supervised import SupervisedOptions
from ssl_c2f.train.optim import (
    OptimOptions,
    layer_of,
    make_optimizer,
    optimizer_state,
    restore_state,
    set_learning_rate,
)

AUDIO = AudioOptions(num_mels=16, clip_seconds=0.4)
DEPTH = 3


def objective(kind: str = "mae", patch_t: int = 4, positions: Any = "learned") -> nn.Module:
    model = ViTOptions(width=8, depth=DEPTH, heads=2, positions=positions)
    options: dict[str, MAEOptions | SupervisedOptions] = {
        "mae": MAEOptions(decoder_width=8, decoder_depth=1, decoder_heads=2),
        "tuned": SupervisedOptions(),
        "probe": SupervisedOptions(head="linear"),
    }
    return options[kind].build(model, make_geometry(AUDIO, "patch", (8, patch_t)), 3)


def by_name(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    return {name: group for group in optimizer.param_groups for name in group["names"]}


@settings(max_examples=30)
@given(
    kind=st.sampled_from(["mae", "tuned", "probe"]), positions=st.sampled_from(["sincos", "learned"]),
    decay=st.floats(0, 1), layer_decay=st.floats(0.1, 1),
)
def test_groups_hold_each_parameter_that_learns_once(
    kind: str, positions: str, decay: float, layer_decay: float
) -> None:
    model = objective(kind, positions=positions)
    optimizer = make_optimizer(model, OptimOptions(weight_decay=decay, layer_decay=layer_decay), DEPTH)
    learn = {name: p for name, p in model.named_parameters() if p.requires_grad}
    listed = [(n, p) for g in optimizer.param_groups for n, p in zip(g["names"], g["params"], strict=True)]
    assert len(listed) == len(learn) and all(learn[name] is p for name, p in listed)
    for name, group in by_name(optimizer).items():
        plain = learn[name].ndim < 2 or name.split(".")[-1] in ("cls_token", "mask_token", "positions")
        assert group["weight_decay"] == (0 if plain else decay), name
        assert group["lr_scale"] == pytest.approx(layer_decay ** (DEPTH + 1 - layer_of(name, DEPTH))), name


def test_layers_are_numbered_from_the_input() -> None:
    layers = {name: layer_of(name, DEPTH) for name, _ in objective("tuned").named_parameters()}
    assert {n for n, layer in layers.items() if layer == 0} == {
        "encoder.cls_token", "encoder.positions", "encoder.patch_embed.weight", "encoder.patch_embed.bias",
    }
    for block in range(DEPTH):
        assert {layer for n, layer in layers.items() if n.startswith(f"encoder.blocks.{block}.")} == {block + 1}
    top = {n for n, layer in layers.items() if layer == DEPTH + 1}
    assert top == {n for n in layers if n.startswith(("head.", "encoder.norm."))}
    assert layer_of("encoder.blocks.10.norm1.weight", 12) == 11
    assert layer_of("decoder.blocks.0.norm1.weight", 12) == 13


def test_the_learning_rate_of_a_group_is_its_share() -> None:
    optimizer = make_optimizer(objective("tuned"), OptimOptions(layer_decay=0.5), DEPTH)
    set_learning_rate(optimizer, 0.8)
    found = {name: group["lr"] for name, group in by_name(optimizer).items()}
    assert found["head.classifier.weight"] == found["encoder.norm.bias"] == pytest.approx(0.8)
    assert found["encoder.blocks.2.mlp.fc1.weight"] == pytest.approx(0.4)
    assert found["encoder.blocks.0.norm1.weight"] == pytest.approx(0.1)
    assert found["encoder.patch_embed.weight"] == found["encoder.positions"] == pytest.approx(0.05)


def stepped(model: nn.Module, seed: int = 0, optimizer: torch.optim.AdamW | None = None) -> torch.optim.AdamW:
    """After one step on made-up gradients."""
    optimizer = optimizer or make_optimizer(model, OptimOptions(), DEPTH)
    set_learning_rate(optimizer, 1e-2)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    return optimizer


def test_restored_moments_go_on_as_if_nothing_had_happened() -> None:
    model = objective()
    optimizer = stepped(model)
    saved = {name: {k: v.clone() for k, v in state.items()} for name, state in optimizer_state(optimizer).items()}
    assert set(saved) == {name for name, _ in model.named_parameters()}

    other = objective()
    other.load_state_dict(model.state_dict())
    resumed = make_optimizer(other, OptimOptions(), DEPTH)
    assert not optimizer_state(resumed)
    assert restore_state(resumed, saved) == len(saved)
    stepped(model, 1, optimizer)
    stepped(other, 1, resumed)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    # copies: what was saved did not move on
    assert all(float(state["step"]) == 1 for state in saved.values())
    fresh = objective()
    fresh.load_state_dict(model.state_dict())
    stepped(fresh, 2)
    stepped(other, 2, resumed)
    assert not torch.equal(*(m.get_parameter("encoder.norm.weight") for m in (fresh, other)))


def test_moments_of_resized_parameters_begin_anew() -> None:
    saved = optimizer_state(stepped(objective(patch_t=4)))
    model = objective(patch_t=2)
    optimizer = make_optimizer(model, OptimOptions(), DEPTH)
    resized = {"encoder.patch_embed.weight", "encoder.positions", "decoder.to_patch.weight", "decoder.to_patch.bias"}
    assert restore_state(optimizer, saved) == len(saved) - len(resized)
    assert set(optimizer_state(optimizer)) == set(saved) - resized
    stepped(model, optimizer=optimizer)
    steps = {name: float(state["step"]) for name, state in optimizer_state(optimizer).items()}
    assert {name for name, step in steps.items() if step == 1} == resized
    assert restore_state(optimizer, {}) == 0
