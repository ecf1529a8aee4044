"""SSAST: its losses equal the published code's and do not depend on padding or on the rest of the batch."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from batches import (
    AUDIO,
    FULL,
    GEOMETRY,
    MASKING,
    MODEL,
    batch_of,
    each_alone,
    gradients,
    lengths,
    patchify_back,
    sounds,
    with_other_padding,
)
from foreign import fixture
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from ssl_c2f.curriculum.geometry import Compression, Geometry, make_geometries, make_geometry
from ssl_c2f.curriculum.transfer import resize_head, resize_match, resize_matrix, transfer
from ssl_c2f.data.front_end import Batch
from ssl_c2f.models.patches import patchify
from ssl_c2f.models.vit import ViTOptions
from ssl_c2f.objectives.ssast import SSAST, Softmax, SSASTOptions, match, squared_error, take

TWO = replace(MASKING, num_masks=2)
each_passes = pytest.mark.parametrize("passes", ["one", "two"])
each_softmax = pytest.mark.parametrize("softmax", ["targets", "predictions"])


def ssast(geometry: Geometry = GEOMETRY, **options: Any) -> SSAST:
    torch.manual_seed(0)
    return SSAST(MODEL, SSASTOptions(**options), geometry).eval()


def masked(num_samples: list[int], model: SSAST, seed: int = 0) -> Batch:
    return batch_of(sounds(num_samples, seed), TWO if model.options.num_masks == 2 else MASKING, model.geometry)


# --- the losses


def test_the_losses_are_those_of_the_published_code() -> None:
    """From the published head's output on, which this small copy of the published forward pass computes."""
    state, case = fixture("ssast_tiny_depth2")
    w = {name.removeprefix("module."): value for name, value in state.items()}
    geometry = make_geometry(AUDIO.model_copy(update={"num_mels": 128, "clip_seconds": 10.26}), "frame_shift", (16, 16))
    assert geometry.grid == (8, 64)
    patches = patchify(case["input"], geometry)
    for index, head in ((case["mask_mpc"], "cpredlayer"), (case["mask_mpg"], "gpredlayer")):
        tokens = take(published_encoder(w, patches, index), index)
        hidden = F.linear(tokens, w[f"{head}.0.weight"], w[f"{head}.0.bias"]).relu()
        predictions, targets = F.linear(hidden, w[f"{head}.2.weight"], w[f"{head}.2.bias"]), take(patches, index)
        if head == "cpredlayer":
            found = match(predictions, targets, torch.ones_like(index, dtype=torch.bool), "predictions")
            torch.testing.assert_close(found.nce.mean(), case["nce"], rtol=1e-5, atol=0)
            torch.testing.assert_close(found.accuracy.mean(), case["accuracy"], rtol=1e-5, atol=0)
            sound = match(predictions, targets, torch.ones_like(index, dtype=torch.bool)).nce.mean()
            assert abs(float(sound / case["nce"]) - 1) > 1e-4  # the other axis is another number
        else:
            mse = squared_error(predictions, targets, torch.ones_like(targets)).mean()
            torch.testing.assert_close(mse, case["mse"], rtol=1e-5, atol=0)


def published_encoder(w: dict[str, Tensor], patches: Tensor, index: Tensor) -> Tensor:
    """(B, N, P) -> (B, N, D) by our own blocks: two class tokens, hidden patches replaced before positions."""
    options = ViTOptions(width=192, depth=2, heads=3)
    geometry = make_geometry(AUDIO.model_copy(update={"num_mels": 128, "clip_seconds": 10.26}), "frame_shift", (16, 16))
    model = SSAST(options, SSASTOptions(), geometry).encoder
    blocks = {name[2:]: value for name, value in w.items() if name.startswith(("v.blocks.", "v.norm."))}
    model.load_state_dict(blocks, strict=False)
    x = F.linear(patches, w["v.patch_embed.proj.weight"].flatten(1), w["v.patch_embed.proj.bias"])
    x = x.scatter(1, index[..., None].expand(-1, -1, 192), w["mask_embed"].expand(*index.shape, -1))
    prefix = torch.cat([w["v.cls_token"], w["v.dist_token"]], 1).expand(len(x), -1, -1)
    x = torch.cat([prefix, x], 1) + w["v.pos_embed"]
    for block in model.blocks:
        x = block(x)
    encoded: Tensor = model.norm(x)
    return encoded[:, 2:].detach()


