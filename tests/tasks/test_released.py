"""Encoders that come with the package: known by name wherever a checkpoint is asked for, offline, from any folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from paths import ROOT

import ssl_c2f
from ssl_c2f import cli
from ssl_c2f.data.synthetic import render
from ssl_c2f.train.weights import load_weights, locate, released, results_folder

RUN = Path(os.environ.get("SSL_C2F_NANO_RUN") or ROOT.parent / "runs/c2f_nano")  # that c2f_nano was released from


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test works in a folder of its own, without a network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


def two_sounds() -> torch.Tensor:
    """(2, S): a chirp and clicks, 5 s at 16 kHz."""
    return torch.from_numpy(np.stack([render(name, 0, 5.0, 16000) for name in ("chirp_up", "clicks_slow")])).float()


def test_released_encoders_come_first_and_have_a_model_card() -> None:
    assert released() == ssl_c2f.list_models()[: len(released())] and "c2f_nano" in released()
    assert [name for name in released() if not (ROOT / f"docs/{name}.md").is_file()] == []
    assert [name for name in released() if name not in (ROOT / "README.md").read_text()] == []


@pytest.mark.parametrize("name", released())
def test_it_tells_two_sounds_apart_and_was_trained(name: str) -> None:
    weights, model = load_weights(Path(name)), ssl_c2f.create_model(name)
    assert {tensor.dtype for tensor in weights.tensors.values()} == {torch.float32}
    with torch.no_grad():
        a, b = model.embed(two_sounds())
        torch.manual_seed(0)
        near, far = model.embed(two_sounds()[:1] * 0.7)[0], b
    assert a.shape == (weights.recipe.model.model_dump()["width"],) and torch.isfinite(torch.stack([a, b])).all()
    assert (a - near).norm() < (a - far).norm() / 2, "the same sound at another level is nearer than another sound"


@pytest.mark.skipif(not RUN.is_dir(), reason=f"no run of c2f_nano at {RUN}: set SSL_C2F_NANO_RUN to its folder")
def test_it_is_the_run_within_half_precision() -> None:
    ours, theirs = load_weights(Path("c2f_nano")), load_weights(RUN)
    assert ours.step == theirs.step and ours.recipe == theirs.recipe and ours.statistics == theirs.statistics
    for name, tensor in theirs.tensors.items():
        torch.testing.assert_close(ours.tensors[name], tensor, rtol=2**-11, atol=2**-24)
    with torch.no_grad():
        a, b = (ssl_c2f.create_model(which).embed(two_sounds()) for which in ("c2f_nano", RUN))
    assert (a - b).norm() < 3e-3 * b.norm() and not torch.equal(a, b)


def test_a_path_of_that_name_comes_first_and_results_go_beside_other_runs(autoencoder: Path, elsewhere: Path) -> None:
    assert results_folder(locate("c2f_nano")) == Path("runs/released/c2f_nano")
    assert load_weights(Path("c2f_nano")).origin == str(locate("c2f_nano"))
    (elsewhere / "c2f_nano").symlink_to(autoencoder)
    assert locate("c2f_nano") == Path("c2f_nano") and load_weights(Path("c2f_nano")).origin.startswith("c2f_nano/")


def test_commands_take_its_name(tones: Path, elsewhere: Path) -> None:
    folds = f"data.root={tones}"
    assert cli.main(["probe", "--ckpt", "c2f_nano", folds, "readouts=[mean]", "device=cpu"]) == 0
    rows = json.loads((elsewhere / "runs/released/c2f_nano/probe/tones/probe.json").read_text())["rows"]
    assert {row["features"] for row in rows} >= {"checkpoint", "random encoder", "log-mel"}
    assert cli.main(["embed", "--ckpt", "c2f_nano", folds, "device=cpu", "out=features.npz"]) == 0
    tuned = ["finetune", "--ckpt", "c2f_nano", folds, "folds=[1]", "phases=[{name: tune, steps: 1, batch_size: 4}]"]
    assert cli.main([*tuned, "train.device=cpu", "train.rehearse=false", "tracking.wandb=off"]) == 0
    assert (elsewhere / "runs/released/c2f_nano/finetune/default/scores.json").exists()


def test_pretraining_goes_on_from_it(tones: Path, elsewhere: Path) -> None:
    phases = "phases=[{name: fine, steps: 1, batch_size: 4, time_factor: 1}]"
    given = ["pretrain", "c2f_nano", "init=c2f_nano", f"data.root={tones}", "run_dir=runs/on", phases]
    assert cli.main([*given, "train.device=cpu", "train.rehearse=false", "optim.lr=1e-9"]) == 0
    made = yaml.safe_load((elsewhere / "runs/on/config.yaml").read_text())
    assert (made["init"], made["model"]["width"]) == ("c2f_nano", 128)
    before, after = load_weights(Path("c2f_nano")).tensors, load_weights(elsewhere / "runs/on").tensors
    assert before.keys() == after.keys()  # the decoder and the projection too
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, msg=name)
