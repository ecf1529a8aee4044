"""What the losses of the objectives depend on, and what they must not depend on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from batches import (
    AUDIO,
    CLASSES,
    FULL,
    GEOMETRY,
    MODEL,
    batch_of,
    each_alone,
    gradients,
    lengths,
    patchify_back,
    some,
    sounds,
    with_other_padding,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from ssl_c2f.curriculum.geometry import Compression, Geometry, make_geometry
from ssl_c2f.models.patches import patchify
from ssl_c2f.objectives.latent import Latent, LatentOptions
from ssl_c2f.objectives.mae import MAE, MAEOptions
from ssl_c2f.objectives.ssast import SSAST, SSASTOptions
from ssl_c2f.objectives.supervised import Supervised, SupervisedOptions

each_targets = pytest.mark.parametrize("norm_targets", [False, True])


def mae(norm_targets: bool = False, geometry: Geometry = GEOMETRY) -> MAE:
    torch.manual_seed(0)
    options = MAEOptions(decoder_width=8, decoder_depth=1, decoder_heads=2, norm_targets=norm_targets)
    return MAE(MODEL, options, geometry).eval()


def supervised(**options: Any) -> Supervised:
    torch.manual_seed(0)
    return Supervised(MODEL, SupervisedOptions(**options), GEOMETRY, CLASSES)


# --- masked autoencoding


@each_targets
@pytest.mark.parametrize("num_samples", [[8000, 8000], [8000, 3000, 900]])
def test_the_loss_is_the_mean_error_of_real_masked_values(norm_targets: bool, num_samples: list[int]) -> None:
    model, batch = mae(norm_targets), batch_of(sounds(num_samples))
    predictions, _ = model.predict(batch)
    g, losses = GEOMETRY, []
    for clip in range(len(num_samples)):
        errors: list[Tensor] = []
        for token in batch.masks[0].masked[clip].nonzero().flatten().tolist():
            f, t = divmod(token, g.columns)
            real = min(g.patch_t, int(batch.num_frames[clip]) - t * g.patch_t)
            patch = batch.spec[clip, t * g.patch_t :][:real, f * g.patch_f : (f + 1) * g.patch_f].T
            if norm_targets:
                patch = (patch - patch.mean()) / (patch.var(correction=0) + 1e-6).sqrt()
            drawn = predictions[clip, token].view(g.patch_f, g.patch_t)[:, :real]
            errors.append((drawn - patch).square().flatten())
        losses.append(torch.cat(errors).mean())
    torch.testing.assert_close(model(batch).loss, torch.stack(losses).mean(), rtol=1e-4, atol=1e-5)


@each_targets
@settings(max_examples=10)
@given(num_samples=lengths)
def test_audio_behind_a_clips_end_changes_nothing(norm_targets: bool, num_samples: list[int]) -> None:
    model, items = mae(norm_targets), sounds(num_samples)
    other = items.audio.clone()
    for row, end in zip(other, num_samples, strict=True):
        row[end:] = 100 * torch.randn(len(row) - end)
    batch, changed = batch_of(items), batch_of(replace(items, audio=other))
    assert torch.equal(model(batch).loss, model(changed).loss)
    assert torch.equal(gradients(model, batch), gradients(model, changed))
    assert torch.equal(model.embed(batch, "mean_std"), model.embed(changed, "mean_std"))


@each_targets
def test_values_in_padding_change_nothing(norm_targets: bool) -> None:
    """Even past the front end, which puts zeros there."""
    model, batch = mae(norm_targets), batch_of(sounds([8000, 3000, 900]))
    changed = with_other_padding(batch)
    torch.testing.assert_close(model(changed).loss, model(batch).loss)
    torch.testing.assert_close(gradients(model, changed), gradients(model, batch))


@each_targets
@settings(max_examples=10)
@given(num_samples=lengths)
def test_a_clips_loss_and_features_do_not_depend_on_its_batch(norm_targets: bool, num_samples: list[int]) -> None:
    items = sounds([*num_samples, int(FULL)])
    model, batch = mae(norm_targets), batch_of(items)
    alone = [batch_of(some(items, slice(i, i + 1))) for i in range(len(items.index))]
    losses = torch.stack([model(one).loss for one in alone])
    torch.testing.assert_close(model(batch).loss, losses.mean(), rtol=1e-4, atol=1e-5)
    for kind in ("mean", "mean_std", "class_token"):
        rows = torch.cat([model.embed(one, kind) for one in alone])
        torch.testing.assert_close(model.embed(batch, kind), rows, rtol=1e-4, atol=1e-4)


def test_the_encoder_does_not_see_what_is_masked() -> None:
    model, batch = mae(), batch_of(sounds([8000, 3000]))
    mask, patches = batch.masks[0], patchify(batch.spec, GEOMETRY)
    hidden = patches.masked_fill(mask.masked[..., None], torch.nan)
    tokens = [model.encoder(x, mask.kept, mask.kept_valid) for x in (patches, hidden)]
    assert torch.equal(*tokens)
    louder = replace(batch, spec=batch.spec * 2)
    assert not torch.equal(model.encoder(patchify(louder.spec, GEOMETRY), mask.kept, mask.kept_valid), tokens[0])


def test_predictions_do_not_depend_on_what_they_are_compared_with() -> None:
    model, batch = mae(), batch_of(sounds([8000]))
    masked = batch.masks[0].masked[..., None]
    spec = patchify(batch.spec, GEOMETRY)
    other = patchify_back(torch.where(masked, spec + 3, spec), batch)
    assert torch.equal(model.predict(other)[0], model.predict(batch)[0])
    assert not torch.equal(model(other).loss, model(batch).loss)


def test_every_weight_learns() -> None:
    model = mae()
    gradients(model, batch_of(sounds([8000, 3000])))
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_a_clip_of_one_token_has_nothing_to_tell() -> None:
    """Such a short clip costs its share of the batch, and no step."""
    geometry = make_geometry(AUDIO, "patch", (16, 4), 2)
    model = mae(geometry=geometry)
    short, long = batch_of(sounds([600]), geometry=geometry), batch_of(sounds([8000]), geometry=geometry)
    assert not short.masks[0].masked.any() and not model(short).loss.any()
    both = model(batch_of(sounds([8000, 600]), geometry=geometry)).loss
    torch.testing.assert_close(both, model(long).loss / 2)


@pytest.mark.parametrize("compression", ["frame_shift", "pool_mean", "pool_max", "patch"])
@each_targets
def test_pictures_show_input_holes_and_reconstruction(compression: Compression, norm_targets: bool) -> None:
    geometry = make_geometry(AUDIO, compression, (8, 4), 2)
    model, batch = mae(norm_targets, geometry), batch_of(sounds([8000, 4000]), geometry=geometry)
    views = model.pictures(batch)
    real = batch.spec[:, : geometry.columns * geometry.patch_t]
    assert all(view.shape == real.shape for view in views.values())
    assert torch.equal(views["input"], real)
    seen = ~views["kept"].isnan()
    assert torch.equal(views["kept"][seen], real[seen])
    assert seen.logical_not().sum() == batch.masks[0].masked.sum() * geometry.patch_dim
    if not norm_targets:
        assert torch.equal(views["reconstruction"][seen], real[seen])
    assert not views["reconstruction"].isnan().any()


# --- with labels


@settings(max_examples=10)
@given(num_samples=lengths, head=st.sampled_from(["mean_pool", "class_token", "linear"]))
def test_logits_depend_neither_on_padding_nor_on_batch_mates(num_samples: list[int], head: str) -> None:
    model, items = supervised(head=head).eval(), sounds([*num_samples, int(FULL)])
    logits = model.logits(batch_of(items, None))
    for own, alone in zip(logits, each_alone(items, None), strict=True):
        torch.testing.assert_close(model.logits(alone)[0], own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", ["mean_pool", "class_token", "linear"])
def test_a_short_clip_is_what_it_is_where_all_clips_are_short(head: str) -> None:
    """Nothing of the columns behind its end is left: neither in attention, nor in pooling, nor in features."""
    short = make_geometry(AUDIO.model_copy(update={"clip_seconds": 0.2}), "frame_shift", (8, 4), 2)
    assert short.columns < GEOMETRY.columns
    model, items = supervised(head=head).eval(), sounds([3200, 8000])
    there = Supervised(MODEL, SupervisedOptions.model_validate({"head": head}), short, CLASSES).eval()
    there.load_state_dict(model.state_dict())
    batch, cut = batch_of(items, None), replace(some(items, slice(0, 1)), audio=items.audio[:1, :3200])
    alone = batch_of(cut, None, short)
    assert batch.short and not alone.short
    torch.testing.assert_close(model.logits(batch)[:1], there.logits(alone), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.embed(batch)[:1], there.embed(alone), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mae().embed(batch)[:1], mae(geometry=short).embed(alone), rtol=1e-4, atol=1e-5)


def test_a_frozen_encoder_neither_learns_nor_drops() -> None:
    model = Supervised(MODEL.model_copy(update={"drop_path": 0.9}), SupervisedOptions(head="linear"), GEOMETRY, CLASSES)
    model.train()
    assert model.training and model.head.training
    assert not any(module.training for module in model.encoder.modules())
    batch = batch_of(sounds([8000, 3000]), None)
    assert torch.equal(model.logits(batch), model.logits(batch))
    model(batch).loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in model.encoder.parameters())
    assert all(p.grad is not None and p.grad.any() for p in model.head.parameters())
    assert not model.eval().head.training


@pytest.mark.parametrize("head", ["mean_pool", "class_token"])
def test_a_tuned_encoder_learns_and_drops(head: str) -> None:
    options = SupervisedOptions.model_validate({"head": head})
    model = Supervised(MODEL.model_copy(update={"drop_path": 0.9}), options, GEOMETRY, CLASSES)
    model.train()
    batch = batch_of(sounds([8000] * 8), None)
    assert not torch.equal(model.logits(batch), model.logits(batch))
    model.eval()
    torch.nn.init.normal_(model.head.classifier.weight)
    gradients(model, batch)
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_single_labels_are_learned_with_cross_entropy() -> None:
    model, batch = supervised(label_smoothing=0.1).eval(), batch_of(sounds([8000] * 3), None)
    result, logits = model(batch), model.logits(batch)
    expected = F.cross_entropy(logits, torch.arange(3), label_smoothing=0.1)
    torch.testing.assert_close(result.loss, expected)
    right = (logits.argmax(1) == torch.arange(3)).float().mean()
    torch.testing.assert_close(result.metrics["accuracy"], right)
    torch.testing.assert_close(model.scores(batch), logits.softmax(1))


def test_several_labels_are_learned_each_for_itself() -> None:
    model, items = supervised(labels="multi", label_smoothing=0.2).eval(), sounds([8000] * 2)
    labels = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])  # none is a label too
    batch = batch_of(replace(items, labels=labels), None)
    logits = model.logits(batch)
    target = torch.where(labels > 0, 0.9, 0.1)
    expected = -(target * F.logsigmoid(logits) + (1 - target) * F.logsigmoid(-logits)).mean()
    torch.testing.assert_close(model(batch).loss, expected)
    torch.testing.assert_close(model.scores(batch), logits.sigmoid())


@pytest.mark.parametrize("labels", ["single", "multi"])
@settings(max_examples=20)
@given(share=st.floats(0.0, 1.0))
def test_mixed_clips_have_the_labels_of_both(labels: str, share: float) -> None:
    """Of several labels, one that both clips have stays whole; timm's mixup would make nonsense of such targets."""
    several = labels == "multi"
    items = replace(sounds([8000]), labels=torch.tensor([[1.0, float(several), 0.0, 0.0]]))
    partner = replace(sounds([8000], seed=1), labels=torch.tensor([[0.0, float(several), 1.0, 0.0]]))
    batch = batch_of(replace(items, partner=partner, share=torch.tensor([share])), None)
    torch.testing.assert_close(batch.labels, torch.tensor([[share, float(several), 1 - share, 0.0]]))
    # the loss is linear in the labels: the mix of what each clip's own labels would cost
    model = supervised(labels=labels).eval()
    own = [model(replace(batch, labels=x.labels)).loss for x in (items, partner)]
    torch.testing.assert_close(model(batch).loss, share * own[0] + (1 - share) * own[1])


def test_the_options_name_their_objective() -> None:
    assert isinstance(MAEOptions().build(MODEL, GEOMETRY, 0), MAE)
    assert isinstance(SSASTOptions().build(MODEL, GEOMETRY, 0), SSAST)
    assert isinstance(LatentOptions().build(MODEL, GEOMETRY, 0), Latent)
    assert isinstance(SupervisedOptions().build(MODEL, GEOMETRY, CLASSES), Supervised)
