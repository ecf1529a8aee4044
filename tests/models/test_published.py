"""Published weights through `ssl_c2f convert`: recognised, mapped, and with the outputs of the published codes."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import foreign
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ssl_c2f import cli
from ssl_c2f.core.options import UserError
from ssl_c2f.data.front_end import Batch, FrontEnd, Items, Statistics
from ssl_c2f.data.masks import Mask
from ssl_c2f.models import published
from ssl_c2f.models.patches import patchify
from ssl_c2f.objectives import Objective
from ssl_c2f.objectives.ssast import SSASTOptions
from ssl_c2f.tasks.export import export
from ssl_c2f.train.weights import ImportOptions, Weights, import_published, load_weights

SMALL = ImportOptions(num_mels=foreign.MELS)
TINY = {"AudioMAE": foreign.audiomae, "AST": foreign.ast, "SSAST": foreign.ssast, "timm ViT": foreign.image}


def converted(state: Any, folder: Path, *words: str) -> tuple[Objective, Weights]:
    """Through the command line, and opened again."""
    torch.save(state, folder / "published.pth")
    assert cli.main(["convert", str(folder / "published.pth"), "--out", str(folder / "ours"), *words]) == 0
    weights = load_weights(folder / "ours")
    return weights.objective(), weights


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def time_first(index: Tensor, grid: tuple[int, int]) -> Tensor:
    """Indices t F' + f as ours, f T' + t."""
    return index % grid[0] * grid[1] + index // grid[0]


@torch.no_grad()
def test_ssast_as_published(tmp_path: Path) -> None:
    state, case = foreign.fixture("ssast_tiny_depth2")
    model, weights = converted(state, tmp_path)
    tokens = model.encoder(patchify(case["input"], weights.geometry))
    assert model.encoder.num_prefix == 2 and weights.geometry.grid == (8, 64)
    assert relative(tokens[:, 2:].mean(1), case["avgtok"]) < 1e-5
    assert relative(tokens[:, :2].mean(1), case["cls"]) < 1e-5
    published_losses = SSASTOptions(passes="two", softmax="predictions")
    recipe = weights.recipe.model_copy(update={"objective": published_losses})
    as_published = dataclasses.replace(weights, recipe=recipe).objective()
    result = as_published(batch_of(case, weights))
    for name, own in (("nce", "nce"), ("mse", "mse"), ("accuracy", "nce_accuracy")):
        assert relative(result.metrics[own], case[name]) < 1e-5, name
    sound = model(batch_of(case, weights)).metrics
    assert relative(sound["nce"], case["nce"]) > 1e-5  # over the targets: another number


def batch_of(case: foreign.State, weights: Weights) -> Batch:
    """The published input with its two masks."""
    masks, g = [], weights.geometry
    valid = torch.ones(2, g.num_tokens, dtype=torch.bool)
    for name in ("mask_mpc", "mask_mpg"):
        hidden = torch.zeros_like(valid).scatter(1, case[name], True)
        kept = (~hidden).nonzero()[:, 1].view(2, -1)
        masks.append(Mask(kept, torch.ones_like(kept, dtype=torch.bool), hidden, valid))
    rows = torch.arange(2)
    frames = torch.full((2,), case["input"].shape[1])
    return Batch(case["input"], frames, rows, rows, torch.zeros(2, 0), g, False, tuple(masks))


@torch.no_grad()
def test_audiomae_as_published(tmp_path: Path) -> None:
    state, case = foreign.fixture("audiomae_encoder_depth2")
    model, weights = converted({"model": state, "args": argparse.Namespace(lr=1e-3), "epoch": 3}, tmp_path)
    g = weights.geometry
    patches = patchify(case["input"][:, 0], g)
    kept = model.encoder(patches, time_first(case["keep"], g.grid))
    assert relative(kept, case["latent_kept"]) < 1e-5
    order = time_first(torch.arange(g.num_tokens), g.grid)
    full = model.encoder(patches)
    assert relative(torch.cat([full[:, :1], full[:, 1:][:, order]], 1), case["latent_full"]) < 1e-5


@torch.no_grad()
def test_ast_as_published(tmp_path: Path) -> None:
    state, case = foreign.fixture("ast_tiny_depth2_stride10")
    model, weights = converted(state, tmp_path)
    g = weights.geometry
    assert g.grid == (12, 50) and (g.stride_f, g.stride_t) == (10, 10) and len(weights.classes) == 50
    logits = model.head(model.encoder(patchify(case["input"], g)), None)  # type: ignore[union-attr, operator]
    assert relative(logits, case["logits"]) < 1e-5


@torch.no_grad()
def test_time_first_tokens_as_timm_computes_them(tmp_path: Path) -> None:
    """AudioMAE's layout, against timm itself: needs no fixture."""
    theirs = foreign.vit((foreign.FRAMES, foreign.MELS))
    model, weights = converted(theirs.state_dict(), tmp_path, f"num_mels={foreign.MELS}")
    g, spec = weights.geometry, torch.randn(2, foreign.FRAMES, foreign.MELS)
    wanted = theirs.forward_features(spec[:, None])
    found = model.encoder(patchify(spec, g))[:, 1:][:, time_first(torch.arange(g.num_tokens), g.grid)]
    assert g.grid == (2, 5) and relative(found, wanted[:, 1:]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("patch", [(16, 16), (32, 2)], ids=["patch", "frame"])
def test_ssast_of_patches_and_of_frames(patch: tuple[int, int], tmp_path: Path) -> None:
    state = foreign.ssast(patch)
    model, weights = converted(state, tmp_path)
    g = weights.geometry
    assert (g.patch_f, g.patch_t) == patch and g.num_mels == foreign.MELS and g.covered == foreign.FRAMES
    theirs = foreign.vit((foreign.MELS, foreign.FRAMES), patch)
    spec = torch.randn(2, foreign.FRAMES, foreign.MELS)
    x = theirs.patch_embed(spec.mT[:, None])
    extra = [state["module.v.cls_token"], state["module.v.dist_token"]]
    x = torch.cat([*(token.expand(2, -1, -1) for token in extra), x], 1) + state["module.v.pos_embed"]
    assert relative(model.encoder(patchify(spec, g)), theirs.norm(theirs.blocks(x))) < 1e-5


def test_an_image_becomes_a_spectrogram(tmp_path: Path) -> None:
    """4x4 patches of three colours -> 2 rows, the middle ones, by 10 columns that span the same positions."""
    state = foreign.image()
    columns = torch.arange(4.0)[None, None, :, None].expand(1, 4, 4, foreign.WIDTH)
    rows = 10 * torch.arange(4.0)[None, :, None, None]
    state["pos_embed"] = torch.cat([state["pos_embed"][:, :1], (rows + columns).flatten(1, 2)], 1)
    _, weights = converted(state, tmp_path, f"num_mels={foreign.MELS}", "frames=160")
    assert weights.geometry.grid == (2, 10) and not weights.classes
    table = weights.tensors["encoder.positions"].view(2, 10, -1)[..., 0]
    assert torch.allclose(table[1] - table[0], torch.tensor(10.0)) and torch.allclose(table.mean(), torch.tensor(16.5))
    assert (table.diff(dim=1) >= 0).all() and table[0, 0] == 10 and table[0, -1] == 13
    kernel = weights.tensors["encoder.patch_embed.weight"]
    assert torch.equal(kernel, state["patch_embed.proj.weight"].sum(1).flatten(1))


@pytest.mark.parametrize("name", TINY)
def test_any_renamed_or_missing_tensor_fails(name: str, tmp_path: Path) -> None:
    def kind(state: foreign.State) -> str:
        torch.save(state, tmp_path / "weights.pth")
        return import_published(tmp_path / "weights.pth", SMALL)[0].source["kind"]

    state = TINY[name]()
    assert kind(state) == name
    dropped = next(kind.dropped for kind in published.KINDS if kind.name == name)
    for key in state:
        if any(re.fullmatch(pattern, key.removeprefix("module.")) for pattern in dropped):
            continue
        rest = {other: value for other, value in state.items() if other != key}
        with pytest.raises(UserError, match=r"weights\.pth") as error:
            kind({**rest, f"{key[:-1]}_": state[key]})
        assert "\n" not in str(error.value)
        if not re.search(r"dist_token|mask_embed|[cg]pred", key):  # without these it is another kind, or less of one
            with pytest.raises(UserError, match=r"weights\.pth") as error:
                kind(rest)
            assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TINY, "Hugging Face AST"])
