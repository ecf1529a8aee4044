"""Which W&B report a command updates."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ssl_c2f.report import wandb_report


class Server:
    """The part of `wandb_workspaces.reports.v2` that opens and makes reports."""

    def __init__(self) -> None:
        self.made: list[Any] = []
        self.Report = self
        self.lost = False

    def __call__(self, **_: str) -> Any:
        self.made.append(SimpleNamespace(id=str(len(self.made)), url=f"https://server/{len(self.made)}"))
        return self.made[-1]

    def from_url(self, url: str) -> Any:
        if self.lost:
            raise TypeError(url)
        return next(report for report in self.made if report.url == url)


def report_about(server: Server, *runs: Path) -> str:
    report = wandb_report._open(server, runs, "someone", "project")
    wandb_report._keep(runs, report)
    return str(report.url)


def test_each_set_of_runs_keeps_its_own_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server, (a, b, c) = Server(), (tmp_path / "runs" / name for name in "abc")
    for run in (a, b, c):
        run.mkdir(parents=True)
    alone, both, three = report_about(server, a), report_about(server, a, b), report_about(server, a, b, c)
    assert len({alone, both, three, report_about(server, b)}) == 4
    monkeypatch.chdir(tmp_path)
    assert report_about(server, Path("runs/a")) == alone and report_about(server, a, a) == alone
    assert report_about(server, a, Path("runs/b")) == both and report_about(server, a, c, b) == three
    (tmp_path / "runs").rename(tmp_path / "moved")
    assert report_about(server, *(tmp_path / "moved" / name for name in "ab")) == both
    server.lost = True
    assert report_about(server, tmp_path / "moved" / "a") not in {alone, both, three}
