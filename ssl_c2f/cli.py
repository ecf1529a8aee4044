"""The command line. Heavy modules are imported by the command that needs them, so that --help answers at once."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ssl_c2f import __version__
from ssl_c2f.core.options import UserError

if TYPE_CHECKING:
    from ssl_c2f.tasks.data import DataCommandOptions

CONFIG_HELP = "a YAML file or the name of a shipped config, then overrides such as optim.lr=1e-3 phases.0.epochs=5"


def main(words: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 for a user's mistake (told in one line), 128 + N for signal N."""
    # On a busy machine OpenMP's threads spin while they wait for each other: a tiny run took ten times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    try:
        arguments = parse(parser(), words)
        status = arguments.run(arguments)
    except UserError as error:
        print(f"ssl_c2f: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ssl_c2f: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 141
    except Exception as error:
        if signum := getattr(error, "signum", 0):  # signals.Interrupted, which is not imported here for --help's sake
            print(f"ssl_c2f: {error}", file=sys.stderr)
            return 128 + int(signum)
        raise
    return status or 0


def parse(top: argparse.ArgumentParser, words: Sequence[str] | None) -> argparse.Namespace:
    """Arguments, with overrides before and behind flags: argparse itself takes them in one place only.

    Raises:
        UserError: an unknown argument.
    """
    arguments, more = top.parse_known_args(words)
    if wrong := [word for word in more if word.startswith("-") or not hasattr(arguments, "words")]:
        raise UserError(f"unknown argument {wrong[0]} (see {top.prog} {arguments.command} --help)")
    if more:
        arguments.words += more
    return arguments


def parser() -> argparse.ArgumentParser:
    """Every command with its arguments."""
    top = argparse.ArgumentParser(prog="ssl_c2f", description="Coarse-to-fine pretraining of audio transformers.")
    top.add_argument("--version", action="version", version=f"ssl_c2f {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int | None], help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run)
        return sub

    def words_of(sub: argparse.ArgumentParser, help: str = CONFIG_HELP) -> None:
        sub.add_argument("words", nargs="*", metavar="CONFIG | KEY=VALUE", help=help)

    def checkpoint_of(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--ckpt", type=Path, required=True, metavar="RUN|FILE", help="run folder, phase or checkpoint")

    sub = command("demo", _demo, "the whole story on sounds that it makes itself, in under three minutes")
    sub.add_argument("folder", nargs="?", type=Path, default=Path("runs/demo"))
    words_of(command("pretrain", _pretrain, "phases with a masked objective; the same folder again resumes"))
    words_of(command("train", _pretrain, "phases with labels, from scratch"))
    sub = command("finetune", _finetune, "a classifier on a pretrained encoder, fold by fold")
    checkpoint_of(sub)
    sub.add_argument("--config", default=None, metavar="CONFIG", help="a YAML file or the name of a shipped config")
    words_of(sub, "overrides such as data.root=FOLDER folds=[1]")
    for name, run, help in (
        ("evaluate", _evaluate, "scores of a classifier on labelled recordings"),
        ("probe", _probe, "linear and kNN probes of frozen features"),
        ("embed", _embed, "features of recordings to a file"),
    ):
        sub = command(name, run, help)
        checkpoint_of(sub)
        words_of(sub, "options such as data.root=FOLDER")
    sub = command("predict", _predict, "labels of recordings, and their timeline")
    checkpoint_of(sub)
    words_of(sub, "recordings or folders, and options KEY=VALUE")
    sub = command("plan", _plan, "tokens, FLOPs, memory, and the share of a single-phase run")
    sub.add_argument("--measure", action="store_true", help="also run a step of every phase on this machine")
    sub.add_argument("--clips", type=int, default=None, help="clips of an epoch, where there is no data.root to count")
    words_of(sub)
    sub = command("convert", _convert, "weights of AST, SSAST, AudioMAE, transformers or timm, as a checkpoint of ours")
    sub.add_argument("file", type=Path, metavar="FILE", help="a file of weights, or a folder of transformers'")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder, which --ckpt takes")
    words_of(sub, "what the file does not say, such as mean=-4.27 std=4.57 stride_f=10 stride_t=10 labels=NAMES.txt")
    sub = command("export", _export, "a checkpoint for transformers, ONNX or anything that reads safetensors")
    sub.add_argument("ckpt", type=Path, metavar="RUN|FILE", help="run folder, phase or checkpoint")
    sub.add_argument("--format", choices=("hf", "onnx", "safetensors"), required=True)
    sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    sub = command("report", _report, "one HTML page about one or more runs, or a W&B report")
    sub.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    sub.add_argument("--out", type=Path, default=None, metavar="FILE.html")
    sub.add_argument("--wandb", action="store_true", help="a W&B report instead of the page; again: it is updated")

    sub = command("config", _config_show, "show, validate or compare configs")
    kinds = sub.add_subparsers(dest="kind", required=True, metavar="show|validate|diff")
    for name, run, help in (
        ("show", _config_show, "all options of a config, resolved"),
        ("validate", _config_validate, "say whether a config is right"),
        ("diff", _config_diff, "options at which two configs differ"),
    ):
        sub = kinds.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run)
        words_of(sub, "CONFIG [KEY=VALUE ...]" if name != "diff" else "CONFIG CONFIG")
    sub = command("data", _data_manifest, "look at recordings before training on them, list them, pack them")
    kinds = sub.add_subparsers(dest="kind", required=True, metavar="manifest|check|stats|build|shard")
    looks: tuple[tuple[str, Callable[[argparse.Namespace], int | None], str], ...] = (
        ("manifest", _data_manifest, "write a list of recordings with labels and folds"),
        ("check", _data_check, "decode every recording whole and name the bad ones"),
        ("stats", _data_stats, "durations, rates and labels; mean and deviation per geometry"),
        ("build", _data_build, "the manifest of a public set, such as esc50, from its own tables"),
        ("shard", _data_shard, "pack many small recordings into few large files"),
    )
    for name, look, help in looks:
        sub = kinds.add_parser(name, help=help, description=help)
        sub.set_defaults(run=look)
        if name == "build":
            sub.add_argument("set", metavar="SET", help="esc50, esc10, urbansound8k, speech_commands, fsd50k, ...")
            sub.add_argument("--out", type=Path, default=None, metavar="FILE", help="default: FOLDER/manifest.csv")
            sub.add_argument("--download", action="store_true", help="fetch it first, where torchaudio can")
        words_of(sub, "data.root=FOLDER and other options KEY=VALUE")
        if name == "manifest":
            sub.add_argument("--out", type=Path, required=True, metavar="FILE.csv|FILE.jsonl")
        if name == "shard":
            sub.add_argument("--out", type=Path, required=True, metavar="FOLDER")
            sub.add_argument("--gigabytes", type=float, default=1.0, help="of a shard, at most")
    return top


def _demo(arguments: argparse.Namespace) -> None:
    from ssl_c2f.tasks.demo import demo

    demo(arguments.folder)


def _pretrain(arguments: argparse.Namespace) -> None:
    from ssl_c2f.report.summary import print_summary
    from ssl_c2f.tasks import config
    from ssl_c2f.train import engine
    from ssl_c2f.train.weights import initial_weights

    command: str = arguments.command
    model: type[config.FolderOptions] = config.PretrainOptions if command == "pretrain" else config.TrainOptions
    options, name = config.read(command, model, arguments.words)
    path = Path(options.run_dir or f"runs/{name}")
    engine.run(options, path, initial=initial_weights(options.init) if options.init else None, kind=command)
    print_summary(path)


def _finetune(arguments: argparse.Namespace) -> None:
    from ssl_c2f.tasks import config
    from ssl_c2f.tasks.finetune import FinetuneOptions, checkpoint_defaults, finetune
    from ssl_c2f.train.weights import load_weights

    words = [*([arguments.config] if arguments.config else []), *arguments.words]
    defaults = checkpoint_defaults(load_weights(arguments.ckpt))
    options, _ = config.read("finetune", FinetuneOptions, words, defaults)
    finetune(arguments.ckpt, options)


def _evaluate(arguments: argparse.Namespace) -> None:
    from ssl_c2f.core import options
    from ssl_c2f.tasks.evaluate import EvaluateOptions, evaluate

    evaluate(arguments.ckpt, options.load(EvaluateOptions, None, arguments.words))


def _probe(arguments: argparse.Namespace) -> None:
    from ssl_c2f.core import options
    from ssl_c2f.tasks.probe import ProbeOptions, probe

    probe(arguments.ckpt, options.load(ProbeOptions, None, arguments.words))


def _embed(arguments: argparse.Namespace) -> None:
    from ssl_c2f.core import options
    from ssl_c2f.tasks.embed import EmbedOptions, embed

    embed(arguments.ckpt, options.load(EmbedOptions, None, arguments.words))


def _predict(arguments: argparse.Namespace) -> None:
    from ssl_c2f.core import options
    from ssl_c2f.tasks.predict import PredictOptions, predict

    paths = [Path(word) for word in arguments.words if "=" not in word or Path(word).exists()]
    overrides = [word for word in arguments.words if Path(word) not in paths]
    predict(arguments.ckpt, paths, options.load(PredictOptions, None, overrides))


def _plan(arguments: argparse.Namespace) -> None:
    from ssl_c2f.tasks import config
    from ssl_c2f.tasks.plan import print_plan

    print_plan(config.read_any(arguments.words), clips=arguments.clips, measure=arguments.measure)


def _convert(arguments: argparse.Namespace) -> None:
    from ssl_c2f.core import options
    from ssl_c2f.tasks.convert import convert
    from ssl_c2f.train.weights import ImportOptions

    convert(arguments.file, arguments.out, options.load(ImportOptions, None, arguments.words))


def _export(arguments: argparse.Namespace) -> None:
    from ssl_c2f.tasks.export import export

    export(arguments.ckpt, arguments.format, arguments.out)


def _report(arguments: argparse.Namespace) -> None:
    if arguments.wandb:
        from ssl_c2f.report.wandb_report import write_report

        print(write_report(arguments.runs))
        if arguments.out is None:
            return
    from ssl_c2f.report import write_page

    out = arguments.out or arguments.runs[0] / "report.html"
    write_page(arguments.runs, out)
    print(out)


def _config_show(arguments: argparse.Namespace) -> None:
    from ssl_c2f.core import options
    from ssl_c2f.tasks import config

    print(options.dump(config.read_any(arguments.words)), end="")


def _config_validate(arguments: argparse.Namespace) -> None:
    from ssl_c2f.tasks import config

    options = config.read_any(arguments.words)
    print(f"{' '.join(arguments.words) or 'the default config'} is valid ({len(options.phases)} phases)")


def _config_diff(arguments: argparse.Namespace) -> None:
    from ssl_c2f.core import options
    from ssl_c2f.tasks import config

    if len(arguments.words) != 2:
        raise UserError("config diff takes two configs")
    a, b = (config.read_any([word]) for word in arguments.words)
    for key, old, new in options.differences(a, b):
        print(f"{key}: {old} -> {new}")


def _data_options(arguments: argparse.Namespace) -> DataCommandOptions:
    from ssl_c2f.core import options
    from ssl_c2f.tasks.data import DataCommandOptions

    return options.load(DataCommandOptions, None, arguments.words)


def _data_manifest(arguments: argparse.Namespace) -> None:
    from ssl_c2f.tasks import data as inspect

    inspect.manifest(_data_options(arguments), arguments.out)


def _data_build(arguments: argparse.Namespace) -> None:
    from ssl_c2f.tasks import data as inspect

    inspect.build_public(_data_options(arguments), arguments.set, arguments.out, arguments.download)


def _data_shard(arguments: argparse.Namespace) -> None:
    from ssl_c2f.tasks import data as inspect

    inspect.shard(_data_options(arguments), arguments.out, arguments.gigabytes)


def _data_check(arguments: argparse.Namespace) -> int:
    from ssl_c2f.tasks import data as inspect

    return inspect.check(_data_options(arguments))


def _data_stats(arguments: argparse.Namespace) -> None:
    from ssl_c2f.tasks import data as inspect

    inspect.stats(_data_options(arguments))


if __name__ == "__main__":
    sys.exit(main())