def test_any_misshaped_tensor_fails(name: str, tmp_path: Path) -> None:
    """Of too many axes, of too few, of another size, and of none: by one line that names the tensor or what is ours."""
    state = TINY[name]() if name in TINY else in_transformers_names(tmp_path)
    dropped = next(kind.dropped for kind in published.KINDS if kind.name == name)
    for key, value in state.items():
        if any(re.fullmatch(pattern, key.removeprefix("module.")) for pattern in (*dropped, "p_input_fdim")):
            continue
        for wrong in (value[None], value.flatten()[0], value[:0], value.transpose(0, -1), torch.cat([value, value])):
            if value.shape == wrong.shape:
                continue
            torch.save(state | {key: wrong}, tmp_path / "weights.pth")
            with pytest.raises(UserError, match=r"weights\.pth: ") as error:
                import_published(tmp_path / "weights.pth", SMALL)
            assert "\n" not in str(error.value)


def in_transformers_names(folder: Path) -> foreign.State:
    converted(foreign.ast(), folder, f"num_mels={foreign.MELS}")
    export(folder / "ours", "hf", folder / "hf")
    return load_file(folder / "hf/model.safetensors")


@pytest.mark.parametrize(
    ("key", "shape", "said"),
    [
        ("v.cls_token", (1, 64), "AST: v.cls_token has shape (1, 64), not (1, 1, D) with D = 64"),
        ("v.pos_embed", (16, 64), "AST: v.pos_embed has shape (16, 64), not (1, N, D) with D = 64"),
        ("v.pos_embed", (1, 2, 64), "AST: pos_embed has positions of 2 class tokens and of no patch"),
        ("v.patch_embed.proj.weight", (64, 256), "patch_embed.proj.weight has shape (64, 256), not (D, C, F, T)"),
        ("v.blocks.1.mlp.fc1.weight", (256,), "blocks.1.mlp.fc1.weight has shape (256,), not (H, D) with D = 64"),
        ("mlp_head.1.bias", (), "AST: mlp_head.1.bias has shape (), not (C)"),
        ("v.blocks.1.norm2.bias", (65,), "encoder.blocks.1.norm2.bias has (65,), our model (64,)"),
        ("v.blocks.0.mlp.fc1.weight", None, "AST: blocks.0.mlp.fc1.weight is missing"),
        ("v.blocks.1.attn.qkv.bias", None, "AST: blocks.1.attn.qkv.bias is missing"),
    ],
)
def test_what_is_wrong_with_a_tensor_is_said(
    key: str, shape: tuple[int, ...] | None, said: str, tmp_path: Path
) -> None:
    state = foreign.ast()
    del state[f"module.{key}"]
    torch.save(state if shape is None else state | {f"module.{key}": torch.zeros(shape)}, tmp_path / "weights.pth")
    with pytest.raises(UserError) as error:
        import_published(tmp_path / "weights.pth", SMALL)
    assert str(error.value).startswith(f"{tmp_path / 'weights.pth'}: ") and said in str(error.value)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("AST", {"num_mels": 8}, "8 mel bins are less than the 16 of a patch: give num_mels"),
        ("AudioMAE", {"num_mels": 8}, "8 mel bins are less than the 16 of a patch: give num_mels"),
        ("timm ViT", {"num_mels": 32, "frames": 8}, "8 frames are less than the 16 of a patch"),
        ("AST", {"num_mels": 32, "heads": 5}, "weights.pth: width 64 is no multiple of heads 5"),
        ("AST", {"num_mels": 32, "stride_f": 20, "stride_t": 20}, "weights.pth: stride 20x20 leaves gaps"),
        ("AST", {"num_mels": 64, "stride_f": 10}, "14 positions are no whole number of columns of 5"),
    ],
)
def test_what_cannot_be_is_one_line(name: str, options: dict[str, Any], said: str, tmp_path: Path) -> None:
    torch.save(TINY[name](), tmp_path / "weights.pth")
    with pytest.raises(UserError) as error:
        import_published(tmp_path / "weights.pth", ImportOptions(**options))
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", TINY)
def test_what_a_training_loop_keeps_beside_the_model_is_left_out(name: str) -> None:
    """As in the files of the fixtures themselves, and in those of training frameworks."""
    state = TINY[name]()
    wrapped = {f"model.{key}": value for key, value in state.items()}
    wrapped |= {"epoch": torch.zeros(()), "loss": torch.ones(2)}
    facts = published.Facts(num_mels=foreign.MELS)
    plain, found = (published.convert(each, facts) for each in (state, wrapped))
    assert found.kind is plain.kind and found.dropped.keys() == plain.dropped.keys() | {"epoch", "loss"}
    assert found.state.keys() == plain.state.keys()
    assert all(torch.equal(value, plain.state[key]) for key, value in found.state.items())
    first = next(iter(state))
    wrapped[f"other.{first}"] = wrapped.pop(f"model.{first}")
    with pytest.raises(UserError):
        published.convert(wrapped, facts)


