"""Exports to transformers, ONNX and safetensors, and imports of them."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import foreign
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import ssl_c2f
from ssl_c2f import cli
from ssl_c2f.core.options import UserError
from ssl_c2f.data.front_end import Batch, FrontEnd, Items, Statistics
from ssl_c2f.models.patches import patchify
from ssl_c2f.tasks.export import export
from ssl_c2f.train.weights import ImportOptions, Weights, import_published, load_weights

needs_transformers = pytest.mark.skipif(
    not importlib.util.find_spec("transformers"), reason="no transformers: pip install ssl_c2f[dev]"
)
needs_onnx = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime"))), reason="no onnxruntime, onnx"
)


@pytest.fixture
def tiny_ast(tmp_path: Path) -> Path:
    """A converted AST of three classes, with names and statistics of its own."""
    torch.save(foreign.ast(), tmp_path / "ast.pth")
    (tmp_path / "names.txt").write_text("cat\ndog\nowl\n")
    words = ["num_mels=32", "mean=-5", "std=3", f"labels={tmp_path / 'names.txt'}", "several=true"]
    assert cli.main(["convert", str(tmp_path / "ast.pth"), "--out", str(tmp_path / "ours"), *words]) == 0
    return tmp_path / "ours"


def fixture_ast(folder: Path) -> Path:
    state, _ = foreign.fixture("ast_tiny_depth2_stride10")
    torch.save(state, folder / "ast.pth")
    assert cli.main(["convert", str(folder / "ast.pth"), "--out", str(folder / "ours")]) == 0
    return folder / "ours"


def logits(weights: Weights, waveform: Tensor) -> Tensor:
    """(B, S) -> (B, C), by our own way from the waveform on."""
    (statistics,) = weights.statistics.values()
    count, rows = torch.full((len(waveform),), waveform.shape[1]), torch.arange(len(waveform))
    batch = FrontEnd(weights.geometry, statistics)(Items(waveform, count, rows, rows, torch.zeros(len(waveform), 0)))
    with torch.no_grad():
        found: Tensor = weights.objective().logits(batch)  # type: ignore[union-attr, operator]
    return found


def test_a_model_in_python_normalises_as_its_weights_say(tiny_ast: Path) -> None:
    """The factor 2 of published weights too."""
    weights, model = load_weights(tiny_ast), ssl_c2f.create_model(tiny_ast)
    waveform = 0.1 * torch.randn(2, weights.geometry.clip_samples)
    with torch.no_grad():
        torch.testing.assert_close(model(waveform), logits(weights, waveform))
        (own,) = weights.statistics.values()
        other = replace(weights, statistics={weights.geometry.digest(): replace(own, factor=1.0)})
        assert own.factor == 2 and not torch.allclose(logits(other, waveform), logits(weights, waveform), rtol=0.01)


def same(a: Weights, b: Weights) -> bool:
    return set(a.tensors) == set(b.tensors) and all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)


def test_out_to_transformers_and_back_is_bit_equal(tiny_ast: Path, tmp_path: Path) -> None:
    export(tiny_ast, "hf", tmp_path / "hf")
    before, after = load_weights(tiny_ast), load_weights(tmp_path / "hf")
    assert same(before, after) and after.classes == ("cat", "dog", "owl")
    assert after.geometry == before.geometry and after.statistics == before.statistics
    assert after.recipe == before.recipe and after.recipe.objective.labels == "multi"
    assert after.source["licence"] == before.source["licence"] and (tmp_path / "hf/NOTICE").exists()
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["layer_norm_eps"] == 1e-6 and config["id2label"] == {"0": "cat", "1": "dog", "2": "owl"}


def test_names_of_transformers_5_are_read_too(tiny_ast: Path, tmp_path: Path) -> None:
    export(tiny_ast, "hf", tmp_path / "hf")
    renames = (
        ("encoder.layer.", "layers."), ("attention.attention.query", "attention.q_proj"),
        ("attention.attention.key", "attention.k_proj"), ("attention.attention.value", "attention.v_proj"),
        ("attention.output.dense", "attention.o_proj"), ("intermediate.dense", "mlp.fc1"), ("output.dense", "mlp.fc2"),
    )
    state = load_file(tmp_path / "hf/model.safetensors")
    for old, new in renames:
        assert any(old in name for name in state)
        state = {name.replace(old, new): tensor for name, tensor in state.items()}
    (tmp_path / "hf/model.safetensors").unlink()
    torch.save(state, tmp_path / "hf/pytorch_model.bin")
    assert same(load_weights(tiny_ast), load_weights(tmp_path / "hf"))


@needs_transformers
@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_transformers_agrees_from_the_waveform_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers import ASTFeatureExtractor, ASTForAudioClassification

    ours = fixture_ast(tmp_path)
    export(ours, "hf", tmp_path / "hf")
    weights = load_weights(ours)
    model = ASTForAudioClassification.from_pretrained(tmp_path / "hf").eval()
    extractor = ASTFeatureExtractor.from_pretrained(tmp_path / "hf")
    waveform = 0.1 * torch.randn(3, weights.geometry.clip_samples)
    given = extractor([row.numpy() for row in waveform], sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        theirs = model(**given).logits
    assert model.config.id2label[7] == "class 7" and theirs.std() > 0.1
    torch.testing.assert_close(theirs, logits(weights, waveform), rtol=0, atol=1e-4)
    assert same(weights, load_weights(tmp_path / "hf"))
    model.save_pretrained(tmp_path / "saved")  # by transformers itself, and under the names that it uses inside
    extractor.save_pretrained(tmp_path / "saved")
    assert same(weights, load_weights(tmp_path / "saved"))
    torch.save(model.state_dict(), tmp_path / "inside.pth")
    stride = ImportOptions(stride_f=10, stride_t=10, heads=3)
    assert same(weights, import_published(tmp_path / "inside.pth", stride)[0])


@needs_transformers
@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_an_own_model_is_cut_to_whole_patches_for_transformers(sounds: Path, tmp_path: Path) -> None:
    """Sine-cosine positions, plain statistics, a last patch that is half padding."""
    from transformers import ASTFeatureExtractor, ASTForAudioClassification

    run = train_ast(sounds, tmp_path)
    export(run, "hf", tmp_path / "hf")
    weights = load_weights(run)
    assert weights.geometry.frames(weights.geometry.clip_samples) % 16
    model = ASTForAudioClassification.from_pretrained(tmp_path / "hf").eval()
    extractor = ASTFeatureExtractor.from_pretrained(tmp_path / "hf")
    back = load_weights(tmp_path / "hf")
    assert "encoder.positions" not in back.tensors  # recognised as sine-cosine
    assert back.geometry.columns == weights.geometry.columns - 1
    waveform = 0.1 * torch.randn(2, weights.geometry.clip_samples)
    given = extractor([row.numpy() for row in waveform], sampling_rate=16000, return_tensors="pt")
    (statistics,) = weights.statistics.values()
    cut = replace(weights, geometry=back.geometry, recipe=back.recipe, statistics={"": statistics})
    with torch.no_grad():
        torch.testing.assert_close(
            model(**given).logits, logits(cut, waveform[:, : back.geometry.clip_samples]), rtol=0, atol=1e-4
        )


def train_ast(sounds: Path, folder: Path, **model: Any) -> Path:
    config = folder / "ast.yaml"
    config.write_text(json.dumps({
        "audio": {"clip_seconds": 0.8, "num_mels": 32}, "objective": {"name": "supervised", "head": "ast"},
        "model": {"width": 16, "depth": 1, "heads": 2, "class_tokens": 2, **model},
        "phases": [{"name": "only", "steps": 1, "batch_size": 4}],
        "tracking": {"wandb": "off"}, "train": {"device": "cpu", "rehearse": False},
    }))
    assert cli.main(["train", str(config), f"data.root={sounds}", f"run_dir={folder / 'run'}"]) == 0
    return folder / "run"


@pytest.mark.parametrize("case", ["encoder alone", "one class token", "mean pooling", "masked"])
def test_what_ast_cannot_express_is_one_line(
    case: str, classifier: Path, autoencoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ckpt, said = {
        "one class token": (classifier, "model.class_tokens=2"), "masked": (autoencoder, "ssl_c2f finetune"),
        "mean pooling": (tmp_path / "ours", "objective.head=ast"),
        "encoder alone": (tmp_path / "ours", "no classifier"),
    }[case]
    torch.save(foreign.ssast() if case == "encoder alone" else foreign.ast(), tmp_path / "a.pth")
    assert cli.main(["convert", str(tmp_path / "a.pth"), "--out", str(tmp_path / "ours"), "num_mels=32"]) == 0
    if case == "mean pooling":
        file = tmp_path / "ours/checkpoints/step-00000000/state.json"
        file.write_text(file.read_text().replace('"head": "ast"', '"head": "mean_pool"'))
        file.with_name("checksums.json").unlink()  # as an earlier version left it
    capsys.readouterr()
    assert cli.main(["export", str(ckpt), "--format", "hf", "--out", str(tmp_path / "hf")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and said in lines[0] and not (tmp_path / "hf").exists()


def test_an_encoder_as_safetensors(autoencoder: Path, tmp_path: Path) -> None:
    assert cli.main(["export", str(autoencoder), "--format", "safetensors", "--out", str(tmp_path / "out")]) == 0
    tensors = load_file(tmp_path / "out/encoder.safetensors")
    facts = json.loads((tmp_path / "out/encoder.json").read_text())
    model = load_weights(autoencoder).objective()
    wanted = dict(model.encoder.state_dict()) | {"positions": model.encoder.positions}
    assert set(tensors) == set(wanted) and all(torch.equal(tensors[name], wanted[name]) for name in wanted)
    assert facts["geometry"] == load_weights(autoencoder).geometry.to_dict() and facts["statistics"]["std"] > 0
    assert cli.main(["export", str(autoencoder), "--format", "safetensors", "--out", str(tmp_path / "out")]) == 2


@needs_onnx
@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", ["fixture", "classifier", "autoencoder"])
def test_onnx_agrees_at_any_length_and_batch(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    import onnxruntime

    ckpt = fixture_ast(tmp_path) if kind == "fixture" else request.getfixturevalue(kind)
    export(ckpt, "onnx", tmp_path / "onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx/model.onnx"))
    weights = load_weights(ckpt)
    g, model = weights.geometry, weights.objective()
    (statistics,) = weights.statistics.values()
    whole = g.frames(g.clip_samples)
    for frames, clips in ((whole, 1), (whole // 2 + 1, 3), (g.patch_t, 2)):
        log_mel = 3 * torch.randn(clips, frames, g.num_mels) - 5
        (found,) = session.run(None, {"log_mel": log_mel.numpy()})
        with torch.no_grad():
            wanted = ours_from_log_mel(model, g, statistics, log_mel)
        torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=0, atol=1e-4)
    assert json.loads((tmp_path / "onnx/model.json").read_text())["classes"] == list(weights.classes)


def ours_from_log_mel(model: Any, g: Any, statistics: Statistics, log_mel: Tensor) -> Tensor:
    """As the front end and the objective do it: short clips are padded, and nobody attends to the padding."""
    clips, frames, _ = log_mel.shape
    spec = (log_mel - statistics.mean) / (statistics.factor * statistics.std)
    spec = torch.nn.functional.pad(spec, (0, 0, 0, g.num_frames - frames))
    count, rows = torch.full((clips,), frames), torch.arange(clips)
    short = g.tokens_t(frames) < g.columns
    batch = Batch(spec, count, rows, rows, torch.zeros(clips, 0), g, short)
    assert patchify(spec, g).shape[1] == g.num_tokens
    found: Tensor = model.logits(batch) if hasattr(model, "logits") else model.embed(batch)
    return found


def test_export_needs_what_it_needs(tmp_path: Path, classifier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(UserError, match=r"pip install ssl_c2f\[export\]"):
        export(classifier, "onnx", tmp_path / "out")
