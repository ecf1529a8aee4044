"""Small runs on the cluster, and ways to strike them at a chosen moment.

A process that is to be struck is stopped first (SIGSTOP), so that it is hit at a known step on any machine.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import launcher
from waits import wait_for

from ssl_c2f.launch import cluster, schedule

STEPS = 40  # of a phase
CONFIG = """
compression: frame_shift
audio: {clip_seconds: 1.0, num_mels: 32}
model: {width: 16, depth: 1, heads: 2, patch_f: 16, patch_t: 8}
objective: {name: mae, decoder_width: 16, decoder_depth: 1, decoder_heads: 2}
phases:
  - {name: coarse, steps: 40, time_factor: 4, mask_ratio: 0.70, batch_size: 8, lr: 1.0e-3, warmup_steps: 2}
  - {name: fine, steps: 40, time_factor: 1, mask_ratio: 0.75, batch_size: 8, lr: 1.0e-3}
ema: 0.9
train: {log_every: 1, checkpoint_every: 10, device: cpu}
tracking: {wandb: off}
"""
MIDDLE = "  - {name: middle, steps: 40, time_factor: 2, batch_size: 8, lr: 1.0e-3}\n"
THREE = CONFIG.replace("  - {name: fine", MIDDLE + "  - {name: fine")
_launching = threading.Lock()  # os.environ and stdout are everybody's


def launch(*words: object) -> tuple[int, str]:
    """slurm/launch.py in this process, which has imported torch already: its exit status and all that it printed."""
    said = io.StringIO()
    with _launching, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        return launcher.launch(*words), said.getvalue()


def weights(run: Path) -> bytes:
    """The last weights of a run and their moving average."""
    phase = sorted((run / "phases").iterdir())[-1]
    assert (phase / "done").exists(), f"{run} is not finished"
    newest = sorted((phase / "checkpoints").glob("step-*"))[-1]
    return (newest / "model.safetensors").read_bytes() + (newest / "ema.safetensors").read_bytes()


def straight(config: Path, sounds: Path, run: Path, processes: int) -> bytes:
    """The weights of the run that nobody disturbs."""
    torchrun = ["torch.distributed.run", f"--nproc-per-node={processes}", "-m"] if processes > 1 else []
    words = ["ssl_c2f", "pretrain", str(config), f"data.root={sounds}", f"run_dir={run}"]
    command = [sys.executable, "-m", *torchrun, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0 and "FutureWarning" not in done.stderr, done.stderr
    return weights(run)


def local(config: Path, sounds: Path, run: Path, processes: int) -> bytes:
    """The weights of a run by `--cluster local`."""
    words = [sys.executable, launcher.LAUNCH, "pretrain", config, f"data.root={sounds}", "--run-dir", run]
    command = [*words, "--cluster", "local", "--ngpus", str(processes)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return weights(run)


@dataclass
class ClusterRun:
    """A run that is launched, struck, and launched again."""

    path: Path
    words: tuple[object, ...]
    ranks: int = 1

    def launch(self) -> str:
        status, said = launch("pretrain", *self.words, "--cluster", "slurm", "--run-dir", self.path)
        assert status == 0, said
        return said

    @property
    def ids(self) -> list[str]:
        return [job["id"] for job in schedule.read_jobs(self.path).values()]

    def id(self, part: str) -> str:
        return str(schedule.read_jobs(self.path)[part]["id"])

    def events(self, event: str, part: str) -> list[dict[str, Any]]:
        file = self.path / "submitit" / "events.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [e for e in map(json.loads, lines) if e["event"] == event and e["part"] == part]

    def step(self) -> int:
        file = self.path / "metrics.jsonl"
        lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
        return int(json.loads(lines[-1])["step"]) if lines else 0

    def stop_at(self, part: str, step: int, attempt: int) -> list[int]:
        """Stop the processes of a part's attempt (from 1) once the run has done a step; returns their pids."""
        wait_for(lambda: len(self.events("started", part)) >= attempt * self.ranks, f"attempt {attempt} of {part}", 150)
        pids = [event["pid"] for event in self.events("started", part)[-self.ranks:]]
        wait_for(lambda: self.step() >= step, f"step {step}", 150)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        return pids

    def finish(self, seconds: float = 300) -> None:
        wait_for(lambda: not cluster.active(self.ids) or time.sleep(0.5), f"{self.path.name} to end", seconds)


def go_on(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def is_pending(pid: int, number: int) -> bool:
    """Whether a signal waits for a stopped process."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except FileNotFoundError:
        return True
    mask = next(int(line.split()[1], 16) for line in lines if line.startswith("ShdPnd:"))
    return bool(mask >> (number - 1) & 1)
