"""Imported weights: fine-tuned at another length and stride, probed, and their licence kept."""

from __future__ import annotations

import json
from pathlib import Path

import foreign
import pytest
import tiny_runs
import torch

from ssl_c2f import cli
from ssl_c2f.core import checkpoint
from ssl_c2f.core.files import write_json
from ssl_c2f.core.run_folder import RunFolder
from ssl_c2f.train.publish import group_of
from ssl_c2f.train.weights import load_weights, results_folder

SHORT = ["phases=[{name: tune, steps: 1, batch_size: 4}]", "tracking.wandb=off", "train.rehearse=false",
         "augment.freq_mask=4", "folds=[1]"]


def state_of(run: Path) -> dict[str, object]:
    newest = tiny_runs.checkpoints(run)[-1]
    state: dict[str, object] = checkpoint.load(newest).state
    return state


@pytest.mark.slow
def test_a_fixture_is_finetuned_at_another_length_and_stride(sounds: Path, tmp_path: Path) -> None:
    """SSAST of 10 s without overlap -> 5 s at stride 10x10, as in AST's recipe."""
    state, _ = foreign.fixture("ssast_tiny_depth2")
    torch.save(state, tmp_path / "ssast.pth")
    assert cli.main(["convert", str(tmp_path / "ssast.pth"), "--out", str(tmp_path / "ours")]) == 0
    words = ["audio.clip_seconds=5.0", "model.stride_f=10", "model.stride_t=10", "objective.head=ast"]
    assert cli.main(["finetune", "--ckpt", str(tmp_path / "ours"), f"data.root={sounds}", *SHORT, *words]) == 0
    fold = tmp_path / "ours/finetune/default/fold-1"
    tuned = load_weights(fold)
    assert tuned.geometry.grid == (12, 50) and json.loads((fold.parent / "scores.json").read_text())["clips"] == 12
    moved = json.loads((fold / "phases/0-tune/transfer.json").read_text())["tensors"]
    assert [tensor["name"] for tensor in moved if tensor["action"] == "resized"] == ["encoder.positions"]


def test_a_published_file_is_finetuned_as_it_is(
    sounds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half the length, a coarse phase, measured statistics: with the factor 2, and the licence in every checkpoint."""
    monkeypatch.chdir(tmp_path)
    torch.save(dict(foreign.vit((1024, 128)).state_dict()), tmp_path / "mae.pth")
    words = ["audio.clip_seconds=0.6", "phases=[{name: a, steps: 1, batch_size: 4, time_factor: 2}, "
             "{name: b, steps: 1, batch_size: 4}]"]
    assert cli.main(["finetune", "--ckpt", "mae.pth", f"data.root={sounds}", *SHORT, *words]) == 0
    said = capsys.readouterr().out
    assert "AudioMAE" in said and "CC-BY-NC" in said
    fold = tmp_path / "runs/mae/finetune/default/fold-1"
    statistics = state_of(fold)["statistics"]
    assert isinstance(statistics, dict) and {values["factor"] for values in statistics.values()} == {2.0}
    source = state_of(fold)["source"]
    assert isinstance(source, dict) and source["licence"].startswith("CC-BY-NC-4.0")
    assert cli.main(["export", str(fold), "--format", "safetensors", "--out", "out"]) == 0
    assert "CC-BY-NC-4.0" in Path("out/NOTICE").read_text()
    measured = ["statistics=measure", "name=measured"]
    assert cli.main(["finetune", "--ckpt", "mae.pth", f"data.root={sounds}", *SHORT, *words[:1], *measured]) == 0
    (own,) = state_of(tmp_path / "runs/mae/finetune/measured/fold-1")["statistics"].values()  # type: ignore[attr-defined]
    assert own["factor"] == 2.0 and own["mean"] != -4.2677393


def test_published_files_serve_every_command(
    tones: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(foreign.ast(), tmp_path / "ast.pth")
    words = ["num_mels=32", "sample_rate=8000"]
    assert cli.main(["convert", str(tmp_path / "ast.pth"), "--out", str(tmp_path / "ours"), *words]) == 0
    ckpt, data = ["--ckpt", str(tmp_path / "ours")], f"data.root={tones}"
    assert cli.main(["predict", *ckpt, str(tones)]) == 0
    assert "class 0" in capsys.readouterr().out
    assert cli.main(["embed", *ckpt, data, "readout=class_token", f"out={tmp_path / 'f.npz'}"]) == 0
    torch.save(foreign.audiomae(), tmp_path / "mae.pth")
    assert cli.main(["convert", str(tmp_path / "mae.pth"), "--out", str(tmp_path / "encoder"), *words]) == 0
    assert cli.main(["embed", "--ckpt", str(tmp_path / "encoder"), data, f"out={tmp_path / 'e.npz'}"]) == 0
    assert cli.main(["probe", "--ckpt", str(tmp_path / "encoder"), data, "strengths=[0.01]"]) == 0
    capsys.readouterr()
    assert cli.main(["predict", "--ckpt", str(tmp_path / "encoder"), str(tones)]) == 2
    assert "an encoder alone and has no classifier" in capsys.readouterr().err


def test_results_have_a_place(tmp_path: Path) -> None:
    (tmp_path / "ast.pth").touch()
    (tmp_path / "model.safetensors").touch()
    assert results_folder(tmp_path / "ast.pth") == Path("runs/ast")
    assert results_folder(tmp_path / "model.safetensors") == Path("runs") / tmp_path.name
    assert results_folder(Path("weights/ours/checkpoints/step-00000000")) == Path("weights/ours")
    assert results_folder(Path("runs/x/phases/0-a/checkpoints/step-00000001")) == Path("runs/x")
    assert results_folder(Path("ours/checkpoints/step-00000000")) == Path("ours")


def test_weights_anywhere_have_a_wandb_group(tmp_path: Path) -> None:
    file = tmp_path / "ast.pth"
    file.touch()
    assert group_of(str(file)) == "ast"
    assert (group_of("/x.pth"), group_of("/a/b/c/x.pth")) == ("x.pth", "x.pth"), "a path of a run that was moved since"
    assert group_of("runs/x/phases/0-a/checkpoints/step-00000001") == "x"
    phase = RunFolder(tmp_path).phase(0, "a")
    write_json(phase.path / "wandb.json", {"id": "1", "group": "mine"})
    assert group_of(str(phase.checkpoints / "step-00000001")) == "mine"
