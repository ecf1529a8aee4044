"""Commands that read a config or paths among their words: from the words to the function that does the work."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from ssl_c2f.core import options as option_files
from ssl_c2f.core.options import UserError
from ssl_c2f.core.signals import Stop
from ssl_c2f.report import write_page
from ssl_c2f.report.summary import print_summary
from ssl_c2f.tasks import config
from ssl_c2f.tasks import finetune as tuning
from ssl_c2f.tasks import predict as prediction
from ssl_c2f.tasks.plan import print_plan
from ssl_c2f.train import engine
from ssl_c2f.train.weights import initial_weights, load_weights


def pretrain(words: Sequence[str]) -> None:
    """`ssl_c2f pretrain`."""
    _run(config.PretrainOptions, words)


def train(words: Sequence[str]) -> None:
    """`ssl_c2f train`."""
    _run(config.TrainOptions, words)


def _run(model: type[config.FolderOptions], words: Sequence[str]) -> None:
    options, name = config.read(model, words)
    path = Path(options.run_dir or f"runs/{name}")
    run_phases(options, path)
    print_summary(path)


def run_phases(
    options: config.FolderOptions, path: Path, only: Collection[str] | None = None, stop: Stop | None = None
) -> None:
    """Do the phases of a run that are not done yet (of those named in `only`). Raises as `engine.run`."""
    initial = initial_weights(options.init) if options.init else None
    engine.run(options, path, initial=initial, only=only, stop=stop, kind=config.command_of(type(options)))


def finetune(ckpt: Path, config_name: str | None, words: Sequence[str]) -> None:
    """`ssl_c2f finetune`."""
    words = [*([config_name] if config_name else []), *words]
    options, _ = config.read(tuning.FinetuneOptions, words, tuning.checkpoint_defaults(load_weights(ckpt)))
    tuning.finetune(ckpt, options)


def predict(ckpt: Path, words: Sequence[str]) -> None:
    """`ssl_c2f predict`: words are paths, and options."""
    paths = [Path(word) for word in words if "=" not in word or Path(word).exists()]
    overrides = [word for word in words if Path(word) not in paths]
    prediction.predict(ckpt, paths, option_files.load(prediction.PredictOptions, None, overrides))


def plan(words: Sequence[str], clips: int | None, measure: bool) -> None:
    """`ssl_c2f plan`."""
    print_plan(config.read_any(words), clips=clips, measure=measure)


def report(runs: Sequence[Path], out: Path | None, wandb: bool) -> None:
    """`ssl_c2f report`: the page, the W&B report, or both."""
    if wandb:
        from ssl_c2f.report.wandb_report import write_report

        print(write_report(runs))
    if out or not wandb:
        out = out or runs[0] / "report.html"
        write_page(runs, out)
        print(out)


def show(words: Sequence[str]) -> None:
    """`ssl_c2f config show`."""
    print(option_files.dump(config.read_any(words)), end="")


def validate(words: Sequence[str]) -> None:
    """`ssl_c2f config validate`."""
    options = config.read_any(words)
    print(f"{' '.join(words) or 'the default config'} is valid ({len(options.phases)} phases)")


def diff(words: Sequence[str]) -> None:
    """`ssl_c2f config diff`."""
    if len(words) != 2:
        raise UserError("config diff takes two configs")
    a, b = (config.read_any([word]) for word in words)
    for key, old, new in option_files.differences(a, b):
        print(f"{key}: {old} -> {new}")
