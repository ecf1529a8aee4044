"""Jobs on this machine: starting them, whether they run, and stopping them so that they save.

A terminal sends Ctrl-C to all of its processes. submitit's controller would then kill those that train, so all of these
ignore SIGINT, except while training listens for it; the launcher passes a request to stop on to them.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import submitit

from ssl_c2f.core.options import UserError
from ssl_c2f.launch import cluster
from ssl_c2f.launch.cluster import Resources
from ssl_c2f.launch.jobs import Job, events_of

POLL_SECONDS = 0.1


def start(resources: Resources, folder: Path, job: Job) -> submitit.Job[None]:
    """Start a job in processes of its own.

    Raises:
        UserError: it asks for more GPUs than CUDA_VISIBLE_DEVICES has.
    """
    resources = resources.of(job)
    executor = submitit.LocalExecutor(folder, resources.max_timeouts, python=_python(resources))
    executor.update_parameters(
        tasks_per_node=resources.tasks_per_node, gpus_per_node=resources.ngpus, timeout_min=resources.timeout,
        signal_delay_s=resources.grace, setup=list(resources.setup),
    )
    with cluster.environment(), _sigint_ignored():
        return executor.submit(job)


def _python(resources: Resources) -> str:
    """The command of a process, on the GPUs that the user chose (submitit would take 0 to N - 1)."""
    python, chosen = resources.python or shlex.quote(sys.executable), os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None or not resources.ngpus:
        return python
    devices = chosen.split(",")
    if chosen and len(devices) < resources.ngpus:
        raise UserError(f"--ngpus {resources.ngpus}, but CUDA_VISIBLE_DEVICES is {chosen}")
    return f"env CUDA_VISIBLE_DEVICES={shlex.quote(','.join(devices[: resources.ngpus]))} {python}"


@contextlib.contextmanager
def _sigint_ignored() -> Iterator[None]:
    """Processes that are started within ignore SIGINT until they say otherwise."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def noting() -> Iterator[list[int]]:
    """SIGINT and SIGTERM are added to the list that this yields, and do nothing else."""
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def finish(job: submitit.Job[None], run: Path, part: str, noted: list[int]) -> None:
    """Wait for a job's end. What was noted asks it to save and stop; noted again, it ends it."""
    while not job.done():
        if noted:
            ask(run, part, str(job.job_id), signal.SIGINT if len(noted) == 1 else signal.SIGKILL)
        time.sleep(POLL_SECONDS)


def ask(run: Path, part: str, number: str, signum: signal.Signals = signal.SIGINT) -> None:
    """Send a signal to the processes of a job that have begun. Until training listens, SIGINT is ignored, and so is a
    second one, so it may be sent until the job has ended."""
    processes: dict[int, int] = {}
    for event in events_of(run):
        if event["part"] == part and event["job"] == number:
            processes.pop(event["rank"], None)
            if event["event"] == "started":
                processes[event["rank"]] = event["pid"]
    for pid in processes.values():
        try:
            os.kill(pid, signum)
        except ProcessLookupError:
            continue
        except PermissionError:
            raise UserError(f"{part} is run by another user: process {pid}") from None


def is_here(job: Mapping[str, Any]) -> bool:
    """Whether an entry of jobs.json is of this machine."""
    return job.get("host") == socket.gethostname()


def is_running(job: Mapping[str, Any]) -> bool:
    """Whether a job of this machine runs: the number may be another process's by now, but then with another folder."""
    if not is_here(job):
        return False
    try:
        command = Path(f"/proc/{job['id']}/cmdline").read_bytes()
    except OSError:
        return False
    return os.fsencode(Path(job["log"]).parent) in command
