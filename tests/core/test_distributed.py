"""Collective calls do nothing in a single process, and agree between two."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ssl_c2f.core import distributed

WORKER = """
import torch
from ssl_c2f.core import distributed
d = distributed.init("cpu")
assert (d.world, d.is_main) == (2, d.rank == 0)
assert d.any_rank(d.rank == 1) and not d.any_rank(False)
own = torch.full((2,), float(d.rank + 1))
assert d.sum(own).tolist() == [3.0, 3.0] and own.tolist() == [d.rank + 1.0] * 2
assert d.gather_objects({"rank": d.rank}) == [{"rank": 0}, {"rank": 1}]
assert d.broadcast_object({"from": d.rank}) == {"from": 0}
d.barrier()
torch.distributed.destroy_process_group()
print(f"rank {d.rank} is done")
"""


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def test_alone() -> None:
    d = distributed.init("cpu")
    tensor = torch.ones(3)
    total = d.sum(tensor)
    assert (d.rank, d.world, d.local_rank, d.is_main, d.device.type) == (0, 1, 0, True, "cpu")
    assert d.any_rank(True) and not d.any_rank(False)
    assert total.equal(tensor) and total.data_ptr() != tensor.data_ptr()
    assert d.gather_objects("it") == ["it"]
    assert d.broadcast_object(value := object()) is value
    d.barrier()
    assert not torch.distributed.is_initialized()


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*command, str(tmp_path / "worker.py")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "rank 0 is done" in done.stdout and "rank 1 is done" in done.stdout
