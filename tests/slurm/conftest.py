"""A real Slurm with five nodes on this machine, for the tests in this folder."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def slurm() -> Iterator[None]:
    """Installs and starts the daemons, or uses those that run; stops them if they were started here."""
    root = Path(os.environ.get("SLURM_TEST_DIR", "/var/lib/slurm-test"))
    ran = (root / "slurmctld.pid").exists()
    up = subprocess.run([HERE / "slurm-up"], capture_output=True, text=True, timeout=280)
    if up.returncode == 3:
        pytest.skip(f"Slurm cannot be installed here: {up.stderr.strip().splitlines()[-1]}")
    assert up.returncode == 0, up.stderr
    before = dict(os.environ)
    os.environ["SLURM_CONF"] = up.stdout.strip().removeprefix("export SLURM_CONF=")
    os.environ["OMP_NUM_THREADS"] = "1"  # of the jobs: equal threads, equal bits
    yield
    os.environ.clear()
    os.environ.update(before)
    if not ran:
        subprocess.run([HERE / "slurm-down"], capture_output=True, timeout=120)
