"""Whatever ends a job, within a phase or between two: the run ends with the weights of an undisturbed one."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from cluster_runs import CONFIG, STEPS, ClusterRun, go_on, is_pending, launch, local, straight
from cluster_runs import weights as final_weights
from submitit import SlurmJob
from waits import wait_for
from wandb_files import sent

from ssl_c2f.launch import cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
Strike = Callable[[ClusterRun, str, list[int]], None]


def interrupt(run: ClusterRun, part: str, pids: list[int]) -> None:
    SlurmJob(folder=run.path / "submitit", job_id=run.id(part))._interrupt()
    wait_for(lambda: all(is_pending(pid, signal.SIGUSR2) for pid in pids), "the signal", 60)  # a phase ends in no time
    go_on(pids)


def requeue(run: ClusterRun, part: str, pids: list[int]) -> None:
    subprocess.run(["scontrol", "requeue", run.id(part)], check=True, timeout=60)
    go_on(pids)


def preempt(run: ClusterRun, part: str, pids: list[int]) -> None:
    """A job of the partition `high` wants all CPUs of the run's two nodes."""
    nodes = ("-N2", "-w", "stnode[3-4]", "--exclusive")
    command = ["sbatch", "-p", "high", *nodes, "-t1", "-o", "/dev/null", "--wrap", "true"]
    subprocess.run(command, check=True, timeout=60, capture_output=True)
    wait_for(lambda: all(is_pending(pid, signal.SIGUSR2) for pid in pids), "preemption", 60)
    go_on(pids)


def time_limit(run: ClusterRun, part: str, pids: list[int]) -> None:
    wait_for(lambda: all(is_pending(pid, signal.SIGUSR2) for pid in pids), "the time limit", 150)
    go_on(pids)


def kill_node(run: ClusterRun, part: str, pids: list[int]) -> None:
    """All that Slurm has on the job's node dies; somebody says that it is down; later it is back."""
    daemon = Path(os.environ["SLURM_CONF"]).with_name(f"{LONELY}.pid")
    shepherds = [int(pid) for pid in subprocess.run(
        ["pgrep", "-f", rf"^slurmstepd: \[{run.id(part)}\."], capture_output=True, text=True, timeout=60
    ).stdout.split()]
    for pid in [int(daemon.read_text()), *shepherds, *pids]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    update = ["scontrol", "update", f"nodename={LONELY}", "state=down", "reason=dead"]
    subprocess.run(update, check=True, timeout=60)
    subprocess.run(["slurmd", "-N", LONELY], check=True, timeout=60)


def kill_one_rank(run: ClusterRun, part: str, pids: list[int]) -> None:
    os.kill(pids[-1], signal.SIGKILL)
    go_on(pids)
    _launch_once_over(run, part)


def kill_step(run: ClusterRun, part: str, pids: list[int]) -> None:
    subprocess.run(["scancel", "--signal=KILL", f"{run.id(part)}.0"], timeout=60)  # it may be over
    _launch_once_over(run, part)


def _launch_once_over(run: ClusterRun, part: str) -> None:
    wait_for(lambda: not cluster.active([run.id(part)]), "the job to be over", 60)
    run.launch()


def cancel(run: ClusterRun, part: str, pids: list[int]) -> None:
    status, said = launch("cancel", run.path)
    assert status == 0 and (f"cancelled {run.id(part)}" in said or run.events("ended", part)), said
    run.launch()


