"""slurm/launch.py where there is no cluster: what it prints, what it refuses, and what a job is made of."""

from __future__ import annotations

import importlib.util
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ssl_c2f import cluster
from ssl_c2f.jobs import Job, Preemption
from ssl_c2f.options import UserError
from ssl_c2f.schedule import Launch, Task, alone, remember

LAUNCH = Path(__file__).parents[1] / "slurm" / "launch.py"
CONFIG = """
audio: {clip_seconds: 1.0, num_mels: 32}
model: {width: 16, depth: 1, heads: 2, patch_f: 16, patch_t: 8}
objective: {name: mae, decoder_width: 16, decoder_depth: 1, decoder_heads: 2}
phases:
  - {name: coarse, steps: 4, time_factor: 2, batch_size: 8, lr: 1.0e-3}
  - {name: fine, steps: 4, batch_size: 8, lr: 1.0e-3}
train: {device: cpu, rehearse: false}
tracking: {wandb: off}
"""


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


def launch(*words: object) -> int:
    spec = importlib.util.spec_from_file_location("launch", LAUNCH)
    assert spec and spec.loader
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    status: int = module.main([str(word) for word in words])
    return status


def program(folder: Path, text: str) -> None:
    folder.write_text(f"#!{sys.executable}\n{text}\n")
    folder.chmod(0o755)


def test_help_answers_at_once() -> None:
    began = time.perf_counter()
    done = subprocess.run([sys.executable, LAUNCH, "pretrain", "--help"], capture_output=True, text=True, check=True)
    assert "--max-timeouts" in done.stdout
    assert time.perf_counter() - began < 5  # importing torch takes longer on a busy machine


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
    launcher = Launch(cluster.Resources(), tmp_path, "run")
    assert launcher.submit([[[task]]]) == [] and launcher.made == []


def test_slurm_finds_its_configuration_and_forgets_the_job_that_we_run_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CONF", "/somewhere/slurm.conf")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    with cluster._environment():
        assert os.environ["SLURM_CONF"] == "/somewhere/slurm.conf" and "SLURM_JOB_ID" not in os.environ
    assert os.environ["SLURM_JOB_ID"] == "17"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--cluster", "local", "--nodes", "2"], "this one machine: it cannot give 2 nodes"),
        (["--cluster", "debug", "--ngpus", "2"], "one process"),
        (["--cluster", "slurm"], "there is no sbatch here"),
        (["--nodes", "0"], "--nodes must be at least 1"),
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


def test_two_launches_at_once_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "submitit"
    with alone(folder), pytest.raises(UserError, match="another launch of"), alone(folder):
        pass


@pytest.mark.slow
def test_local_runs_the_phases_one_after_the_other(config: Path, sounds: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [sys.executable, LAUNCH, "pretrain", config, f"data.root={sounds}", "--run-dir", run, "--cluster", "local"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(words, check=True, env=environment, timeout=120)
    assert all((run / "phases" / name / "done").exists() for name in ("0-coarse", "1-fine"))
    again = subprocess.run(words, check=True, env=environment, timeout=120, capture_output=True, text=True)
    assert "nothing to submit" in again.stdout
    failed = subprocess.run(
        [*words, "phases.0.lr=1e30", "train.max_nonfinite=0", "--run-dir", str(tmp_path / "bad")],
        env=environment, timeout=120, capture_output=True, text=True,
    )
    assert failed.returncode == 1 and "non-finite loss" in failed.stdout
