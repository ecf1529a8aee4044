"""A run from its folder to its last phase: open or resume it, rehearse, and train the phases that are not done.

Opening checks that a run can be resumed with these options and recordings.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Collection
from pathlib import Path

import yaml

from ssl_c2f.core import checkpoint, distributed
from ssl_c2f.core import options as option_files
from ssl_c2f.core.files import read_json, write_json, write_text
from ssl_c2f.core.options import UserError
from ssl_c2f.core.run_folder import RunFolder
from ssl_c2f.core.signals import Abandoned, Interrupted, Stop
from ssl_c2f.data.corpus import Corpus
from ssl_c2f.data.dataset import amount
from ssl_c2f.data.front_end import Statistics
from ssl_c2f.data.manifest import fingerprint
from ssl_c2f.data.statistics import InputStatistics
from ssl_c2f.objectives.supervised import SupervisedOptions
from ssl_c2f.train.checkpoint_state import CheckpointState
from ssl_c2f.train.loop import train_phase
from ssl_c2f.train.plan import make_plan
from ssl_c2f.train.recipe import RunOptions
from ssl_c2f.train.rehearsal import rehearse
from ssl_c2f.train.state import Run
from ssl_c2f.train.weights import Weights

# Options that may change when a run is resumed, besides added phases: they do not change what is computed
MAY_CHANGE = (
    "run_dir", "name", "folds", "folds.*",
    "tracking.*", "evaluation.*", "data.root", "data.manifest", "data.labels", "data.columns",
    "data.columns.*", "data.separator", "data.workers", "data.cache_gb", "data.max_bad_files",
    "train.device", "train.max_batch_per_device", "train.compile", "train.rehearse", "train.log_every",
    "train.checkpoint_every", "train.keep", "train.max_nonfinite",
)

# ... and which others, once the run has diverged
SLOWER = ("optim.lr", "optim.clip_norm", "phases.*.lr", "phases.*.warmup_epochs", "phases.*.warmup_steps")


def open_run(
    options: RunOptions, path: Path, dist: distributed.Dist, stop: Stop, initial: Weights | None,
    statistics: InputStatistics | None, kind: str, group: str = "",
) -> Run:
    """Open or create a run folder, its recordings, statistics and plan.

    Raises:
        UserError: the folder holds another run, there is no audio, or the options do not fit it.
    """
    for phase in options.phases:
        if phase.batch_size % dist.world:
            raise UserError(f"phase {phase.name}: batch_size {phase.batch_size} is no multiple of {dist.world} devices")
        per_device = phase.batch_size // dist.world
        if options.objective.whole_batch and per_device > (options.train.max_batch_per_device or per_device):
            raise UserError(
                f"phase {phase.name}: objective {options.objective.name} compares the clips of a batch with each "
                f"other, so train.max_batch_per_device must be {per_device} or more"
            )
    folder, text = RunFolder(path), option_files.dump(options)
    if dist.is_main and folder.config.exists():
        check_options(options, folder)
        set_aside_damaged(folder)
    dist.barrier()
    if statistics is None:
        opened = Corpus.open(
            options.data, options.seed, folder.bad_files if dist.is_main else None,
            labels_needed=isinstance(options.objective, SupervisedOptions),
        )
        if dist.is_main:
            print("".join(f"{note}\n" for note in opened.manifest.notes), end="")
        given = dict(initial.statistics) if initial else {}
        statistics = InputStatistics(opened, given | _statistics_so_far(folder), folder)
    corpus = statistics.corpus
    _check_labels(options, corpus)
    clips = corpus.clips_per_epoch(options.fine_geometry)
    curriculum = options.curriculum(clips, corpus.num_classes)
    if dist.is_main:
        held_out = f"; {len(corpus.held_out):,} held out" if corpus.held_out else ""
        print(amount(corpus.manifest, corpus.training, options.fine_geometry) + held_out, flush=True)
        RunFolder.create(path, text)
        _check_recordings(folder, corpus, clips)
        write_text(folder.config, text)  # including the options that changed
        plan = make_plan(options, clips, corpus.num_classes)
        write_json(folder.plan, plan.to_dict())
        for geometry in {*(phase.geometry for phase in curriculum.phases), options.fine_geometry}:
            statistics.of(geometry)
    dist.barrier()
    return Run(options, folder, statistics, curriculum, dist, initial, stop, kind, group or path.resolve().name)


def check_options(options: RunOptions, folder: RunFolder) -> None:
    """Phases may be added to a run, and some options may change.

    Raises:
        UserError: others differ from those that the run was begun with.
    """
    added = (f"phases.{i}.*" for i in range(folder.num_phases(), len(options.phases)))
    before = None
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError, RecursionError):  # said by `check_config`
        earlier = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
        # options that an earlier version did not have stood at their defaults
        before = option_files.dump(type(options).model_validate(earlier, strict=False))
    slower = SLOWER if folder.diverged.exists() else ()
    folder.check_config(option_files.dump(options), (*MAY_CHANGE, *slower, *added), before)


def set_aside_damaged(folder: RunFolder) -> None:
    """Rename checkpoints that cannot be read any more, from the newest of the run to the first that can: the run is
    resumed from there, through phases that were done if need be, and ends with the same weights."""
    for phase in reversed(folder.phases()):
        lines = checkpoint.set_aside_damaged(phase.checkpoints)
        print(*lines, sep="\n", end="\n" if lines else "")
        if lines:
            phase.done.unlink(missing_ok=True)
        if phase.newest():
            return


def _statistics_so_far(folder: RunFolder) -> dict[str, Statistics]:
    """What the run's checkpoints were trained with: a file of statistics may be damaged since then."""
    found: dict[str, Statistics] = {}
    for newest in filter(None, (phase.newest() for phase in folder.phases())):
        with contextlib.suppress(UserError):  # `start` raises it, if this checkpoint is needed
            found |= CheckpointState.read(read_json(newest / "state.json"), newest).statistics
    return found