def test_a_renamed_tensor_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for old, new in (("attn.qkv.bias", "attn.qkw.bias"), ("mlp_head.1.bias", "mlp_head.2.bias")):
        state = foreign.ast()
        key = next(key for key in state if key.endswith(old))
        state[key.replace(old, new)] = state.pop(key)
        torch.save(state, tmp_path / "renamed.pth")
        assert cli.main(["convert", str(tmp_path / "renamed.pth"), "--out", str(tmp_path / "ours"), "num_mels=32"]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and "renamed.pth" in lines[0] and new in lines[0]
        assert not (tmp_path / "ours").exists()


class Malicious:
    """Unpickling it creates a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("writer", [torch.save, lambda what, file: Path(file).write_bytes(pickle.dumps(what, 2))])
def test_a_malicious_pickle_runs_nothing(writer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, trace = tmp_path / "weights.pth", tmp_path / "trace"
    writer({"model": foreign.audiomae(), "args": Malicious(trace)}, file)
    for words in (["convert", str(file), "--out", str(tmp_path / "ours")], ["probe", "--ckpt", str(file)]):
        assert cli.main(words) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and "weights.pth" in lines[0]
    assert not trace.exists() and not (tmp_path / "ours").exists()
    os.system(f"touch {trace}")  # what it would have done
    assert trace.exists()


@pytest.mark.parametrize("content", [b"no pickle", b"", pickle.dumps([1, 2], 2)])
def test_other_files_are_one_line(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file.pth"
    file.write_bytes(content)
    assert cli.main(["embed", "--ckpt", str(file), f"out={tmp_path / 'x.npz'}", f"data.root={tmp_path}"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_statistics_licence_and_names_travel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, weights = converted(foreign.audiomae(), tmp_path, f"num_mels={foreign.MELS}")
    said = capsys.readouterr().out
    assert "AudioMAE" in said and "CC-BY-NC" in said and "AudioSet" in said and "transfer: " in said
    assert [*weights.statistics.values()] == [Statistics(-4.2677393, 4.5689974, 2.0)]
    assert weights.source["licence"].startswith("CC-BY-NC-4.0")
    assert "CC-BY-NC-4.0" in (tmp_path / "ours/NOTICE").read_text()
    assert json.loads((tmp_path / "ours/transfer.json").read_text())["count"]["dropped"] == 1
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\nowl\n")
    torch.save(foreign.ast(), tmp_path / "ast.pth")
    given = SMALL.model_copy(update={"mean": -5.0, "std": 3.0, "labels": str(names), "several": True})
    weights, _ = import_published(tmp_path / "ast.pth", given)
    assert weights.classes == ("cat", "dog", "owl") and weights.recipe.objective.labels == "multi"
    assert [*weights.statistics.values()] == [Statistics(-5.0, 3.0, 2.0)]
    names.write_text("cat\n")
    with pytest.raises(UserError, match="1 names, but the weights have 3"):
        import_published(tmp_path / "ast.pth", given)


def test_the_stride_of_ast_is_said_or_given(tmp_path: Path) -> None:
    torch.save(foreign.ast(stride=10), tmp_path / "ast.pth")
    weights, _ = import_published(tmp_path / "ast.pth", SMALL)
    assert weights.geometry.grid == (2, 7) and any("stride 10x10 taken" in line for line in weights.notes)
    given = SMALL.model_copy(update={"stride_f": 16, "stride_t": 16})
    assert import_published(tmp_path / "ast.pth", given)[0].geometry.overlaps is False


@pytest.mark.parametrize("side", ["stride_f", "stride_t"])
def test_one_side_of_the_stride_is_enough(side: str, tmp_path: Path) -> None:
    """AST's is the same both ways; elsewhere patches do not overlap on the other side."""
    torch.save(foreign.ast(stride=16), tmp_path / "ast.pth")
    weights, _ = import_published(tmp_path / "ast.pth", SMALL.model_copy(update={side: 16}))
    assert (weights.geometry.stride_f, weights.geometry.stride_t) == (16, 16) and weights.geometry.grid == (2, 5)
    assert any(f"stride 16x16 taken, of which {side} was given" in line for line in weights.notes)
    torch.save(foreign.audiomae(), tmp_path / "mae.pth")
    weights, _ = import_published(tmp_path / "mae.pth", SMALL.model_copy(update={side: 8 if side == "stride_t" else 4}))
    assert (weights.geometry.stride_f, weights.geometry.stride_t) == ((16, 8) if side == "stride_t" else (4, 16))


def test_guessed_heads_are_said(tmp_path: Path) -> None:
    torch.save(foreign.ast(), tmp_path / "ast.pth")
    weights, _ = import_published(tmp_path / "ast.pth", SMALL)
    assert any("heads 1 taken, which the file does not say" in line for line in weights.notes)
    weights, _ = import_published(tmp_path / "ast.pth", SMALL.model_copy(update={"heads": 4}))
    assert weights.recipe.model.heads == 4 and not any("heads 4" in line for line in weights.notes)


def test_what_transformers_does_not_normalise_we_do_not_either(tmp_path: Path) -> None:
    in_transformers_names(tmp_path)
    file = tmp_path / "hf/preprocessor_config.json"
    facts = json.loads(file.read_text())
    assert facts["do_normalize"] is True
    file.write_text(json.dumps(facts | {"do_normalize": False}))
    weights = load_weights(tmp_path / "hf")
    (statistics,) = weights.statistics.values()
    waveform, rows = 0.1 * torch.randn(1, weights.geometry.clip_samples), torch.arange(1)
    front_end = FrontEnd(weights.geometry, statistics)
    items = Items(waveform, torch.tensor([waveform.shape[1]]), rows, rows, torch.zeros(1, 0))
    plain = front_end.log_mel(waveform)
    assert torch.equal(front_end(items).spec[:, : plain.shape[1]], plain)
    assert any("preprocessor_config.json does not normalise" in line for line in weights.notes)


def test_convert_overwrites_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(foreign.ssast(), tmp_path / "a.pth")
    (tmp_path / "there").mkdir()
    (tmp_path / "there/file").write_text("mine")
    assert cli.main(["convert", str(tmp_path / "a.pth"), "--out", str(tmp_path / "there")]) == 2
    assert "give a new folder" in capsys.readouterr().err
    assert cli.main(["convert", str(tmp_path / "nothing.pth"), "--out", str(tmp_path / "new")]) == 2
    assert "nothing.pth" in capsys.readouterr().err
