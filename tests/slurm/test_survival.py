"""Whatever ends a job, mid-phase or on a phase's boundary: the run ends with the weights of one that was left alone."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from cluster_runs import CONFIG, STEPS, ClusterRun, go_on, is_pending, launch, straight, wait_for
from cluster_runs import weights as final_weights
from submitit import SlurmJob

from ssl_c2f import cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
Strike = Callable[[ClusterRun, str, list[int]], None]


def interrupt(run: ClusterRun, part: str, pids: list[int]) -> None:
    SlurmJob(folder=run.path / "submitit", job_id=run.id(part))._interrupt()
    wait_for(lambda: all(is_pending(pid, signal.SIGUSR2) for pid in pids), 60, "the signal")  # a phase ends in no time
    go_on(pids)


def requeue(run: ClusterRun, part: str, pids: list[int]) -> None:
    subprocess.run(["scontrol", "requeue", run.id(part)], check=True, timeout=60)
    go_on(pids)


def preempt(run: ClusterRun, part: str, pids: list[int]) -> None:
    """A job of the partition `high` wants all CPUs of both nodes."""
    command = ["sbatch", "-p", "high", "-N2", "--exclusive", "-t1", "-o", "/dev/null", "--wrap", "true"]
    subprocess.run(command, check=True, timeout=60, capture_output=True)
    wait_for(lambda: all(is_pending(pid, signal.SIGUSR2) for pid in pids), 60, "preemption")
    go_on(pids)


def time_limit(run: ClusterRun, part: str, pids: list[int]) -> None:
    wait_for(lambda: all(is_pending(pid, signal.SIGUSR2) for pid in pids), 150, "the time limit")
    go_on(pids)


def kill_one_rank(run: ClusterRun, part: str, pids: list[int]) -> None:
    os.kill(pids[-1], signal.SIGKILL)
    go_on(pids)
    _launch_once_over(run, part)


def kill_step(run: ClusterRun, part: str, pids: list[int]) -> None:
    subprocess.run(["scancel", "--signal=KILL", f"{run.id(part)}.0"], timeout=60)  # it may be over
    _launch_once_over(run, part)


def _launch_once_over(run: ClusterRun, part: str) -> None:
    wait_for(lambda: not cluster.active([run.id(part)]), 60, "the job to be over")
    run.launch()


def cancel(run: ClusterRun, part: str, pids: list[int]) -> None:
    status, said = launch("cancel", run.path)
    assert status == 0 and f"cancelled {run.id(part)}" in said, said
    run.launch()


#        name            strike         processes  flags
WAYS = {
    "interrupt": (interrupt, 1, ()),
    "requeue": (requeue, 1, ()),
    "time limit": (time_limit, 1, ("--timeout", 2, "--grace", 20)),
    "killed step": (kill_step, 1, ()),
    "cancel": (cancel, 1, ()),
    "killed rank": (kill_one_rank, 2, ()),
    "preemption": (preempt, 2, ()),
}


def survive(run: ClusterRun, strike: Strike) -> bytes:
    """Strike the first phase in its middle and again when it has done its last step."""
    run.launch()
    pids = run.stop_at("coarse", STEPS // 2 - 5, attempt=1)
    assert run.step() < STEPS
    strike(run, "coarse", pids)
    pids = run.stop_at("coarse", STEPS, attempt=2)
    strike(run, "coarse", pids)
    run.finish()
    return final_weights(run.path)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("config") / "tiny.yaml"
    file.write_text(CONFIG)
    return file


@pytest.fixture(scope="module")
def ends(
    slurm: None, config: Path, sounds: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[object, Future[bytes]]]:
    """All runs at once, since they mostly wait: how each of them ends, and the undisturbed ones by their processes."""
    folder = tmp_path_factory.mktemp("runs")

    def begin(name: str) -> Future[bytes]:
        strike, ranks, flags = WAYS[name]
        size = ("--nodes", ranks, "--ngpus", 1, "--cpus-per-task", 1, "--mem", "500MB")
        words = (config, f"data.root={sounds}", *size, *flags)
        return pool.submit(survive, ClusterRun(folder / name.replace(" ", "-"), words, ranks), strike)

    with ThreadPoolExecutor(len(WAYS)) as pool:
        found: dict[object, Future[bytes]] = {name: begin(name) for name in WAYS if name != "preemption"}
        found |= {n: pool.submit(straight, config, sounds, folder / f"straight-{n}", n) for n in (1, 2)}
        for future in [*found.values()]:
            future.exception()  # preemption comes alone: it strikes whatever runs
        found["preemption"] = begin("preemption")
        yield found


@pytest.mark.parametrize("name", WAYS)
def test_ends_with_the_weights_of_an_undisturbed_run(name: str, ends: dict[object, Future[bytes]]) -> None:
    assert ends[name].result() == ends[WAYS[name][1]].result()


def test_processes_differ(ends: dict[object, Future[bytes]]) -> None:
    """Else the tests above could not tell one phase's weights from another's."""
    assert ends[1].result() != ends[2].result()
