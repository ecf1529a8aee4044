"""Runs at a W&B server: the real `wandb` and `wandb-workspaces`, a stub of the server on loopback.

Every run is a process of its own, as on a cluster; the server can be slow, broken, or stop in the middle.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
from wandb_stub import KEY, WandbStub

pytestmark = pytest.mark.slow

PHASES = ("coarse", "middle", "fine")
STEPS = 60  # of a phase
SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "planted-aws-secret", "HTTPS_PROXY": "http://user:planted-proxy@127.0.0.1:9",
    "GITHUB_TOKEN": "planted-github-token",
}
PATIENCE = 60.0  # seconds: a busy machine is no broken server
TUNE = (
    "phases=[{name: tune, steps: 2, batch_size: 8}]", "folds=[1,2]", "train.log_every=1", "tracking.wandb=online",
    f"tracking.timeout_seconds={PATIENCE}",
)


@pytest.fixture
def server() -> Iterator[WandbStub]:
    with WandbStub() as stub:
        yield stub


class Shell:
    """Commands of ours and of W&B, with variables that lead to the stub and with secrets beside them."""

    def __init__(self, server: WandbStub, folder: Path, sounds: Path) -> None:
        self.server, self.folder, self.run = server, folder, folder / "runs/mine"
        # Without WANDB_SERVICE: W&B leaves the address of this process's own service there, for its children to use.
        mine = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
        self.environment = {**mine, **SECRETS, **server.environment(folder / "home"), "NO_PROXY": "127.0.0.1"}
        self.data = f"data.root={sounds}"
        config = tiny_runs.DEFAULTS | {
            "phases": [phase | {"steps": STEPS} for phase in tiny_runs.DEFAULTS["phases"]],
            "evaluation": {"every": 4, "max_clips": 6, "mask_draws": 1},
            "tracking": {"wandb": "online", "timeout_seconds": PATIENCE},
            "train": tiny_runs.DEFAULTS["train"] | {"checkpoint_every": 100},
        }
        folder.mkdir(exist_ok=True)
        (folder / "tiny.yaml").write_text(json.dumps(config))

    def start(self, *words: str, module: str = "ssl_c2f") -> subprocess.Popen[str]:
        with open(self.folder / "log.txt", "a") as log:
            return subprocess.Popen(
                [sys.executable, "-m", module, *words], cwd=self.folder, env=self.environment, text=True,
                stdout=log, stderr=subprocess.STDOUT,
            )

    def do(self, *words: str, module: str = "ssl_c2f", status: int = 0) -> str:
        """Run a command to its end; what it printed."""
        before = len(self.log)
        process = self.start(*words, module=module)
        assert process.wait() == status, self.log[before:]
        return self.log[before:]

    @property
    def log(self) -> str:
        file = self.folder / "log.txt"
        return file.read_text() if file.exists() else ""

    def pretrain(self, *more: str) -> tuple[str, ...]:
        return ("pretrain", "tiny.yaml", self.data, "data.val_folds=[5]", f"run_dir={self.run}", *more)

    def lines(self, phase: str) -> list[tuple[int, int]]:
        """(number of the row, step) of a phase's records in metrics.jsonl."""
        whole = (self.run / "metrics.jsonl").read_text().rpartition("\n")[0]
        records = [record for record in map(json.loads, whole.splitlines()) if record["phase"] == phase]
        return [(2 * record["step"] + ("val/loss" in record), record["step"]) for record in records]

    def sync(self) -> None:
        """As often as it takes: on a busy machine W&B's own service may start too slowly for it, which is no error."""
        for _ in range(3):
            left = [path for path in self.run.rglob("offline-run-*") if not list(path.glob("*.synced"))]
            if left:
                self.do("sync", *map(str, left), module="wandb")


@pytest.fixture
def shell(server: WandbStub, tmp_path: Path, sounds: Path) -> Shell:
    return Shell(server, tmp_path / "work", sounds)


def shown(rows: list[dict[str, Any]]) -> list[tuple[int, int]]:
    return [(row["_step"], row["step"]) for row in rows if "step" in row]


def kill_in(phase: str, shell: Shell) -> None:
    """SIGKILL a run in a phase, once the server has some of its steps: W&B sends them every 15 s, so it is held."""
    process = shell.start(*shell.pretrain())
    while process.poll() is None and not ((shell.run / "metrics.jsonl").exists() and len(shell.lines(phase)) > 9):
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)
    until = time.monotonic() + 60
    while not len(server_rows(shell, phase)) and time.monotonic() < until:
        time.sleep(0.05)
    process.kill()
    assert process.wait() == -signal.SIGKILL, shell.log