def _check_labels(options: RunOptions, corpus: Corpus) -> None:
    if not isinstance(options.objective, SupervisedOptions):
        return
    manifest, single = corpus.manifest, options.objective.labels == "single"
    unlabelled = [manifest.clips[i].path for i in corpus.training if not manifest.clips[i].labels]
    several = [manifest.clips[i].path for i in corpus.training if len(manifest.clips[i].labels) > 1]
    if not manifest.classes:
        raise UserError(f"{manifest.root}: no recording has a label: put them into a folder for each class, or name a "
                        "table with data.manifest=FILE")
    if several and single:
        raise UserError(f"{several[0]} has several labels: set objective.labels=multi")
    if len(manifest.classes) == 1 and single:
        raise UserError(
            f"{manifest.root}: all recordings have the one label {manifest.classes[0]!r}; is data.root one level too "
            "high? (a detector of one class: objective.labels=multi, and recordings without labels)"
        )
    if unlabelled and single:
        raise UserError(
            f"{len(unlabelled)} training clips have no label, the first is {unlabelled[0]} (with "
            "objective.labels=multi they would be negatives of every class)"
        )


def _check_recordings(folder: RunFolder, corpus: Corpus, clips_per_epoch: int) -> None:
    """Raises UserError: the recordings are not those the run began with, so the order of clips would differ."""
    facts = {
        "fingerprint": fingerprint(corpus.manifest), "clips": len(corpus.manifest.clips),
        "training": len(corpus.training), "held_out": len(corpus.held_out), "classes": list(corpus.manifest.classes),
        "clips_per_epoch": clips_per_epoch,
    }
    before = read_json(folder.recordings)
    if not before:  # missing or damaged
        write_json(folder.recordings, facts)
    # version 0.1 took one clip of each recording in an epoch
    elif {"clips_per_epoch": before.get("training")} | before != facts:
        raise UserError(
            f"the recordings changed since {folder.path} was begun ({before.get('clips')} clips then, {facts['clips']} "
            "now): use another run_dir"
        )


def run(
    options: RunOptions, path: Path, *, initial: Weights | None = None, statistics: InputStatistics | None = None,
    only: Collection[str] | None = None, stop: Stop | None = None, kind: str = "pretrain",
    group: str = "",
) -> RunFolder:
    """Do a run, or go on with it: the phases that are not done yet, in order (of those named in `only`).

    `kind` (pretrain, train, finetune) is what W&B shows as the type of its jobs, `group` (by default the folder's name)
    what its runs belong to.

    Raises:
        Interrupted: SIGINT, SIGTERM or `stop` ended it; calling again goes on. UserError: see `open_run`.
    """
    dist, stop = distributed.init(options.train.device), stop or Stop()
    lock = RunFolder(path).lock() if dist.is_main else contextlib.nullcontext()
    with lock as dead, stop.listening(signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        try:
            with stop.interrupting():  # nothing is lost: all of this is done again
                job = open_run(options, path, dist, stop, initial, statistics, kind, group)
                wanted = [p for p in job.curriculum.phases if only is None or p.name in only]
                # all see what one saw
                todo = dist.broadcast_object([p for p in wanted if not job.phase_folder(p).is_done()])
                if dead:
                    gone = f"process {dead['pid']} on {dead['host']} ended without letting go"
                    print(f"{path}: {gone}; going on from there")
                if options.train.rehearse and todo:  # also those that other jobs will run
                    left = [p for p in job.curriculum.phases if not job.phase_folder(p).is_done()]
                    rehearse(job, dist.broadcast_object(left))
        except Abandoned:
            raise Interrupted(stop.signum, None) from None
        for phase in todo:
            train_phase(job, phase)
    return job.folder
