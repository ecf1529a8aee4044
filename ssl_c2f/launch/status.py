"""`slurm/launch.py status`: the state and progress of a run's jobs, from its folder and the queue."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssl_c2f.core.files import read_json, read_jsonl
from ssl_c2f.core.options import UserError
from ssl_c2f.core.progress import duration, table
from ssl_c2f.core.run_folder import RunFolder
from ssl_c2f.launch import cluster, local
from ssl_c2f.launch.jobs import events_of
from ssl_c2f.launch.schedule import read_jobs, slurm_ids

_TAIL = 3  # lines of a log


@dataclass(frozen=True)
class JobStatus:
    """What is known about one job of a run."""

    run: Path
    name: str
    number: str
    log: Path
    state: str
    error: str
    requeues: int
    step: str = "-"
    rate: str = "-"
    left: str = "-"

    @property
    def failed(self) -> bool:
        return not self.state.startswith(
            ("done", "started", "PENDING", "RUNNING", "COMPLET", "REQUEUE", "CONFIG", "SUSPENDED")
        )


def runs_below(path: Path) -> list[Path]:
    """The folders with jobs: the run itself, its fine-tunings, or the variants of a sweep.

    Raises:
        UserError: none.
    """
    below = ("", "finetune/*/", "*/", "*/finetune/*/")
    found = [file.parent for pattern in below for file in sorted(path.glob(f"{pattern}jobs.json"))]
    if not found:
        raise UserError(f"{path}: no jobs were submitted for it (there is no jobs.json)")
    return list(dict.fromkeys(found))


def jobs_of(run: Path) -> list[JobStatus]:
    """The last job that was submitted for each phase, fold or evaluation of a run."""
    jobs = read_jobs(run)
    queue = cluster.active(slurm_ids(run)) if shutil.which("squeue") else {}
    events = events_of(run)
    found = []
    for name, job in jobs.items():
        own = [event for event in events if event["part"] == name and event["job"] == job["id"]]
        starts = [i for i, event in enumerate(own) if event["event"] == "started" and event["rank"] == 0]
        since = own[starts[-1]:] if starts else []
        failures = [event for event in since if event["event"] == "failed"]
        if job["cluster"] == "local":
            failures = failures or [event for event in since if event["event"] == "interrupted"]
        now = "RUNNING" if local.is_running(job) else queue.get(job["id"], "")
        state = now or ("done" if _is_done(run, name, own) else _ended(job, failures[0]["event"] if failures else ""))
        error = failures[0]["error"] if failures and not now else ""
        rank = failures[0]["rank"] if failures else 0
        log = Path(job["log"].replace("_0_log.err", f"_{rank}_log.err"))
        requeues = max(len(starts) - 1, 0)
        found.append(JobStatus(run, name, job["id"], log, state, error, requeues, *_progress(run, name)))
    return found


def _ended(job: dict[str, Any], last_event: str) -> str:
    """The state of a job that neither is in the queue nor did its work."""
    if job["cluster"] == "slurm":
        return cluster.ended(job["id"]) or last_event or "gone"
    return last_event or ("gone" if local.is_here(job) else f"started on {job['host']}")


def print_status(run: Path) -> None:
    """A line for each job, then why those failed that did, and the ends of the logs of those that run.

    Raises:
        UserError: no job was submitted for this folder.
    """
    for each in runs_below(run.resolve()):
        jobs = jobs_of(each)
        columns = ("part", "job", "state", "step", "clips/s", "left", "requeues")
        table(str(each), columns, [(j.name, j.number, j.state, j.step, j.rate, j.left, j.requeues) for j in jobs])
        for job in jobs:
            if job.failed:
                print(f"{job.name}: {job.error or job.state}\n  log: {job.log}")
            elif job.state.startswith("RUNNING"):
                print("\n  ".join([f"{job.name}: {job.log}", *_tail(job.log)]))


def _is_done(run: Path, name: str, own: list[dict[str, Any]]) -> bool:
    """A phase has a file `done`; a fold or an evaluation records an event."""
    phase = next((phase for phase in RunFolder(run).phases() if phase.name == name), None)
    return phase.is_done() if phase else any(event["event"] == "ended" and event["rank"] == 0 for event in own)


def _progress(run: Path, name: str) -> tuple[str, str, str]:
    """Of a phase, or of all phases of a fold: steps done, clips per second, time left."""
    is_fold, folder = name.startswith("fold-"), RunFolder(run / name)
    if not folder.plan.exists():  # a phase of `run`; recordings without folds have one fit, `run` itself
        folder = RunFolder(run)
    plan: list[dict[str, Any]] = read_json(folder.plan).get("phases", [])
    own = [i for i, phase in enumerate(plan) if phase["name"] == name or is_fold]
    if not own:
        return "-", "-", "-"
    before, mine = plan[: own[0]], plan[own[0] : own[-1] + 1]
    first, steps = (sum(phase["steps"] for phase in phases) for phases in (before, mine))
    names = {phase["name"] for phase in mine}
    records = [r for r in read_jsonl(folder.metrics) if r["phase"] in names and "clips_per_second" in r]
    if not records:
        return f"0/{steps}", "-", "-"
    last, clips = records[-1], sum(phase["clips"] for phase in [*before, *mine])
    rate = last["clips_per_second"]
    return f"{last['step'] - first}/{steps}", f"{rate:.0f}", duration(max(clips - last["samples"], 0) / rate)


def _tail(log: Path) -> list[str]:
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return [line for line in lines if line.strip()][-_TAIL:]
