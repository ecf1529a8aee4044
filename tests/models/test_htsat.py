"""HTS-AT: how time is folded into an image, its cost, and training it from coarse to fine."""
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import batch_of, some
from batches import sounds as noise
from engine_runs import go, to_the_end_in_steps
from flops import counted
from hypothesis import given
from hypothesis import strategies as st
from paths import ROOT
from timm.models.swin_transformer import SwinTransformerBlock
from tiny_runs import checkpoints, records, weights
from trained_runs import CLASSES, of, write_sounds

from ssl_c2f.core import checkpoint, options
from ssl_c2f.core.options import UserError
from ssl_c2f.curriculum import cost
from ssl_c2f.curriculum.geometry import AudioOptions, Compression, Geometry, make_geometries, make_geometry, stage_grid
from ssl_c2f.curriculum.transfer import resize_biases, transfer, window_of
from ssl_c2f.data.front_end import Batch
from ssl_c2f.data.synthetic import CLASSES as SOUNDS
from ssl_c2f.models.htsat import HTSAT, HTSATOptions, fold, window_mask
from ssl_c2f.models.patches import patchify
from ssl_c2f.models.vit import ViTOptions
from ssl_c2f.objectives.supervised import SupervisedOptions
from ssl_c2f.tasks import config
from ssl_c2f.tasks.embed import EmbedOptions, embed
from ssl_c2f.tasks.evaluate import EvaluateOptions, evaluate
from ssl_c2f.tasks.export import export
from ssl_c2f.tasks.finetune import FinetuneOptions, checkpoint_defaults, finetune
from ssl_c2f.tasks.predict import PredictOptions, predict
from ssl_c2f.tasks.probe import ProbeOptions, probe
from ssl_c2f.train import optim
from ssl_c2f.train.recipe import RunOptions
from ssl_c2f.train.weights import load_weights

SMALL = HTSATOptions(widths=(8, 16, 32, 64), depths=(2, 1, 1, 2), heads=(1, 2, 2, 4))
COMPRESSIONS: tuple[Compression, ...] = ("frame_shift", "pool_mean", "pool_max", "patch")


def geometry_of(
    factor: int = 1, compression: Compression = "frame_shift", seconds: float = 10.24, model: HTSATOptions = SMALL,
    mels: int = 64,
) -> Geometry:
    audio = AudioOptions(clip_seconds=seconds, num_mels=mels)
    return make_geometry(
        audio, compression, (model.patch_f, model.patch_t), factor, multiple=16, fold=(model.folds, model.merge)
    )


