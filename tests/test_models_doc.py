"""docs/models.md: the objective in it trains as printed, and its table lists every objective."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from paths import ROOT

from ssl_c2f.objectives import AnyOptions, Objective, ObjectiveOptions

TEXT = (ROOT / "docs/models.md").read_text()


def patched(text: str, diff: str) -> str:
    """Apply a diff without line numbers: context, removed and added lines in order."""
    lines, at = text.splitlines(), 0
    for line in diff.splitlines():
        kind, content = line[0], line[1:]
        if kind == "+":
            lines.insert(at, content)
            at += 1
        else:
            at = lines.index(content, at)
            del lines[at : at + (kind == "-")]
            at += kind == " "
    return "\n".join(lines) + "\n"


def test_the_table_has_every_objective() -> None:
    names = {options.model_fields["name"].default: options.mask_shape for options in get_args(get_args(AnyOptions)[0])}
    rows = dict(re.findall(r"^\| `(\w+)` \| `(?:.*\|){3} (\S+) \|.*\|.*\|$", TEXT, re.MULTILINE))
    assert rows.keys() == names.keys()
    assert all(rows[name].strip("`") == shape or name == "supervised" for name, shape in names.items())


@pytest.mark.slow
def test_the_example_trains(sounds: Path, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "ssl_c2f", tmp_path / "ssl_c2f", ignore=shutil.ignore_patterns("__pycache__"))
    folder = tmp_path / "ssl_c2f/objectives"
    (code,), (diff,) = (re.findall(rf"^```{kind}\n(.*?)^```$", TEXT, re.M | re.S) for kind in ("python", "diff"))
    (folder / "levels.py").write_text(code)
    init = folder / "__init__.py"
    init.write_text(patched(init.read_text(), diff))
    command = [sys.executable, "-m", "ssl_c2f", "pretrain", ROOT / "configs/debug/mae.yaml", "objective={name: levels}",
               f"data.root={sounds}", "run_dir=run"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 18 and sum(losses[-3:]) < sum(losses[:3])
    assert all(line["val/loss"] > 0 for line in lines if "val/knn_accuracy" in line)


def test_an_incomplete_objective_cannot_be_made() -> None:
    with pytest.raises(TypeError, match="abstract"):
        ObjectiveOptions(name="half")  # type: ignore[abstract]
    with pytest.raises(TypeError, match="abstract"):
        Objective()  # type: ignore[abstract]
