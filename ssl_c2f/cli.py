"""The command line: a table of commands, each with its arguments and the function that they are given to."""

from __future__ import annotations

import argparse
import io
import os
import sys
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from ssl_c2f import __version__
from ssl_c2f.core import options as option_files
from ssl_c2f.core.options import UserError
from ssl_c2f.core.signals import Interrupted


@dataclass(frozen=True)
class Argument:
    """A flag or a positional argument: what argparse's `add_argument` is called with."""

    name: str
    how: Mapping[str, Any]


@dataclass(frozen=True)
class Command:
    """A command. `does` is a function of the package, imported when the command is given, so that --help is fast.

    The function gets the arguments by name, or all of them if it has a parameter `arguments`. Where it has a parameter
    `options`, an `Options` class, the words KEY=VALUE are read as that.
    """

    does: str
    help: str | None
    arguments: tuple[Argument, ...] = ()


@dataclass(frozen=True)
class Group:
    """Commands of two words."""

    help: str
    commands: Mapping[str, Command]


Table = Mapping[str, Command | Group]


def argument(name: str, help: str | None = None, **how: Any) -> Argument:
    return Argument(name, {"help": help, **how})


def words(help: str) -> Argument:
    """What stands behind a command without a flag; `parse` collects it from between flags as well."""
    return argument("words", help, nargs="*", metavar="CONFIG | KEY=VALUE")


CONFIG = words("a YAML file or the name of a shipped config, then overrides such as data.root=FOLDER phases.0.epochs=5")
OPTIONS = words("options such as data.root=FOLDER")
CKPT = argument(
    "--ckpt", "run folder, phase, checkpoint or published file; or c2f_nano, which comes with the package", type=Path,
    required=True, metavar="RUN|FILE",
)
NEW_FOLDER = argument("--out", "a new folder", type=Path, required=True, metavar="DIR")

CONFIGS = Group("show, validate or compare configs", {
    "show": Command("tasks.commands.show", "all options of a config, resolved", (CONFIG,)),
    "validate": Command("tasks.commands.validate", "say whether a config is right", (CONFIG,)),
    "diff": Command("tasks.commands.diff", "options at which two configs differ", (words("CONFIG CONFIG"),)),
})
DATA = Group("look at recordings before training on them, list them, pack them", {
    "manifest": Command("tasks.data.manifest", "write a list of recordings with labels and folds", (
        OPTIONS, argument("--out", type=Path, required=True, metavar="FILE.csv|FILE.jsonl"),
    )),
    "check": Command("tasks.data.check", "decode every recording whole and name the bad ones", (OPTIONS,)),
    "stats": Command("tasks.data.stats", "durations, rates and labels; mean and std per geometry", (OPTIONS,)),
    "build": Command("tasks.data.build_public", "the manifest of a public set, such as esc50, from its own tables", (
        argument("name", "esc50, esc10, urbansound8k, speech_commands, fsd50k, ...", metavar="SET"), OPTIONS,
        argument("--out", "default: FOLDER/manifest.csv", type=Path, metavar="FILE"),
        argument("--download", "fetch it first, where torchaudio can", action="store_true"),
    )),
    "shard": Command("tasks.data.shard", "pack many small recordings into few large files", (
        OPTIONS, argument("--out", type=Path, required=True, metavar="FOLDER"),
        argument("--gigabytes", "of a shard, at most", type=float, default=1.0),
    )),
})
COMMANDS: Table = {
    "demo": Command("tasks.demo.demo", "the whole story on sounds that it makes itself, in under three minutes", (
        argument("folder", nargs="?", type=Path, default=Path("runs/demo")),
    )),
    "pretrain": Command(
        "tasks.commands.pretrain", "phases with a masked objective; the same folder again resumes", (CONFIG,)
    ),
    "train": Command("tasks.commands.train", "phases with labels, from scratch", (CONFIG,)),
    "finetune": Command("tasks.commands.finetune", "a classifier on a pretrained encoder, fold by fold", (
        CKPT, words("overrides such as data.root=FOLDER folds=[1]"),
        argument("--config", "a YAML file or the name of a shipped config", metavar="CONFIG", dest="config_name"),
    )),
    "evaluate": Command("tasks.evaluate.evaluate", "scores of a classifier on labelled recordings", (CKPT, OPTIONS)),
    "probe": Command("tasks.probe.probe", "linear and kNN probes of frozen features", (CKPT, OPTIONS)),
    "embed": Command("tasks.embed.embed", "features of recordings to a file", (CKPT, OPTIONS)),
    "predict": Command("tasks.commands.predict", "labels of recordings, and their timeline", (
        CKPT, words("recordings or folders, and options KEY=VALUE"),
    )),
    "plan": Command("tasks.commands.plan", "tokens, FLOPs, memory, and the share of a single-phase run", (
        CONFIG, argument("--measure", "also run a step of every phase on this machine", action="store_true"),
        argument("--clips", "clips of an epoch, where there is no data.root to count", type=int),
    )),
    "convert": Command(
        "tasks.convert.convert", "weights of AST, SSAST, AudioMAE, transformers or timm, as a checkpoint of ours", (
            argument("file", "a file of weights, or a folder of transformers'", type=Path, metavar="FILE"), NEW_FOLDER,
            words("what the file does not say, such as mean=-4.27 std=4.57 stride_f=10 stride_t=10 labels=NAMES.txt"),
        )),
    "export": Command("tasks.export.export", "a checkpoint for transformers, ONNX or anything that reads safetensors", (
        argument("ckpt", "run folder, phase or checkpoint", type=Path, metavar="RUN|FILE"), NEW_FOLDER,
        argument("--format", choices=("hf", "onnx", "safetensors"), required=True),
    )),
    "report": Command("tasks.commands.report", "one HTML page about one or more runs, or a W&B report", (
        argument("runs", nargs="+", type=Path, metavar="RUN"), argument("--out", type=Path, metavar="FILE.html"),
        argument("--wandb", "a W&B report instead of the page; again: it is updated", action="store_true"),
    )),
    "config": CONFIGS,
    "data": DATA,
}