def server_rows(shell: Shell, phase: str) -> list[dict[str, Any]]:
    run = shell.server.by_type().get(f"pretrain/{phase}")
    return run.rows if run else []


def assert_chain(server: WandbStub) -> None:
    """Each phase's run made an artifact that the next used; both folds, their scores and the probe used the last."""
    runs = server.by_type()
    models = {a.run: a for a in server.artifacts.values() if a.kind == "model" and a.committed}
    for before, after in pairwise(PHASES):
        made = models[runs[f"pretrain/{before}"].name]
        assert set(made.used_by) == {runs[f"pretrain/{after}"].name}
        assert {"model.safetensors", "ema.safetensors", "state.json"} == set(made.manifest["contents"])
        assert models[runs[f"pretrain/{after}"].name].metadata["source"]["artifact"] == made.name
    later = {name for name, run in server.runs.items() if not run.fields["jobType"].startswith("pretrain/")}
    assert len(later) == 4 and set(models[runs["pretrain/fine"].name].used_by) == later


def assert_no_secret(shell: Shell, server: WandbStub) -> None:
    planted = [value.encode() for value in (KEY, "planted-aws-secret", "planted-proxy", "planted-github-token")]
    files = [file for file in shell.folder.rglob("*") if file.is_file()]
    assert any(file.suffix == ".wandb" for file in files) and any(file.name == "report.html" for file in files)
    assert any(file.name == "debug-internal.log" for file in files)
    kept = {str(file): file.read_bytes() for file in files}
    told = json.dumps([[run.fields, run.files] for run in server.runs.values()] + [*server.views.values()])
    kept |= server.blobs | {"what the server was told": told.encode()}
    assert [(name, value) for name, content in kept.items() for value in planted if value in content] == []


def test_killed_resumed_tuned_and_reported(shell: Shell, server: WandbStub) -> None:
    kill_in("middle", shell)
    assert 0 < len(server_rows(shell, "middle")) < STEPS, "it was killed in the middle of the phase"
    assert not list(shell.run.glob("phases/1-middle/checkpoints/step-*")), "all of which is rolled back"
    shell.do(*shell.pretrain())
    for phase in PHASES:
        run = server.by_type()[f"pretrain/{phase}"]
        assert shown(run.rows) == shell.lines(phase), phase
        assert run.exit_code == 0 and run.fields["groupName"] == "mine" and run.config["phase"] == phase
        assert {"plan", "geometry", "phases"} <= set(run.config) and (phase == "coarse") != ("source" in run.config)
        views = {name.split("/")[3].split("_")[0] for name in run.uploads if name.startswith("media/images/pictures")}
        assert views == {"input", "kept", "reconstruction"}
    assert any(name.startswith("media/table/transfer") for name in server.by_type()["pretrain/fine"].uploads)

    shell.do("finetune", "--ckpt", str(shell.run), shell.data, *TUNE)
    shell.do("probe", "--ckpt", str(shell.run), shell.data, "strengths=[0.01]")
    tables = {run.fields["jobType"]: "".join(run.uploads) for run in server.runs.values()}
    assert "media/table/confusion" in tables["finetune/scores"] and "media/table/probe" in tables["probe/scores"]
    assert [shown(run.rows) for run in server.runs.values() if run.fields["jobType"] == "finetune/tune"] == [
        [(2, 1), (4, 2)]
    ] * 2
    assert_chain(server)
    assert_report(shell, server)
    shell.do("report", str(shell.run))
    assert_no_secret(shell, server)


