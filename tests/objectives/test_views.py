"""Views told apart: the loss is the published one, and nothing but a clip's own views and its rivals go into it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from batches import AUDIO, GEOMETRY, MODEL, gradients, sounds, with_other_padding
from flops import counted
from torch import Tensor
from torch.nn import functional as F

from ssl_c2f.core import options as option_files
from ssl_c2f.core.options import UserError
from ssl_c2f.curriculum import cost
from ssl_c2f.curriculum.geometry import Compression, Geometry, make_geometry
from ssl_c2f.curriculum.phases import Masking
from ssl_c2f.data.augment import AugmentOptions
from ssl_c2f.data.front_end import Batch, FrontEnd, Statistics
from ssl_c2f.models.patches import patchify
from ssl_c2f.objectives.views import Views, ViewsOptions, info_nce, joined, vicreg
from ssl_c2f.train.recipe import RunOptions

SMALL: dict[str, Any] = {"seconds": 0.25, "hidden": 12, "projection": 8, "decoder_width": 8, "decoder_heads": 2}


def views(geometry: Geometry = GEOMETRY, **more: Any) -> Views:
    torch.manual_seed(0)
    return Views(MODEL, ViewsOptions(**SMALL | more), geometry).eval()


def batch_of(num_samples: list[int], count: int = 2, geometry: Geometry = GEOMETRY) -> Batch:
    masking = Masking("uniform", 0.5, (1, 2), count, view_seconds=0.25)
    augment = AugmentOptions(time_stretch=(0.7, 1.4), gain_db=6)
    batch: Batch = FrontEnd(geometry, Statistics(0.0, 4.0))(sounds(num_samples), masking, augment)
    return batch


def test_with_two_views_infonce_is_simclrs_loss() -> None:
    z = torch.randn(2, 5, 8)
    loss, metrics = info_nce(z, ViewsOptions(temperature=0.3))
    rows = F.normalize(z.flatten(0, 1), dim=1)
    scores = (rows @ rows.T / 0.3).fill_diagonal_(-1e9)
    partner = torch.cat([torch.arange(5) + 5, torch.arange(5)])
    torch.testing.assert_close(loss, F.cross_entropy(scores, partner))
    torch.testing.assert_close(metrics["nce_accuracy"], (scores.argmax(1) == partner).float().mean())
    torch.testing.assert_close(metrics["nce_chance"], torch.tensor(9.0).log())


@pytest.mark.parametrize("count", [2, 3])
def test_infonce_knows_its_partners_in_any_order_of_clips(count: int) -> None:
    z = F.normalize(torch.randn(1, 6, 8) + 0.1 * torch.randn(count, 6, 8), dim=-1)
    loss, metrics = info_nce(z, ViewsOptions())
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(info_nce(z[:, order], ViewsOptions())[0], loss)
    assert metrics["nce_accuracy"] == 1.0
    worse = info_nce(torch.cat([z[:1, order], z[1:]]), ViewsOptions())[0]
    assert worse > loss + 0.5


def test_vicreg_is_the_sum_of_its_three_terms() -> None:
    a, b = torch.randn(2, 7, 4)
    loss, _ = vicreg(torch.stack([a, b]), ViewsOptions())
    variance = sum(F.relu(1 - (x.var(0) + 1e-4).sqrt()).mean() / 2 for x in (a, b))
    shared = sum((torch.cov(x.T).square().sum() - x.var(0).square().sum()) / 4 / 2 for x in (a, b))
    torch.testing.assert_close(loss, 25 * F.mse_loss(a, b) + 25 * variance + shared)


@pytest.mark.parametrize("contrast", ["infonce", "vicreg"])
def test_values_in_padding_change_nothing(contrast: str) -> None:
    model, batch = views(contrast=contrast), batch_of([8000, 2000, 700])
    assert batch.short
    changed = with_other_padding(batch)
    torch.testing.assert_close(model(changed).loss, model(batch).loss)
    torch.testing.assert_close(gradients(model, changed), gradients(model, batch))


def test_the_encoder_does_not_see_what_is_masked_and_its_places_are_the_clips() -> None:
    model, batch = views(), batch_of([8000, 8000])
    mask = joined(batch.masks)
    _, tokens = model.encode(batch, mask)
    hidden = patchify(batch.spec, batch.geometry).masked_fill(mask.masked[..., None], torch.nan)
    spec = torch.zeros_like(batch.spec)
    g = batch.geometry
    grid = hidden.view(-1, g.grid_f, g.columns, g.patch_f, g.patch_t).permute(0, 2, 4, 1, 3)
    spec[:] = grid.flatten(3).flatten(1, 2)
    assert torch.equal(model.encode(replace(batch, spec=spec), mask)[1], tokens)
    seen: list[Tensor] = []
    model.encoder.register_forward_pre_hook(lambda m, a, k: seen.append(k["places"]), with_kwargs=True)
    for epoch in range(40):
        model.encode(replace(batch, keys=batch.keys + epoch), mask)
    columns = torch.stack(seen) % GEOMETRY.columns
    assert columns.min() == 0 and columns.max() == GEOMETRY.columns - 1
    rows = torch.stack(seen) // GEOMETRY.columns
    assert (rows == mask.kept // g.columns).all()


def test_without_reconstruction_there_is_no_decoder() -> None:
    model, batch = views(reconstruction=0), batch_of([8000, 8000])
    assert model.decoder is None and "mse" not in model(batch).metrics
    assert set(model.pictures(batch)) == {"input", "kept"}
    whole = views()
    assert whole(batch).loss > whole(batch).metrics["nce"]
    assert set(whole.pictures(batch)) == {"input", "kept", "reconstruction"}


@pytest.mark.parametrize(
    ("compression", "factor"), [("frame_shift", 1), ("frame_shift", 2), ("pool_mean", 4), ("pool_max", 3), ("patch", 2)]
)
def test_a_step_costs_what_the_counter_says(compression: Compression, factor: int) -> None:
    geometry = make_geometry(AUDIO, compression, (8, 4), factor)
    for options in (ViewsOptions(**SMALL), ViewsOptions(views=3, **SMALL | {"reconstruction": 0, "seconds": 0.4})):
        objective = options.build(MODEL, geometry, 0)
        masking = Masking("uniform", 0.5, (1, 2), options.views, view_seconds=options.seconds)
        found = counted(objective, geometry, masking)
        parts = options.costs(MODEL, geometry, 0.5, 0)
        assert cost.step_flops(parts) == pytest.approx(found, rel=0.02)


def run(*words: str) -> RunOptions:
    return option_files.load(RunOptions, None, words, {
        "objective": {"name": "views"}, "phases": [{"name": name, "steps": 1} for name in "ab"],
    })


@pytest.mark.parametrize(
    ("word", "complaint"),
    [
        ("augment.mixup_prob=0.5", "mix_prob"),
        ("objective.decoder_width=36 objective.decoder_heads=8", "multiple"),
        ("model.patch_f=128 objective.seconds=0.1", "single token"),
        ("phases.1.warmup_steps=1 optim.schedule=trunk", "phase b"),
    ],
)
def test_what_cannot_work_is_refused(word: str, complaint: str) -> None:
    run()
    with pytest.raises(UserError, match=complaint):
        run(*word.split())
