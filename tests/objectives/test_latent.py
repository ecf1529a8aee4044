"""Latent prediction: the teacher, its targets, and what the student's loss depends on."""

from __future__ import annotations

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
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from ssl_c2f.core.options import UserError
from ssl_c2f.curriculum.geometry import Compression, Geometry, make_geometries, make_geometry
from ssl_c2f.curriculum.transfer import transfer
from ssl_c2f.data.front_end import Batch
from ssl_c2f.models.conv_decoder import ConvDecoder
from ssl_c2f.models.patches import patchify
from ssl_c2f.models.vit import ViTOptions
from ssl_c2f.objectives.latent import Latent, LatentOptions, instance_norm, spread_of, teacher_decay
from ssl_c2f.objectives.mae import MAE, MAEOptions
from ssl_c2f.train import optim

VIEWS = replace(MASKING, shape="inverse_block", num_masks=3)
LEARNED = MODEL.model_copy(update={"positions": "learned"})
SMALL: dict[str, Any] = {"views": 3, "decoder_width": 8, "decoder_depth": 2, "decoder_groups": 2}


def latent(geometry: Geometry = GEOMETRY, model: ViTOptions = MODEL, **options: Any) -> Latent:
    torch.manual_seed(0)
    objective = Latent(model, LatentOptions(**SMALL | options), geometry).eval()
    with torch.no_grad():  # a teacher of its own, so that nobody takes one for the other
        for parameter in objective.teacher.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return objective


def seen(num_samples: list[int], geometry: Geometry = GEOMETRY, views: int = 3) -> Batch:
    return batch_of(sounds(num_samples), replace(VIEWS, num_masks=views), geometry)


# --- the teacher


def test_it_begins_as_the_encoder_and_follows_it() -> None:
    model = Latent(LEARNED, LatentOptions(**SMALL, decay=(0.5, 0.9)), GEOMETRY)
    start = {name: value.clone() for name, value in model.encoder.state_dict().items()}
    assert all(torch.equal(value, start[name]) for name, value in model.teacher.state_dict().items())
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.add_(1.0)
    model.after_step(0.0)
    for name, value in model.teacher.state_dict().items():
        torch.testing.assert_close(value, start[name] + 0.5)
        torch.testing.assert_close(model.encoder.state_dict()[name], start[name] + 1.0)
    model.after_step(1.0)
    torch.testing.assert_close(model.teacher.cls_token, start["cls_token"] + 0.5 + 0.1 * 0.5)


@given(u=st.floats(0, 1), ramp=st.floats(0.01, 1), first=st.floats(0, 1), last=st.floats(0, 1))
def test_the_decay_is_a_function_of_the_run_alone(u: float, ramp: float, first: float, last: float) -> None:
    first, last = sorted((first, last))
    options = LatentOptions(decay=(first, last), decay_ramp=ramp)
    assert teacher_decay(options, 0.0) == first and teacher_decay(options, 1.0) == pytest.approx(last)
    assert first - 1e-9 <= teacher_decay(options, u) <= last + 1e-9
    assert teacher_decay(options, u) <= teacher_decay(options, min(u + 0.1, 1.0)) + 1e-9
    assert teacher_decay(options, ramp) == pytest.approx(last)


