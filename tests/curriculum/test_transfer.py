"""Transfer: what is done with each weight when the geometry changes."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from ssl_c2f.core.options import UserError
from ssl_c2f.curriculum.geometry import AudioOptions, Compression, Geometry, make_geometries
from ssl_c2f.curriculum.transfer import interpolate_positions, resize_head, resize_kernel, resize_matrix, transfer
from ssl_c2f.models.vit import ViTOptions
from ssl_c2f.objectives import Objective
from ssl_c2f.objectives.mae import MAEOptions
from ssl_c2f.objectives.supervised import SupervisedOptions

AUDIO = AudioOptions(num_mels=32, clip_seconds=1.0)
MODEL = ViTOptions(width=16, depth=2, heads=2, patch_f=8, patch_t=4)
LEARNED = MODEL.model_copy(update={"positions": "learned"})
MAE = MAEOptions(decoder_width=8, decoder_depth=1, decoder_heads=2)
COMPRESSIONS: tuple[Compression, ...] = get_args(Compression)

sides = st.integers(1, 6)


def pair(compression: Compression, factors: tuple[int, int] = (4, 2), audio: AudioOptions = AUDIO) -> list[Geometry]:
    """The geometries on both sides of a boundary."""
    return make_geometries(audio, compression, (8, 4), [(factor, None) for factor in factors])


def mae(geometry: Geometry, model: ViTOptions = MODEL, options: MAEOptions = MAE) -> Objective:
    return options.build(model, geometry, 0)


def actions(report: Any) -> dict[str, str]:
    return {moved.name: moved.action for moved in report.moved}


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("model", [MODEL, LEARNED], ids=["sincos", "learned"])
def test_the_same_geometry_copies_everything(compression: Compression, model: ViTOptions) -> None:
    geometry = pair(compression)[0]
    state, target = mae(geometry, model).state_dict(), mae(geometry, model).state_dict()
    before = {name: value.clone() for name, value in target.items()}
    result, report = transfer(state, geometry, target, geometry)
    assert list(result) == list(target)
    assert all(torch.equal(result[name], state[name]) for name in state)
    assert report.count() == {"copied": len(state)}
    # copies, not views: training one phase must not change the last one's checkpoint, nor the fresh model
    for value in result.values():
        value.add_(1)
    assert all(torch.equal(target[name], before[name]) for name in target)
    assert not any(torch.equal(result[name], state[name]) for name in state)


@pytest.mark.parametrize("compression", ["frame_shift", "pool_mean", "pool_max"])
@pytest.mark.parametrize("factors", [(4, 2), (2, 1), (4, 1), (1, 3)])
def test_frame_shift_and_pooling_copy_every_weight(compression: Compression, factors: tuple[int, int]) -> None:
    source, target = pair(compression, factors)
    state = mae(source).state_dict()
    result, report = transfer(state, source, mae(target).state_dict(), target)
    assert report.count() == {"copied": len(state)}
    assert all(torch.equal(result[name], value) for name, value in state.items())
    model = mae(target)
    model.load_state_dict(result)  # positions are no part of the state: the model made its own


def test_a_patch_boundary_resizes_kernel_and_head_and_copies_the_rest() -> None:
    source, target = pair("patch")
    state = mae(source).state_dict()
    result, report = transfer(state, source, mae(target).state_dict(), target)
    resized = {"encoder.patch_embed.weight", "decoder.to_patch.weight", "decoder.to_patch.bias"}
    assert {name for name, action in actions(report).items() if action == "resized"} == resized
    assert report.count() == {"copied": len(state) - 3, "resized": 3}
    assert all(torch.equal(result[name], value) for name, value in state.items() if name not in resized)
    assert result["encoder.patch_embed.weight"].shape == (16, 8 * 8)
    assert result["decoder.to_patch.weight"].shape == (8 * 8, 8)
    mae(target).load_state_dict(result)


@settings(max_examples=40)
@given(old=st.tuples(sides, sides), grow=st.tuples(st.integers(0, 5), st.integers(0, 5)))
def test_a_patch_that_grows_has_the_same_embedding(old: tuple[int, int], grow: tuple[int, int]) -> None:
    new = (old[0] + grow[0], old[1] + grow[1])
    weight = torch.randn(5, old[0] * old[1], dtype=torch.float64)
    patches = torch.randn(7, old[0] * old[1], dtype=torch.float64)
    resized = F.interpolate(patches.view(7, 1, *old), size=new, mode="area").flatten(1)
    torch.testing.assert_close(patches @ resize_matrix(old, new).T, resized)
    torch.testing.assert_close(resized @ resize_kernel(weight, old, new).T, patches @ weight.T)


@settings(max_examples=40)
@given(new=st.tuples(st.integers(1, 5), st.integers(1, 5)), by=st.tuples(st.integers(1, 4), st.integers(1, 4)))
def test_where_resizing_averages_pi_resize_is_scaled_interpolation(new: tuple[int, int], by: tuple[int, int]) -> None:
    old = (new[0] * by[0], new[1] * by[1])
    weight = torch.randn(5, old[0] * old[1])
    expected = by[0] * by[1] * F.avg_pool2d(weight.view(5, 1, *old), by).flatten(1)
    torch.testing.assert_close(resize_kernel(weight, old, new), expected, rtol=0, atol=1e-5)
    # so a patch of constant runs, which loses nothing when it shrinks, keeps its embedding
    small = torch.randn(3, 1, *new)
    large = small.repeat_interleave(by[0], 2).repeat_interleave(by[1], 3)
    torch.testing.assert_close(
        small.flatten(1) @ resize_kernel(weight, old, new).T, large.flatten(1) @ weight.T, rtol=0, atol=1e-4
    )


@given(old=st.tuples(sides, sides), new=st.tuples(sides, sides))
def test_a_resized_head_draws_the_resized_patch(old: tuple[int, int], new: tuple[int, int]) -> None:
    weight, bias = torch.randn(old[0] * old[1], 3), torch.randn(old[0] * old[1])
    x = torch.randn(4, 3)
    drawn = F.interpolate((x @ weight.T + bias).view(4, 1, *old), size=new, mode="area").flatten(1)
    torch.testing.assert_close(x @ resize_head(weight, old, new).T + resize_head(bias, old, new), drawn)


def places(g: Geometry) -> tuple[Tensor, Tensor]:
    """Centres of the real cells, in shares of the band and in seconds."""
    rows = (torch.arange(g.grid_f, dtype=torch.float64) + 0.5) * g.patch_f / g.num_mels
    columns = (torch.arange(g.columns, dtype=torch.float64) + 0.5) * g.patch_t * g.pool * g.hop / g.sample_rate
    return rows, columns


@settings(max_examples=40)
@given(
    compression=st.sampled_from(COMPRESSIONS), factors=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    patch=st.tuples(st.sampled_from([4, 8, 16]), st.integers(1, 9)), clip=st.floats(0.6, 1.5), apart=st.booleans(),
)
def test_positions_that_are_linear_in_time_and_frequency_stay_so(
    compression: Compression, factors: tuple[int, int], patch: tuple[int, int], clip: float, apart: bool
) -> None:
    """Also to a run of its own, with other patches and another length."""
    source = pair(compression, factors)[0]
    if apart:
        other = AudioOptions(num_mels=32, clip_seconds=clip, sample_rate=8000, hop_ms=12.5)
        (target,) = make_geometries(other, compression, patch, [(factors[1], None)])
    else:
        target = pair(compression, factors)[1]
    rows, columns = places(source)
    table = (2 * rows[:, None] - 3 * columns).flatten()[:, None] * torch.tensor([1.0, -2.0])
    new_rows, new_columns = (
        new.clamp(float(old[0]), float(old[-1])) for new, old in zip(places(target), (rows, columns), strict=True)
    )  # constant beyond the outermost cells
    expected = (2 * new_rows[:, None] - 3 * new_columns).flatten()[:, None] * torch.tensor([1.0, -2.0])
    found = interpolate_positions(table, source, target)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5, check_dtype=False)


def test_learned_positions_are_resized_and_said_so() -> None:
    source, target = pair("pool_mean")
    result, report = transfer(mae(source, LEARNED).state_dict(), source, mae(target, LEARNED).state_dict(), target)
    assert [name for name, action in actions(report).items() if action == "resized"] == ["encoder.positions"]
    assert len(result["encoder.positions"]) == target.num_tokens == 2 * source.num_tokens - target.grid_f
    assert any("encoder.positions" in line and "physical time" in line for line in report.lines())


@pytest.mark.parametrize(
    ("change", "tensor"),
    [
        ({"width": 32}, "encoder.cls_token"),
        ({"depth": 3}, r"encoder\.blocks\.2"),
        ({"depth": 1}, r"encoder\.blocks\.1"),
        ({"mlp_ratio": 2.0}, r"mlp\.fc1"),
        ({"positions": "learned"}, r"encoder\.positions"),
    ],
)
@pytest.mark.parametrize("compression", ["frame_shift", "patch"])
def test_an_encoder_that_does_not_fit_is_refused(compression: Compression, change: dict[str, Any], tensor: str) -> None:
    source, target = pair(compression)
    changed = MODEL.model_copy(update=change)
    for model, wanted in ((MODEL, changed), (changed, MODEL)):
        with pytest.raises(UserError, match=f"the encoder does not fit the checkpoint: .*{tensor}") as error:
            transfer(mae(source, model).state_dict(), source, mae(target, wanted).state_dict(), target)
        assert "\n" not in str(error.value)


def test_another_decoder_is_reinitialised_and_reported() -> None:
    source, target = pair("patch")
    other = MAEOptions(decoder_width=12, decoder_depth=2, decoder_heads=2)
    state, fresh = mae(source).state_dict(), mae(target, options=other).state_dict()
    result, report = transfer(state, source, fresh, target)
    found = actions(report)
    for name, value in fresh.items():
        if name.startswith("decoder.") and name != "decoder.to_patch.bias":  # its size is the patch's alone
            assert found[name] == "reinitialised" and torch.equal(result[name], value), name
        elif name.startswith("encoder."):
            assert found[name] in ("copied", "resized"), name
    detail = {moved.name: moved.detail for moved in report.moved}
    assert detail["decoder.embed.weight"] == "checkpoint has (8, 16), the model (12, 16)"
    assert any("reinitialised decoder: " in line for line in report.lines())


def test_what_the_target_has_not_is_dropped_and_reported_and_the_counts_add_up() -> None:
    source, target = pair("patch")
    state = mae(source).state_dict()
    classifier = SupervisedOptions().build(MODEL, target, 5).state_dict()
    result, report = transfer(state, source, classifier, target)
    found, count = actions(report), report.count()
    assert {name for name, action in found.items() if action == "dropped"} == {n for n in state if n[:7] == "decoder"}
    assert {name for name, action in found.items() if action == "reinitialised"} == {
        name for name in classifier if name.startswith("head.")
    }
    assert sum(count.values()) == len(report.moved) == len(set(state) | set(classifier))
    assert sum(count.values()) - count["dropped"] == len(result) == len(classifier)
    lines = report.lines()
    assert all(f"{n} {action}" in lines[0] for action, n in count.items())
    assert any("resized encoder.patch_embed.weight: patch 8x16 -> 8x8" in line for line in lines)
    assert any(f"dropped decoder: {count['dropped']} tensors" in line for line in lines)
    assert report.to_dict()["count"] == count and len(report.to_dict()["tensors"]) == len(report.moved)
