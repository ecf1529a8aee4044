"""The cost computed before a run equals the FLOPs that PyTorch counts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from flops import counted
from torch import Tensor

from ssl_c2f.curriculum import cost
from ssl_c2f.curriculum.geometry import AudioOptions, Compression, make_geometries, make_geometry
from ssl_c2f.curriculum.phases import Masking
from ssl_c2f.data.masks import num_masked
from ssl_c2f.models.decoder import decoder_cost
from ssl_c2f.models.encoder import EncoderOptions
from ssl_c2f.models.htsat import HTSATOptions
from ssl_c2f.models.vit import ViTOptions
from ssl_c2f.objectives.base import ObjectiveOptions
from ssl_c2f.objectives.latent import LatentOptions
from ssl_c2f.objectives.mae import MAEOptions
from ssl_c2f.objectives.ssast import SSASTOptions
from ssl_c2f.objectives.supervised import SupervisedOptions

AUDIO = AudioOptions(clip_seconds=1.2)
SMALL = ViTOptions(width=32, depth=2, heads=2)
CLASSES, CLIPS = 10, 1


@pytest.mark.parametrize(
    ("compression", "factor"), [("frame_shift", 1), ("frame_shift", 4), ("pool_mean", 2), ("pool_max", 3), ("patch", 4)]
)
def test_masked_autoencoding_costs_what_the_counter_says(compression: Compression, factor: int) -> None:
    geometry = make_geometry(AUDIO, compression, (16, 16), factor)
    for model, options, ratio in [
        (SMALL, MAEOptions(decoder_width=16, decoder_depth=2, decoder_heads=2), 0.75),
        (SMALL.model_copy(update={"mlp_ratio": 2.5, "depth": 1}), MAEOptions(decoder_width=48, norm_targets=True), 0.4),
    ]:
        objective = options.build(model, geometry, 0)
        found = counted(objective, geometry, Masking("uniform", ratio, (3, 5)))
        expected = cost.step_flops(options.costs(model, geometry, ratio, 0))
        assert expected == pytest.approx(found, rel=0.001)


@pytest.mark.parametrize(("compression", "factor"), [("frame_shift", 1), ("pool_mean", 4), ("patch", 2)])
@pytest.mark.parametrize("patch", [(16, 16), (128, 2)])
@pytest.mark.parametrize(
    "options",
    [
        SSASTOptions(),
        SSASTOptions(passes="two"),
        LatentOptions(views=1, decoder_width=16, decoder_depth=2, decoder_groups=4),
        LatentOptions(views=3, decoder_width=32, decoder_groups=32),
        LatentOptions(views=2, decoder_width=32, decoder_groups=1, decoder_depth=1),
    ],
    ids=["ssast", "ssast two", "latent", "latent depthwise", "latent dense"],
)
def test_other_masked_objectives_cost_what_the_counter_says(
    compression: Compression, factor: int, patch: tuple[int, int], options: SSASTOptions | LatentOptions
) -> None:
    geometry = make_geometry(AUDIO, compression, patch, factor)
    objective = options.build(SMALL, geometry, 0)
    found = counted(objective, geometry, Masking("cluster", 0.75, (1, 2), options.num_masks))
    parts = options.costs(SMALL, geometry, 0.75, 0)
    assert cost.step_flops(parts) == pytest.approx(found, rel=0.002)
    masked = num_masked(geometry.num_tokens, 0.75)
    once = geometry.num_tokens if isinstance(options, SSASTOptions) else geometry.num_tokens - masked
    assert cost.seen_tokens(parts) == once * options.num_masks


@pytest.mark.parametrize(
    "options",
    [MAEOptions(norm_targets=True), SSASTOptions(passes="two"), LatentOptions(views=3), SupervisedOptions()],
    ids=lambda options: options.name,
)
def test_an_objective_without_a_formula_is_counted(options: ObjectiveOptions) -> None:
    """The same as its formula says, and without a step of the generator."""
    geometry, before = make_geometry(AUDIO, "patch", (16, 16), 2), torch.get_rng_state()
    counted_parts = ObjectiveOptions.costs(options, SMALL, geometry, 0.6, CLASSES)
    formula = options.costs(SMALL, geometry, 0.6, CLASSES)
    assert torch.equal(torch.get_rng_state(), before)
    for figure in (cost.step_flops, cost.forward_flops, cost.seen_tokens):
        assert figure(counted_parts) == pytest.approx(figure(formula), rel=0.002)


def test_ssasts_two_losses_share_a_pass() -> None:
    base = ViTOptions(width=768, depth=12, heads=12)
    geometry = make_geometry(AudioOptions(clip_seconds=10.24), "frame_shift", (16, 16))
    two, one = (
        cost.step_flops(SSASTOptions.model_validate({"passes": passes}).costs(base, geometry, 0.78, 0))
        for passes in ("two", "one")
    )
    assert 1.9 < two / one < 2.1


@pytest.mark.parametrize(
    ("patch", "options"),
    [
        ((16, 16), {"head": "mean_pool"}),
        ((128, 2), {"head": "class_token", "labels": "multi"}),
        ((16, 16), {"head": "linear"}),
        ((8, 32), {"head": "linear"}),
    ],
)
def test_supervised_training_costs_what_the_counter_says(patch: tuple[int, int], options: dict[str, Any]) -> None:
    geometry = make_geometry(AUDIO, "frame_shift", patch, 2)
    supervised = SupervisedOptions(**options)
    objective = supervised.build(SMALL, geometry, CLASSES)
    found = counted(objective, geometry, None)
    assert cost.step_flops(supervised.costs(SMALL, geometry, 0.5, CLASSES)) == pytest.approx(found, rel=0.001)


def test_a_probe_runs_its_encoder_forward_only() -> None:
    geometry = make_geometry(AUDIO, "frame_shift", (16, 16))
    probe = SupervisedOptions(head="linear").costs(SMALL, geometry, 0.5, CLASSES)
    tuned = SupervisedOptions(head="mean_pool").costs(SMALL, geometry, 0.5, CLASSES)
    assert cost.forward_flops(probe) == cost.forward_flops(tuned)
    assert cost.step_flops(probe) < 0.36 * cost.step_flops(tuned)


def test_the_designs_figures() -> None:
    """ViT-B's encoder at 512, 256 and 128 tokens; and a full decoder is most of a masked step."""
    at = [cost.transformer(tokens, 768, 12, 4.0) for tokens in (512, 256, 128)]
    assert [round(x / at[0], 3) for x in at] == [1, 0.475, 0.231]

    base = ViTOptions(width=768, depth=12, heads=12)
    geometry = make_geometry(AudioOptions(clip_seconds=10.24), "frame_shift", (16, 16))
    kept = 512 - num_masked(512, 0.8)
    decoder = cost.step_flops(decoder_cost(base, 512, 8, geometry, kept))
    assert decoder / (decoder + cost.step_flops(base.costs(geometry, kept))) == pytest.approx(0.63, abs=0.005)