# --- folding


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("seconds", [10.24, 10.0, 5.0, 1.3])
@pytest.mark.parametrize("factor", [1, 2, 4])
def test_a_ramp_shows_where_each_token_stands(factor: int, seconds: float, compression: Compression) -> None:
    g = geometry_of(factor, compression, seconds)
    frames = torch.arange(g.covered, dtype=torch.float64)[:, None].expand(-1, 64)
    mels = torch.arange(64, dtype=torch.float64).expand(g.covered, -1)
    (height, width), found = g.folded, fold(patchify(torch.stack([frames, mels]), g), g)
    assert found.shape == (2, height, width, g.patch_dim)
    for r in range(height):
        for w in range(width):
            column, row = (r // g.grid_f) * width + w, r % g.grid_f
            if column >= g.columns:
                assert not found[:, r, w].any()
                continue
            cell = found[:, r, w].view(2, g.patch_f, g.patch_t)
            assert cell[0].tolist() == [[column * g.patch_t + i for i in range(g.patch_t)]] * g.patch_f
            assert cell[1].tolist() == [[row * g.patch_f + i] * g.patch_t for i in range(g.patch_f)]


def test_cutting_then_folding_is_the_published_image() -> None:
    """1024 frames of 64 mel bins become 256 x 256: four bands of 256 frames, each of 64 rows."""
    g = geometry_of()
    spec = torch.randn(2, 1024, 64)
    image = torch.cat([spec[:, 256 * i : 256 * (i + 1)].mT for i in range(4)], dim=1)
    assert g.folded == (64, 64) and image.shape == (2, 256, 256)
    cut = image.unflatten(1, (64, 4)).unflatten(3, (64, 4)).transpose(2, 3)  # type: ignore[no-untyped-call]
    assert torch.equal(fold(patchify(spec, g), g), cut.flatten(3))


@pytest.mark.parametrize(
    ("factor", "seconds", "folds", "last", "windows"),
    [
        (1, 10.24, 4, (8, 8), [(8, 8), (8, 8), (8, 8), (8, 8)]), (1, 10.0, 4, (8, 8), [(8, 8)] * 4),
        (2, 10.24, 2, (4, 8), [(8, 8), (8, 8), (8, 8), (4, 8)]),
        (4, 10.24, 2, (4, 4), [(8, 8), (8, 8), (8, 8), (4, 4)]),
        (1, 5.0, 2, (4, 8), [(8, 8), (8, 8), (8, 8), (4, 8)]), (4, 5.0, 1, (2, 4), [(8, 8), (8, 8), (4, 8), (2, 4)]),
        (1, 0.2, 1, (2, 1), [(8, 8), (8, 4), (4, 2), (2, 1)]),
    ],
)
def test_bands_and_windows_shrink_with_the_clip(
    factor: int, seconds: float, folds: int, last: tuple[int, int], windows: list[tuple[int, int]]
) -> None:
    for compression in COMPRESSIONS:
        g = geometry_of(factor, compression, seconds)
        assert g.folds == folds and stage_grid(g, 3) == last
        encoder = HTSAT(SMALL, g)
        assert [encoder.blocks[i].window_size for i in (0, 2, 3, 5)] == windows
        patches = torch.randn(1, g.num_tokens, g.patch_dim)
        assert encoder(patches).shape == (1, last[0] * last[1], 64)


def test_rows_that_would_merge_with_another_bands_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^10 rows of patches of 4 mel bins: merging them needs a multiple of 8$"):
        geometry_of(mels=40)


@given(seconds=st.floats(0.1, 12), factor=st.sampled_from([1, 2, 3, 4]), seed=st.integers(0, 99))
def test_real_tokens_are_those_with_a_real_column(seconds: float, factor: int, seed: int) -> None:
    g = geometry_of(factor, seconds=seconds)
    real = int(torch.randint(1, g.columns + 1, (1,), generator=torch.Generator().manual_seed(seed)))
    valid = (torch.arange(g.columns) < real).repeat(g.grid_f)[None]
    encoder = HTSAT(HTSATOptions(widths=(4,) * 4, depths=(1,) * 4, heads=(1,) * 4), g)
    (height, width), band = stage_grid(g, 3), g.grid_f // 8
    for columns, mask in ((real, encoder.real(valid)), (g.columns, encoder.real(None))):
        first = [((r // band) * width + w) * 8 for r in range(height) for w in range(width)]
        assert [start < columns for start in first] == (mask[0].tolist() if mask is not None else [True] * len(first))


# --- the encoder and its attention


def test_every_weight_learns() -> None:
    g = geometry_of(seconds=1.3)
    torch.manual_seed(0)
    objective = SupervisedOptions().build(SMALL, g, 3).eval()
    torch.nn.init.normal_(objective.head.classifier.weight)  # type: ignore[union-attr, arg-type]
    spec, rows = torch.randn(2, g.num_frames, 64), torch.arange(2)
    objective(Batch(spec, torch.full((2,), g.covered), rows, rows, torch.eye(3)[:2], g, False)).loss.backward()
    assert [name for name, p in objective.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_embedded_patches_are_normalised() -> None:
    """Without biases, how loud all of them are makes no difference."""
    g = geometry_of(seconds=1.3)
    encoder, patches = HTSAT(SMALL, g).eval(), 5 * torch.randn(2, g.num_tokens, g.patch_dim)
    torch.testing.assert_close(encoder(3 * patches), encoder(patches), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("grid", [(16, 24), (8, 14), (4, 12), (13, 21), (3, 5)])
@pytest.mark.parametrize("step", [0, 4])
def test_attention_stays_in_its_window(grid: tuple[int, int], step: int) -> None:
    """By gradients: a token learns from its window's tokens, none of the opposite edge's, none of what fills up."""
    block = SwinTransformerBlock(4, grid, 1, window_size=8, shift_size=step)
    mask = window_mask(grid, block.window_size, block.shift_size)
    if mask is not None and not any(side % size for side, size in zip(grid, block.window_size, strict=True)):
        assert torch.equal(mask, block.attn_mask)
    block.register_buffer("attn_mask", mask, persistent=False)
    sizes = zip(grid, block.window_size, block.shift_size, strict=True)
    parts = [[(i - s) // w for i in range(n)] for n, w, s in sizes]
    x = torch.randn(1, *grid, 4, requires_grad=True)
    out = block(x)
    for r, c in [(0, 0), (grid[0] - 1, grid[1] - 1), (grid[0] // 2, grid[1] // 2), (0, grid[1] - 1)]:
        (slope,) = torch.autograd.grad(out[0, r, c].square().sum(), x, retain_graph=True)
        seen = slope[0].abs().amax(-1) > 1e-12
        wanted = [[a == parts[0][r] and b == parts[1][c] for b in parts[1]] for a in parts[0]]
        assert seen.tolist() == wanted


def test_nothing_attends_to_what_fills_windows_up() -> None:
    mask = window_mask((8, 14), (8, 8), (0, 0))  # two windows; the last two columns of the second are no tokens
    assert mask is not None and mask.shape == (2, 64, 64) and not mask[0].any()
    filling = torch.arange(64) % 8 >= 6
    assert torch.equal(mask[1] == 0, filling[:, None] == filling)
    assert window_mask((8, 16), (8, 8), (0, 0)) is None
    g, masks = geometry_of(seconds=1.7), []
    for i, block in enumerate(HTSAT(SMALL, g).blocks):
        masks.append(window_mask(stage_grid(g, (0, 0, 1, 2, 3, 3)[i]), block.window_size, block.shift_size))
        assert (masks[-1] is None) == (block.attn_mask is None)
        assert masks[-1] is None or torch.equal(masks[-1], block.attn_mask)
    assert [mask is None for mask in masks] == [True, False, True, False, True, True]


def test_a_clips_logits_depend_on_no_other_clip() -> None:
    g = make_geometry(AudioOptions(num_mels=16, clip_seconds=0.5), "frame_shift", (4, 4), fold=(4, 4))
    model = HTSATOptions(widths=(8, 16, 32), depths=(1, 2, 1), heads=(1, 2, 2), window=4)
    torch.manual_seed(0)
    objective = SupervisedOptions().build(model, g, 4).eval()
    items = noise([8000, 700, 4100])
    together = objective.logits(batch_of(items, None, g))  # type: ignore[union-attr, operator]
    for i in range(3):
        alone = objective.logits(batch_of(some(items, slice(i, i + 1)), None, g))  # type: ignore[union-attr, operator]
        torch.testing.assert_close(alone, together[i : i + 1])
    batch = batch_of(items, None, g)
    tokens, real = objective.encoder(patchify(batch.spec, g), valid=batch.valid), objective.encoder.real(batch.valid)
    assert real is not None and real.sum(1).tolist() == [3, 1, 2]
    for i in range(3):  # the head and the features take the mean of what is real
        torch.testing.assert_close(objective.embed(batch)[i], tokens[i, real[i]].mean(0))
        logits = objective.head.classifier(objective.head.norm(tokens[i, real[i]].mean(0)))  # type: ignore[union-attr]
        torch.testing.assert_close(logits, together[i])
    louder = replace(items, audio=items.audio.clone())
    louder.audio[1, 700:], louder.audio[2, 4100:] = 9.0, -9.0  # what is behind a clip's end has no say
    assert torch.equal(objective.logits(batch_of(louder, None, g)), together)  # type: ignore[union-attr, operator]


def test_without_class_tokens_there_is_none_to_read(tmp_path: Path) -> None:
    g = geometry_of(seconds=0.5)
    objective = SupervisedOptions().build(SMALL, g, 3)
    batch = Batch(torch.randn(2, g.covered, 64), torch.tensor([48, 48]), *[torch.arange(2)] * 3, g, False)
    assert objective.embed(batch).shape == (2, 64) and objective.embed(batch, "mean_std").shape == (2, 128)
    with pytest.raises(UserError, match="no class token"):
        objective.embed(batch, "class_token")


# --- cost


@pytest.mark.parametrize("seconds", [2.6, 1.7, 0.6])
@pytest.mark.parametrize(("compression", "factor"), [("frame_shift", 1), ("pool_mean", 2), ("patch", 4)])
@pytest.mark.parametrize("head", ["mean_pool", "linear"])
def test_it_costs_what_the_counter_says(seconds: float, compression: Compression, factor: int, head: Any) -> None:
    g = geometry_of(factor, compression, seconds)
    supervised = SupervisedOptions(head=head)
    found = counted(supervised.build(SMALL, g, 10), g, None)
    parts = supervised.costs(SMALL, g, 0.5, 10)
    assert cost.step_flops(parts) == pytest.approx(found, rel=0.005)
    assert cost.seen_tokens(parts) == g.num_tokens


def test_the_published_size() -> None:
    """About 28 M parameters in the encoder, and twice 5.9 G multiply-adds forward, as of Swin-T at 256 x 256."""
    model, supervised = HTSATOptions(), SupervisedOptions()
    g = geometry_of(model=model)
    assert sum(p.numel() for p in HTSAT(model, g).parameters()) == pytest.approx(27.5e6, rel=0.01)
    forward = cost.forward_flops(supervised.costs(model, g, 0.5, 527))
    assert forward == pytest.approx(11.8e9, rel=0.02)
    coarse = cost.forward_flops(supervised.costs(model, geometry_of(4, model=model), 0.5, 527))
    assert forward / coarse == pytest.approx(4, rel=0.02)  # windows: linear in the tokens


# --- carrying weights over


@given(
    old=st.tuples(st.integers(1, 8), st.integers(1, 8)), new=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    slope=st.tuples(st.floats(-1, 1), st.floats(-1, 1)),
)
def test_biases_keep_their_slope_and_their_middle(
    old: tuple[int, int], new: tuple[int, int], slope: tuple[float, float]
) -> None:
    def plane(window: tuple[int, int]) -> torch.Tensor:
        rows, columns = (torch.arange(1 - n, n, dtype=torch.float64) / max(n - 1, 1) for n in window)
        return (1 + slope[0] * rows[:, None] + slope[1] * columns).reshape(-1, 1)

    if all(a > 1 or b == 1 for a, b in zip(old, new, strict=True)):
        torch.testing.assert_close(resize_biases(plane(old), old, new), plane(new))
    table = torch.randn(len(plane(old)), 2)
    there = resize_biases(table, old, new)
    torch.testing.assert_close(there[len(there) // 2], table[len(table) // 2])
    assert window_of(len(plane(old)), old) == old and there.shape == (len(plane(new)), 2)


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_boundaries_resize_the_tables_of_clipped_windows_alone(compression: Compression) -> None:
    audio = AudioOptions(clip_seconds=10.24, num_mels=64)
    coarse, middle, fine = make_geometries(
        audio, compression, (4, 4), [(4, None), (2, None), (1, None)], fold=(SMALL.folds, SMALL.merge)
    )
    for source, target, expected in ((coarse, middle, "4x4 -> 4x8"), (middle, fine, "4x8 -> 8x8")):
        a, b = (SupervisedOptions().build(SMALL, g, 3) for g in (source, target))
        fitted, report = transfer(a.state_dict(), source, b.state_dict(), target)
        b.load_state_dict(fitted)
        resized = {move.name: move.detail for move in report.moved if move.action == "resized"}
        kernels = {"encoder.patch_embed.weight"} if compression == "patch" else set()
        tables = {f"encoder.blocks.{i}.attn.relative_position_bias_table" for i in (4, 5)}
        assert resized.keys() == tables | kernels
        assert all(resized[name] == f"window {expected}, linear" for name in tables)
        assert report.count() == {"resized": len(resized), "copied": len(fitted) - len(resized)}
        shallow = HTSATOptions.model_validate({**SMALL.model_dump(), "depths": (2, 1, 1, 1)})
        c = SupervisedOptions().build(shallow, source, 3)
        with pytest.raises(UserError, match=r"encoder does not fit the checkpoint: encoder\.blocks\.5"):
            transfer(c.state_dict(), source, b.state_dict(), target)
        state = a.state_dict()
        state["encoder.blocks.5.attn.relative_position_bias_table"] = torch.zeros(50, 4)
        with pytest.raises(UserError, match="50 relative positions fit no window in a grid of"):
            transfer(state, source, b.state_dict(), target)


def test_each_layer_learns_at_its_own_rate() -> None:
    g = geometry_of(seconds=0.5)
    objective = SupervisedOptions().build(SMALL, g, 3)
    names = [name for name, _ in objective.named_parameters()]
    layers = {name: optim.layer_of(name, SMALL.depth) for name in names}
    assert {layers[n] for n in names if "embed" in n} == {0}
    assert layers["encoder.merges.2.norm.weight"] == layers["encoder.blocks.2.norm1.weight"] == 3
    assert {layers[n] for n in names if n.startswith(("encoder.norm", "head"))} == {SMALL.depth + 1}
    assert set(layers.values()) == set(range(SMALL.depth + 2))
    groups = optim.make_optimizer(objective, optim.OptimOptions(layer_decay=0.5), SMALL.depth).param_groups
    tables = [g for g in groups if any("bias_table" in name for name in g["names"])]
    assert tables and all(g["weight_decay"] == 0 for g in tables)


# --- training


def debug_options(root: Path, *overrides: str) -> RunOptions:
    file = ROOT / "configs/debug/supervised_htsat.yaml"
    return options.load(config.TrainOptions, file, [f"data.root={root}", *overrides])


@pytest.mark.parametrize(
    "compression", [pytest.param(c, marks=pytest.mark.slow) for c in COMPRESSIONS]
)
def test_three_phases_interrupted_equal_straight(compression: str, sounds: Path, tmp_path: Path) -> None:
    short = [f"phases.{i}.steps=2" for i in range(3)]
    o = debug_options(sounds, f"compression={compression}", "augment.mixup_prob=0.5", "train.rehearse=false", *short)
    whole, parts = go(o, tmp_path / "whole"), tmp_path / "parts"
    assert to_the_end_in_steps(o, parts) >= 3
    assert weights(whole) == weights(parts) and len(weights(whole)) == 6
    assert records(whole) == records(parts)
    moved = json.loads((whole / "phases/1-middle/transfer.json").read_text())["tensors"]
    assert any(t["action"] == "resized" and "bias_table" in t["name"] for t in moved)
    last = checkpoint.load(checkpoints(whole)[-1])
    assert last.state["options"]["model"]["name"] == "htsat"


@pytest.mark.slow
def test_32_clips_are_learned_by_heart(tmp_path: Path) -> None:
    root = write_sounds(tmp_path / "sounds", tuple(list(SOUNDS)[:8]), per_class=4)
    o = options.load(RunOptions, None, (), {
        "data": {"root": str(root)}, "audio": {"sample_rate": 8000, "clip_seconds": 0.5, "num_mels": 32},
        "model": {"name": "htsat", "widths": [32, 64], "depths": [2, 2], "heads": [2, 4], "window": 4},
        "objective": {"name": "supervised"}, "tracking": {"wandb": "off"},
        "phases": [{"name": f"c{c}", "steps": 40, "time_factor": c, "batch_size": 32, "lr": 2e-3, "warmup_steps": 5}
                   for c in (4, 2, 1)],
        "train": {"rehearse": False, "device": "cpu", "log_every": 1},
    })
    lines = [line for line in records(go(o, tmp_path / "run")) if "accuracy" in line]
    assert lines[0]["loss"] > 1.5
    assert sum(line["accuracy"] for line in lines[-5:]) / 5 > 0.95


def test_everything_that_takes_a_checkpoint_takes_it(tones: Path, tmp_path: Path) -> None:
    model = "{name: htsat, widths: [8, 16], depths: [1, 1], heads: [1, 2], window: 4}"
    o = debug_options(
        tones, f"model={model}", "audio={sample_rate: 8000, clip_seconds: 0.5, num_mels: 32}", "train.rehearse=false",
        "phases=[{name: coarse, steps: 2, time_factor: 2, batch_size: 8}]",
    )
    run = go(o, tmp_path / "run")
    assert 0 <= evaluate(run, of(EvaluateOptions, tones, folds=[5]))["accuracy"] <= 1
    embed(run, of(EmbedOptions, tones, out=str(tmp_path / "f.npz")))
    probe(run, of(ProbeOptions, tones, out=str(tmp_path / "probe")))
    assert (tmp_path / "f.npz").exists() and (tmp_path / "probe" / "probe.json").exists()
    clip = next((tones / CLASSES[0]).glob("*.wav"))
    (prediction,) = predict(run, [clip], PredictOptions(device="cpu", timeline=True))
    assert prediction.scores
    tuned = options.load(FinetuneOptions, None, [
        f"data.root={tones}", "folds=[5]", "optim.layer_decay=0.7", "train.rehearse=false", "train.device=cpu",
        "phases=[{name: middle, steps: 1, time_factor: 2, batch_size: 8}, {name: fine, steps: 1, batch_size: 8}]",
        "tracking.wandb='off'",
    ], checkpoint_defaults(load_weights(run)))
    assert isinstance(tuned.model, HTSATOptions)
    finetune(run, tuned)
    for format in ("hf", "onnx", "safetensors"):
        with pytest.raises(UserError, match="only model vit can be exported, not htsat"):
            export(run, format, tmp_path / "out")  # type: ignore[arg-type]


# --- options


@pytest.mark.parametrize(
    ("override", "wrong"),
    [
        ("objective={name: mae}", "model htsat learns from labels only, and objective mae hides"),
        ("objective={name: ssast}", "objective ssast hides"), ("objective={name: latent}", "objective latent hides"),
        ("objective.head=ast", "objective.head ast: model htsat has no class token; use mean_pool"),
        ("objective.head=class_token", "objective.head class_token: model htsat has no class token"),
        ("model.width=32", "model.width: unknown key for model.name=htsat; it belongs to model.name=vit"),
        ("model.folds=3", "folds 3 is no power of two"), ("model.heads=[2,2]", "one value for each stage"),
        ("model.heads=[3,2,4]", "width 16 is no multiple of heads 3"),
        ("model.name=swin", "model.name is 'swin'; allowed: vit, htsat"),
        ("audio.num_mels=40", "10 rows of patches of 4 mel bins"),
    ],
)
def test_what_it_cannot_do_is_told_in_one_line(override: str, wrong: str) -> None:
    with pytest.raises(UserError) as error:
        options.load(RunOptions, ROOT / "configs/debug/supervised_htsat.yaml", [override])
    assert wrong in str(error.value) and "\n" not in str(error.value)


def test_without_a_name_the_model_is_a_vit() -> None:
    phases = [{"name": "only", "steps": 1}]
    for model in ({"width": 36}, {"name": "vit", "width": 36}, ViTOptions(width=36)):
        o = RunOptions.model_validate({"model": model, "phases": phases}, strict=False)
        assert o.model == ViTOptions(width=36)
    file = options.load(RunOptions, None, ["model.width=60"], {"phases": phases})
    assert file.model == ViTOptions(width=60) and "name: vit" in options.dump(file)
    hierarchical = options.load(RunOptions, ROOT / "configs/debug/supervised_htsat.yaml")
    assert RunOptions.model_validate_json(hierarchical.model_dump_json()) == hierarchical
