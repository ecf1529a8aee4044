"""What the commands of slurm/launch.py ask for: runs, each with its jobs and the options that these will read."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ssl_c2f.core import options as option_files
from ssl_c2f.core.files import read_json
from ssl_c2f.core.options import Options, UserError
from ssl_c2f.core.run_folder import RunFolder
from ssl_c2f.data.dataset import clips_per_epoch
from ssl_c2f.data.recordings import open_manifest, split
from ssl_c2f.launch.jobs import FOLDER, Job
from ssl_c2f.launch.schedule import Stages, Task
from ssl_c2f.tasks import config
from ssl_c2f.tasks.evaluate import EvaluateOptions
from ssl_c2f.tasks.finetune import UNSPLIT, FinetuneOptions, check_origin, checkpoint_defaults, folds_of
from ssl_c2f.train.engine import check_options
from ssl_c2f.train.plan import make_plan
from ssl_c2f.train.recipe import RunOptions
from ssl_c2f.train.weights import Weights, find_checkpoint, find_published, load_weights, locate, results_folder


@dataclass(frozen=True)
class Run:
    """A run that a launch is about."""

    path: Path
    stages: Stages
    configs: Mapping[Path, Options] = field(default_factory=dict)  # what its jobs will read, and where


def read_runs(arguments: argparse.Namespace, world: int) -> tuple[Path, list[Run]]:
    """The folder that a launch works in, and its runs: one for each of --seeds and --sweep.

    `world` is the number of processes of a job.

    Raises:
        UserError: what the first job would complain about.
    """
    ckpt: Path | None = locate(arguments.ckpt).resolve() if "ckpt" in arguments else None
    if ckpt and arguments.command == "evaluate":
        return _evaluation(arguments, ckpt)
    variants = _variants(arguments)
    weights = load_weights(ckpt) if ckpt else None
    first, default = _read_first(arguments, weights)
    base = Path(arguments.run_dir or first.run_dir or default).resolve()
    # Variants of a fine-tuning stand beside others of the same checkpoint, where the report looks for them.
    beside = weights is not None and base == default and variants != [()]
    runs = []
    for variant in variants:
        name = ",".join(word.replace("/", "_") for word in variant)
        path = base.with_name(f"{base.name},{name}") if beside else base / name
        words = [*arguments.words, *variant]
        if weights and ckpt:
            check_origin(path, weights.origin)
            tuning, _ = config.read(FinetuneOptions, words, checkpoint_defaults(weights))
            runs.append(_finetuning(tuning, path, ckpt, world))
        elif arguments.command == "pipeline":
            runs.append(_pipeline(words, path, arguments.finetune_config, world))
        else:
            only = [phase for phase in arguments.phases.split(",") if phase]
            runs.append(_phases(arguments.command, words, path, world, only))
    return base.parent if beside else base, runs


def _variants(arguments: argparse.Namespace) -> list[tuple[str, ...]]:
    """The overrides of each run: the product of what --seeds and --sweep list."""
    axes = [("seed", arguments.seeds)] if arguments.seeds else []
    for sweep in arguments.sweep:
        key, equals, values = sweep.partition("=")
        if not equals or not values:
            raise UserError(f"--sweep {sweep}: say KEY=A,B,C")
        axes.append((key, values))
    return list(itertools.product(*([f"{key}={value}" for value in values.split(",")] for key, values in axes)))


def _read_first(arguments: argparse.Namespace, weights: Weights | None) -> tuple[Any, Path]:
    """The options before --seeds and --sweep, and the folder that they mean by default."""
    if weights:
        tuning, _ = config.read(FinetuneOptions, arguments.words, checkpoint_defaults(weights))
        return tuning, RunFolder(results_folder(Path(weights.origin))).finetuning(tuning.name).path.resolve()
    words = [word for word in arguments.words if not word.startswith("finetune.")]
    options, name = config.read(config.COMMANDS.get(arguments.command, config.PretrainOptions), words)
    return options, Path("runs") / name


def _phases(command: str, words: Sequence[str], path: Path, world: int, only: Collection[str] = ()) -> Run:
    """A run whose jobs are its phases, of which only those named in `only` are to be submitted (none: all).

    Raises:
        UserError: no such phase, no audio, batches that do not divide, a folder that holds another run.
    """
    options, _ = config.read(config.COMMANDS[command], words)
    options = options.model_copy(update={"run_dir": str(path)})
    _check_batches(options, world)
    folder, names = RunFolder(path), [phase.name for phase in options.phases]
    if folder.config.exists():
        check_options(options, folder)
    if unknown := set(only) - set(names):
        raise UserError(f"--phases: there is no phase {min(unknown)}; there are {', '.join(names)}")
    manifest = open_manifest(options.data)
    clips = clips_per_epoch(manifest, split(manifest, options.data)[0], options.fine_geometry)
    plan = make_plan(options, clips, len(manifest.classes))
    file = _config_of(path)
    stages = [
        [Task(Job(command, name, str(file), str(path)), folder.phase(i, name).is_done, cost.pflops,
              not only or name in only)]
        for i, (name, cost) in enumerate(zip(names, plan.phases, strict=True))
    ]
    return Run(path, stages, {file: options})


def _pipeline(words: Sequence[str], path: Path, tuning_config: str | None, world: int) -> Run:
    """Pretraining, and behind it the fine-tuning that words with `finetune.` in front are about."""
    own = [word for word in words if not word.startswith("finetune.")]
    pretraining = _phases("pretrain", own, path, world)
    (options,) = pretraining.configs.values()
    defaults = options.model_dump(mode="json", include={"audio", "model", "compression"}) | UNSPLIT
    shared = [word for word in own if word.startswith(("data.", "seed=")) and not word.startswith("data.val_")]
    tuned = [word.removeprefix("finetune.") for word in words if word.startswith("finetune.")]
    tuning, _ = config.read(FinetuneOptions, [*([tuning_config] if tuning_config else []), *shared, *tuned], defaults)
    finetuning = _finetuning(tuning, RunFolder(path).finetuning(tuning.name).path, path, world)
    missing = [task.name for (task,) in pretraining.stages if not task.is_done()]
    if missing and any(task.is_done() for task in finetuning.stages[0]):
        raise UserError(
            f"{finetuning.path} was fine-tuned before phase {missing[0]} was there: choose another finetune.name=, or "
            "delete it"
        )
    return Run(path, [*pretraining.stages, *finetuning.stages], {**pretraining.configs, **finetuning.configs})


def _finetuning(options: FinetuneOptions, path: Path, ckpt: Path, world: int) -> Run:
    """Fine-tuning in `path`: a job for each fold that is held out, then one that scores them all.

    Raises:
        UserError: no audio, no such fold, batches that do not divide.
    """
    _check_batches(options, world)
    options = options.model_copy(update={"run_dir": str(path)})
    manifest, folder, file = open_manifest(options.data), RunFolder(path), _config_of(path)
    clips = clips_per_epoch(manifest, range(len(manifest.clips)), options.fine_geometry)
    pflops = make_plan(options, clips, len(manifest.classes)).pflops

    def job(command: str, part: str) -> Job:
        return Job(command, part, str(file), str(path), str(ckpt))

    fits = {"all" if fold is None else str(fold): folder if fold is None else folder.fold(fold)
            for fold in folds_of(options, manifest)}
    tuning = [Task(job("finetune", part), partial(_is_tuned, fit, options), pflops) for part, fit in fits.items()]

    def is_scored() -> bool:
        scored = read_json(path / "scores.json").get("folds")
        return scored is not None and set(scored) >= set(fits) - {"all"} and all(task.is_done() for task in tuning)

    return Run(path, [tuning, [Task(job("score", "scores"), is_scored)]], {file: options})


def _is_tuned(fit: RunFolder, options: FinetuneOptions) -> bool:
    return all(fit.phase(i, phase.name).is_done() for i, phase in enumerate(options.phases))


def _evaluation(arguments: argparse.Namespace, ckpt: Path) -> tuple[Path, list[Run]]:
    if arguments.seeds or arguments.sweep:
        raise UserError("evaluate draws nothing and has one result: give --seeds and --sweep to what trains")
    found = find_published(ckpt) or find_checkpoint(ckpt)
    options = option_files.load(EvaluateOptions, None, arguments.words)
    path = Path(arguments.run_dir or results_folder(found)).resolve()
    file = path / FOLDER / "evaluate.yaml"
    task = Task(Job("evaluate", "evaluate", str(file), str(path), str(ckpt)), lambda: False)
    return path, [Run(path, [[task]], {file: options})]


def _config_of(path: Path) -> Path:
    """Where a launch keeps the options for the jobs of a run."""
    return path / FOLDER / "config.yaml"


def _check_batches(options: RunOptions, world: int) -> None:
    for phase in options.phases:
        if phase.batch_size % world:
            raise UserError(f"phase {phase.name}: batch_size {phase.batch_size} is no multiple of {world} processes")