class Parser(argparse.ArgumentParser):
    """Tells a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def parser(
    table: Table = COMMANDS, program: str = "ssl_c2f", about: str = "Coarse-to-fine pretraining of audio transformers."
) -> argparse.ArgumentParser:
    """Every command with its arguments."""
    top = Parser(prog=program, description=about, formatter_class=argparse.RawTextHelpFormatter)
    top.add_argument("--version", action="version", version=f"ssl_c2f {__version__}")
    _add(top, table, "command", "COMMAND")
    return top


def _add(top: argparse.ArgumentParser, table: Table, level: str, shown: str) -> None:
    subs = top.add_subparsers(dest=level, required=True, metavar=shown)
    for name, command in table.items():
        sub = subs.add_parser(name, help=command.help, description=command.help)
        if isinstance(command, Group):
            _add(sub, command.commands, "kind", "|".join(command.commands))
            continue
        sub.set_defaults(does=command.does)
        for each in command.arguments:
            sub.add_argument(each.name, **each.how)


def parse(top: argparse.ArgumentParser, given: Sequence[str] | None) -> argparse.Namespace:
    """Arguments, with overrides before and behind flags: argparse itself takes them in one place only.

    Raises:
        UserError: a wrong or unknown argument.
    """
    arguments, more = top.parse_known_args(given)
    if wrong := [word for word in more if word.startswith("-") or not hasattr(arguments, "words")]:
        raise UserError(f"unknown argument {wrong[0]} (see {top.prog} {arguments.command} --help)")
    if more:
        arguments.words += more
    return arguments


def call(arguments: argparse.Namespace) -> int:
    """Call the function of a command; returns the exit status, which is 0 unless the function says otherwise."""
    module, _, name = arguments.does.rpartition(".")
    function = getattr(import_module(f"ssl_c2f.{module}"), name)
    hints = typing.get_type_hints(function)
    if "arguments" in hints:
        return int(function(arguments))
    given = {key: value for key, value in vars(arguments).items() if key in hints}
    if "options" in hints:
        given["options"] = option_files.load(hints["options"], None, arguments.words)
    status = function(**given)
    return status if isinstance(status, int) else 0


def main(
    given: Sequence[str] | None = None, top: argparse.ArgumentParser | None = None
) -> int:
    """Do what the words say; returns the exit status: 0, 2 for a user's mistake (told in one line), 128 + N for signal
    N, or what the command has for one."""
    # On a busy machine OpenMP's threads spin while they wait for each other: a tiny run took ten times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    top = top or parser()
    try:
        return call(parse(top, given))
    except UserError as error:
        print(f"{top.prog}: {error}", file=sys.stderr)
        return 2
    except Interrupted as error:
        print(f"{top.prog}: {error}", file=sys.stderr)
        return 128 + error.signum
    except KeyboardInterrupt:
        print(f"{top.prog}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 141


if __name__ == "__main__":
    sys.exit(main())
