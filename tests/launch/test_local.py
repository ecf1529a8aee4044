"""`--cluster local`: jobs on this machine, their status, and how they are stopped."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from launcher import CONFIG, LAUNCH, launch, program
from waits import wait_for

from ssl_c2f.core.options import UserError
from ssl_c2f.launch import local
from ssl_c2f.launch.cluster import Resources
from ssl_c2f.launch.jobs import Job, events_of
from ssl_c2f.launch.schedule import Task, read_jobs, remember
from ssl_c2f.launch.status import jobs_of
from ssl_c2f.report.read import read_run
from ssl_c2f.report.wandb_report import _commands


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text(CONFIG)
    return file


@pytest.fixture
def no_controller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Slurm's programs are there, but nobody answers; the file in which they note that they were asked."""
    asked, folder = tmp_path / "asked", tmp_path / "bin"
    folder.mkdir()
    for name in ("sinfo", "squeue", "sacct", "scontrol", "scancel"):
        program(folder / name, f"import sys; open({str(asked)!r}, 'a').write({name!r}); sys.exit('no controller')")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return asked


def test_a_local_job_is_a_process_and_none_of_slurms(
    no_controller: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = Task(Job("pretrain", "coarse", "config.yaml", str(tmp_path)), lambda: False)
    command = [sys.executable, "-c", "import time; time.sleep(60)", tmp_path / "submitit"]
    with subprocess.Popen(command) as process:
        try:
            remember(task, str(process.pid), tmp_path / "other", "local")
            assert jobs_of(tmp_path)[0].state == "gone", "another process has got its number"
            remember(task, str(process.pid), tmp_path / "submitit", "local")
            assert jobs_of(tmp_path)[0].state == "RUNNING"
        finally:
            process.kill()
    assert jobs_of(tmp_path)[0].state == "gone"
    assert launch("cancel", tmp_path) == 0 and "no job of it" in capsys.readouterr().out
    assert not no_controller.exists()


def test_a_local_job_of_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
    remember(Task(Job("pretrain", "coarse", "", str(tmp_path)), lambda: False), str(os.getpid()), tmp_path, "local")
    monkeypatch.undo()
    (part,) = jobs_of(tmp_path)
    assert part.state == "started on elsewhere" and not part.failed
    assert launch("cancel", tmp_path) == 2
    assert "coarse was started on elsewhere: cancel it there" in capsys.readouterr().err


def test_gpus_are_those_that_the_user_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = tmp_path / "shown"
    program(tmp_path / "python", f"import os; open({str(shown)!r}, 'w').write(os.environ['CUDA_VISIBLE_DEVICES'])")
    job = Job("pretrain", "coarse", "config.yaml", str(tmp_path))
    for chosen, ngpus, expected in (("3,GPU-5a,7", 2, "3,GPU-5a"), ("", 1, ""), (None, 2, "0,1"), ("3", 0, "")):
        if chosen is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
        resources = Resources(ngpus=ngpus, python=str(tmp_path / "python"))
        started: Any = local.start(resources, tmp_path / "submitit", job)
        started._process.wait()
        assert shown.read_text() == expected
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(UserError, match="--ngpus 2, but CUDA_VISIBLE_DEVICES is 3"):
        local.start(Resources(ngpus=2), tmp_path / "submitit", job)


@pytest.mark.slow
def test_local_runs_the_phases_one_after_the_other(config: Path, sounds: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [sys.executable, LAUNCH, "pretrain", config, f"data.root={sounds}", "--run-dir", run, "--cluster", "local"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(words, check=True, env=environment, timeout=120)
    assert all((run / "phases" / name / "done").exists() for name in ("0-coarse", "1-fine"))
    (command,) = _commands(read_run(run, "run"))
    assert command == shlex.join(["python", *map(str, words[1:])])
    again = subprocess.run(words, check=True, env=environment, timeout=120, capture_output=True, text=True)
    assert "nothing to submit" in again.stdout
    failed = subprocess.run(
        [*words, "phases.0.lr=1e30", "train.max_nonfinite=0", "--run-dir", str(tmp_path / "bad")],
        env=environment, timeout=120, capture_output=True, text=True,
    )
    assert failed.returncode == 1 and "a loss that is not finite" in failed.stdout


@pytest.mark.slow
def test_what_is_stopped_here_saves_first(
    config: Path, sounds: Path, tmp_path: Path, no_controller: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By Ctrl-C, which a terminal sends to all of its processes, and by `cancel`; in a step that takes its time."""
    run = tmp_path / "run"
    words = [sys.executable, LAUNCH, "pretrain", config, f"data.root={sounds}", "--run-dir", run, "--cluster", "local",
             "phases.0.steps=3000", "train.log_every=1", "train.checkpoint_every=9999"]

    def interrupted(tell: Callable[[subprocess.Popen[str]], object], attempt: int, *more: str) -> None:
        begun = lines()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        launcher = subprocess.Popen([*words, *more], stderr=subprocess.PIPE, text=True, env=environment,
                                    start_new_session=True)
        wait_for(lambda: len(starts()) == attempt and lines() > begun, "the first steps")
        os.kill(starts()[-1]["pid"], signal.SIGSTOP)
        tell(launcher)
        time.sleep(3)
        os.kill(starts()[-1]["pid"], signal.SIGCONT)
        errors = launcher.communicate(timeout=60)[1]
        step = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
        assert launcher.returncode == 130
        assert errors == (
            f"launch.py: stopped by SIGINT at step {step}, which is saved; the same command goes on from there\n"
        )
        assert (run / "phases" / "0-coarse" / "checkpoints" / f"step-{step:08d}").exists()
        assert events_of(run)[-1]["event"] == "interrupted"
        (part,) = jobs_of(run)
        assert part.state == "interrupted" and part.error in errors

    def starts() -> list[dict[str, Any]]:
        return [event for event in events_of(run) if event["event"] == "started"]

    def lines() -> int:
        file = run / "metrics.jsonl"
        return file.read_text().count("\n") if file.exists() else 0

    interrupted(lambda launcher: os.killpg(launcher.pid, signal.SIGINT), 1)
    with ThreadPoolExecutor() as pool:

        def cancel(launcher: subprocess.Popen[str]) -> None:
            assert [part.state for part in jobs_of(run)] == ["RUNNING"]
            pool.submit(launch, "cancel", run)

        interrupted(cancel, 2, "--setup", "true")  # with a shell between
    assert f"cancelled {read_jobs(run)['coarse']['id']}\n" in capsys.readouterr().out
    assert not no_controller.exists()
