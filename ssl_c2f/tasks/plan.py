"""`ssl_c2f plan`: what a run will cost, before it runs; with --measure also seconds and memory on this machine."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from ssl_c2f.core import distributed
from ssl_c2f.core.progress import table
from ssl_c2f.core.run_folder import RunFolder
from ssl_c2f.core.signals import Stop
from ssl_c2f.curriculum.cost import step_flops
from ssl_c2f.curriculum.phases import Phase
from ssl_c2f.data.corpus import Corpus
from ssl_c2f.data.dataset import amount, clips_per_epoch
from ssl_c2f.data.front_end import FrontEnd, Statistics
from ssl_c2f.data.manifest import Manifest
from ssl_c2f.data.recordings import open_manifest, split
from ssl_c2f.data.sampler import micro_batches
from ssl_c2f.data.statistics import InputStatistics
from ssl_c2f.train.loop import train_step
from ssl_c2f.train.plan import make_plan, plan_rows
from ssl_c2f.train.recipe import RunOptions
from ssl_c2f.train.rehearsal import dry_run, noise
from ssl_c2f.train.state import Run, prepare

ASSUMED_CLIPS = 10_000
_ROUNDS = 3


def print_plan(options: RunOptions, *, clips: int | None = None, measure: bool = False) -> None:
    """Print the plan of a run over its recordings, or over `clips` clips where there are none to count.

    Raises:
        UserError: there is no audio where the options say.
    """
    num_classes = 10
    if options.data.root or options.data.manifest:
        manifest = open_manifest(options.data)
        training, num_classes = split(manifest, options.data)[0], len(manifest.classes)
        clips = clips_per_epoch(manifest, training, options.fine_geometry)
        print("".join(f"{note}\n" for note in manifest.notes), end="")
        print(amount(manifest, training, options.fine_geometry))
    elif clips is None:
        clips = ASSUMED_CLIPS
        print(f"no data.root: an epoch of {clips:,} clips is assumed (--clips N)")
    plan = make_plan(options, clips, num_classes)
    print(f"{plan.parameters / 1e6:.2f} M parameters; {plan.state_mb:.0f} MB of weights, gradients and optimiser state")
    table(f"plan over {clips:,} clips of {options.audio.clip_seconds:g} s", *plan_rows(plan))
    print(f"rehearsal: {plan.rehearsal_pflops:.3g} PFLOPs, not in the total")
    for phase in plan.phases:
        parts = ", ".join(f"{name} {flops:.3g}" for name, flops in phase.parts.items())
        memory = f"about {phase.activation_mb_per_clip:.1f} MB of activations"
        print(f"{phase.name}, per clip: GFLOPs of a step: {parts}; {memory}")
    if measure:
        _measure(options, clips, num_classes)


def _measure(options: RunOptions, clips: int, num_classes: int) -> None:
    """Time one micro-batch of noise in every phase: front end, forward, backward and optimiser step."""
    nothing = Path()
    manifest = Manifest(nothing, (), tuple(f"class {i}" for i in range(num_classes)))
    corpus = Corpus.whole(manifest, options.data)
    dist = distributed.init(options.train.device)
    curriculum, statistics = options.curriculum(clips, num_classes), InputStatistics(corpus)
    run = Run(options, RunFolder(nothing), statistics, curriculum, dist, None, Stop(), "plan")
    rows = [_measured(run, phase) for phase in run.curriculum.phases]
    hours = sum(float(row[-1]) for row in rows)
    memory = "peak memory" if dist.device.type == "cuda" else "peak memory of the process"
    columns = ("phase", "clips at a time", "ms per clip", "GFLOP/s", memory, "hours")
    rows.append(("total", *[""] * 4, f"{hours:.2f}"))
    table(f"measured on one {dist.device.type}, median of {_ROUNDS} steps", columns, rows)


def _measured(run: Run, phase: Phase) -> Sequence[str]:
    device = run.dist.device
    own_peak = _forget_peak(device)
    size = micro_batches(phase.batch_size, run.options.train.max_batch_per_device)[-1]
    trial, short = dry_run(run, phase, size, steps=_ROUNDS + 1)
    training, items = prepare(trial, short), noise(run, phase, size)
    front_end = FrontEnd(phase.geometry, Statistics(0.0, 1.0)).to(device)
    times = []
    for _ in range(_ROUNDS + 1):  # the first one warms up
        began = time.perf_counter()
        train_step(trial, training, iter([items]), front_end)  # reads the gradient's norm, so it waits for the device
        times.append(time.perf_counter() - began)
    seconds = statistics.median(times[1:]) / size
    flops = step_flops(phase.costs)
    peak = f"{_peak(device) / 2**30:.2f} GiB" if own_peak else "-"
    hours = seconds * phase.steps * phase.batch_size / 3600
    speed = f"{1e3 * seconds:.3g}", f"{flops / seconds / 1e9:.3g}"
    return phase.name, str(size), *speed, peak, f"{hours:.2f}"


def _forget_peak(device: torch.device) -> bool:
    """Begin a new peak of memory, since the system's is that of all phases so far. Whether that can be had here: on a
    CPU, Linux alone lets a process do so."""
    gc.collect()  # what is left of the phase before is not this one's
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak(device: torch.device) -> int:
    """Bytes since `_forget_peak`: of tensors on a GPU; of the whole process, libraries included, on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status["VmHWM"].split()[0])
