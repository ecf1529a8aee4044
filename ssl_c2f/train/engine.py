"""The loop: one for masked pretraining, supervised training and fine-tuning.

Everything that is random is drawn from (seed, clip, step), so a checkpoint holds the step and no generator's state.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ssl_c2f.core import distributed, draws
from ssl_c2f.core import options as option_files
from ssl_c2f.core.files import read_json, write_json, write_text
from ssl_c2f.core.options import UserError
from ssl_c2f.core.progress import Progress
from ssl_c2f.core.run_folder import RunFolder
from ssl_c2f.core.signals import Abandoned, Interrupted, Stop
from ssl_c2f.curriculum.phases import Phase, Place, learning_rate
from ssl_c2f.data.corpus import Corpus
from ssl_c2f.data.dataset import TrainingClips, make_loader
from ssl_c2f.data.front_end import FrontEnd, Items, Statistics
from ssl_c2f.data.manifest import fingerprint
from ssl_c2f.data.sampler import micro_batches, positions
from ssl_c2f.data.statistics import InputStatistics
from ssl_c2f.objectives import StepResult
from ssl_c2f.objectives.supervised import SupervisedOptions
from ssl_c2f.track.tracker import Tracker
from ssl_c2f.train import optim, publish
from ssl_c2f.train.pictures import save_pictures
from ssl_c2f.train.recipe import RunOptions, make_plan
from ssl_c2f.train.state import Run, Training, build, carry_over, prepare, save, start
from ssl_c2f.train.validate import at_full_resolution, validate
from ssl_c2f.train.weights import Weights

# What may change when a run is resumed, besides added phases: where it runs and how it is watched, not what it computes
MAY_CHANGE = (
    "run_dir", "name", "folds", "folds.*",
    "tracking.*", "evaluation.*", "data.root", "data.manifest", "data.workers", "data.cache_gb", "data.max_bad_files",
    "train.device", "train.max_batch_per_device", "train.compile", "train.rehearse", "train.log_every",
    "train.checkpoint_every", "train.keep", "train.max_nonfinite",
)


@dataclass(frozen=True)
class Step:
    """What one step gave."""

    names: tuple[str, ...]  # the loss, and the objective's metrics
    means: Tensor  # of these over the device's share of the batch
    grad_norm: float
    lr: float
    waited: float  # seconds for data


def train_step(run: Run, t: Training, place: Place, loader: Iterator[Items], front_end: FrontEnd) -> Step:
    """One step of the optimiser over the device's share of the global batch, in micro-batches."""
    o, phase = run.options, place.phase
    lr = learning_rate(place, o.optim.schedule)
    optim.set_learning_rate(t.optimizer, lr)
    torch.manual_seed(draws.seed(o.seed, t.step, run.dist.rank, "step"))  # drop path draws from torch's own generator
    sizes = micro_batches(phase.batch_size // run.dist.world, o.train.max_batch_per_device)
    waited, results = 0.0, []
    for i, size in enumerate(sizes):
        began = time.perf_counter()
        items = _next(loader)
        waited += time.perf_counter() - began
        run.corpus.bad.add(items.bad)
        batch = front_end(items, o.masking(phase, t.objective), o.augment)
        with _no_sync(t.model, i < len(sizes) - 1), _autocast(run):
            result: StepResult = t.model(batch)
        share = size / sum(sizes)
        with _no_sync(t.model, i < len(sizes) - 1):
            (result.loss * share).backward()  # type: ignore[no-untyped-call]
        results.append(torch.stack([result.loss.detach(), *result.metrics.values()]) * share)
    norm = float(nn.utils.clip_grad_norm_(t.objective.parameters(), o.optim.clip_norm))
    if math.isfinite(norm):
        t.optimizer.step()
        _update_ema(t, o.ema)
        t.objective.after_step(place.u)
    else:
        t.skipped += 1
        if t.skipped > o.train.max_nonfinite:
            good = _last_checkpoint(run, phase) or "none yet"
            raise UserError(f"{t.skipped} steps had a non-finite loss; the last good checkpoint is {good}")
    t.optimizer.zero_grad(set_to_none=True)
    t.step += 1
    return Step(("loss", *result.metrics), torch.stack(results).sum(0), norm, lr, waited)


def _last_checkpoint(run: Run, phase: Phase) -> Path | None:
    """The newest of the phase or of those before it. Skipped steps change no weights, so it holds finite ones."""
    so_far = reversed(run.curriculum.phases[: phase.index + 1])
    return next(filter(None, (run.phase_folder(p).newest() for p in so_far)), None)


def _next(loader: Iterator[Items]) -> Items:
    try:
        return next(loader)
    except UserError as error:  # from a worker it comes with the worker's traceback
        line = str(error).strip().splitlines()[-1].removeprefix("ssl_c2f.core.options.UserError: ")
        error.__traceback__ = None  # it would keep the loader alive, in a cycle that takes its workers 10 s to leave
    raise UserError(line)


def _no_sync(model: nn.Module, active: bool) -> contextlib.AbstractContextManager[None]:
    if active and isinstance(model, DistributedDataParallel):
        return model.no_sync()  # type: ignore[no-any-return]
    return contextlib.nullcontext()


def _autocast(run: Run) -> torch.autocast:
    return torch.autocast(run.dist.device.type, torch.bfloat16, enabled=run.options.train.precision == "bf16")


@torch.no_grad()
def _update_ema(t: Training, decay: float) -> None:
    """A shorter memory at first, so that the random start is forgotten."""
    if t.ema is not None:
        decay = min(decay, (1 + t.step) / (10 + t.step))
        torch._foreach_lerp_(list(t.ema.values()), list(t.objective.state_dict().values()), 1 - decay)


def train_phase(run: Run, phase: Phase) -> None:
    """Take one phase from where it stands on disk to its end.

    Raises:
        Interrupted: a signal came; the state was saved. UserError: too many non-finite steps or unreadable files.
    """
    with Progress(
        phase.name, phase.index, len(run.curriculum.phases), start=phase.first_step, stop=phase.last_step,
        enabled=run.dist.is_main,
    ) as progress:
        t = start(run, phase, progress.note)
        tracker = publish.make_tracker(run, phase, t.step, progress.note)
        with tracker or contextlib.nullcontext():
            _train(run, phase, t, tracker, progress)
            if tracker:
                masking, runner = run.options.masking(phase, t.objective), run.runner(t.objective.geometry)
                save_pictures(run.phase_folder(phase).pictures, t.objective, runner, masking)
                publish.show_phase(tracker, run, phase)
    if run.dist.is_main:
        run.phase_folder(phase).mark_done(t.step, **run.counters(t.step), train_seconds=t.train_seconds)
    run.dist.barrier()


def _train(run: Run, phase: Phase, t: Training, tracker: Tracker | None, progress: Progress) -> None:
    o, geometry, corpus = run.options, run.options.geometries[phase.index], run.corpus
    front_end = run.statistics.front_end(geometry).to(run.dist.device)
    clips = TrainingClips(corpus.source(geometry), corpus.training, o.seed, o.augment)
    batches = positions(
        run.curriculum, t.step, phase.last_step, run.dist.rank, run.dist.world, o.train.max_batch_per_device
    )
    loader = iter(make_loader(clips, batches, corpus.workers(geometry)))
    all_flops = run.counters(run.curriculum.steps)["flops"]
    logged, seconds, waited = t.step, 0.0, 0.0  # since the last line
    if t.step > phase.first_step and _validation_due(run, phase, t.step):  # stopped before it
        earlier = bool(run.stop.signum)  # a signal of before it began must not keep it from ever being done
        _validate(run, phase, t, tracker, progress.note, None if earlier else run.stop)
    while t.step < phase.last_step:
        began = time.perf_counter()
        step = train_step(run, t, run.curriculum.lookup(t.step), loader, front_end)
        last = t.step == phase.last_step
        log = last or t.step % o.train.log_every == 0
        means = (run.dist.sum(step.means) / run.dist.world).tolist() if log else []
        took = time.perf_counter() - began
        t.train_seconds, seconds, waited = t.train_seconds + took, seconds + took, waited + step.waited
        if log:
            _share_bad_files(run)
        if log and tracker:
            rate, wait = (t.step - logged) * phase.batch_size / seconds, waited / seconds
            axes = _axes(run, phase, t)
            masked = {"mask_ratio": phase.mask_ratio} if o.objective.num_masks else {}
            tracker.log(axes | dict(zip(step.names, means, strict=True)) | masked | {
                "lr": step.lr, "grad_norm": step.grad_norm, "skipped": t.skipped,
                "clips_per_second": rate, "data_wait": wait,
            })
            progress.update(
                t.step, loss=means[0], lr=step.lr, clips_per_second=rate, wait=wait,
                run_done=float(axes["flops"]) / all_flops,
            )
            logged, seconds, waited = t.step, 0.0, 0.0
        stopped = run.dist.any_rank(bool(run.stop.signum))
        due = _validation_due(run, phase, t.step)
        if last or stopped or due or t.step % o.train.checkpoint_every == 0:
            save(run, phase, t)
        if stopped and (due or not last):
            raise Interrupted(run.stop.signum or signal.SIGTERM, t.step)
        if due:  # saved before: it takes longer than a scheduler may wait
            _validate(run, phase, t, tracker, progress.note, run.stop)


def _axes(run: Run, phase: Phase, t: Training) -> dict[str, float | str]:
    place: dict[str, float | str] = {"phase": phase.name, "step": t.step}
    return place | run.counters(t.step) | {"train_seconds": t.train_seconds}


def _share_bad_files(run: Run) -> None:
    """Each process reads other clips; the main one names what any of them cannot read, and all keep to the limit."""
    for seen in run.dist.gather_objects(run.corpus.bad.seen):
        run.corpus.bad.add(list(seen.items()))


def _validation_due(run: Run, phase: Phase, step: int) -> bool:
    """Whether a phase ends with `step`, or a multiple of `evaluation.every` epochs lies within it."""
    interval = run.options.evaluation.every * len(run.corpus.training)
    if not interval or step == phase.last_step:
        return bool(interval)
    return run.curriculum.samples(step) // interval > run.curriculum.samples(step - 1) // interval


def _validate(
    run: Run, phase: Phase, t: Training, tracker: Tracker | None, note: Callable[[str], object], stop: Stop | None
) -> None:
    """Rank 0 validates, if that is not on record yet, while the others wait.

    Raises:
        Interrupted: `stop` was set, which need not wait for its end: whoever goes on validates.
    """
    stopped = False
    if tracker and not tracker.validated(t.step):
        state = t.ema if t.ema is not None else t.objective.state_dict()
        geometry, device = run.options.geometries[phase.index], run.dist.device
        fine = at_full_resolution(run.options, state, geometry, run.corpus.num_classes, device)
        try:
            result = validate(fine, run.options, run.runner(run.options.fine_geometry, stop))
        except Abandoned:
            stopped = True
        else:
            tracker.log(_axes(run, phase, t) | result)
            note(f"step {t.step}: " + ", ".join(f"{name} {value:.4f}" for name, value in result.items()))
    if run.dist.any_rank(stopped):
        raise Interrupted(run.stop.signum or signal.SIGTERM, t.step)


def rehearse(run: Run, phases: Collection[Phase]) -> None:
    """Run two steps of noise through every phase and boundary, in micro-batches of the real size, and throw all of it
    away: what does not fit or cannot work fails now. No weight, generator or counter of the run is touched.

    Raises:
        UserError: a phase does not fit into memory.
    """
    o, device, before = run.options, run.dist.device, None
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda):
        for phase in sorted(phases, key=lambda p: p.index):
            sizes = micro_batches(phase.batch_size // run.dist.world, o.train.max_batch_per_device)[-2:]
            try:
                t = prepare(run, build(run, phase), 0)
                if before:
                    carry_over(t, before.objective.state_dict(), before.ema, before.geometry, o.geometries[phase.index])
                front_end = FrontEnd(o.geometries[phase.index], Statistics(0.0, 1.0)).to(device)
                place = Place(phase.index, replace(phase, batch_size=sum(sizes) * run.dist.world), 0.0, 0.0)
                for _ in range(2):  # memory is fullest in the second: beside gradients and the optimiser's moments
                    train_step(run, t, place, iter([noise(run, phase, size) for size in sizes]), front_end)
            except RuntimeError as error:
                if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
                    raise
                raise UserError(
                    f"phase {phase.name} does not fit into memory with {sizes[-1]} clips at a time: "
                    f"set train.max_batch_per_device below {sizes[-1]}"
                ) from None
            before = t


def noise(run: Run, phase: Phase, size: int) -> Items:
    """Full-length clips of noise with labels, for trials."""
    generator = torch.Generator().manual_seed(phase.index)
    samples, classes = run.options.geometries[phase.index].clip_samples, run.corpus.num_classes
    items = Items(
        audio=torch.randn(size, samples, generator=generator), num_samples=torch.full((size,), samples),
        index=torch.arange(size), keys=draws.key(phase.index, torch.arange(size)),
        labels=torch.eye(max(classes, 1))[torch.arange(size) % max(classes, 1)][:, :classes],
    )
    if not run.options.augment.mixup_prob:
        return items
    return Items(**{**vars(items), "partner": items, "share": torch.full((size,), 0.5)})


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
    folder, text = RunFolder(path), option_files.dump(options)
    if dist.is_main and folder.config.exists():
        check_options(options, folder)
    if statistics is None:
        opened = Corpus.open(options.data, options.seed, folder.bad_files if dist.is_main else None)
        statistics = InputStatistics(opened, initial.statistics if initial else {}, folder)
    corpus = statistics.corpus
    _check_labels(options, corpus)
    curriculum = options.curriculum(len(corpus.training), corpus.num_classes)
    if dist.is_main:
        RunFolder.create(path, text)
        _check_recordings(folder, corpus)
        write_text(folder.config, text)  # with what may change
        plan = make_plan(options, len(corpus.training), corpus.num_classes)
        write_json(folder.plan, plan.to_dict())
        for geometry in {*options.geometries, options.fine_geometry}:
            statistics.of(geometry)
    dist.barrier()
    return Run(options, folder, statistics, curriculum, dist, initial, stop, kind, group or path.resolve().name)


def check_options(options: RunOptions, folder: RunFolder) -> None:
    """Phases may be added to a run, and some options may change.

    Raises:
        UserError: others differ from those that the run was begun with.
    """
    added = (f"phases.{i}.*" for i in range(folder.num_phases(), len(options.phases)))
    folder.check_config(option_files.dump(options), (*MAY_CHANGE, *added))


def _check_labels(options: RunOptions, corpus: Corpus) -> None:
    if not isinstance(options.objective, SupervisedOptions):
        return
    clips = corpus.manifest.clips
    unlabelled = [clips[i].path for i in corpus.training if not clips[i].labels]
    several = [clips[i].path for i in corpus.training if len(clips[i].labels) > 1]
    if unlabelled:
        raise UserError(f"{len(unlabelled)} training clips have no label, the first is {unlabelled[0]}")
    if several and options.objective.labels == "single":
        raise UserError(f"{several[0]} has several labels: set objective.labels=multi")


def _check_recordings(folder: RunFolder, corpus: Corpus) -> None:
    """Refuse to resume on other recordings: the order of samples, and so the run, would be another."""
    facts = {
        "fingerprint": fingerprint(corpus.manifest), "clips": len(corpus.manifest.clips),
        "training": len(corpus.training), "held_out": len(corpus.held_out), "classes": list(corpus.manifest.classes),
    }
    if not folder.recordings.exists():
        write_json(folder.recordings, facts)
    elif (before := read_json(folder.recordings)) != facts:
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
    with lock as dead, stop.listening(signal.SIGINT, signal.SIGTERM):
        job = open_run(options, path, dist, stop, initial, statistics, kind, group)
        wanted = [p for p in job.curriculum.phases if only is None or p.name in only]
        todo = dist.broadcast_object([p for p in wanted if not job.phase_folder(p).is_done()])  # all see what one saw
        if dead:
            print(f"{path}: process {dead['pid']} on {dead['host']} ended without letting go; going on from there")
        if options.train.rehearse and todo:  # also those that other jobs will run
            left = [p for p in job.curriculum.phases if not job.phase_folder(p).is_done()]
            rehearse(job, dist.broadcast_object(left))
        for phase in todo:
            train_phase(job, phase)
    return job.folder
