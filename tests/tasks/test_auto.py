"""The Python interface: models by name, path or repository, and a folder that can be uploaded to the Hub."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import foreign
import pytest
import torch

import ssl_c2f
from ssl_c2f.core.options import UserError
from ssl_c2f.data.front_end import Statistics
from ssl_c2f.models.published import AUDIOSET
from ssl_c2f.train.weights import load_weights


def test_the_package_is_imported_without_torch() -> None:
    code = "import sys, ssl_c2f; print({'torch', 'huggingface_hub'} & set(sys.modules), dir(ssl_c2f))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("set()"), done.stderr


@pytest.mark.parametrize("name", [name for name in ssl_c2f.list_models() if name.endswith("tiny")])
def test_models_by_name(name: str) -> None:
    model = ssl_c2f.create_model(name, classes=("a", "b"), clip_seconds=0.3)
    waveform = 0.1 * torch.randn(2, 4000)
    with torch.no_grad():
        logits = model(waveform)
        assert logits.shape == (2, 2) and model.embed(waveform).shape == (2, 192)
        again = ssl_c2f.create_model(name, classes=("a", "b"), clip_seconds=0.3)
        assert torch.equal(again(waveform), logits)
        other = ssl_c2f.create_model(name, classes=("a", "b"), clip_seconds=0.3, seed=1)
        assert not torch.equal(other(waveform), logits)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", ["classifier", "autoencoder"])
def test_a_run_is_saved_and_loaded_as_the_hub_does(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    run = request.getfixturevalue(kind)
    model = ssl_c2f.create_model(run)
    model.save_pretrained(tmp_path / "saved")
    waveform = 0.1 * torch.randn(2, 4000)
    with torch.no_grad():
        found = model(waveform)
        assert torch.equal(ssl_c2f.AudioModel.from_pretrained(str(tmp_path / "saved"))(waveform), found)
        assert torch.equal(ssl_c2f.create_model(tmp_path / "saved")(waveform), found)
    assert found.shape == (2, 3 if kind == "classifier" else 16)
    before, after = load_weights(run), load_weights(tmp_path / "saved")  # what --ckpt makes of it
    assert all(torch.equal(before.tensors[name], after.tensors[name]) for name in before.tensors)
    assert before.statistics == after.statistics and before.classes == after.classes


def test_short_recordings_are_padded_and_long_ones_cut(classifier: Path) -> None:
    model = ssl_c2f.create_model(classifier)
    waveform = 0.1 * torch.randn(2, 9000)
    with torch.no_grad():
        assert torch.equal(model(waveform), model(waveform[:, : model.geometry.clip_samples]))
        padded = waveform[:, :4000].clone()
        padded[:, 2400:] = 7.0
        apart = model(padded, torch.tensor([2400, 2400]))
        padded[:, 2400:] = 0.0
        torch.testing.assert_close(model(padded, torch.tensor([2400, 2400])), apart)


@pytest.mark.filterwarnings("default")
def test_licences_go_along(tmp_path: Path) -> None:
    torch.save(foreign.ssast(), tmp_path / "ssast.pth")
    model = ssl_c2f.create_model(tmp_path / "ssast.pth")
    model.save_pretrained(tmp_path / "saved")
    assert "BSD-3-Clause" in (tmp_path / "saved/NOTICE").read_text()
    assert load_weights(tmp_path / "saved").source == model.weights.source


def test_unknown_names_are_one_line() -> None:
    with pytest.raises(UserError, match="did you mean 'ast_base'"):
        ssl_c2f.create_model("ast_bass")
    with pytest.raises(AttributeError, match="no attribute"):
        _ = ssl_c2f.create_modle


@pytest.mark.parametrize("name", ["runs/typo", "runs/a b"])
def test_neither_a_path_nor_on_the_hub_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=f"^no path '{name}', and not found on the Hub [(].+[)]$") as error:
        ssl_c2f.create_model(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "factor"), [("vit_tiny", 1.0), ("ast_tiny", 2.0), ("ssast_frame_tiny", 2.0)])
def test_models_by_name_normalise_as_their_kind_does(name: str, factor: float) -> None:
    model = ssl_c2f.create_model(name, clip_seconds=0.3)
    assert [*model.weights.statistics.values()] == [Statistics(*AUDIOSET, factor)]
