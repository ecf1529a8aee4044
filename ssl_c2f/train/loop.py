"""The training loop: one for masked pretraining, supervised training and fine-tuning.

All random numbers are drawn from (seed, clip) or (seed, step), so a checkpoint holds the step and no generator's state.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ssl_c2f.core import draws
from ssl_c2f.core.options import UserError
from ssl_c2f.core.progress import Progress
from ssl_c2f.core.signals import Abandoned, Interrupted, Stop
from ssl_c2f.curriculum.phases import Phase, learning_rate
from ssl_c2f.data.dataset import BadItems, TrainingClips, make_loader
from ssl_c2f.data.front_end import FrontEnd, Items
from ssl_c2f.data.sampler import micro_batches, positions
from ssl_c2f.objectives import StepResult
from ssl_c2f.track.tracker import Tracker
from ssl_c2f.train import optim, publish
from ssl_c2f.train.pictures import save_pictures
from ssl_c2f.train.state import Run, Training, diverged, save, snapshot, start
from ssl_c2f.train.validate import validate

COLLAPSED = 2.0  # effective rank of held-out features below which there is little to tell clips apart by
Loader = Iterator[Items | BadItems | UserError]
_PATIENCE = 1.0  # seconds for which data are still waited for after a signal


@dataclass(frozen=True)
class Step:
    """The result of one step."""

    names: tuple[str, ...]  # the loss, and the objective's metrics
    means: Tensor  # of these over the device's part of the batch
    grad_norm: float
    lr: float
    waited: float  # seconds for data


def train_step(run: Run, training: Training, loader: Loader, front_end: FrontEnd) -> Step:
    """One step of the optimiser on the device's part of the global batch, in micro-batches.

    Raises:
        Interrupted: a signal came while it waited for data.
        UserError: the run has diverged, or there are no data to go on with.
    """
    o, objective = run.options, training.objective
    phase, t, u = run.curriculum.lookup(training.step)
    lr = learning_rate(phase, t, o.optim.schedule, run.curriculum.spent(training.step))
    optim.set_learning_rate(training.optimizer, lr)
    # Drop path draws from torch's own generator. Seeded by the step, it draws the same after a resume as in one go.
    torch.manual_seed(draws.seed(o.seed, training.step, run.dist.rank, "step"))
    sizes = micro_batches(phase.batch_size // run.dist.world, o.train.max_batch_per_device)
    waited, results = 0.0, []
    for i, size in enumerate(sizes):
        began = time.perf_counter()
        items = _wait(run, training, loader, untouched=i == 0)
        waited += time.perf_counter() - began
        run.corpus.bad.add(items.bad)
        # Spectrograms and masks are made here, on the device, and never stored: they differ from phase to phase.
        batch = front_end(items, phase.masking, o.augment)
        # Gradients are averaged over the devices once, with the last micro-batch: DDP reads the flag in both passes.
        synchronise = i == len(sizes) - 1
        with _no_sync(training.model, not synchronise), _autocast(run):
            result: StepResult = training.model(batch)
        # Micro-batches differ in size by one clip at most, and a clip weighs the same in each: the sum of these
        # gradients is the gradient of the mean over the whole batch, however it was cut.
        fraction = size / sum(sizes)
        with _no_sync(training.model, not synchronise):
            (result.loss * fraction).backward()  # type: ignore[no-untyped-call]
        # The figures stay on the device: reading them here would make it wait for every micro-batch.
        results.append(torch.stack([result.loss.detach(), *result.metrics.values()]) * fraction)
    means = torch.stack(results).sum(0)
    norm = float(nn.utils.clip_grad_norm_(objective.parameters(), o.optim.clip_norm))
    # Both are those of all devices, so all of them take the step or skip it together.
    if training.judge(float(run.dist.sum(means[:1]) / run.dist.world), norm):
        training.optimizer.step()
        _update_ema(training, o.ema)
        objective.after_step(u)
    elif training.skipped > o.train.max_nonfinite:
        raise diverged(run, training)
    training.optimizer.zero_grad(set_to_none=True)  # freed rather than zeroed: the next forward pass has the memory
    training.step += 1
    return Step(("loss", *result.metrics), means, norm, lr, waited)


def _wait(run: Run, training: Training, loader: Loader, untouched: bool) -> Items:
    """The next batch. After a signal it is not waited for long: a disk may be gone.

    `untouched`: the step has not run a forward pass yet, which may change buffers. Then the state is saved, unless
    other processes are in the middle of the step.

    Raises:
        Interrupted: a signal came. UserError: an error of the loader (see `dataset.TrainingClips`).
    """
    try:
        with run.stop.interrupting(_PATIENCE):
            items = next(loader)
    except Abandoned:
        step = training.step if untouched and run.dist.world == 1 and save(run, training) else None
        raise Interrupted(run.stop.signum, step) from None
    if isinstance(items, UserError):
        # A new error: the one at hand would hold this frame and be held by it, and the loader with them, whose workers
        # would then take 10 s to leave.
        raise UserError(str(items))
    assert isinstance(items, Items)
    return items


def _no_sync(model: nn.Module, active: bool) -> contextlib.AbstractContextManager[None]:
    if active and isinstance(model, DistributedDataParallel):
        return model.no_sync()  # type: ignore[no-any-return]
    return contextlib.nullcontext()


def _autocast(run: Run) -> torch.autocast:
    return torch.autocast(run.dist.device.type, torch.bfloat16, enabled=run.options.train.precision == "bf16")


@torch.no_grad()
def _update_ema(training: Training, decay: float) -> None:
    """With a smaller decay in the first steps, so that the random initial weights are forgotten."""
    if training.ema is not None:
        decay = min(decay, (1 + training.step) / (10 + training.step))
        weights = training.objective.state_dict()
        torch._foreach_lerp_(list(training.ema.values()), list(weights.values()), 1 - decay)


def train_phase(run: Run, phase: Phase) -> None:
    """Train one phase from its newest checkpoint to its end.

    Raises:
        Interrupted: a signal came, and the training state was saved.
        UserError: too many non-finite steps or unreadable files.
    """
    folder = run.phase_folder(phase)
    with Progress(
        phase.name, phase.index, len(run.curriculum.phases), start=phase.first_step, stop=phase.last_step,
        enabled=run.dist.is_main,
    ) as progress:
        training = start(run, phase, progress.note)
        # The tracker cuts metrics.jsonl back to the step of the checkpoint: what was logged behind it happens again.
        tracker = publish.make_tracker(run, phase, training.step, progress.note)
        with tracker or contextlib.nullcontext():
            _train(run, training, tracker, progress)
            if tracker:
                with _abandoning(run, training.step):
                    save_pictures(folder.pictures, training.objective, run.runner(phase.geometry), phase.masking)
                publish.show_phase(tracker, run, phase)
    # Last of all, and only now may the next phase start: a phase that was killed before is gone through again.
    if run.dist.is_main:
        counters = run.curriculum.counters(training.step)
        folder.mark_done(training.step, **counters, train_seconds=training.train_seconds)
    run.dist.barrier()


@contextlib.contextmanager
def _abandoning(run: Run, step: int) -> Iterator[None]:
    """Stops at a signal what will be done again when the run is resumed from `step`."""
    try:
        with run.stop.interrupting():
            yield
    except Abandoned:
        raise Interrupted(run.stop.signum, step) from None


def _train(run: Run, training: Training, tracker: Tracker | None, progress: Progress) -> None:
    o, corpus, phase = run.options, run.corpus, training.phase
    front_end = run.statistics.front_end(phase.geometry).to(run.dist.device)
    clips = TrainingClips(corpus.source(phase.geometry), corpus.training, o.seed, o.augment, o.data.balance)
    # Which clips come is a function of the step, so the loader starts anywhere and knows nothing of epochs.
    batches = positions(
        run.curriculum, training.step, phase.last_step, run.dist.rank, run.dist.world, o.train.max_batch_per_device
    )
    loader = make_loader(clips, batches, corpus.workers(phase.geometry))
    all_flops = run.curriculum.counters(run.curriculum.steps)["flops"]
    logged, seconds, waited = training.step, 0.0, 0.0  # since the last line
    if training.step > phase.first_step and _validation_due(run, phase, training.step):  # the run stopped before it
        earlier = bool(run.stop.signum)  # a signal from before must not prevent the validation for ever
        _validate(run, training, tracker, progress.note, None if earlier else run.stop)
    while training.step < phase.last_step:
        began = time.perf_counter()
        step = train_step(run, training, loader, front_end)
        last = training.step == phase.last_step
        log = last or training.step % o.train.log_every == 0
        # Reading the means waits for the device, so it is done before the clock is read: a step's time is then its own.
        means = (run.dist.sum(step.means) / run.dist.world).tolist() if log else []
        took = time.perf_counter() - began
        training.train_seconds += took  # pure training: validation, checkpoints and pictures are not in it
        seconds, waited = seconds + took, waited + step.waited
        if log:
            _share_bad_files(run)
        if log and tracker:
            rate, wait = (training.step - logged) * phase.batch_size / seconds, waited / seconds
            axes = _axes(run, training)
            masked = {"mask_ratio": phase.masking.ratio} if phase.masking else {}
            tracker.log(axes | dict(zip(step.names, means, strict=True)) | masked | {
                "lr": step.lr, "grad_norm": step.grad_norm, "skipped": training.skipped,
                "clips_per_second": rate, "data_wait": wait,
            })
            progress.update(
                training.step, loss=means[0], lr=step.lr, clips_per_second=rate, wait=wait,
                run_done=float(axes["flops"]) / all_flops,
            )
            logged, seconds, waited = training.step, 0.0, 0.0
        # A signal may reach one process before the others; they must leave after the same step, or the rest would wait
        # for its gradients for ever.
        stopped = run.dist.any_rank(bool(run.stop.signum))
        due = _validation_due(run, phase, training.step)
        if last and training.unsound_since is not None:
            raise diverged(run, training)
        if last or stopped or due or training.step % o.train.checkpoint_every == 0:
            save(run, training)
        if stopped and (due or not last):  # at the end of a phase there is nothing left to interrupt
            raise Interrupted(run.stop.signum or signal.SIGTERM, training.step)
        if due:  # after the save: a scheduler that wants the machine back does not wait for it
            _validate(run, training, tracker, progress.note, run.stop)


def _axes(run: Run, training: Training) -> dict[str, float | str]:
    """The axes against which metrics are logged."""
    place: dict[str, float | str] = {"phase": training.phase.name, "step": training.step}
    return place | run.curriculum.counters(training.step) | {"train_seconds": training.train_seconds}


def _share_bad_files(run: Run) -> None:
    """Every process reads other clips: the main one lists the unreadable files of all, and the limit holds for all."""
    for seen in run.dist.gather_objects(run.corpus.bad.seen):
        run.corpus.bad.add(list(seen.items()))


def _validation_due(run: Run, phase: Phase, step: int) -> bool:
    """Whether a phase ends with `step`, or a multiple of `evaluation.every` epochs lies within it."""
    interval = run.options.evaluation.every * run.curriculum.clips_per_epoch
    if not interval or step == phase.last_step:
        return bool(interval)
    return run.curriculum.samples(step) // interval > run.curriculum.samples(step - 1) // interval


def _validate(
    run: Run, training: Training, tracker: Tracker | None, note: Callable[[str], object], stop: Stop | None
) -> None:
    """Rank 0 validates, unless that is logged already, and the others wait.

    Raises:
        Interrupted: `stop` was set. The validation is dropped, and done again when the run is resumed.
    """
    stopped = False
    if tracker and not tracker.validated(training.step):
        fine = snapshot(run, training).at_full_resolution(run.dist.device)
        try:
            with run.stop.interrupting() if stop else contextlib.nullcontext():
                result = validate(fine, run.options, run.runner(run.options.fine_geometry, stop))
        except Abandoned:
            stopped = True
        else:
            tracker.log(_axes(run, training) | result)
            if result.get("val/rank", COLLAPSED) < COLLAPSED:
                directions = f"held-out clips differ in {result['val/rank']:.1f} directions"
                note(f"step {training.step}: warning: the features collapse, {directions}")
            note(f"step {training.step}: " + ", ".join(f"{name} {value:.4f}" for name, value in result.items()))
    if run.dist.any_rank(stopped):
        raise Interrupted(run.stop.signum or signal.SIGTERM, training.step)
