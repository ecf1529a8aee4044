"""The contents of the wheel: the other tests use an editable install, which finds every file in the checkout."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from paths import ROOT


@pytest.mark.slow
def test_the_wheel_has_all_that_an_installed_package_needs(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", tmp_path]
    done = subprocess.run([*command, ROOT], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("ssl_c2f-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = {f"ssl_c2f/{file.relative_to(ROOT)}" for file in (ROOT / "configs").rglob("*.yaml")}
    package = {
        str(file.relative_to(ROOT)) for file in (ROOT / "ssl_c2f").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    others = ("py.typed", "report/page.js", "report/page.css", "released/c2f_nano/model.safetensors")
    assert {f"ssl_c2f/{name}" for name in others} < package and configs
    assert configs | package == {name for name in names if name.startswith("ssl_c2f/")}
    assert wheel.stat().st_size < 15e6
    assert any(name.endswith(".dist-info/entry_points.txt") for name in names)
