"""A signal is obeyed during validation, the run is saved first, and no validation is left out."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from tiny_runs import checkpoints, records, run_options, weights

from ssl_c2f.core.signals import Interrupted, Stop
from ssl_c2f.train import engine
from ssl_c2f.train.recipe import RunOptions


class Meanwhile(Stop):
    """A signal that comes during validation."""

    def check(self) -> None:
        self.signum = signal.SIGTERM
        super().check()


@pytest.fixture
def options(sounds: Path) -> RunOptions:
    return run_options(sounds, "evaluation.every=0.01", "train.checkpoint_every=99")


def test_a_run_that_is_stopped_at_each_step_validates_all_of_them(options: RunOptions, tmp_path: Path) -> None:
    engine.run(options, tmp_path / "straight")
    for _ in range(6):
        with pytest.raises(Interrupted):
            engine.run(options, tmp_path / "run", stop=Stop(signal.SIGTERM))
    engine.run(options, tmp_path / "run")
    assert records(tmp_path / "run") == records(tmp_path / "straight")
    assert weights(tmp_path / "run") == weights(tmp_path / "straight")


def test_a_signal_does_not_wait_for_the_end_of_validation(options: RunOptions, tmp_path: Path) -> None:
    engine.run(options, tmp_path / "straight")
    with pytest.raises(Interrupted, match="at step 1, which is saved"):
        engine.run(options, tmp_path / "run", stop=Meanwhile())
    assert [folder.name for folder in checkpoints(tmp_path / "run")] == ["step-00000001"]
    assert not any("val/loss" in record for record in records(tmp_path / "run"))
    engine.run(options, tmp_path / "run")
    assert records(tmp_path / "run") == records(tmp_path / "straight")
    assert weights(tmp_path / "run") == weights(tmp_path / "straight")