def assert_report(shell: Shell, server: WandbStub) -> None:
    address = shell.do("report", str(shell.run), "--wandb").splitlines()[-1]
    assert address.startswith(server.url)
    assert shell.do("report", str(shell.run), "--wandb").splitlines()[-1] == address
    (view,) = server.views.values()  # it was updated
    other = shell.folder / "runs/other"
    shutil.copytree(shell.run, other)
    of_both = shell.do("report", str(shell.run), str(other), "--wandb").splitlines()[-1]
    assert of_both != address and len(server.views) == 2
    assert shell.do("report", str(shell.run), "--wandb").splitlines()[-1] == address and len(server.views) == 2
    blocks = json.loads(view["spec"])["blocks"]
    grids = [block["metadata"] for block in blocks if block["type"] == "panel-grid"]
    named = 0
    for grid in grids:
        ids = {value for s in grid["runSets"] for f in s["filters"]["filters"] for value in f["value"]}
        assert ids and ids <= set(server.runs)
        logged = {key for name in ids for row in server.runs[name].rows for key in row}
        for panel in grid["panelBankSectionConfig"]["panels"]:
            config = panel["config"]
            names = [*config.get("metrics", []), *config.get("mediaKeys", []), *filter(None, [config.get("xAxis")])]
            assert set(names) <= logged, (panel["viewType"], set(names) - logged)
            named += len(names)
    assert named >= 12
    text = json.dumps(blocks)
    for said in ("single phase (planned)", "Fine-tuning", "ssl_c2f pretrain", "ssl_c2f finetune", "95 % interval"):
        assert said in text, said


@pytest.mark.parametrize("trouble", ["slow", "broken", "stopped"])
def test_a_server_in_trouble_does_no_harm(shell: Shell, server: WandbStub, trouble: str) -> None:
    def stop_in_the_middle(stub: WandbStub) -> None:
        if "pretrain/middle" in stub.by_type() and stub.watch:
            stub.watch = None
            stub.refuse()

    match trouble:
        case "slow":
            server.delay = 5.0
        case "broken":
            server.status = 500
        case "stopped":
            server.watch = stop_in_the_middle
    began = time.monotonic()
    shell.do(*shell.pretrain("tracking.wandb=off", f"run_dir={shell.folder}/other"))
    undisturbed = time.monotonic() - began
    began = time.monotonic()
    log = shell.do(*shell.pretrain("tracking.timeout_seconds=5"))
    assert time.monotonic() - began < undisturbed + 30, "each of three phases would wait for many answers"
    assert log.count("wandb sync") == 1 and "Traceback" not in log
    shell.do("finetune", "--ckpt", str(shell.run), shell.data, *TUNE, "tracking.timeout_seconds=5")
    assert [step for _, step in shell.lines("fine")][-1] == 3 * STEPS
    assert "tracked offline; upload it first: wandb sync" in shell.do("report", str(shell.run), "--wandb", status=2)

    server.restart()
    shell.sync()
    runs = server.by_type()
    for phase in PHASES:
        run = runs[f"pretrain/{phase}"]
        assert shown(run.history) == shell.lines(phase), phase
        assert run.exit_code == 0
    models = {a.name: a for a in server.artifacts.values() if a.kind == "model" and a.committed}
    assert len(models) == len(PHASES) + 2  # and two folds
    chain = [models[f"model-{runs[kind].name}"] for kind in ("finetune/tune", "pretrain/fine", "pretrain/middle")]
    before = [runs[f"pretrain/{phase}"].name for phase in reversed(PHASES)]
    assert [model.metadata["source"]["artifact"] for model in chain] == [f"model-{name}" for name in before]
    if trouble == "slow":
        assert_report(shell, server)


def test_uploaded_checkpoints_are_whole(shell: Shell, server: WandbStub) -> None:
    shell.do(*shell.pretrain("phases=[{name: only, steps: 2, batch_size: 8}]", "tracking.artifacts=upload"))
    (model,) = (a for a in server.artifacts.values() if a.kind == "model")
    weights = next(shell.run.rglob("model.safetensors")).read_bytes()
    assert server.blobs[f"artifact/{model.id}/model.safetensors"] == weights
    shell.do(*shell.pretrain("phases=[{name: only, steps: 2, batch_size: 8}]", "tracking.artifacts=none",
                             f"run_dir={shell.folder}/other"))
    assert sum(a.kind == "model" for a in server.artifacts.values()) == 1


def test_a_failed_phase_is_shown_as_failed(shell: Shell, server: WandbStub) -> None:
    shell.do(*shell.pretrain("optim.lr=1e30", "train.max_nonfinite=0", "evaluation.every=0"), status=2)
    assert server.by_type()["pretrain/coarse"].exit_code == 1


def test_a_run_without_wandb_is_told_what_to_do(shell: Shell) -> None:
    shell.do(*shell.pretrain("phases=[{name: only, steps: 2, batch_size: 8}]", "tracking.wandb=off"))
    (line,) = shell.do("report", str(shell.run), "--wandb", status=2).splitlines()
    assert "no phase of it was tracked by W&B" in line and "tracking.wandb=online" in line
