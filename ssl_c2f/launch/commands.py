"""The commands of slurm/launch.py: submit, or run here, what is left to do of what was asked for."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import re
import shlex
import shutil
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import fields, replace
from pathlib import Path

import submitit

from ssl_c2f.core import options as option_files
from ssl_c2f.core.files import write_text
from ssl_c2f.core.options import UserError
from ssl_c2f.core.progress import table
from ssl_c2f.core.provenance import redact
from ssl_c2f.launch import cluster, local, schedule, status, work
from ssl_c2f.launch.cluster import Resources
from ssl_c2f.launch.jobs import COMMAND, FOLDER, events_of
from ssl_c2f.launch.schedule import Batch, Schedule, Task

_POLL_SECONDS = 2.0

_NOT_MORE = frozenset(name.replace("_", "-") for name in cluster.PLAIN) | {
    "array", "cpus-per-task", "dependency", "error", "gpus-per-node", "job-name", "kill-on-invalid-dep", "mem", "nodes",
    "no-requeue", "ntasks", "ntasks-per-node", "open-mode", "output", "parsable", "requeue", "signal", "test-only",
    "time", "wait", "wrap",
}


def launch(arguments: argparse.Namespace) -> int:
    """Submit what a command asks for, or run it here; returns the exit status.

    Raises:
        UserError: nothing was left in the queue.
    """
    resources = _resources(arguments)
    folder, runs = work.read_runs(arguments, resources.world)
    kind, why = cluster.choose(arguments.cluster)
    print(f"cluster: {kind} ({why})")
    if kind in ("local", "debug") and resources.nodes > 1:
        raise UserError(f"--cluster {kind} is this one machine: it cannot give {resources.nodes} nodes")
    if kind == "debug" and resources.world > 1:
        raise UserError("--cluster debug is one process: use --ngpus 1")
    stages = [run.stages for run in runs]
    if arguments.dry_run:
        _print_dry_run(stages, schedule.make_schedule(stages, {}), resources, folder, kind)
        return 0
    todo = [task for task in _tasks(stages) if not task.is_done() and task.wanted]
    if not todo:
        print(f"{folder}: nothing to submit, all of it is done")
        return 0
    with schedule.alone(folder / FOLDER):
        if kind == "slurm":
            largest = next((task.job for task in todo if not task.job.is_alone), todo[0].job)
            cluster.check(resources.of(largest), folder / FOLDER)
        for file, options in itertools.chain(*(run.configs.items() for run in runs)):
            write_text(file, option_files.dump(options))
            write_text(file.with_name(COMMAND), json.dumps(redact(sys.argv)) + "\n")
        if arguments.snapshot:
            resources = _with_snapshot(resources, folder)
        if kind != "slurm":
            return _run_here(kind, resources, folder, schedule.make_schedule(stages, {}))
        numbers = _submit(stages, resources, folder)
    return _wait(folder, numbers) if arguments.wait else 0


def cancel(run: Path) -> None:
    """Cancel all jobs of a run, on Slurm and on this machine."""
    path = run.resolve()
    runs = status.runs_below(path)
    gone = _cancel_local(runs)
    there = cluster.active(set().union(*map(schedule.slurm_ids, runs)))
    cluster.cancel(there)
    gone += sorted(there)
    for job in (job for each in runs for job in status.jobs_of(each) if job.state.startswith("started on")):
        raise UserError(f"{job.name} was {job.state}: cancel it there")
    print(f"cancelled {', '.join(gone)}" if gone else f"{path}: no job of it is queued or runs")


def _tasks(runs: Sequence[schedule.Stages]) -> list[Task]:
    return [task for stages in runs for stage in stages for task in stage]


def _resources(arguments: argparse.Namespace) -> Resources:
    if arguments.grace >= 60 * arguments.timeout:
        raise UserError(f"--grace {arguments.grace} seconds leave nothing of --timeout {arguments.timeout} minutes")
    _split("--python", arguments.python or "")
    given = {field.name: getattr(arguments, field.name) for field in fields(Resources) if field.name in arguments}
    gpu_type, _, ngpus = arguments.ngpus.rpartition(":")
    if not re.fullmatch(r"\d+", ngpus) or not re.fullmatch(r"[\w.-]*", gpu_type):
        raise UserError(f"--ngpus {arguments.ngpus} should be a number, or TYPE:NUMBER such as a100:2")
    return Resources(**{
        **given, "ngpus": int(ngpus), "gpu_type": gpu_type, "more": _sbatch_options(arguments.sbatch),
        "setup": tuple(arguments.setup), "srun_args": _split("--srun-args", arguments.srun_args),
        "plain": {name: value for name in cluster.PLAIN if (value := getattr(arguments, name))},
    })


def _sbatch_options(words: Sequence[str]) -> dict[str, str | bool]:
    """Options of sbatch that have no flag here; one without a value is a switch."""
    options: dict[str, str | bool] = {}
    for word in words:
        name, equals, value = word.lstrip("-").partition("=")
        if not re.fullmatch(r"[a-z][a-z0-9-]*", name) or "\n" in value:
            raise UserError(f"--sbatch {word} should be KEY=VALUE as sbatch has it, such as reservation=friday")
        if name in _NOT_MORE:
            raise UserError(f"--sbatch {word}: {name} has a flag of its own, or is what a launch lives by")
        options[name] = value if equals else True
    return options


def _split(flag: str, text: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise UserError(f"{flag} {text}: {str(error).lower()}") from None


def _with_snapshot(resources: Resources, folder: Path) -> Resources:
    """Let jobs import a copy of the package, named by its content; requeued jobs find it again."""
    package = Path(__file__).parents[1]
    sources = sorted(file for file in package.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in sources)).hexdigest()[:12]
    copy = folder / FOLDER / f"code-{digest}"
    if not copy.exists():
        aside = copy.with_name(f".{copy.name}.tmp")  # a copy that was interrupted is never taken for whole
        shutil.rmtree(aside, ignore_errors=True)
        try:
            shutil.copytree(package, aside / package.name, ignore=shutil.ignore_patterns("__pycache__"))
            aside.rename(copy)
        except OSError as error:
            raise UserError(f"cannot copy the code to {copy}: {error}") from error
    path = f"export PYTHONPATH={shlex.quote(str(copy))}${{PYTHONPATH:+:$PYTHONPATH}}"
    safe = "export PYTHONSAFEPATH=1"  # else the working directory, which may be the checkout, comes first
    return replace(resources, setup=(*resources.setup, path, safe))


def _submit(runs: Sequence[schedule.Stages], resources: Resources, folder: Path) -> list[str]:
    """Submit what is left of runs; returns the numbers of all jobs that they now wait for."""
    # The queue comes first: a job that ends after that is found done, one that ended before is not found queued.
    queue = cluster.settled({task.number for task in _tasks(runs)} - {""})
    plan = schedule.make_schedule(runs, queue)
    made = schedule.submit(plan, resources, folder / FOLDER, folder.name)
    for task, number in made.items():
        where = f" of {task.run.name}" if len(runs) > 1 else ""
        print(f"submitted {task.name}{where} as job {number}")
    for task, state in plan.queued.items():
        print(f"{task.name} is already in the queue as job {task.number}: {state}")
    if not made:
        print(f"{folder}: nothing to submit")
    print(f"python slurm/launch.py status {folder}")
    return [*made.values(), *(task.number for task in plan.queued)]


def _wait(folder: Path, numbers: Collection[str]) -> int:
    while cluster.active(numbers):
        time.sleep(_POLL_SECONDS)
    status.print_status(folder)
    return int(any(job.failed for run in status.runs_below(folder) for job in status.jobs_of(run)))


def _run_here(kind: str, resources: Resources, folder: Path, plan: Schedule) -> int:
    """The tasks one after the other: `local` in processes of their own, `debug` in this one."""
    for task in plan.tasks:
        print(f"{task.name}: running here; logs are in {folder / FOLDER}", flush=True)
        if kind == "debug":
            submitit.DebugExecutor(folder / FOLDER).submit(task.job).results()
        elif failed := _run_local(resources, folder / FOLDER, task):
            return failed
    return 0


def _run_local(resources: Resources, folder: Path, task: Task) -> int:
    """The exit status: 1 where it failed, 128 + N where signal N stopped it."""
    with local.noting() as noted:
        job = local.start(resources, folder, task.job)
        number = str(job.job_id)
        schedule.remember(task, number, folder, "local")
        local.finish(job, task.run, task.name, noted)
    own = [event for event in events_of(task.run) if event["job"] == number and event["rank"] == 0]
    stop = own[-1] if own and own[-1]["event"] == "interrupted" else {}
    if noted or stop:
        print(f"launch.py: {stop.get('error', 'interrupted')}", file=sys.stderr)
        return 128 + int(noted[0] if noted else stop["signum"])
    if job.exception() is None:
        return 0
    found = next(found for found in status.jobs_of(task.run) if found.name == task.name)
    print(f"{found.name}: {found.error or 'it was killed'}\n  log: {found.log}")
    return 1


def _cancel_local(runs: Sequence[Path]) -> list[str]:
    """Stop what runs on this machine, and wait until it has saved; also what its launcher starts meanwhile."""
    asked: dict[str, Path] = {}
    while True:
        jobs = [(run, part, job) for run in runs for part, job in schedule.read_jobs(run).items()]
        running = [found for found in jobs if local.is_running(found[2])]
        for run, part, job in running:
            local.ask(run, part, job["id"])
            asked[job["id"]] = Path(job["log"]).parent
        if not running and not any(schedule.is_launching(folder) for folder in asked.values()):
            return list(asked)
        time.sleep(local.POLL_SECONDS)


def _print_dry_run(
    runs: Sequence[schedule.Stages], plan: Schedule, resources: Resources, folder: Path, kind: str
) -> None:
    """A row for each task, then the batch scripts; of runs that are alike, those of the first."""
    rows, todo = [], set(plan.tasks)
    for stages in runs:
        for needed, stage in itertools.pairwise([(), *stages]):
            after = ", ".join(task.name for task in needed) or "-"
            for task in stage:
                state = "to do" if task in todo else "done" if task.is_done() else "left out"
                rows.append((task.run.name, task.name, state, after, f"{task.pflops:.3g}"))
    table("what would be submitted", ("run", "part", "", "after", "PFLOPs"), rows)
    if kind != "slurm":
        print(f"the scripts for --cluster slurm ({kind} runs the parts one after the other):")
    alike: dict[tuple[str, ...], list[Batch]] = {}
    for batch in plan.batches:
        alike.setdefault(batch.names, []).append(batch)
    for names, (batch, *others) in alike.items():
        count = len({task.run for each in (batch, *others) for task in each.tasks})
        print(f"\n# {', '.join(names)}{f' (of each of {count} runs)' if count > 1 else ''}")
        print(cluster.script(
            resources.of(batch.tasks[0].job), folder / FOLDER, f"{folder.name}/{names[0]}",
            dependency=batch.dependency(lambda task: f"<{task.name}>"), count=len(batch.tasks),
        ))
