"""Slurm: what a job asks for, its batch script, putting it into the queue, what the queue says."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.helpers import clean_env
from submitit.slurm.slurm import _make_sbatch_string

from ssl_c2f.core.options import UserError
from ssl_c2f.launch.jobs import Job

# A signal that comes while Python still imports would end it, and with it the job and all that wait for it.
_PATIENT = """sh -c 'trap "" USR2 TERM; exec "$0" "$@"'"""
PLAIN = ("partition", "account", "qos", "constraint", "exclude", "comment", "mail_user", "mail_type")  # as sbatch
_ENDING_SECONDS = 90.0  # how long a launcher waits for jobs that are ending


@dataclass(frozen=True)
class Resources:
    """What every job of a launch asks for."""

    nodes: int = 1
    ngpus: int = 1  # of each node, with a process for each; 0: a process on each node's CPU
    gpu_type: str = ""  # as the cluster calls it; any, if it is empty
    cpus_per_task: int = 8
    mem: str | None = None
    timeout: int = 24 * 60  # minutes
    grace: int = 120  # seconds between USR2 and the end
    max_timeouts: int = 30
    python: str | None = None
    setup: tuple[str, ...] = ()
    srun_args: tuple[str, ...] = ()
    plain: Mapping[str, str] = field(default_factory=dict)  # partition, account, ...: passed on as they are
    more: Mapping[str, str | bool] = field(default_factory=dict)  # other options of sbatch

    @property
    def tasks_per_node(self) -> int:
        return max(1, self.ngpus)

    @property
    def world(self) -> int:
        return self.nodes * self.tasks_per_node

    def of(self, job: Job) -> Resources:
        """What this job asks for: one process, and at most one GPU, where more would do the same over again."""
        return replace(self, nodes=1, ngpus=min(self.ngpus, 1)) if job.is_alone else self

    def sbatch(self, name: str, dependency: str | None = None) -> dict[str, Any]:
        """The parameters of submitit's SlurmExecutor."""
        cpus = f"--cpus-per-task={self.cpus_per_task}"  # srun does not inherit it since Slurm 22.05
        parameters: dict[str, Any] = {
            "job_name": name, "nodes": self.nodes, "ntasks_per_node": self.tasks_per_node,
            "cpus_per_task": self.cpus_per_task, "time": self.timeout, "signal_delay_s": self.grace,
            "gpus_per_node": f"{self.gpu_type}:{self.ngpus}".lstrip(":") if self.ngpus else None,
            "mem": self.mem, "dependency": dependency,
            "setup": list(self.setup) or None, "srun_args": [cpus, "--kill-on-bad-exit=1", *self.srun_args],
            "additional_parameters": {"kill-on-invalid-dep": "yes", "requeue": True, **self.more}, **self.plain,
        }
        # submitit gives jobs a wckey of its own, which a cluster that checks them refuses
        return {key: value for key, value in parameters.items() if value is not None} | {"wckey": None}

    def command(self) -> str:
        return f"{_PATIENT} {self.python or shlex.quote(sys.executable)}"