def test_it_is_neither_optimised_nor_in_training() -> None:
    model = latent(model=MODEL.model_copy(update={"drop_path": 0.9}))
    names = {name for group in optim.make_optimizer(model, optim.OptimOptions(), 2).param_groups
             for name in group["names"]}
    assert names == {name for name, _ in model.named_parameters() if not name.startswith("teacher.")}
    model.train()
    assert model.encoder.training and not any(module.training for module in model.teacher.modules())
    batch = seen([8000, 3000])
    patches = patchify(batch.spec, GEOMETRY)
    first, second = (model.targets(patches, batch.valid) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    model.eval()(batch).loss.backward()
    assert all(parameter.grad is None for parameter in model.teacher.parameters())
    assert all(p.grad is not None and p.grad.any() for name, p in model.named_parameters() if name in names)


def test_targets_are_the_mean_of_normalised_layers_and_the_clips_own_mean() -> None:
    model, batch = latent(target_layers=2), seen([8000, 3000])
    tokens, clips, features = model.targets(patchify(batch.spec, GEOMETRY), batch.valid)
    layers: list[Tensor] = []
    for block in model.teacher.blocks:
        block.register_forward_hook(lambda module, inputs, output: layers.append(output))
    final = model.teacher(patchify(batch.spec, GEOMETRY), valid=batch.valid)
    assert batch.valid is not None
    for clip, valid in enumerate(batch.valid):
        own = [layer[clip, 1:][valid] for layer in layers]
        normed = [(x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt() for x in own]
        torch.testing.assert_close(tokens[clip][valid], torch.stack(normed).mean(0), rtol=1e-4, atol=1e-4)
        mean = torch.stack(own).mean((0, 1))
        wanted = (mean - mean.mean()) / (mean.var(correction=0) + 1e-5).sqrt()
        torch.testing.assert_close(clips[clip], wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(features[clip], final[clip, 1:][valid].mean(0), rtol=1e-4, atol=1e-5)
    last = latent(target_layers=1).targets(patchify(batch.spec, GEOMETRY), batch.valid)[0]
    assert not torch.allclose(last, tokens)


def test_the_teacher_and_the_spectrogram_are_shared_by_all_views() -> None:
    model, calls = latent(), []
    model.teacher.blocks[0].register_forward_hook(lambda m, inputs, output: calls.append(tuple(output.shape[:2])))
    model.encoder.blocks[0].register_forward_hook(lambda m, inputs, output: calls.append(tuple(output.shape[:2])))
    batch = seen([8000, 8000])
    model(batch)
    kept = batch.masks[0].kept.shape[1]
    assert calls == [(2, 1 + GEOMETRY.num_tokens), (6, 1 + kept)]


# --- the student


def test_the_loss_is_the_mean_over_views() -> None:
    model, batch = latent(), seen([8000, 3000])
    alone = latent(views=1)
    losses = torch.stack([alone(replace(batch, masks=(mask,))).loss for mask in batch.masks])
    assert len(losses.unique()) == 3
    torch.testing.assert_close(model(batch).loss, losses.mean())
    result = latent(clip_weight=2.0)(batch)
    torch.testing.assert_close(result.loss.detach(), result.metrics["token_loss"] + 2 * result.metrics["clip_loss"])


def test_a_perfect_student_has_no_loss() -> None:
    """Where the decoder and the clip head say just what the teacher does."""
    model, batch = latent(), seen([8000, 3000])
    tokens, clips, _ = model.targets(patchify(batch.spec, GEOMETRY), batch.valid)
    masked = torch.cat([mask.masked for mask in batch.masks])
    said = tokens.repeat(3, 1, 1).masked_fill(~masked[..., None], 7.0)  # what is kept is not asked for
    model.decoder.register_forward_hook(lambda *_: said)
    model.clip_head.register_forward_hook(lambda *_: clips.repeat(3, 1))
    assert model(batch).loss == 0


def test_the_student_does_not_see_what_is_masked() -> None:
    model, batch = latent(), seen([8000])
    one = replace(batch, masks=batch.masks[:1] * 3)
    patches, hidden = patchify(batch.spec, GEOMETRY), one.masks[0].masked[..., None]
    other = patchify_back(torch.where(hidden, patches + 3, patches), one)
    outputs: list[Tensor] = []
    model.decoder.register_forward_hook(lambda m, inputs, output: outputs.append(output))
    assert not torch.equal(model(one).loss, model(other).loss)
    assert torch.equal(*outputs)


@settings(max_examples=8)
@given(num_samples=lengths)
def test_a_clips_loss_depends_neither_on_padding_nor_on_its_batch(num_samples: list[int]) -> None:
    model, items = latent(), sounds([*num_samples, int(FULL)])
    alone = [model(batch).loss for batch in each_alone(items, VIEWS)]
    torch.testing.assert_close(model(batch_of(items, VIEWS)).loss, torch.stack(alone).mean(), rtol=1e-4, atol=1e-4)


def test_values_in_padding_change_nothing() -> None:
    model, batch = latent(), seen([8000, 3000, 900])
    changed = with_other_padding(batch)
    torch.testing.assert_close(model(changed).loss, model(batch).loss)
    torch.testing.assert_close(gradients(model, changed), gradients(model, batch))


def test_a_short_clip_is_decoded_as_where_all_clips_are_short() -> None:
    """Convolutions do not reach behind its end."""
    short = make_geometry(AUDIO.model_copy(update={"clip_seconds": 0.2}), "frame_shift", (8, 4), 2)
    torch.manual_seed(0)
    long_decoder = ConvDecoder(16, 8, 3, 2, GEOMETRY)
    decoder = ConvDecoder(16, 8, 3, 2, short)
    decoder.load_state_dict(long_decoder.state_dict())
    kept, tokens = torch.tensor([[0, 1, short.columns]]), torch.randn(1, 3, 16)
    there = kept // short.columns * GEOMETRY.columns + kept % short.columns
    valid = (torch.arange(GEOMETRY.columns) < short.columns).repeat(1, GEOMETRY.grid_f)
    found = long_decoder(tokens, there, valid)[:, valid[0]]
    torch.testing.assert_close(found, decoder(tokens, kept))
    assert not torch.allclose(long_decoder(tokens, there)[:, valid[0]], found)


def test_a_clip_of_one_token_has_only_itself_to_tell() -> None:
    model = latent(make_geometry(AUDIO, "patch", (16, 4), 2))
    batch = seen([600], model.geometry)
    result = model(batch)
    assert result.metrics["token_loss"] == 0 and result.metrics["clip_loss"] > 0
    assert gradients(model, batch).isfinite().all()


# --- collapse


def test_collapse_is_seen() -> None:
    batch, model = seen([8000, 8000, 5000]), latent()
    assert model(batch).metrics["std_of_l2_normalized"] > 0
    torch.nn.init.zeros_(model.teacher.norm.weight)
    assert model(batch).metrics["std_of_l2_normalized"] < 1e-6
    torch.testing.assert_close(spread_of(torch.randn(2000, 64)), torch.tensor(1 / 8), rtol=0.02, atol=0)
    assert spread_of(torch.randn(1, 64)).isnan()


def test_instance_norm_of_a_constant_is_nothing() -> None:
    assert instance_norm(torch.full((2, 5, 3), 4.0), None).abs().max() == 0


# --- crossing a boundary


@pytest.mark.parametrize("compression", ["frame_shift", "pool_mean", "patch"])
def test_the_teacher_crosses_as_the_encoder_does(compression: Compression) -> None:
    coarse, fine = make_geometries(AUDIO, compression, (8, 4), [(2, None), (1, None)])
    model, target = latent(coarse, LEARNED), latent(fine, LEARNED)
    result, report = transfer(model.state_dict(), coarse, target.state_dict(), fine)
    target.load_state_dict(result)
    actions = {moved.name: moved.action for moved in report.moved}
    resized = {"positions"} | ({"patch_embed.weight"} if compression == "patch" else set())
    if compression == "patch":  # the columns are the same seconds long, one for two
        assert fine.columns > coarse.columns
    for part in ("encoder", "teacher"):
        own = {name.removeprefix(f"{part}."): action for name, action in actions.items() if name.startswith(part)}
        assert {name for name, action in own.items() if action == "resized"} == resized
    swapped = {n.replace("encoder.", "x.").replace("teacher.", "encoder.").replace("x.", "teacher."): v
               for n, v in model.state_dict().items()}
    other, _ = transfer(swapped, coarse, target.state_dict(), fine)
    assert all(torch.equal(other[n.replace("teacher.", "encoder.")], v) for n, v in result.items() if "teacher." in n)
    assert target(seen([8000, 3000], fine)).loss.isfinite()


@pytest.mark.parametrize("lost", ["teacher.norm.bias", "teacher.positions", "encoder.positions"])
def test_a_lost_teacher_is_refused(lost: str) -> None:
    coarse, fine = make_geometries(AUDIO, "frame_shift", (8, 4), [(2, None), (1, None)])
    state, target = latent(coarse, LEARNED).state_dict(), latent(fine, LEARNED).state_dict()
    part = lost.partition(".")[0]
    with pytest.raises(UserError, match=f"the {part} does not fit the checkpoint: {lost}: not in the checkpoint$"):
        transfer({name: value for name, value in state.items() if name != lost}, coarse, target, fine)
    with pytest.raises(UserError, match=f"the {part} does not fit the checkpoint: {lost}: not in the model$"):
        transfer(state, coarse, {name: value for name, value in target.items() if name != lost}, fine)


def test_what_has_no_teacher_takes_the_encoder_alone() -> None:
    state, fresh = latent().state_dict(), MAE(MODEL, MAEOptions(), GEOMETRY).state_dict()
    result, report = transfer(state, GEOMETRY, fresh, GEOMETRY)
    assert all(torch.equal(value, state[name]) for name, value in result.items() if name.startswith("encoder."))
    assert any("dropped teacher" in line for line in report.lines())


def test_impossible_options() -> None:
    with pytest.raises(ValidationError, match="the decay rises"):
        LatentOptions(decay=(0.9, 0.5))
    with pytest.raises(ValidationError, match="does not divide decoder_width 8"):
        LatentOptions(decoder_width=8, decoder_groups=3)
