"""The cost of a run as `plan` computes it, and as it measures it."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
import torch
from tiny_runs import DEFAULTS, run_options

from ssl_c2f import cli
from ssl_c2f.train.plan import make_plan

MEMORY = [
    "cpu",
    pytest.param("cuda", marks=[
        pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    ]),
]


def measured(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> list[dict[str, str]]:
    """The rows of the table that --measure adds to the plan."""
    file = tmp_path / "tiny.yaml"
    file.write_text(json.dumps(DEFAULTS))
    assert cli.main(["plan", str(file), "--measure", "--clips", "800", *words]) == 0
    _, *lines = capsys.readouterr().out.partition("measured on one ")[2].splitlines()
    columns, *rows = (re.split(r"  +", line) for line in lines)
    assert rows[-1][0] == "total"
    return [dict(zip(columns, row, strict=True)) for row in rows[:-1]] + [{"total": rows[-1][-1]}]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this system keeps one peak for all phases")
@pytest.mark.parametrize("device", MEMORY)
def test_each_phase_is_measured_for_itself(
    device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ssl_c2f.tasks.plan._ROUNDS", 1)
    phases = [
        {"name": "large", "steps": 1000, "batch_size": 1500}, {"name": "small", "steps": 500, "batch_size": 4},
    ]
    words = ["train.max_batch_per_device=null", "augment.mixup_prob=0", f"train.device={device}"]
    began = time.perf_counter()
    large, small, total = measured([f"phases={json.dumps(phases)}", *words], tmp_path, capsys)
    (column,) = (name for name in large if name.startswith("peak memory"))
    memory = [float(row[column].removesuffix(" GiB")) for row in (large, small)]
    assert [row["clips at a time"] for row in (large, small)] == ["1500", "4"]
    assert memory[0] > memory[1] + 0.08, "the second phase's is its own"
    assert memory[1] > 0 or device == "cuda"  # where libraries do not count, next to nothing is there
    hours = [float(row["ms per clip"]) / 3.6e6 * clips for row, clips in ((large, 1_500_000), (small, 2000))]
    assert [float(row["hours"]) for row in (large, small)] == pytest.approx(hours, abs=0.006, rel=0.01)
    assert 0.3 * float(large["ms per clip"]) < time.perf_counter() - began
    assert float(total["total"]) == pytest.approx(sum(hours), abs=0.01, rel=0.01)
    assert all(float(row["GFLOP/s"]) > 0 for row in (large, small))


@pytest.mark.parametrize(("precision", "size"), [("fp32", 4), ("bf16", 2)])
def test_activations_have_the_precision_of_the_run(precision: str, size: int, tmp_path: Path) -> None:
    o = run_options(tmp_path, f"train.precision={precision}")
    for geometry, phase in zip(o.geometries, make_plan(o, 100, 0).phases, strict=True):
        expected = o.model.activation_bytes(geometry, phase.kept, size) / 1e6
        assert phase.activation_mb_per_clip == pytest.approx(expected)