def test_a_coarse_phase_keeps_fewer_activations() -> None:
    fine, coarse = (make_geometry(AUDIO, "pool_mean", (16, 16), factor) for factor in (1, 2))
    assert coarse.num_tokens < fine.num_tokens
    sizes = [cost.transformer_bytes(g.num_tokens, 32, 3, 4.0) for g in (fine, coarse)]
    assert sizes[0] / sizes[1] == fine.num_tokens / coarse.num_tokens
    assert cost.state_bytes(10, ema=True) - cost.state_bytes(10, ema=False) == 40
    assert cost.state_bytes(10, ema=False, frozen=10) == 40


HIERARCHICAL = HTSATOptions(
    widths=(16, 32), depths=(2, 2), heads=(2, 4), patch_f=4, patch_t=4, window=4, folds=1, mlp_ratio=4.0
)


@pytest.mark.parametrize("bytes_per_value", [4, 2])
@pytest.mark.parametrize("model", [SMALL.model_copy(update={"depth": 8}), HIERARCHICAL], ids=["vit", "htsat"])
def test_activations_are_those_that_autograd_keeps(model: EncoderOptions, bytes_per_value: int) -> None:
    patch = (model.patch_f, model.patch_t)
    geometry = make_geometries(AUDIO, "frame_shift", patch, [(1, None)], model.stride, model.fold)[0]
    encoder = model.build(geometry).train()

    def kept(clips: int) -> int:
        seen: dict[int, Tensor] = {}  # by storage: what several operations keep is there once

        def pack(tensor: Tensor) -> Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        patches = torch.randn(clips, geometry.num_tokens, geometry.patch_dim)
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=bytes_per_value == 2),
        ):
            encoder(patches)
        return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())

    found = kept(3) - kept(2)  # weights, and their copies in bf16, are not counted
    assert model.activation_bytes(geometry, geometry.num_tokens, bytes_per_value) == pytest.approx(found, rel=0.1)


def test_only_real_columns_cost() -> None:
    geometry = make_geometry(AUDIO, "patch", (16, 16), 1, multiple=640)
    wider = replace(geometry, num_frames=geometry.num_frames * 2, grid_t=geometry.grid_t * 2)
    assert MAEOptions().costs(SMALL, geometry, 0.5, 0) == MAEOptions().costs(SMALL, wider, 0.5, 0)
