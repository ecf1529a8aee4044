"""Damage to a run's own checkpoints costs steps, and never the run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from engine_runs import go
from tiny_runs import checkpoints, run_options, weights

EVERY_STEP = ("train.checkpoint_every=1",)


@pytest.fixture(scope="module")
def straight(sounds: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run as it stands, undisturbed. Not to be written to."""
    return go(run_options(sounds), tmp_path_factory.mktemp("straight"))


@pytest.fixture(scope="module")
def often_saved(sounds: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run with a checkpoint of every step. Not to be written to."""
    return go(run_options(sounds, *EVERY_STEP), tmp_path_factory.mktemp("often"))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "ema.safetensors", "optimizer.pt", "state.json", "checksums.json"]
)
@pytest.mark.parametrize("harm", ["flipped", "gone"])
def test_damage_to_the_newest_checkpoint_costs_the_steps_since_the_one_before(
    sounds: Path, tmp_path: Path, straight: Path, often_saved: Path, name: str, harm: str
) -> None:
    shutil.copytree(often_saved, tmp_path / "run")
    newest = checkpoints(tmp_path / "run")[-1]
    data = bytearray((newest / name).read_bytes())
    data[len(data) // 2] ^= 1
    (newest / name).write_bytes(data) if harm == "flipped" else (newest / name).unlink()
    assert weights(go(run_options(sounds, *EVERY_STEP), tmp_path / "run")) == weights(straight)
    set_aside = [path.name for path in newest.parent.glob("damaged-*")]
    assert set_aside == ([] if (name, harm) == ("checksums.json", "gone") else [f"damaged-{newest.name}"])


def test_damage_to_all_of_a_phase_costs_the_phase(sounds: Path, tmp_path: Path, straight: Path) -> None:
    shutil.copytree(straight, tmp_path / "run")
    for folder in tmp_path.glob("run/phases/[12]-*/checkpoints/step-*"):
        (folder / "model.safetensors").write_bytes(b"")
    for file in tmp_path.glob("run/statistics/*"):
        file.write_text("{")
    (tmp_path / "run/recordings.json").write_text("")
    assert weights(go(run_options(sounds, *EVERY_STEP), tmp_path / "run")) == weights(straight)
