"""The commands of slurm/launch.py."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import submitit

from ssl_c2f.core import options as files
from ssl_c2f.core.files import write_text
from ssl_c2f.core.options import Options, UserError
from ssl_c2f.core.progress import table
from ssl_c2f.core.provenance import redact
from ssl_c2f.launch import cluster, local, schedule
from ssl_c2f.launch import status as jobstatus
from ssl_c2f.launch.cluster import Resources
from ssl_c2f.launch.jobs import COMMAND, FOLDER, Job, events_of
from ssl_c2f.launch.schedule import Chain, Task
from ssl_c2f.tasks import config
from ssl_c2f.tasks.evaluate import EvaluateOptions
from ssl_c2f.tasks.finetune import FinetuneOptions, check_origin, checkpoint_defaults
from ssl_c2f.train.weights import find_checkpoint, find_published, load_weights, results_folder

_POLL_SECONDS = 2.0


@dataclass
class Work:
    """What a command wants done: chains of tasks, and the options that their jobs will read."""

    folder: Path
    chains: list[Chain] = field(default_factory=list)
    configs: list[tuple[Options, Path]] = field(default_factory=list)


def launch(arguments: argparse.Namespace) -> int:
    """Do a command; returns the exit status.

    Raises:
        UserError: nothing was left in the queue.
    """
    if arguments.command == "status":
        jobstatus.print_status(arguments.run.resolve())
        return 0
    if arguments.command == "cancel":
        return _cancel(arguments.run.resolve())
    resources = _resources(arguments)
    work = _work(arguments, resources)
    kind, why = cluster.choose(arguments.cluster)
    print(f"cluster: {kind} ({why})")
    if kind in ("local", "debug") and resources.nodes > 1:
        raise UserError(f"--cluster {kind} is this one machine: it cannot give {resources.nodes} nodes")
    if kind == "debug" and resources.world > 1:
        raise UserError("--cluster debug is one process: use --ngpus 1")
    if arguments.dry_run:
        _print_dry_run(work, resources, kind)
        return 0
    todo = [task for chain in work.chains for stage in chain for task in stage if not task.done and task.wanted]
    if not todo:
        print(f"{work.folder}: nothing to submit, all of it is done")
        return 0
    with schedule.alone(work.folder / FOLDER):
        if kind == "slurm":
            largest = next((task.job for task in todo if not task.job.is_alone), todo[0].job)
            cluster.check(resources.of(largest), work.folder / FOLDER)
        for options, path in work.configs:
            write_text(path, files.dump(options))
            write_text(path.with_name(COMMAND), json.dumps(redact(sys.argv)) + "\n")
        resources = _with_snapshot(resources, work.folder) if arguments.snapshot else resources
        if kind != "slurm":
            return _run_here(kind, resources, work)
        ids = _submit(resources, work)
    return _wait(work, ids) if arguments.wait else 0


def _resources(arguments: argparse.Namespace) -> Resources:
    plain = ("partition", "account", "qos", "constraint", "exclude", "comment", "mail_user", "mail_type")
    for name, least in (("nodes", 1), ("ngpus", 0), ("cpus_per_task", 1), ("timeout", 1), ("grace", 1)):
        if getattr(arguments, name) < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}")
    if arguments.grace >= 60 * arguments.timeout:
        raise UserError(f"--grace {arguments.grace} seconds leave nothing of --timeout {arguments.timeout} minutes")
    _split("--python", arguments.python or "")
    return Resources(
        nodes=arguments.nodes, ngpus=arguments.ngpus, cpus_per_task=arguments.cpus_per_task, mem=arguments.mem,
        timeout=arguments.timeout, grace=arguments.grace, max_timeouts=arguments.max_timeouts, python=arguments.python,
        setup=tuple(arguments.setup), srun_args=_split("--srun-args", arguments.srun_args),
        plain={name: value for name in plain if (value := getattr(arguments, name))},
    )


def _split(flag: str, text: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise UserError(f"{flag} {text}: {str(error).lower()}") from None


def _work(arguments: argparse.Namespace, resources: Resources) -> Work:
    match arguments.command:
        case "pretrain" | "train":
            return _phases(arguments, resources)
        case "pipeline":
            return _pipeline(arguments, resources)
        case "finetune":
            return _finetunings(arguments, resources)
        case _:
            return _evaluation(arguments)


def _phases(arguments: argparse.Namespace, resources: Resources) -> Work:
    command = arguments.command
    model = config.COMMANDS[command]
    first, name = config.read(command, model, arguments.words)
    base = _folder(arguments, first, Path("runs") / name)
    work = Work(base)
    only = [phase for phase in arguments.phases.split(",") if phase]
    for variant in _variants(arguments):
        options, _ = config.read(command, model, [*arguments.words, *variant])
        path = base / _variant_name(variant)
        options = options.model_copy(update={"run_dir": str(path)})
        schedule.check_run(options, path, resources.world)
        work.chains.append(schedule.phases_of(command, options, path, only))
        work.configs.append((options, schedule.config_of(path)))
    return work


def _variant_name(variant: Sequence[str]) -> str:
    return ",".join(word.replace("/", "_") for word in variant)


def _variants(arguments: argparse.Namespace) -> list[tuple[str, ...]]:
    """The overrides of each run: the product of what --seeds and --sweep list."""
    axes = [("seed", arguments.seeds)] if arguments.seeds else []
    for sweep in arguments.sweep:
        key, equals, values = sweep.partition("=")
        if not equals or not values:
            raise UserError(f"--sweep {sweep}: say KEY=A,B,C")
        axes.append((key, values))
    return list(itertools.product(*([f"{key}={value}" for value in values.split(",")] for key, values in axes)))


def _pipeline(arguments: argparse.Namespace, resources: Resources) -> Work:
    words = [word for word in arguments.words if not word.startswith("finetune.")]
    first, name = config.read("pretrain", config.COMMANDS["pretrain"], words)
    base = _folder(arguments, first, Path("runs") / name)
    work = Work(base)
    for variant in _variants(arguments):
        one = _one_pipeline([*arguments.words, *variant], base / _variant_name(variant), arguments, resources)
        work.chains += one.chains
        work.configs += one.configs
    return work


def _one_pipeline(given: Sequence[str], path: Path, arguments: argparse.Namespace, resources: Resources) -> Work:
    words = [word for word in given if not word.startswith("finetune.")]
    tuned = [word.removeprefix("finetune.") for word in given if word.startswith("finetune.")]
    options, _ = config.read("pretrain", config.COMMANDS["pretrain"], words)
    options = options.model_copy(update={"run_dir": str(path)})
    schedule.check_run(options, path, resources.world)
    dumped = options.model_dump(mode="json")
    defaults = {key: dumped[key] for key in ("audio", "model", "compression")}
    shared = [word for word in words if word.startswith(("data.", "seed=")) and not word.startswith("data.val_")]
    file = arguments.finetune_config or config.DEFAULT["finetune"]
    tuning, _ = config.read("finetune", FinetuneOptions, [file, *shared, *tuned], defaults)
    after = _finetuning(tuning, path / "finetune" / tuning.name, path, resources)
    phases = schedule.phases_of("pretrain", options, path)
    missing = [task.job.name for (task,) in phases if not task.done]
    if missing and any(task.done for task in after.chains[0][0]):
        raise UserError(
            f"{after.folder} was fine-tuned before phase {missing[0]} was there: choose another finetune.name=, or "
            "delete it"
        )
    return Work(path, [[*phases, *after.chains[0]]], [(options, schedule.config_of(path)), *after.configs])


def _finetunings(arguments: argparse.Namespace, resources: Resources) -> Work:
    ckpt = arguments.ckpt.resolve()
    weights = load_weights(ckpt)
    defaults = checkpoint_defaults(weights)
    first, _ = config.read("finetune", FinetuneOptions, arguments.words, defaults)
    default = find_run(ckpt) / "finetune" / first.name
    base = _folder(arguments, first, default)
    variants = _variants(arguments)
    work = Work(base if variants == [()] or base != default else default.parent)
    for variant in variants:
        options, _ = config.read("finetune", FinetuneOptions, [*arguments.words, *variant], defaults)
        # beside others of the same run, where the report looks for them
        path = base / _variant_name(variant) if base == work.folder else base.with_name(
            f"{base.name},{_variant_name(variant)}"
        )
        check_origin(path, weights.origin)
        one = _finetuning(options, path, ckpt, resources)
        work.chains += one.chains
        work.configs += one.configs
    return work


def _finetuning(options: FinetuneOptions, path: Path, ckpt: Path, resources: Resources) -> Work:
    options = options.model_copy(update={"run_dir": str(path)})
    for phase in options.phases:
        if phase.batch_size % resources.world:
            raise UserError(f"fine-tuning: batch_size {phase.batch_size} is no multiple of {resources.world} processes")
    return Work(path, [schedule.folds_of(options, path, ckpt)], [(options, schedule.config_of(path))])


def _evaluation(arguments: argparse.Namespace) -> Work:
    if arguments.seeds or arguments.sweep:
        raise UserError("evaluate draws nothing and has one result: give --seeds and --sweep to what trains")
    ckpt = arguments.ckpt.resolve()
    find_published(ckpt) or find_checkpoint(ckpt)
    options = files.load(EvaluateOptions, None, arguments.words)
    path = (arguments.run_dir or find_run(ckpt)).resolve()
    file = path / FOLDER / "evaluate.yaml"
    job = Job("evaluate", "evaluate", str(file), str(path), str(ckpt))
    return Work(path, [[[Task(job, lambda: False)]]], [(options, file)])


def find_run(ckpt: Path) -> Path:
    """The run that a checkpoint lies in."""
    found = find_published(ckpt) or find_checkpoint(ckpt)
    return next((parent for parent in found.parents if (parent / "config.yaml").exists()), results_folder(found))


def _folder(arguments: argparse.Namespace, options: Any, default: Path) -> Path:
    return Path(arguments.run_dir or options.run_dir or default).resolve()


def _with_snapshot(resources: Resources, folder: Path) -> Resources:
    """Let jobs import a copy of the package, named by its content; requeued jobs find it again."""
    package = Path(__file__).parents[1]
    sources = sorted(file for file in package.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in sources)).hexdigest()[:12]
    copy = folder / FOLDER / f"code-{digest}"
    if not copy.exists():
        aside = copy.with_name(f".{copy.name}.tmp")  # one that was interrupted is never taken for whole
        shutil.rmtree(aside, ignore_errors=True)
        try:
            shutil.copytree(package, aside / package.name, ignore=shutil.ignore_patterns("__pycache__"))
            aside.rename(copy)
        except OSError as error:
            raise UserError(f"cannot copy the code to {copy}: {error}") from error
    path = f"export PYTHONPATH={shlex.quote(str(copy))}${{PYTHONPATH:+:$PYTHONPATH}}"
    safe = "export PYTHONSAFEPATH=1"  # else the folder that we are in, which may be the checkout, comes first
    return replace(resources, setup=(*resources.setup, path, safe))


def _submit(resources: Resources, work: Work) -> list[str]:
    launcher = schedule.Launch(resources, work.folder / FOLDER, work.folder.name)
    ids = launcher.submit(work.chains)
    for task, number in launcher.made:
        where = f" of {task.run.name}" if len(work.chains) > 1 else ""
        print(f"submitted {task.job.name}{where} as job {number}")
    made = {number for _, number in launcher.made}
    for chain in work.chains:
        for task in itertools.chain(*chain):
            number = launcher.id_of(task)
            if not task.done and number in launcher.queue and number not in made:
                print(f"{task.job.name} is already in the queue as job {number}: {launcher.queue[number]}")
    if not launcher.made:
        print(f"{work.folder}: nothing to submit")
    print(f"python slurm/launch.py status {work.folder}")
    return ids


def _wait(work: Work, ids: Sequence[str]) -> int:
    while cluster.active(ids):
        time.sleep(_POLL_SECONDS)
    jobstatus.print_status(work.folder)
    return int(any(part.failed for run in jobstatus.runs_below(work.folder) for part in jobstatus.parts_of(run)))


def _run_here(kind: str, resources: Resources, work: Work) -> int:
    """The tasks one after the other: `local` in processes of their own, `debug` in this one."""
    folder = work.folder / FOLDER
    for task in (task for chain in work.chains for stage in chain for task in stage):
        if task.done or not task.wanted:
            continue
        print(f"{task.job.name}: running here; logs are in {folder}", flush=True)
        if kind == "debug":
            submitit.DebugExecutor(folder).submit(task.job).results()
        elif status := _run_local(resources, folder, task):
            return status
    return 0


def _run_local(resources: Resources, folder: Path, task: Task) -> int:
    """The exit status: 1 where it failed, 128 + N where signal N stopped it."""
    with local.noting() as noted:
        job = local.start(resources, folder, task.job)
        number = str(job.job_id)
        schedule.remember(task, number, folder, "local")
        local.finish(job, task.run, task.job.name, noted)
    own = [event for event in events_of(task.run) if event["job"] == number and event["rank"] == 0]
    stop = own[-1] if own and own[-1]["event"] == "interrupted" else {}
    if noted or stop:
        print(f"launch.py: {stop.get('error', 'interrupted')}", file=sys.stderr)
        return 128 + int(noted[0] if noted else stop["signum"])
    if job.exception() is None:
        return 0
    part = next(part for part in jobstatus.parts_of(task.run) if part.name == task.job.name)
    print(f"{part.name}: {part.error or 'it was killed'}\n  log: {part.log}")
    return 1


def _cancel(path: Path) -> int:
    runs = jobstatus.runs_below(path)
    gone = _cancel_local(runs)
    there = cluster.active(set().union(*map(schedule.slurm_ids, runs)))
    cluster.cancel(there)
    gone += sorted(there)
    for part in (part for run in runs for part in jobstatus.parts_of(run) if part.state.startswith("started on")):
        raise UserError(f"{part.name} was {part.state}: cancel it there")
    print(f"cancelled {', '.join(gone)}" if gone else f"{path}: no job of it is queued or runs")
    return 0


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


def _print_dry_run(work: Work, resources: Resources, kind: str) -> None:
    rows = []
    for chain in work.chains:
        for needed, stage in itertools.pairwise([[], *chain]):
            after = ", ".join(task.job.name for task in needed) or "-"
            for task in stage:
                state = "done" if task.done else "to do" if task.wanted else "left out"
                rows.append((task.run.name, task.job.name, state, after, f"{task.pflops:.3g}"))
    table("what would be submitted", ("run", "part", "", "after", "PFLOPs"), rows)
    if kind != "slurm":
        print(f"the scripts for --cluster slurm ({kind} runs the parts one after the other):")
    nothing: list[Task] = []
    before, together = "", True
    for alike in itertools.zip_longest(*work.chains, fillvalue=nothing):
        stages = [[task for task in stage if not task.done and task.wanted] for stage in alike]
        together = together and all(len(stage) <= 1 for stage in stages)  # one array for all runs, as Launch does it
        todo = list(itertools.chain(*stages)) if together else max(stages, key=len)
        if todo:
            after = "aftercorr" if together and len(todo) > 1 else "afterok"
            each = f" (of each of {len(stages)} runs)" if len(stages) > 1 and not together else ""
            print(f"\n# {', '.join(task.job.name for task in todo)}{each}")
            job, dependency = f"{work.folder.name}/{todo[0].job.name}", f"{after}:<{before}>" if before else None
            asked = resources.of(todo[0].job)
            print(cluster.script(asked, work.folder / FOLDER, job, dependency=dependency, count=len(todo)))
            before = todo[0].job.name