def choose(cluster: str) -> tuple[str, str]:
    """The cluster that `auto` means, and why."""
    if cluster != "auto":
        return cluster, "as asked"
    if shutil.which("sbatch") is None:
        return "local", "there is no sbatch here"
    try:
        answer = subprocess.run(["sinfo", "-h"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "local", "sbatch is here, but sinfo did not answer within 10 s"
    if answer.returncode:
        return "local", f"sbatch is here, but sinfo fails: {_last(answer.stderr)}"
    return "slurm", "sbatch is here and sinfo answers"


def script(resources: Resources, folder: Path, name: str, *, dependency: str | None = None, count: int = 1) -> str:
    """The batch script of a job (of an array of `count` jobs), as submitit writes it. Needs no cluster."""
    command = f"{resources.command()} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    return _make_sbatch_string(
        command=command, folder=folder, map_count=count if count > 1 else None, **resources.sbatch(name, dependency)
    )


def check(resources: Resources, folder: Path) -> None:
    """Ask Slurm whether it would take such a job at all.

    Raises:
        UserError: an unknown partition, account or limit; more than the cluster has.
    """
    text = script(resources, folder, "check")
    with environment():
        answer = _slurm("sbatch", "--test-only", given=text)
    if answer.returncode:
        raise UserError(f"Slurm refuses such a job: {_reason(answer.stderr)}")


def submit(
    resources: Resources, folder: Path, name: str, jobs: Sequence[Job], dependency: str | None = None
) -> list[str]:
    """Put jobs into the queue, several of them as an array; returns their ids, such as 17 or 17_0.

    Raises:
        UserError: Slurm refuses them.
    """
    resources = resources.of(jobs[0])
    executor = submitit.SlurmExecutor(folder, resources.max_timeouts, python=resources.command())
    executor.update_parameters(**resources.sbatch(name, dependency))
    try:
        with environment():
            made = executor.submit_array(jobs) if len(jobs) > 1 else [executor.submit(jobs[0])]
    except (FailedJobError, FailedSubmissionError, subprocess.SubprocessError, OSError) as error:
        raise UserError(f"Slurm refused {name}: {_reason(str(error))}") from error
    return [str(job.job_id) for job in made]


def active(ids: Collection[str]) -> dict[str, str]:
    """The jobs that are queued, running or ending: id -> state and, for those that wait, why."""
    if not ids:
        return {}
    answer = _slurm("squeue", "-h", "-r", "-u", str(os.getuid()), "-o", "%i|%T|%r")
    if answer.returncode:
        raise UserError(f"squeue fails: {_last(answer.stderr)}")
    found = {}
    for line in answer.stdout.splitlines():
        number, state, reason = line.split("|", 2)
        if number in ids:
            found[number] = f"{state} ({reason})" if state == "PENDING" and reason != "None" else state
    return found


def settled(ids: Collection[str]) -> dict[str, str]:
    """As `active`, after waiting until jobs that are ending have left the queue or are queued again."""
    until = time.monotonic() + _ENDING_SECONDS
    while "COMPLETING" in (found := active(ids)).values():
        if time.monotonic() > until:
            late = next(number for number, state in found.items() if state == "COMPLETING")
            raise UserError(f"job {late} does not end; try again later")
        time.sleep(0.5)
    return found


def ended(number: str) -> str:
    """The final state of a job that is no longer in the queue; "" if Slurm has forgotten it."""
    with contextlib.suppress(UserError):
        answer = _slurm("sacct", "-n", "-X", "-P", "-j", number, "-o", "State")
        if answer.returncode == 0 and answer.stdout.strip():
            return answer.stdout.strip().splitlines()[-1]
        answer = _slurm("scontrol", "show", "job", "-o", number)
        for word in answer.stdout.split():
            if word.startswith("JobState="):
                return word.removeprefix("JobState=")
    return ""


def cancel(ids: Collection[str]) -> None:
    if ids:
        _slurm("scancel", *ids)


def _slurm(*command: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, input=given)
    except FileNotFoundError:
        raise UserError(f"there is no {command[0]} here: is this a machine of the cluster? (--cluster local)") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} does not answer") from None


@contextlib.contextmanager
def environment() -> Iterator[None]:
    """Without the variables of the job that this process may run in, but with the place of Slurm's configuration."""
    configuration = os.environ.get("SLURM_CONF")
    with clean_env():
        if configuration:
            os.environ["SLURM_CONF"] = configuration
        yield


def _reason(text: str) -> str:
    """What sbatch complains about, in one line."""
    lines = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in text.splitlines() if line.strip()]
    return "; ".join(dict.fromkeys(line.strip() for line in lines[-2:])) or "it does not say why"


def _last(text: str) -> str:
    return next(reversed(text.strip().splitlines()), "")
