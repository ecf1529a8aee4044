"""The table that is printed at the end of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ssl_c2f.report.summary import print_summary


def test_a_line_for_each_phase_and_the_paths_of_what_was_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    axes = {"samples": 4096, "flops": 2.5e15, "train_seconds": 61.4}
    records = [
        {"phase": "coarse", "step": 1, "samples": 8, "flops": 1e12, "train_seconds": 0.1, "loss": 9.0},
        {"phase": "coarse", "step": 512, **axes, "loss": 0.51234},
        {"phase": "coarse", "step": 512, **axes, "val/loss": 0.6},  # shown in the same line as the record before
        {"phase": "fine", "step": 600, "samples": 5000, "flops": 3e15, "train_seconds": 99.9, "loss": 0.4},
    ]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "metrics.jsonl").write_text(lines + '{"phase": "fi')  # the process was killed while it wrote this
    (tmp_path / "bad_files.jsonl").write_text("{}\n{}\n")
    steps = ("0-coarse/checkpoints/step-00000256", "0-coarse/checkpoints/step-00000512", "1-fine/checkpoints")
    for step in steps:
        (tmp_path / "phases" / step).mkdir(parents=True)
    print_summary(tmp_path)
    title, *rows = capsys.readouterr().out.splitlines()
    assert title == f"{tmp_path} (totals from the start)"
    assert [row.split() for row in rows[:3]] == [
        ["phase", "steps", "clips", "PFLOPs", "time", "loss", "val/loss"],
        ["coarse", "512", "4,096", "2.5", "61", "s", "0.5123", "0.6000"],
        ["fine", "600", "5,000", "3", "100", "s", "0.4000", "-"],
    ]
    assert rows[3:] == [
        f"2 unreadable files were skipped: {tmp_path / 'bad_files.jsonl'}",
        str(tmp_path / "metrics.jsonl"), str(tmp_path / "phases" / steps[1]),
    ]
