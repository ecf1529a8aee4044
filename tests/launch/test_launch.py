"""slurm/launch.py without a cluster: its output, its errors, and the jobs that it makes."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from launcher import CONFIG, LAUNCH, launch, program
from submitit.core.utils import DelayedSubmission, UncompletedJobError

from ssl_c2f.core.options import UserError
from ssl_c2f.core.provenance import provenance
from ssl_c2f.core.signals import Interrupted, Stop
from ssl_c2f.launch import cluster
from ssl_c2f.launch import commands as launching
from ssl_c2f.launch.jobs import Job, Preemption
from ssl_c2f.launch.schedule import Task, alone, remember
from ssl_c2f.launch.status import jobs_of


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text(CONFIG)
    return file


@pytest.fixture(autouse=True)
def no_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of Slurm that are installed are not found."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


def test_help_answers_at_once() -> None:
    command = [sys.executable, "-X", "importtime", LAUNCH, "pretrain", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--max-timeouts" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "ssl_c2f.cli" in imported and not imported & {"torch", "submitit", "wandb"}


def test_auto_says_what_it_chose_and_why(tmp_path: Path) -> None:
    assert cluster.choose("debug") == ("debug", "as asked")
    assert cluster.choose("auto") == ("local", "there is no sbatch here")
    program(tmp_path / "bin" / "sbatch", "")
    program(tmp_path / "bin" / "sinfo", "import sys; sys.exit('slurm_load_partitions: Unable to contact controller')")
    assert cluster.choose("auto") == (
        "local", "sbatch is here, but sinfo fails: slurm_load_partitions: Unable to contact controller"
    )
    program(tmp_path / "bin" / "sinfo", "")
    assert cluster.choose("auto")[0] == "slurm"


def test_dry_run_needs_no_cluster_and_writes_nothing(
    config: Path, sounds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = launch(
        "pretrain", config, f"data.root={sounds}", "--run-dir", tmp_path / "run", "--cluster", "slurm", "--dry-run",
        "--nodes", 2, "--ngpus", 4, "--cpus-per-task", 6, "--mem", "64GB", "--timeout", 90, "--partition", "p",
        "--account", "a", "--qos", "q", "--constraint", "c", "--exclude", "n1", "--mail-user", "me@x.org",
        "--mail-type", "END", "--setup", "module load cuda", "--srun-args", "--container-image=i --x", "--grace", 77,
    )
    assert status == 0
    printed = capsys.readouterr().out
    for line in (
        "#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=4", "#SBATCH --gpus-per-node=4", "#SBATCH --cpus-per-task=6",
        "#SBATCH --mem=64GB", "#SBATCH --time=90", "#SBATCH --partition=p", "#SBATCH --account=a", "#SBATCH --qos=q",
        "#SBATCH --constraint=c", "#SBATCH --exclude=n1", "#SBATCH --mail-user=me@x.org", "#SBATCH --mail-type=END",
        "#SBATCH --signal=USR2@77", "#SBATCH --kill-on-invalid-dep=yes", "#SBATCH --requeue", "module load cuda",
    ):
        assert printed.count(f"\n{line}\n") == 2, line
    assert printed.count("--dependency='afterok:<coarse>'") == 1
    (command, _) = [line for line in printed.splitlines() if line.startswith("srun ")]
    assert " --cpus-per-task=6 " in command and " --container-image=i --x " in command
    assert "PFLOPs" in printed and not (tmp_path / "run").exists()


def test_seeds_and_sweeps_multiply(
    config: Path, sounds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("pretrain", config, f"data.root={sounds}", "--run-dir", tmp_path, "--cluster", "slurm", "--dry-run")
    assert launch(*words, "--seeds", "0,1", "--sweep", "mask.ratio=0.5,0.6,0.7") == 0
    printed = capsys.readouterr().out
    assert printed.count("#SBATCH --array=0-5%6") == 2
    assert "seed=1,mask.ratio=0.7" in printed and "--dependency='aftercorr:<coarse>'" in printed


def test_pipeline_shows_all_of_its_parts(
    config: Path, sounds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("pipeline", config, f"data.root={sounds}", "--run-dir", tmp_path, "--cluster", "slurm", "--dry-run")
    assert launch(*words, "finetune.folds=[1,2,4]") == 0
    printed = capsys.readouterr().out
    for part in ("coarse", "fine", "fold-1, fold-2, fold-4", "scores"):
        assert f"\n# {part}\n" in printed
    assert printed.count("#SBATCH --array=0-2%3") == 1


def test_scoring_asks_for_one_process(
    config: Path, sounds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("pipeline", config, f"data.root={sounds}", "--run-dir", tmp_path, "--cluster", "slurm", "--dry-run")
    assert launch(*words, "finetune.folds=[1,2]", "--ngpus", 4) == 0
    tuning, scores = capsys.readouterr().out.split("\n# scores\n")
    assert "#SBATCH --ntasks-per-node=4" in tuning and "#SBATCH --gpus-per-node=4" in tuning
    assert "#SBATCH --ntasks-per-node=1" in scores and "#SBATCH --gpus-per-node=1" in scores
    asked = cluster.Resources(nodes=2, ngpus=0).of(Job("evaluate", "evaluate", "evaluate.yaml", str(tmp_path)))
    assert (asked.world, asked.nodes, asked.ngpus) == (1, 1, 0)


def test_types_of_gpu_and_other_options_of_sbatch(
    config: Path, sounds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("pretrain", config, f"data.root={sounds}", "--run-dir", tmp_path, "--cluster", "slurm", "--dry-run")
    assert launch(*words) == 0
    assert "wckey" not in capsys.readouterr().out
    more = ("--sbatch", "reservation=friday", "--sbatch", "wckey=mine", "--sbatch", "exclusive")
    assert launch(*words, "--ngpus", "a100:2", *more) == 0
    printed = capsys.readouterr().out
    for line in ("gpus-per-node=a100:2", "ntasks-per-node=2", "reservation=friday", "wckey=mine", "exclusive"):
        assert printed.count(f"#SBATCH --{line}\n") == printed.count("#!/bin/bash")
    for wrong in (("--sbatch", "a b=c"), ("--sbatch", "array=1-3"), ("--ngpus", "a100:"), ("--ngpus", "two")):
        assert launch(*words, *wrong) == 2
        assert wrong[0] in capsys.readouterr().err


def test_what_submitit_is_given(tmp_path: Path) -> None:
    program(tmp_path / "bin" / "srun", "")
    program(tmp_path / "bin" / "sbatch", "print('Submitted batch job 17')")
    train, score = Job("pretrain", "coarse", "c.yaml", str(tmp_path)), Job("score", "scores", "c.yaml", str(tmp_path))
    resources = cluster.Resources(nodes=2, ngpus=4, max_timeouts=7)
    for jobs, ids, tasks in (([train], ["17"], 4), ([train, train], ["17_0", "17_1"], 4), ([score], ["17"], 1)):
        folder = tmp_path / f"{jobs[0].part}{len(jobs)}"
        assert cluster.submit(resources, folder, "run", jobs) == ids
        for number in ids:
            given = DelayedSubmission.load(folder / f"{number}_submitted.pkl")
            assert given.function == jobs[0] and given._timeout_countdown == 7
        assert f"#SBATCH --ntasks-per-node={tasks}\n" in (folder / "17_submission.sh").read_text()


def test_a_copy_of_the_code_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copytree = shutil.copytree

    def fall_over(source: Path, to: Path, **rest: Any) -> None:
        to.mkdir(parents=True)
        (to / "__init__.py").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copytree", fall_over)
    with pytest.raises(KeyboardInterrupt):
        launching._with_snapshot(cluster.Resources(), tmp_path)
    monkeypatch.setattr(shutil, "copytree", copytree)
    launching._with_snapshot(cluster.Resources(), tmp_path)
    (copy,) = (tmp_path / "submitit").iterdir()
    assert copy.name.startswith("code-") and (copy / "ssl_c2f" / "train" / "engine.py").exists()


def test_pipelines_of_several_seeds(
    config: Path, sounds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("pipeline", config, f"data.root={sounds}", "--run-dir", tmp_path, "--cluster", "slurm", "--dry-run")
    assert launch(*words, "finetune.folds=[1,2,4]", "--seeds", "5,6") == 0
    printed = capsys.readouterr().out
    assert printed.count("#SBATCH --array=0-1%2") == 2, "an array for each phase"
    assert printed.count("#SBATCH --array=0-2%3") == 1
    assert "\n# fold-1, fold-2, fold-4 (of each of 2 runs)\n" in printed
    assert launch(*words[:-1], "--dry-run", "--sweep", "finetune.optim.lr=1e-3,2e-3") == 0
    assert "finetune.optim.lr=2e-3" in capsys.readouterr().out


def test_a_part_that_ends_while_the_queue_is_read_is_not_submitted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = tmp_path / "done"

    def settled(ids: object) -> dict[str, str]:
        done.touch()
        return {}  # it has left the queue

    monkeypatch.setattr(cluster, "settled", settled)
    task = Task(Job("pretrain", "coarse", "config.yaml", str(tmp_path)), done.exists)
    remember(task, "17", tmp_path)
    assert launching._submit([[[task]]], cluster.Resources(), tmp_path) == []


def test_slurm_finds_its_configuration_and_forgets_the_job_that_we_run_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CONF", "/somewhere/slurm.conf")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    with cluster.environment():
        assert os.environ["SLURM_CONF"] == "/somewhere/slurm.conf" and "SLURM_JOB_ID" not in os.environ
    assert os.environ["SLURM_JOB_ID"] == "17"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--cluster", "local", "--nodes", "2"], "this one machine: it cannot give 2 nodes"),
        (["--cluster", "debug", "--ngpus", "2"], "one process"),
        (["--cluster", "slurm"], "there is no sbatch here"),
        (["--nodes", "0"], "--nodes must be at least 1"),
        (["--timeout", "1"], "--grace 120 seconds leave nothing of --timeout 1 minutes"),
        (["--timeout", "2"], "--grace 120 seconds leave nothing of --timeout 2 minutes"),
        (["--srun-args", '"abc'], '--srun-args "abc: no closing quotation'),
        (["--python", "run 'x"], "--python run 'x: no closing quotation"),
        (["phases.0.step=1"], "steps"),
        (["data.root=/nowhere"], "/nowhere"),
        (["phases.1.batch_size=9", "--ngpus", "2"], "batch_size 9 is no multiple of 2 processes"),
        (["--phases", "coarse,medium"], "there is no phase medium"),
        (["--sweep", "mask.ratio"], "say KEY=A,B,C"),
        (["--run-dir", "/proc/x"], "cannot write /proc/x"),
    ],
)
def test_mistakes_take_one_line(
    words: list[str], complaint: str, config: Path, sounds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch("pretrain", config, f"data.root={sounds}", "--run-dir", tmp_path / "run", *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("launch.py: ") and complaint in line
    assert not (tmp_path / "run" / "phases").exists()


def test_evaluation_has_no_seeds(
    config: Path, sounds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch("evaluate", "--ckpt", tmp_path, f"data.root={sounds}", "--seeds", "0,1") == 2
    assert "give --seeds and --sweep to what trains" in capsys.readouterr().err


def test_status_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch("status", tmp_path) == 2
    assert "no jobs were submitted for it" in capsys.readouterr().err


def test_a_job_is_names_and_paths() -> None:
    job = Job("pretrain", "coarse", "/runs/x/submitit/config.yaml", "/runs/x")
    assert len(pickle.dumps(job)) < 300
    fresh = job.checkpoint()
    assert fresh.function == job and fresh.function is not job
    assert (fresh.args, fresh.kwargs, fresh.done()) == ((), {}, False)


def test_usr2_asks_for_a_stop_and_leaves_the_rest_for_later() -> None:
    called: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: called.append(number))
    try:
        preemption = Preemption()
        os.kill(os.getpid(), signal.SIGUSR2)
        assert preemption.asked and preemption.stop.signum == signal.SIGUSR2 and not called
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_status_tells_why_a_job_was_not_requeued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At its last time limit submitit raises; elsewhere scontrol may fail."""
    for name, value in (("SUBMITIT_EXECUTOR", "local"), ("SUBMITIT_LOCAL_JOB_ID", "17")):
        monkeypatch.setenv(name, value)

    def stopped(job: Job, stop: Stop) -> None:
        raise Interrupted(signal.SIGUSR2, 5)

    def leave(preemption: Preemption, *given: object) -> None:
        raise UncompletedJobError("Job not requeued because: timed-out too many times.")

    monkeypatch.setattr(Job, "_work", stopped)
    monkeypatch.setattr(Preemption, "leave", leave)
    task = Task(Job("pretrain", "coarse", "config.yaml", str(tmp_path)), lambda: False)
    remember(task, "17", tmp_path)
    with pytest.raises(UncompletedJobError):
        task.job()
    (part,) = jobs_of(tmp_path)
    assert part.failed and part.error == (
        "UncompletedJobError: Job not requeued because: timed-out too many times."
    )


def test_a_job_shows_the_launch_as_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["submitit/core/_submit.py", "FOLDER"])
    monkeypatch.setattr("ssl_c2f.train.engine.run", lambda *given, **rest: None)
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "command.json").write_text('["slurm/launch.py", "pretrain", "api_key=***"]')
    Job("pretrain", "coarse", str(tmp_path / "config.yaml"), str(tmp_path))._work(Stop())
    assert provenance()["command"] == ["slurm/launch.py", "pretrain", "api_key=***"]


def test_a_file_system_without_locks_takes_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(UserError, match=r"cannot lock .*launching: No locks available"), alone(tmp_path):
        pass


def test_two_launches_at_once_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "submitit"
    with alone(folder), pytest.raises(UserError, match="another launch of"), alone(folder):
        pass
