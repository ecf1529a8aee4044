"""What a job of a cluster runs: one phase of a run, one fold of a fine-tuning, or a scoring.

A job can be stopped in four ways; it always resumes from the run folder alone:
  USR2     (a time limit comes near, or preemption): save at the next step boundary, then submitit requeues the job
  TERM     (scancel, preemption without a signal of its own): save, then stay until Slurm ends the job, so that Slurm,
           and not this process's exit status, decides whether it was cancelled or is to run again
  INT      (Ctrl-C or `cancel` on this machine): save, then end
  none     (SIGKILL, a node that died): the next attempt resumes from the newest checkpoint
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

from submitit.core.job_environment import JobEnvironment
from submitit.helpers import DelayedSubmission, TorchDistributedEnvironment

from ssl_c2f.core.files import append_line, read_jsonl
from ssl_c2f.core.run_folder import RunFolder
from ssl_c2f.core.signals import Interrupted, Stop

FOLDER = "submitit"  # in the run folder: scripts, logs, and what follows
EVENTS = "events.jsonl"  # when each process of a job started and ended, and why; written by the jobs
COMMAND = "command.json"  # beside the options: the command line of the launch
_PORTS = (20_000, 32_000)  # below the range that systems draw ports of outgoing connections from
_LONGEST_GRACE = 900.0  # seconds that a job which got SIGTERM waits for Slurm to end it


@dataclass(frozen=True)
class Job:
    """One job of a run: names and paths, no state. Pickled by submitit, which calls it in every process of the job."""

    command: str  # pretrain, train, finetune, score, evaluate
    part: str  # the phase, or the fold that is held out
    config: str  # the options, resolved when it was submitted
    run: str
    ckpt: str = ""

    @property
    def name(self) -> str:
        return f"fold-{self.part}" if self.command == "finetune" else self.part

    @property
    def is_alone(self) -> bool:
        """Whether one process does it: scoring is not distributed."""
        return self.command in ("score", "evaluate")

    def __call__(self) -> None:
        preemption = Preemption()
        if self.is_alone and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as local.py starts it
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # there is nothing to be saved
        environment = export_rendezvous()
        self.record(environment, "started", host=environment.hostname, code=str(Path(__file__).parents[1]))
        try:
            self._work(preemption.stop)
        except Interrupted as interrupted:
            self.record(environment, "interrupted", error=str(interrupted), signum=interrupted.signum)
            _leave_group()
            self._leave(preemption, environment, interrupted)
        except BaseException as error:
            self._record_failure(environment, error)
            raise
        self.record(environment, "ended")
        _leave_group()

    def checkpoint(self) -> DelayedSubmission:
        """What submitit requeues: the same job, since all state is in the run folder."""
        return DelayedSubmission(replace(self))

    def record(self, environment: JobEnvironment, event: str, **facts: Any) -> None:
        """Add a line to the run's events, from which `status` shows why a job failed and how often it was requeued."""
        line = {
            "event": event, "part": self.name, "job": environment.job_id, "rank": environment.global_rank,
            "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0")), "pid": os.getpid(),
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"), **facts,
        }
        append_line(Path(self.run) / FOLDER / EVENTS, json.dumps(line))

    def _leave(self, preemption: Preemption, environment: JobEnvironment, interrupted: Interrupted) -> None:
        try:
            preemption.leave(environment, interrupted)
        except Exception as error:
            if error is not interrupted:  # it is not to be requeued, or cannot be
                self._record_failure(environment, error)
            raise

    def _record_failure(self, environment: JobEnvironment, error: BaseException) -> None:
        self.record(environment, "failed", error=f"{type(error).__name__}: {str(error).strip().rpartition(chr(10))[2]}")

    def _work(self, stop: Stop) -> None:
        # Imported here, so that an import that fails is recorded as the reason why the job failed.
        from ssl_c2f.core import options
        from ssl_c2f.report import write_page
        from ssl_c2f.tasks import commands, config
        from ssl_c2f.tasks.evaluate import EvaluateOptions, evaluate
        from ssl_c2f.tasks.finetune import FinetuneOptions, finetune

        launch = Path(self.config).with_name(COMMAND)
        if launch.exists():  # the run's provenance shows the launch, not submitit's own command
            sys.argv = json.loads(launch.read_text())
        file, ckpt, is_score = Path(self.config), Path(self.ckpt), self.command == "score"
        match self.command:
            case "pretrain" | "train":
                model = config.PretrainOptions if self.command == "pretrain" else config.TrainOptions
                commands.run_phases(options.load(model, file), Path(self.run), only={self.part}, stop=stop)
            case "finetune" | "score":
                fold = {} if is_score or self.part == "all" else {"folds": (int(self.part),)}
                tuning = options.load(FinetuneOptions, file).model_copy(update={"run_dir": self.run, **fold})
                finetune(ckpt, tuning, stop, report=is_score)
                if is_score and RunFolder(ckpt).config.exists():
                    write_page([ckpt], ckpt / "report.html")
            case _:
                evaluate(ckpt, options.load(EvaluateOptions, file))


class Preemption:
    """Turns USR2 into a request to stop at a step boundary; submitit's own handler, which requeues, is called after."""

    def __init__(self) -> None:
        self.stop = Stop()
        self.asked = False
        self._requeue = signal.getsignal(signal.SIGUSR2)  # submitit's handler; the default without a cluster
        if callable(self._requeue):
            signal.signal(signal.SIGUSR2, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self.stop.signum = number

    def leave(self, environment: JobEnvironment, interrupted: Interrupted) -> None:
        """End this process after the state was saved, so that the scheduler does the right thing next.

        Raises:
            Interrupted: there is no scheduler. SystemExit: it will start the job again.
        """
        on_slurm = environment.name() == "slurm"
        if on_slurm and (environment.global_rank > 0 or not self.asked):
            # a process that ends would end the job's step, and with it the one that talks to Slurm
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            self._wait(environment)
        if self.asked and environment.global_rank == 0 and callable(self._requeue):
            self._requeue(signal.SIGUSR2, None)
        if self.asked:
            raise SystemExit(0)
        raise interrupted

    def _wait(self, environment: JobEnvironment) -> None:
        until = time.monotonic() + _LONGEST_GRACE
        while time.monotonic() < until and not (self.asked and environment.global_rank == 0):
            time.sleep(0.2)


def export_rendezvous() -> JobEnvironment:
    """Set the variables that `distributed.init` reads (RANK, WORLD_SIZE, MASTER_ADDR, ...) from the scheduler's."""
    environment = JobEnvironment()
    if environment.num_tasks > 1:
        # A port of its own for each attempt: the one before may still hold its port.
        draw = Random(f"{environment.job_id} {os.environ.get('SLURM_RESTART_COUNT', '0')}")
        os.environ["MASTER_PORT"] = str(draw.randint(*_PORTS))
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        if environment.num_nodes == 1:  # works where the node's name does not resolve
            os.environ["MASTER_ADDR"] = "127.0.0.1"
        import torch

        if torch.cuda.device_count() == 1:  # a cluster that shows each process only its own
            os.environ["LOCAL_RANK"] = "0"
    return environment


def events_of(run: Path) -> list[dict[str, Any]]:
    """What the jobs of a run have recorded."""
    return read_jsonl(run / FOLDER / EVENTS)


def _leave_group() -> None:
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        with contextlib.suppress(RuntimeError):  # others may be gone
            torch.distributed.destroy_process_group()
