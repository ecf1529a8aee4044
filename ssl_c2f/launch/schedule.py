"""What a launch submits: the jobs of runs that are neither done nor queued, each after those that it needs.

`make_schedule` decides, and submits nothing: a dry run prints its schedule, `submit` puts it into Slurm's queue, and a
launch on this machine runs its jobs one after the other.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from ssl_c2f.core import locks
from ssl_c2f.core.files import read_json, write_json
from ssl_c2f.core.options import UserError
from ssl_c2f.core.provenance import now
from ssl_c2f.core.run_folder import RunFolder
from ssl_c2f.launch import cluster
from ssl_c2f.launch.cluster import Resources
from ssl_c2f.launch.jobs import Job


@dataclass(frozen=True, eq=False)
class Task:
    """A job that a run needs, whether or not it is still to be done."""

    job: Job
    is_done: Callable[[], bool]  # asks the run folder
    pflops: float = 0.0
    wanted: bool = True  # False: others may wait for it, but it is not to be submitted

    @property
    def name(self) -> str:
        return self.job.name

    @property
    def run(self) -> Path:
        return Path(self.job.run)

    @property
    def number(self) -> str:
        """Slurm's number of the job that was last submitted for it, or ""."""
        job = read_jobs(self.run).get(self.name, {})
        return str(job["id"]) if job.get("cluster") == "slurm" else ""


Stages = Sequence[Sequence[Task]]  # of a run: all tasks of a stage must end well before one of the next stage starts


@dataclass(frozen=True, eq=False)
class Batch:
    """What one call of sbatch submits: a job, or an array of jobs that do not wait for each other."""

    tasks: Sequence[Task]
    after: Sequence[Task] = ()  # all of these must have ended well before ...
    pairwise: bool = False  # ... or, for element i of an array, element i of these alone

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(task.name for task in self.tasks))

    def dependency(self, number: Callable[[Task], str]) -> str | None:
        """sbatch's --dependency, given the number of each task's job."""
        if self.pairwise:
            return f"aftercorr:{number(self.after[0]).partition('_')[0]}" if self.after else None
        return f"afterok:{':'.join(map(number, self.after))}" if self.after else None


@dataclass
class Schedule:
    """What is to be submitted, in this order, and what becomes of the jobs that are in the queue."""

    batches: list[Batch] = field(default_factory=list)
    queued: dict[Task, str] = field(default_factory=dict)  # left alone: task -> state
    lost: list[Task] = field(default_factory=list)  # to be cancelled: they wait for jobs that are gone

    @property
    def tasks(self) -> list[Task]:
        return [task for batch in self.batches for task in batch.tasks]


def make_schedule(runs: Sequence[Stages], queue: Mapping[str, str]) -> Schedule:
    """What is left to be done of runs, given the queue (number -> state), which must have been read before.

    Runs that need the same first jobs get them as arrays, in which each element waits for its own predecessor.

    Raises:
        UserError: a task that is not to be submitted is neither done nor queued, and others need it.
    """
    schedule = Schedule()
    alike: dict[tuple[str, ...], list[tuple[list[Task], Stages]]] = {}
    for stages in runs:
        schedule.queued |= {t: queue[t.number] for stage in stages for t in stage if t.number in queue}
        # Whether a task is done is asked once: running jobs go on meanwhile, and one stage must fit the next.
        left = [[t for t in stage if t in schedule.queued or not t.is_done()] for stage in stages]
        left = [stage for stage in left if stage]
        head = [stage[0] for stage in takewhile(lambda stage: len(stage) == 1 and stage[0].wanted, left)]
        if len(runs) > 1 and head and not any(task in schedule.queued for stage in left for task in stage):
            alike.setdefault(tuple(task.name for task in head), []).append((head, left[len(head) :]))
        else:
            _add_run(schedule, left, ())
    for group in alike.values():
        before: tuple[Task, ...] = ()
        for tasks in zip(*(head for head, _ in group), strict=True):
            schedule.batches.append(Batch(tasks, before, pairwise=len(tasks) > 1))
            before = tasks
        for last, (_, rest) in zip(before, group, strict=True):
            _add_run(schedule, rest, [last])
    return schedule


def _add_run(schedule: Schedule, stages: Stages, after: Sequence[Task]) -> None:
    """Add what is left of one run, whose first stage needs `after`."""
    needs, renewed = list(after), False
    for i, stage in enumerate(stages):
        # A queued job whose predecessor is submitted anew, or has left the queue, waits for a job that is gone.
        for task in [task for task in stage if task in schedule.queued]:
            if renewed or (not needs and "Dependency" in schedule.queued[task]):
                schedule.lost.append(task)
                del schedule.queued[task]
        todo = [task for task in stage if task not in schedule.queued]
        if missing := [task for task in todo if not task.wanted]:
            if any(task.wanted for later in stages[i + 1 :] for task in later):
                raise UserError(f"phase {missing[0].name} is neither done nor queued, and others need it")
            return
        if todo:
            schedule.batches.append(Batch(todo, needs))
            renewed = True
        needs = list(stage)


def submit(schedule: Schedule, resources: Resources, folder: Path, name: str) -> dict[Task, str]:
    """Put a schedule into Slurm's queue; returns the numbers of the jobs that were made.

    Raises:
        UserError: Slurm refuses a job. Those that were submitted before it are cancelled.
    """
    made: dict[Task, str] = {}
    cluster.cancel([task.number for task in schedule.lost])
    try:
        for batch in schedule.batches:
            jobs, dependency = [task.job for task in batch.tasks], batch.dependency(lambda task: task.number)
            numbers = cluster.submit(resources, folder, f"{name}/{batch.names[0]}", jobs, dependency)
            made |= zip(batch.tasks, numbers, strict=True)
            for task, number in zip(batch.tasks, numbers, strict=True):
                remember(task, number, folder)
    except BaseException:
        cluster.cancel(made.values())
        for task in made:
            remember(task, None, folder)
        raise
    return made


def read_jobs(run: Path) -> dict[str, dict[str, Any]]:
    """jobs.json of a run: part -> id, cluster (slurm, or local with its host: the id is a process), log, submitted."""
    return {part: {"cluster": "slurm", **job} for part, job in read_json(RunFolder(run).jobs).items()}


def slurm_ids(run: Path) -> set[str]:
    """The jobs of a run that Slurm knows."""
    return {job["id"] for job in read_jobs(run).values() if job["cluster"] == "slurm"}


def remember(task: Task, number: str | None, folder: Path, kind: str = "slurm") -> None:
    """Put a job into its run's jobs.json; without a number, take it out."""
    jobs = read_jobs(task.run)
    jobs.pop(task.name, None)
    if number:
        where = {"cluster": kind} | ({"host": socket.gethostname()} if kind == "local" else {})
        jobs[task.name] = {"id": number, **where, "log": str(folder / f"{number}_0_log.err"), "submitted": now()}
    write_json(RunFolder(task.run).jobs, jobs)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Be the only launcher of a run: two at once would each submit it.

    Raises:
        UserError: there is another, or the folder cannot be written.
    """
    with locks.hold(folder / "launching", f"another launch of {folder.parent} is run"):
        yield


def is_launching(folder: Path) -> bool:
    """Whether a launcher is at work there: one that runs jobs here stays until they have ended."""
    return locks.state(folder / "launching") == "held"
