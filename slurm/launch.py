"""Runs as jobs of a Slurm cluster, or of this machine.

  python slurm/launch.py pretrain [CONFIG] [key=value ...]     a job for each phase, each after the one before
  python slurm/launch.py finetune --ckpt RUN [key=value ...]   an array of folds, then one job that scores them
  python slurm/launch.py pipeline [CONFIG] [key=value ...] [finetune.key=value ...]      both, and a report
  python slurm/launch.py status RUN                            how they are getting on
  python slurm/launch.py cancel RUN

The same command again goes on: what is done or queued is left alone. docs/slurm.md has more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ssl_c2f.cli import parse
from ssl_c2f.core.options import UserError

WORDS = "a YAML file or the name of a shipped config, then overrides such as data.root=FOLDER phases.0.epochs=5"
CLUSTER = "auto: slurm where sbatch is there and sinfo answers, else local; debug: in this process"


def main(words: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 where a job failed, 2 for a user's mistake (told in one line)."""
    try:
        arguments = parse(parser(), words)
        from ssl_c2f.launch import commands as launching  # imports torch: --help need not

        return launching.launch(arguments)
    except UserError as error:
        print(f"launch.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("launch.py: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 141


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="launch.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in ("pretrain", "train", "finetune", "evaluate", "pipeline"):
        sub = commands.add_parser(name)
        sub.add_argument("words", nargs="*", metavar="CONFIG | KEY=VALUE", help=WORDS)
        if name in ("finetune", "evaluate"):
            sub.add_argument("--ckpt", type=Path, required=True, metavar="RUN|FILE")
        if name == "pipeline":
            sub.add_argument("--finetune-config", default=None, metavar="CONFIG")
        sub.add_argument("--seeds", default="", metavar="0,1,2", help="one run for each, as arrays")
        sub.add_argument("--sweep", action="append", default=[], metavar="KEY=A,B,C", help="one run for each value")
        if name in ("pretrain", "train"):
            sub.add_argument("--phases", default="", metavar="A,B", help="only these")
        _add_flags(sub)
    for name in ("status", "cancel"):
        commands.add_parser(name).add_argument("run", type=Path, metavar="RUN")
    return top


def _add_flags(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--run-dir", type=Path, default=None, help="the run's folder, which all nodes must see")
    sub.add_argument("--cluster", choices=("auto", "slurm", "local", "debug"), default="auto", help=CLUSTER)
    sub.add_argument("--nodes", type=int, default=1)
    sub.add_argument("--ngpus", type=int, default=1, help="GPUs of a node, a process for each; 0: the CPU")
    sub.add_argument("--cpus-per-task", type=int, default=8)
    sub.add_argument("--mem", default=None, help="of a node, such as 64GB")
    sub.add_argument("--timeout", type=int, default=24 * 60, help="minutes; a job that needs more is requeued")
    sub.add_argument("--grace", type=int, default=120, help="seconds before its end at which a job is told to save")
    sub.add_argument("--max-timeouts", type=int, default=30, help="how often a job is requeued at its time limit")
    for name in ("partition", "account", "qos", "constraint", "exclude", "comment", "mail-user", "mail-type"):
        sub.add_argument(f"--{name}", default=None, help="as sbatch has it")
    sub.add_argument("--setup", action="append", default=[], metavar="LINE", help="before the job: 'module load x'")
    sub.add_argument("--srun-args", default="", metavar="'--x --y=1'", help="more for srun; one alone: --srun-args=--x")
    sub.add_argument("--python", default=None, metavar="COMMAND", help="such as 'apptainer exec --nv image.sif python'")
    sub.add_argument("--snapshot", action="store_true", help="jobs use a copy of the code as it is now")
    sub.add_argument("--dry-run", action="store_true", help="print scripts, what waits for what, and the cost")
    sub.add_argument("--wait", action="store_true", help="stay until all jobs have ended")


if __name__ == "__main__":
    sys.exit(main())