@each_softmax
@settings(max_examples=20)
@given(counts=st.lists(st.integers(0, 6), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_matching_is_clip_by_clip_and_padding_is_no_candidate(softmax: Softmax, counts: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    predictions, targets = torch.randn(2, len(counts), 6, 5, generator=generator)
    valid = torch.arange(6) < torch.tensor(counts)[:, None]
    found = match(predictions, targets.masked_fill(~valid[..., None], 1e3), valid, softmax)
    for clip, k in enumerate(counts):
        scores = predictions[clip, :k] @ targets[clip, :k].T
        shares = scores.softmax(1 if softmax == "targets" else 0)
        nce = -shares.diagonal().log().mean() if k else torch.tensor(0.0)
        right = (shares.argmax(1) == torch.arange(k)).float().mean() if k else torch.tensor(0.0)
        torch.testing.assert_close(found.nce[clip], nce, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.accuracy[clip], right)
        assert found.count[clip] == k


@each_softmax
def test_matching_knows_chance_and_certainty(softmax: Softmax) -> None:
    valid = torch.ones(2, 7, dtype=torch.bool)
    same = match(torch.ones(2, 7, 3), torch.ones(2, 7, 3), valid, softmax)
    torch.testing.assert_close(same.nce, torch.full((2,), math.log(7)))
    sure = match(100 * torch.eye(7).expand(2, 7, 7), torch.eye(7).expand(2, 7, 7), valid, softmax)
    assert sure.nce.max() < 1e-6 and sure.accuracy.tolist() == [1, 1]


# --- the objective


@each_passes
def test_the_loss_adds_up(passes: str) -> None:
    model = ssast(passes=passes, mse_weight=3.0)
    batch = masked([8000, 3000], model)
    result = model(batch)
    torch.testing.assert_close(result.loss.detach(), result.metrics["nce"] + 3 * result.metrics["mse"])
    counts = batch.masks[0].masked.sum(1).float()
    torch.testing.assert_close(result.metrics["nce_k"], counts.mean())
    torch.testing.assert_close(result.metrics["nce_chance"], counts.log().mean())
    drawn = [patch for view, patch in _errors(model, batch, batch.masks[-1].masked)]
    torch.testing.assert_close(result.metrics["mse"], torch.stack(drawn).mean(), rtol=1e-4, atol=1e-5)


def _errors(model: SSAST, batch: Batch, hidden: Tensor) -> list[tuple[int, Tensor]]:
    """Of each clip, from the picture of its reconstruction: the real frames of hidden patches."""
    pictures, found = model.pictures(batch), []
    for clip, frames in enumerate(batch.num_frames.tolist()):
        gone = pictures["kept"][clip, :frames].isnan()
        assert gone.any()
        error = (pictures["reconstruction"] - pictures["input"])[clip, :frames][gone]
        found.append((clip, error.square().mean()))
    return found


def test_drawing_weighs_ten_times_as_much_as_published() -> None:
    model = ssast()
    result = model(masked([8000, 3000], model))
    torch.testing.assert_close(result.loss.detach(), result.metrics["nce"] + 10 * result.metrics["mse"])


@each_passes
def test_the_losses_share_a_pass_or_have_their_own_masks(passes: str) -> None:
    model, calls = ssast(passes=passes), []
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    batch = masked([8000], model)
    result = model(batch)
    assert len(calls) == len(batch.masks) == (2 if passes == "two" else 1)
    if passes == "two":
        assert not torch.equal(batch.masks[0].masked, batch.masks[1].masked)
        swapped = model(replace(batch, masks=batch.masks[::-1]))
        alone = ssast()(replace(batch, masks=batch.masks[:1]))
        assert torch.equal(result.metrics["nce"], alone.metrics["nce"])
        assert torch.equal(swapped.metrics["mse"], alone.metrics["mse"])
        assert not torch.equal(result.metrics["mse"], swapped.metrics["mse"])


@each_passes
@settings(max_examples=8)
@given(num_samples=lengths)
def test_a_clips_loss_depends_neither_on_padding_nor_on_its_batch(passes: str, num_samples: list[int]) -> None:
    model, items = ssast(passes=passes), sounds([*num_samples, int(FULL)])
    masking = TWO if passes == "two" else MASKING
    alone = [model(batch).loss for batch in each_alone(items, masking)]
    torch.testing.assert_close(model(batch_of(items, masking)).loss, torch.stack(alone).mean(), rtol=1e-4, atol=1e-4)


def test_values_in_padding_change_nothing() -> None:
    model = ssast()
    batch = masked([8000, 3000, 900], model)
    changed = with_other_padding(batch)
    torch.testing.assert_close(model(changed).loss, model(batch).loss)
    torch.testing.assert_close(gradients(model, changed), gradients(model, batch))


def test_tokens_do_not_depend_on_what_is_hidden() -> None:
    model = ssast()
    batch = masked([8000], model)
    patches, hidden = patchify(batch.spec, GEOMETRY), batch.masks[0].masked[..., None]
    other = patchify_back(torch.where(hidden, patches + 3, patches), batch)
    tokens = [model.encode(patchify(x.spec, GEOMETRY), x.masks[0], x) for x in (batch, other)]
    assert torch.equal(*tokens) and not torch.equal(model(batch).loss, model(other).loss)
    louder = model.encode(patches * 2, batch.masks[0], batch)
    assert not torch.equal(tokens[0], louder)


@each_passes
def test_every_weight_learns(passes: str) -> None:
    model = ssast(passes=passes)
    gradients(model, masked([8000, 3000], model))
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_a_clip_of_one_token_has_nothing_to_tell() -> None:
    model = ssast(make_geometry(AUDIO, "patch", (16, 4), 2))
    short = model(masked([600], model))
    assert short.loss == 0 and short.metrics["nce_k"] == 1
    assert gradients(model, masked([600], model)).isfinite().all()


@pytest.mark.parametrize("patch", [(8, 4), (16, 2)], ids=["patches", "frames"])
@pytest.mark.parametrize("compression", ["frame_shift", "pool_mean", "patch"])
def test_the_heads_go_with_the_patch(patch: tuple[int, int], compression: Compression) -> None:
    coarse, fine = make_geometries(AUDIO, compression, patch, [(2, None), (1, None)])
    model, target = ssast(coarse), ssast(fine)
    result, report = transfer(model.state_dict(), coarse, target.state_dict(), fine)
    target.load_state_dict(result)
    assert target(masked([8000, 3000], target)).loss.isfinite()
    resized = {moved.name for moved in report.moved if moved.action == "resized"}
    heads = {f"{head}.{kind}" for head in ("match_head.to_match", "draw_head.to_patch") for kind in ("weight", "bias")}
    assert resized == (heads | {"encoder.patch_embed.weight"} if compression == "patch" else set())
    assert set(report.count()) <= {"copied", "resized"}
    if compression == "patch":
        sizes, state = [(g.patch_f, g.patch_t) for g in (coarse, fine)], model.state_dict()
        for name, fit in (("match_head.to_match.weight", resize_match), ("draw_head.to_patch.weight", resize_head)):
            torch.testing.assert_close(result[name], fit(state[name], *sizes))


@settings(max_examples=30)
@given(old=st.tuples(st.integers(1, 5), st.integers(1, 5)), grow=st.tuples(st.integers(0, 4), st.integers(0, 4)))
def test_a_resized_matching_head_gives_a_patch_that_grows_the_same_score(
    old: tuple[int, int], grow: tuple[int, int]
) -> None:
    new = (old[0] + grow[0], old[1] + grow[1])
    weight, bias = torch.randn(old[0] * old[1], 3, dtype=torch.float64), torch.randn(old[0] * old[1]).double()
    tokens, patches = torch.randn(4, 3).double(), torch.randn(6, old[0] * old[1]).double()
    scores = (tokens @ weight.T + bias) @ patches.T
    larger = patches @ resize_matrix(old, new).T
    resized = (tokens @ resize_match(weight, old, new).T + resize_match(bias, old, new)) @ larger.T
    torch.testing.assert_close(resized, scores)
