"""A real Slurm of two nodes on this machine, for the tests in this folder."""

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
    if os.geteuid() != 0:
        pytest.skip("starting Slurm's daemons needs root")
    root = Path(os.environ.get("SLURM_TEST_DIR", "/var/lib/slurm-test"))
    was_up = (root / "slurmctld.pid").exists() and subprocess.run(["scontrol", "ping"], capture_output=True).returncode == 0
    up = subprocess.run([HERE / "slurm-up"], capture_output=True, text=True, timeout=280)
    if up.returncode:
        pytest.skip(f"Slurm cannot be installed or started here: {up.stderr.strip().splitlines()[-1:]}")
    before = dict(os.environ)
    os.environ["SLURM_CONF"] = up.stdout.strip().removeprefix("export SLURM_CONF=")
    os.environ["OMP_NUM_THREADS"] = "1"  # of the jobs: equal threads, equal bits
    yield
    os.environ.clear()
    os.environ.update(before)
    if not was_up:
        subprocess.run([HERE / "slurm-down"], capture_output=True, timeout=120)
