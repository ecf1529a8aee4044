"""Settings of all tests, and recordings and runs that several tests use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# OpenMP threads that wait for each other spin by default, which takes ten times as long on a busy machine. The variable
# must be set before torch is imported, so this file imports nothing of ssl_c2f at its top.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# no deadline per example: a busy machine must not fail a test
settings.register_profile("ssl_c2f", deadline=None)
settings.load_profile("ssl_c2f")


@pytest.fixture(scope="session")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 recordings of one second at 16 kHz: 12 classes, 5 folds. Read-only."""
    from ssl_c2f.data.synthetic import write_dataset

    folder = tmp_path_factory.mktemp("sounds")
    write_dataset(folder, clips_per_class=5, seconds=1.0)
    return folder


@pytest.fixture(scope="session")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """15 recordings of half a second at 8 kHz: 3 classes, 5 folds. Read-only."""
    from trained_runs import write_sounds

    return write_sounds(tmp_path_factory.mktemp("recordings") / "tones")


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory, tones: Path) -> Path:
    """A supervised run; fold 5 of `tones` is held out."""
    from trained_runs import train

    return train(tmp_path_factory.mktemp("runs") / "classifier", tones, name="supervised")


@pytest.fixture(scope="session")
def autoencoder(tmp_path_factory: pytest.TempPathFactory, tones: Path) -> Path:
    """A masked autoencoder on the same recordings."""
    from trained_runs import train

    return train(tmp_path_factory.mktemp("runs") / "mae", tones, name="mae", decoder_width=16, decoder_depth=1)
