"""Runs that start from weights of an image model, of another run, or of a published file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import yaml
from paths import ROOT

from ssl_c2f import cli
from ssl_c2f.core import checkpoint
from ssl_c2f.train.weights import find_checkpoint, initial_weights, load_weights


@pytest.fixture(scope="module")
def image_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ViT as timm saves it, of 64 x 64 images in patches of 16."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("vit_tiny_patch16_224", img_size=64, embed_dim=64, depth=2, num_heads=1)
    file = tmp_path_factory.mktemp("timm") / "vit.safetensors"
    safetensors.torch.save_file(model.state_dict(), file)
    return file


def train(command: str, config: str, sounds: Path, run: Path, *words: str) -> int:
    given = [command, str(ROOT / f"configs/debug/{config}.yaml"), f"data.root={sounds}", f"run_dir={run}"]
    return cli.main([*given, "phases.0.steps=2", "phases.1.steps=2", "phases.2.steps=2", *words])


def test_training_starts_from_weights_of_images(
    image_model: Path, sounds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train("train", "supervised", sounds, run, f"init={image_model}", "optim.lr=1e-9") == 0
    said = capsys.readouterr()
    assert "transfer: " in said.out + said.err
    made = yaml.safe_load((run / "config.yaml").read_text())
    assert (made["model"]["width"], made["model"]["depth"], made["init"]) == (64, 2, str(image_model.resolve()))
    report = json.loads((run / "phases/0-coarse/transfer.json").read_text())
    assert report["from"] == str(image_model.resolve())
    # at so small a learning rate the blocks are still those of the images
    state = checkpoint.load(find_checkpoint(run / "phases/0-coarse")).model
    theirs = safetensors.torch.load_file(image_model)
    torch.testing.assert_close(state["encoder.blocks.1.mlp.fc1.weight"], theirs["blocks.1.mlp.fc1.weight"])
    statistics = load_weights(run / "phases/0-coarse").statistics.values()
    assert all(s.factor == 1.0 and abs(s.mean + 4.2677393) > 1e-3 for s in statistics), "measured on these sounds"
    assert train("train", "supervised", sounds, run, f"init={image_model}", "optim.lr=1e-9") == 0, "resumes"


def test_pretraining_goes_on_from_another_run(sounds: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert train("pretrain", "mae", sounds, first, "model.width=48") == 0
    assert train("pretrain", "mae", sounds, second, f"init={first}", "optim.lr=1e-9") == 0
    a, b = (checkpoint.load(find_checkpoint(run)).model for run in (first, second))
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], msg=name)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["init=nowhere.pth"], "init=nowhere.pth: no such file, and no ViT of timm's"),
        (["init=deit_tiny_patch16_22"], "(deit_tiny_patch16_224?)"),
        (["init=resnet18"], "no ViT of timm's"),
        (["model.width=32"], "the encoder does not fit the checkpoint: encoder.cls_token"),
    ],
)
def test_what_cannot_be_started_from(
    words: list[str], said: str, image_model: Path, sounds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = words if words[0].startswith("init=") else [f"init={image_model}", *words]
    assert train("train", "supervised", sounds, tmp_path / "run", *words) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("ssl_c2f: ") and said in last


def test_heads_are_those_of_timms_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a cache of the Hub's, which a network would have filled. It is 64 wide and has two heads, not one."""
    theirs = timm.create_model("test_vit")
    repository = tmp_path / ("models--" + theirs.pretrained_cfg["hf_hub_id"].replace("/", "--"))
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0" * 40)
    (repository / "snapshots" / ("0" * 40)).mkdir(parents=True)
    safetensors.torch.save_file(theirs.state_dict(), repository / "snapshots" / ("0" * 40) / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    weights = initial_weights("test_vit")
    model = weights.recipe.model
    assert (model.width, model.depth, model.heads) == (64, 6, 2) and weights.statistics == {}
    name = "blocks.5.mlp.fc2.weight"
    assert torch.equal(weights.tensors[f"encoder.{name}"], theirs.state_dict()[name])
    block, tokens = weights.objective().encoder.blocks[3], torch.randn(2, 9, 64)
    torch.testing.assert_close(block(tokens), theirs.eval().blocks[3](tokens))


def test_offline_is_one_line(
    sounds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert train("train", "supervised", sounds, tmp_path / "run", "init=vit_tiny_patch16_224.augreg_in21k") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "init=vit_tiny_patch16_224.augreg_in21k: its weights cannot be fetched" in line and "init=FILE" in line
    assert not (tmp_path / "run").exists()
