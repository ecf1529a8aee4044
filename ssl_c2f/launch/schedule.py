"""What a launch puts into the queue: the parts of runs that are neither done nor queued, each after what it needs."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from ssl_c2f.core import locks
from ssl_c2f.core.files import write_json
from ssl_c2f.core.options import UserError
from ssl_c2f.core.run_folder import PhaseFolder, RunFolder
from ssl_c2f.data.dataset import open_manifest, split
from ssl_c2f.launch import cluster
from ssl_c2f.launch.cluster import Resources
from ssl_c2f.launch.jobs import FOLDER, Job
from ssl_c2f.tasks.finetune import FinetuneOptions
from ssl_c2f.train.engine import check_options
from ssl_c2f.train.recipe import RunOptions, make_plan


@dataclass(frozen=True)
class Task:
    """A job that a run needs, whether or not it is still to be done."""

    job: Job
    is_done: Callable[[], bool]  # from disk, whenever it is asked: jobs go on while a launch looks
    pflops: float = 0.0
    wanted: bool = True  # False: others may wait for it, but it is not to be submitted

    @property
    def run(self) -> Path:
        return Path(self.job.run)

    @property
    def done(self) -> bool:
        return self.is_done()


Chain = list[list[Task]]  # stages: all tasks of one must end well before the next one's start


def config_of(run: Path) -> Path:
    """Where a launch keeps the options for the jobs of a run."""
    return run / FOLDER / "config.yaml"


def phases_of(command: str, options: RunOptions, path: Path, only: Collection[str] = ()) -> Chain:
    """The phases of a run, of which only those named in `only` are to be submitted (none: all).

    Raises:
        UserError: no such phase, no audio.
    """
    names = [phase.name for phase in options.phases]
    if unknown := set(only) - set(names):
        raise UserError(f"--phases: there is no phase {min(unknown)}; there are {', '.join(names)}")
    manifest = open_manifest(options.data)
    plan = make_plan(options, len(split(manifest, options.data)[0]), len(manifest.classes))
    config = str(config_of(path))
    return [
        [Task(Job(command, name, config, str(path)), RunFolder(path).phase(i, name).is_done, cost.pflops,
              not only or name in only)]
        for i, (name, cost) in enumerate(zip(names, plan.phases, strict=True))
    ]


def folds_of(options: FinetuneOptions, path: Path, ckpt: Path) -> Chain:
    """Fine-tuning in `path`: a task for each fold that is held out, then one that scores them all.

    Raises:
        UserError: no audio, no such fold.
    """
    manifest = open_manifest(options.data)
    there = sorted({clip.fold for clip in manifest.clips if clip.fold is not None})
    folds = there if options.folds == "auto" else list(options.folds)
    if missing := set(folds) - set(there):
        raise UserError(f"folds: no clip of {manifest.root} is in fold {min(missing)}; there are {there}")
    parts = [str(fold) for fold in folds] if len(there) > 1 else ["all"]
    config = str(config_of(path))
    pflops = make_plan(options, len(manifest.clips), len(manifest.classes)).pflops
    tasks = []
    for part in parts:
        folder = RunFolder(path if part == "all" else path / f"fold-{part}")
        phases = [folder.phase(i, phase.name) for i, phase in enumerate(options.phases)]
        job = Job("finetune", part, config, str(path), str(ckpt))
        tasks.append(Task(job, partial(_all_done, phases), pflops))

    def scored() -> bool:
        return all(task.done for task in tasks) and _scored(path, parts)

    return [tasks, [Task(Job("score", "scores", config, str(path), str(ckpt)), scored)]]


def _all_done(phases: Sequence[PhaseFolder]) -> bool:
    return all(phase.is_done() for phase in phases)


def _scored(path: Path, parts: Sequence[str]) -> bool:
    """Whether scores.json has all folds in it."""
    file = path / "scores.json"
    return file.exists() and set(json.loads(file.read_text())["folds"]) >= set(parts) - {"all"}


def check_run(options: RunOptions, path: Path, world: int) -> None:
    """What the first job would complain about, said before it is queued.

    Raises:
        UserError: the folder holds another run, or batches do not divide among the processes.
    """
    for phase in options.phases:
        if phase.batch_size % world:
            raise UserError(f"phase {phase.name}: batch_size {phase.batch_size} is no multiple of {world} processes")
    if RunFolder(path).config.exists():
        check_options(options, RunFolder(path))


class Launch:
    """One launch: what it finds in the queue, and what it adds. A part that is done, queued or running is not added."""

    def __init__(self, resources: Resources, folder: Path, name: str) -> None:
        self.resources, self.folder, self.name = resources, folder, name
        self.queue: dict[str, str] = {}
        self.made: list[tuple[Task, str]] = []

    def submit(self, chains: Sequence[Chain]) -> list[str]:
        """Submit what is left of chains, alike ones as arrays; returns the ids of all jobs that they now wait for.

        Raises:
            UserError: Slurm refuses a job (those submitted before it are cancelled), or a phase that is not to be
                submitted is missing.
        """
        known = {self.id_of(task) for chain in chains for stage in chain for task in stage} - {""}
        self.queue = cluster.settled(known)
        try:
            alike: dict[tuple[str, ...], list[tuple[Chain, Chain]]] = {}
            for chain in chains:
                left = [stage for stage in chain if not all(task.done for task in stage)]
                head = list(takewhile(lambda stage: len(stage) == 1 and stage[0].wanted, left))
                if len(chains) > 1 and head and not any(self._queued(task) for stage in left for task in stage):
                    alike.setdefault(tuple(task.job.name for (task,) in head), []).append((head, left[len(head):]))
                else:
                    self._chain(chain)
            for group in alike.values():
                lasts = self._arrays([head for head, _ in group])
                for last, (_, rest) in zip(lasts, group, strict=True):
                    self._chain(rest, last)
        except BaseException:
            cluster.cancel([number for _, number in self.made])
            for task, _ in self.made:
                remember(task, None, self.folder)
            raise
        waiting = {number for _, number in self.made} | self.queue.keys()
        return sorted(waiting)

    def id_of(self, task: Task) -> str:
        job = read_jobs(task.run).get(task.job.name, {})
        return str(job["id"]) if job.get("cluster") == "slurm" else ""

    def _queued(self, task: Task) -> bool:
        return self.id_of(task) in self.queue

    def _chain(self, chain: Chain, after: str = "") -> None:
        needs = [after] if after else []
        renewed = False  # those that wait for a job that is gone would never start
        for i, stage in enumerate(chain):
            there = [task for task in stage if self._queued(task)]
            lost = [task for task in there if renewed or (not needs and "Dependency" in self.queue[self.id_of(task)])]
            cluster.cancel([self.id_of(task) for task in lost])
            there = [task for task in there if task not in lost]
            todo = [task for task in stage if not task.done and task not in there]
            if missing := [task for task in todo if not task.wanted]:
                if not any(task.wanted and not task.done for later in chain[i + 1:] for task in later):
                    break
                raise UserError(f"phase {missing[0].job.name} is neither done nor queued, and others need it")
            new = self._put(todo, f"afterok:{':'.join(needs)}" if needs else None) if todo else []
            renewed = renewed or bool(new)
            needs = [self.id_of(task) for task in there] + new

    def _arrays(self, chains: Sequence[Chain]) -> list[str]:
        """Element i of each array waits for element i of the one before; returns the ids of the last array."""
        before: str | None = None
        ids: list[str] = []
        for stage in zip(*chains, strict=True):
            tasks = [task for (task,) in stage]
            after = "aftercorr" if len(tasks) > 1 else "afterok"
            ids = self._put(tasks, f"{after}:{before}" if before else None)
            before = ids[0].partition("_")[0]
        return ids

    def _put(self, tasks: Sequence[Task], dependency: str | None) -> list[str]:
        jobs = [task.job for task in tasks]
        ids = cluster.submit(self.resources, self.folder, f"{self.name}/{jobs[0].name}", jobs, dependency)
        for task, number in zip(tasks, ids, strict=True):
            self.made.append((task, number))
            remember(task, number, self.folder)
        return ids


def read_jobs(run: Path) -> dict[str, dict[str, Any]]:
    """jobs.json of a run: part -> id, cluster (slurm, or local with its host: the id is a process), log, submitted."""
    file = run / "jobs.json"
    jobs: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}
    return {part: {"cluster": "slurm", **job} for part, job in jobs.items()}


def slurm_ids(run: Path) -> set[str]:
    """The jobs of a run that Slurm knows."""
    return {job["id"] for job in read_jobs(run).values() if job["cluster"] == "slurm"}


def remember(task: Task, number: str | None, folder: Path, kind: str = "slurm") -> None:
    """Put a job into its run's jobs.json; without a number, take it out."""
    jobs = read_jobs(task.run)
    jobs.pop(task.job.name, None)
    if number:
        log = str(folder / f"{number}_0_log.err")
        where = {"cluster": kind} | ({"host": socket.gethostname()} if kind == "local" else {})
        now = datetime.now(UTC).isoformat(timespec="seconds")
        jobs[task.job.name] = {"id": number, **where, "log": log, "submitted": now}
    write_json(task.run / "jobs.json", jobs)


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
