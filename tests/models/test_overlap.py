"""Overlapping patches and two class tokens, as in AST."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ssl_c2f import cli
from ssl_c2f.core import checkpoint, options
from ssl_c2f.core.options import UserError
from ssl_c2f.curriculum.geometry import AudioOptions, Geometry, make_geometries, make_geometry
from ssl_c2f.curriculum.transfer import transfer
from ssl_c2f.data.front_end import Batch
from ssl_c2f.models.heads import Head, read_out
from ssl_c2f.models.patches import patchify, real_values
from ssl_c2f.models.vit import ViT, ViTOptions
from ssl_c2f.objectives.mae import MAEOptions
from ssl_c2f.objectives.supervised import SupervisedOptions
from ssl_c2f.train.recipe import RunOptions

AUDIO = AudioOptions(num_mels=20, clip_seconds=0.4)


@st.composite
def overlapping(draw: st.DrawFn) -> Geometry:
    patch = draw(st.integers(2, 8)), draw(st.integers(2, 9))
    stride = draw(st.integers(1, patch[0] - 1)), draw(st.integers(1, patch[1]))
    audio = AUDIO.model_copy(update={"clip_seconds": draw(st.floats(0.05, 0.6))})
    compression = draw(st.sampled_from(["frame_shift", "pool_mean", "pool_max", "patch"]))
    return make_geometry(audio, compression, patch, draw(st.integers(1, 3)), stride=stride)


@given(overlapping())
def test_a_convolution_cuts_the_same_patches(g: Geometry) -> None:
    spec = torch.randn(2, g.num_frames, g.num_mels)
    kernel = torch.randn(5, 1, g.patch_f, g.patch_t)
    wanted = F.conv2d(spec[:, : g.covered].mT[:, None], kernel, stride=(g.stride_f, g.stride_t))
    assert wanted.shape[2:] == g.grid and g.num_tokens == g.grid[0] * g.grid[1]
    found = patchify(spec, g) @ kernel.flatten(1).T
    torch.testing.assert_close(found, wanted.flatten(2).mT, rtol=1e-4, atol=1e-4)


@given(overlapping(), st.integers(1, 9600))
def test_columns_cover_every_real_frame_and_none_is_padding_alone(g: Geometry, samples: int) -> None:
    frames = g.frames(samples)
    columns = g.tokens_t(frames)
    assert g.patch_t + (columns - 1) * g.stride_t >= frames
    assert columns == 1 or (columns - 2) * g.stride_t + g.patch_t < frames  # one less would not do
    assert g.columns <= g.grid_t and g.covered <= g.num_frames
    if samples <= g.clip_samples:
        real = real_values(torch.tensor([frames]), g).any(-1).view(g.grid)[0]
        assert real[:columns].all()


@given(overlapping())
def test_positions_are_those_of_the_values_in_a_patch(g: Geometry) -> None:
    frames = torch.arange(g.num_frames, dtype=torch.float64)[None, :, None].expand(1, -1, g.num_mels)
    mels = torch.arange(g.num_mels, dtype=torch.float64).expand(1, g.num_frames, -1)
    rows, columns = (places.double() for places in g.positions())
    unit = g.unit_samples / (g.pool * g.hop)  # frames
    in_time = (patchify(frames, g).mean(-1).view(g.grid)[0] + 0.5) / unit - 0.5
    in_mels = (patchify(mels, g).mean(-1).view(g.grid)[:, 0] + 0.5) / g.unit_mels - 0.5
    torch.testing.assert_close(columns[: g.columns], in_time, rtol=0, atol=1e-4)
    torch.testing.assert_close(rows, in_mels, rtol=0, atol=1e-4)


def test_the_grid_of_ast() -> None:
    """Ten seconds of AudioSet: 12 rows; its 1024 frames give 101 columns, whose patches reach to frame 1016."""
    audio = AudioOptions(clip_seconds=(1015 * 160 + 400) / 16000)
    g = make_geometry(audio, "frame_shift", (16, 16), stride=(10, 10))
    assert g.grid == (12, 101) and g.covered == 1016 and g.overlaps
    assert Geometry(**json.loads(json.dumps(g.to_dict()))) == g
    plain = make_geometry(audio, "patch", (16, 16))
    old: dict[str, Any] = {key: value for key, value in plain.to_dict().items() if "stride" not in key}
    assert Geometry(**old) == plain  # of checkpoints from before there were strides


@pytest.mark.parametrize("compression", ["frame_shift", "pool_mean", "patch"])
def test_a_coarse_column_stands_amid_the_fine_ones(compression: Any) -> None:
    coarse, fine = make_geometries(AUDIO, compression, (8, 8), [(2, None), (1, None)], (4, 4))
    places, covered = coarse.positions()[1], fine.positions()[1]
    # 2 j + 1/2 of strides of half a patch each, and half a patch of its own
    wanted = torch.arange(len(places)) + 0.5
    torch.testing.assert_close(places, wanted)
    assert float(covered[1] - covered[0]) == 0.5


@settings(max_examples=20)
@given(overlapping(), st.floats(0.3, 0.9))
def test_learned_positions_follow_physical_time_to_another_stride_and_length(g: Geometry, seconds: float) -> None:
    model = ViTOptions(width=16, depth=1, heads=2, positions="learned")
    options_ = SupervisedOptions(head="ast")
    target = make_geometry(
        AUDIO.model_copy(update={"clip_seconds": seconds}), "frame_shift", (g.patch_f, g.patch_t),
        unit=(g.unit_mels, g.unit_samples // 160), stride=(g.stride_f, g.patch_t),
    )
    state = options_.build(model, g, 2).state_dict()
    columns = g.positions()[1][: g.columns].repeat(g.grid_f)
    state["encoder.positions"] = columns[:, None].expand(-1, 16).clone()
    fitted, _ = transfer(state, g, options_.build(model, target, 2).state_dict(), target)
    found = fitted["encoder.positions"].view(*target.grid, 16)[0, :, 0]
    own = g.positions()[1]
    wanted = target.positions()[1][: target.columns].clamp(float(own[0]), float(own[g.columns - 1]))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)


def test_two_class_tokens_go_before_the_patches() -> None:
    g = make_geometry(AUDIO, "frame_shift", (10, 4))
    encoder = ViT(ViTOptions(width=16, depth=1, heads=2, class_tokens=2), g).eval()
    tokens = encoder(torch.randn(3, g.num_tokens, g.patch_dim))
    assert encoder.num_prefix == 2 and tokens.shape == (3, 2 + g.num_tokens, 16)
    valid = torch.rand(3, g.num_tokens) < 0.5
    valid[:, 0] = True
    torch.testing.assert_close(read_out(tokens, valid, "class_token", 2), (tokens[:, 0] + tokens[:, 1]) / 2)
    torch.testing.assert_close(read_out(tokens, valid, "mean", 2), read_out(tokens[:, 1:], valid, "mean", 1))
    head = Head("ast", 16, 3, 2)
    assert torch.equal(head(tokens, None), head.classifier(head.norm(tokens[:, :2].mean(1))))
    moved = tokens.clone()
    moved[:, 2:] = 0
    assert torch.equal(head(moved, None), head(tokens, None))


def test_masked_autoencoding_works_with_two_class_tokens() -> None:
    from ssl_c2f.data.masks import draw_mask

    g = make_geometry(AUDIO, "frame_shift", (10, 4))
    model = ViTOptions(width=16, depth=1, heads=2, class_tokens=2)
    mae = MAEOptions(decoder_width=8, decoder_depth=1, decoder_heads=2).build(model, g, 0)
    frames = torch.full((2,), g.frames(g.clip_samples))
    mask = draw_mask(torch.arange(2), g.grid, g.tokens_t(frames), "uniform", 0.5, (1, 1))
    spec = torch.randn(2, g.num_frames, g.num_mels)
    batch = Batch(spec, frames, torch.arange(2), torch.arange(2), torch.zeros(2, 0), g, False, (mask,))
    assert mae(batch).loss.isfinite() and mae.embed(batch).shape == (2, 16)


SUPERVISED = {"objective": {"name": "supervised"}, "phases": [{"name": "only", "steps": 1}]}
STRIDE = {"model": {"stride_f": 10, "stride_t": 10}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({**STRIDE, "objective": {"name": "mae"}}, "objective mae"),
        ({**STRIDE, "phases": [{"name": "only", "steps": 1, "patch_t": 32}]}, "phase only has a patch of its own"),
        ({"model": {"stride_t": 17}}, "stride 16x17 leaves gaps"),
        ({"model": {"patch_f": 130, "stride_f": 10}}, "patch_f 130"),
        ({"model": {"class_tokens": 3}}, "class_tokens"),
    ],
)
def test_what_cannot_overlap_is_one_line(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        options.load(RunOptions, None, (), SUPERVISED | changes)
    assert "\n" not in str(error.value)
    fits = options.load(RunOptions, None, (), SUPERVISED | STRIDE)
    assert fits.fine_geometry.grid == (12, 100) and fits.geometries == [fits.fine_geometry]


def test_supervised_training_overlaps_from_coarse_to_fine(sounds: Path, tmp_path: Path) -> None:
    """As a user types it: two factors, two class tokens, a stride of half a patch; the checkpoint predicts."""
    config = tmp_path / "ast.yaml"
    config.write_text(json.dumps({
        "audio": {"clip_seconds": 0.8, "num_mels": 32}, "objective": {"name": "supervised", "head": "ast"},
        "model": {"width": 16, "depth": 1, "heads": 2, "positions": "learned", "class_tokens": 2,
                  "stride_f": 8, "stride_t": 8},
        "phases": [{"name": "coarse", "steps": 1, "time_factor": 2, "batch_size": 4},
                   {"name": "fine", "steps": 1, "batch_size": 4}],
        "tracking": {"wandb": "off"}, "train": {"device": "cpu"},
    }))
    words = [str(config), f"data.root={sounds}", f"run_dir={tmp_path / 'run'}"]
    assert cli.main(["train", *words]) == 0
    saved = [checkpoint.load(folder).state for folder in tiny_runs.checkpoints(tmp_path / "run")]
    coarse, fine = (Geometry(**state["geometry"]) for state in saved)
    assert coarse.overlaps and (coarse.stride_t, coarse.hop) == (8, 320)
    assert fine.overlaps and fine.grid == (3, 9)  # 78 frames
    file = next(sounds.rglob("*.wav"))
    assert cli.main(["predict", "--ckpt", str(tmp_path / "run"), str(file)]) == 0