LONELY = "stnode5"
COMMON, PAIR = ("--exclude", "stnode[3-5]"), ("--exclude", "stnode[1-2,5]")
#        name            strike         processes  flags
WAYS: dict[str, tuple[Strike, int, tuple[object, ...]]] = {  # the longest comes first
    "time limit": (time_limit, 1, (*COMMON, "--timeout", 2, "--grace", 20, "tracking.wandb=offline")),
    "preemption": (preempt, 2, PAIR),
    "killed node": (kill_node, 1, ("--exclude", "stnode[1-4]")),
    "interrupt": (interrupt, 1, (*COMMON, "tracking.wandb=offline")),
    "requeue": (requeue, 1, COMMON),
    "killed step": (kill_step, 1, COMMON),
    "cancel": (cancel, 1, COMMON),
    "killed rank": (kill_one_rank, 2, COMMON),
}
WANDB = ("interrupt", "time limit")
#         part      step       attempt
PLACES = (
    ("coarse", STEPS // 2 - 5, 1),  # in its middle, off the checkpoints
    ("coarse", STEPS, 2),  # its last step is done, and not saved yet
    ("fine", STEPS, 1),  # it has begun, and done nothing
    ("fine", 2 * STEPS, 2),  # the very last step of the run
)
HURRIED = (*PLACES[:2], ("fine", 2 * STEPS, 1))


def survive(run: ClusterRun, name: str) -> bytes:
    """Strike a run at one place after the other; all of them by two ways, and time limits, which are slow, at two."""
    places = HURRIED[:2] if name == "time limit" else PLACES if name in ("interrupt", "requeue") else HURRIED
    run.launch()
    for part, step, attempt in places:
        pids = run.stop_at(part, step, attempt)
        assert run.step() < step + 10
        WAYS[name][0](run, part, pids)
    run.finish()
    return final_weights(run.path)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("config") / "tiny.yaml"
    file.write_text(CONFIG)
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def ends(
    slurm: None, config: Path, sounds: Path, folder: Path, request: pytest.FixtureRequest
) -> Iterator[dict[object, Future[bytes]]]:
    """All runs at once, since they mostly wait: how each of them ends, and the undisturbed ones by their processes."""
    asked = {item.name for item in request.session.items}  # a test that runs alone begins what it needs
    wanted = {name for name in WAYS if any(f"[{name}]" in test for test in asked)}
    processes = {WAYS[name][1] for name in wanted} | ({1, 2} if "test_two_processes" in asked else set())

    def begin(name: str) -> Future[bytes]:
        _, ranks, flags = WAYS[name]
        size = ("--nodes", ranks, "--ngpus", 0, "--cpus-per-task", 1, "--mem", "500MB")
        words = (config, f"data.root={sounds}", *size, *flags)
        return pool.submit(survive, ClusterRun(folder / name.replace(" ", "-"), words, ranks), name)

    with ThreadPoolExecutor(len(WAYS) + 3) as pool:
        found: dict[object, Future[bytes]] = {name: begin(name) for name in WAYS if name in wanted}
        found |= {n: pool.submit(straight, config, sounds, folder / f"straight-{n}", n) for n in processes}
        if "test_two_processes" in asked:
            found["local"] = pool.submit(local, config, sounds, folder / "local", 2)
        yield found


@pytest.mark.parametrize("name", WAYS)
def test_ends_with_the_weights_of_an_undisturbed_run(name: str, ends: dict[object, Future[bytes]]) -> None:
    assert ends[name].result() == ends[WAYS[name][1]].result()


def test_two_processes(ends: dict[object, Future[bytes]]) -> None:
    """By `--cluster local` as by torchrun; and not as one, or the tests above could not tell weights apart."""
    assert ends["local"].result() == ends[2].result() != ends[1].result()


@pytest.mark.parametrize("name", WANDB)
def test_wandb_keeps_one_run_for_each_phase(name: str, ends: dict[object, Future[bytes]], folder: Path) -> None:
    ends[name].result()
    run = folder / name.replace(" ", "-")
    ids = {file.read_text().strip() for file in run.glob("phases/*/wandb_id")}
    files = [folder.name.rpartition("-")[2] for folder in run.glob("wandb/offline-run-*")]
    assert len(ids) == 2 and sorted(files) == sorted(ids), "a phase that was struck goes on under the id that it had"
    assert sorted(row["step"] for row in sent(run)) == list(range(1, 2 * STEPS + 1)), "in a file that holds all of it"
    if name == "time limit":  # the other sends TERM too, of which W&B's own process dies
        assert "W&B failed" not in "".join(log.read_text() for log in run.glob("submitit/*_log.err"))
