"""Runs as jobs of a Slurm cluster, or of this machine.

  python slurm/launch.py pretrain [CONFIG] [key=value ...]     a job for each phase, each after the one before
  python slurm/launch.py finetune --ckpt RUN [key=value ...]   an array of folds, then one job that scores them
  python slurm/launch.py pipeline [CONFIG] [key=value ...] [finetune.key=value ...]      both, and a report
  python slurm/launch.py status RUN                            how they are getting on
  python slurm/launch.py cancel RUN

The same command again goes on: what is done or queued is left alone. docs/slurm.md has more.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ssl_c2f import cli
from ssl_c2f.cli import CKPT, CONFIG, Argument, Command, argument
from ssl_c2f.core.options import UserError

SBATCH = ("partition", "account", "qos", "constraint", "exclude", "comment", "mail-user", "mail-type")


def number(name: str, least: int, default: int, help: str | None = None) -> Argument:
    """A flag with a whole number."""
    return argument(name, help, type=_at_least(name, least), default=default, metavar="N")


def _at_least(name: str, least: int) -> Callable[[str], int]:
    def whole_number(word: str) -> int:
        if (value := int(word)) < least:
            raise UserError(f"{name} must be at least {least}")
        return value

    return whole_number


FLAGS = (
    argument("--run-dir", "the run's folder, which all nodes must see", type=Path),
    argument("--cluster", "auto: slurm where sbatch is there and sinfo answers, else local; debug: in this process",
             choices=("auto", "slurm", "local", "debug"), default="auto"),
    number("--nodes", 1, 1),
    argument("--ngpus", "GPUs of a node, a process for each, of a type: a100:2; 0: the CPU", default="1",
             metavar="[TYPE:]N"),
    number("--cpus-per-task", 1, 8),
    argument("--mem", "of a node, such as 64GB"),
    number("--timeout", 1, 24 * 60, "minutes; a job that needs more is requeued"),
    number("--grace", 1, 120, "seconds before its end at which a job is told to save"),
    number("--max-timeouts", 0, 30, "how often a job is requeued at its time limit"),
    *(argument(f"--{name}", "as sbatch has it") for name in SBATCH),
    argument("--sbatch", "any other option of sbatch: reservation=friday, wckey=mine", action="append", default=[],
             metavar="KEY[=VALUE]"),
    argument("--setup", "before the job: 'module load x'", action="append", default=[], metavar="LINE"),
    argument("--srun-args", "more for srun; one alone: --srun-args=--x", default="", metavar="'--x --y=1'"),
    argument("--python", "such as 'apptainer exec --nv image.sif python'", metavar="COMMAND"),
    argument("--snapshot", "jobs use a copy of the code as it is now", action="store_true"),
    argument("--dry-run", "print scripts, what waits for what, and the cost", action="store_true"),
    argument("--wait", "stay until all jobs have ended", action="store_true"),
)
SWEEPS = (
    argument("--seeds", "one run for each, as arrays", default="", metavar="0,1,2"),
    argument("--sweep", "one run for each value", action="append", default=[], metavar="KEY=A,B,C"),
)
PHASES = argument("--phases", "only these", default="", metavar="A,B")
TUNING = argument("--finetune-config", metavar="CONFIG")


def _launched(*own: Argument) -> Command:
    return Command("launch.commands.launch", None, (CONFIG, *own, *SWEEPS, *FLAGS))


RUN = argument("run", type=Path, metavar="RUN")
COMMANDS = {
    "pretrain": _launched(PHASES), "train": _launched(PHASES), "finetune": _launched(CKPT), "evaluate": _launched(CKPT),
    "pipeline": _launched(TUNING),
    "status": Command("launch.status.print_status", None, (RUN,)),
    "cancel": Command("launch.commands.cancel", None, (RUN,)),
}


def main(words: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 where a job failed, 2 for a user's mistake (told in one line)."""
    return cli.main(words, cli.parser(COMMANDS, "launch.py", __doc__ or ""))


if __name__ == "__main__":
    sys.exit(main())
