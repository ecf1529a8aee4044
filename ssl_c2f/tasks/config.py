"""One set of options per command, filled from a shipped or own YAML file and dotted overrides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, model_validator

from ssl_c2f.core import options as files
from ssl_c2f.core.options import Options, UserError
from ssl_c2f.tasks.finetune import FinetuneOptions
from ssl_c2f.train.recipe import RunOptions
from ssl_c2f.train.weights import initial_weights

DEFAULT = {"pretrain": "pretrain/mae_c2f", "train": "train/vit_c2f", "finetune": "finetune/default"}


class FolderOptions(RunOptions):
    """A run with a folder of its own."""

    run_dir: str | None = Field(None, description="the run's folder; runs/CONFIG by default; given again, it resumes")
    init: str | None = Field(None, description="weights to start from: what --ckpt takes, or a ViT of timm's by name")


class PretrainOptions(FolderOptions):
    """`ssl_c2f pretrain`."""

    @model_validator(mode="after")
    def _masked(self) -> PretrainOptions:
        if self.objective.name == "supervised":
            raise ValueError("objective supervised learns from labels: use ssl_c2f train")
        return self


class TrainOptions(FolderOptions):
    """`ssl_c2f train`."""

    @model_validator(mode="after")
    def _supervised(self) -> TrainOptions:
        if self.objective.name != "supervised":
            raise ValueError(f"objective {self.objective.name} needs no labels: use ssl_c2f pretrain")
        return self


ENCODER = ("width", "depth", "heads", "mlp_ratio", "class_tokens", "positions")  # of weights; the rest can be resized
COMMANDS: Mapping[str, type[RunOptions]] = {
    "pretrain": PretrainOptions, "train": TrainOptions, "finetune": FinetuneOptions
}
T = TypeVar("T", bound=Options)


def command_of(model: type[Options]) -> str:
    """The command that options of this type are of."""
    return next(command for command, known in COMMANDS.items() if known is model)


def read(model: type[T], words: Sequence[str], defaults: Mapping[str, Any] | None = None) -> tuple[T, str]:
    """Options from `[CONFIG] [key=value ...]`, in any order, and the config's short name.

    Raises:
        UserError: see `options.load`.
    """
    file, overrides = _split(words, command_of(model))
    options = files.load(model, file, overrides, defaults)
    if isinstance(options, FolderOptions) and options.init:
        overrides = [word for word in overrides if not word.startswith("init=")]
        options = files.load(model, file, [*_as_its_weights(options.init), *overrides], defaults)
    return options, file.stem


def _split(words: Sequence[str], command: str) -> tuple[Path, list[str]]:
    """The config file among words, by default the command's, and the overrides."""
    names, overrides = ([word for word in words if ("=" in word) == is_override] for is_override in (False, True))
    if len(names) > 1:
        raise UserError(f"give one config, not {' and '.join(names)} (overrides are KEY=VALUE)")
    return files.find_config(names[0] if names else DEFAULT[command], command), overrides


def _as_its_weights(init: str) -> list[str]:
    """Overrides that give a run the encoder of the weights that it starts from, wherever it is started."""
    of = initial_weights(init).recipe.model.model_dump(mode="json")
    place = Path(init).resolve() if Path(init).exists() else init
    return [*(f"model.{key}={of[key]}" for key in ENCODER if key in of), f"init={place}"]


def read_any(words: Sequence[str]) -> RunOptions:
    """Options of a config for whichever command it is: by its folder's name, else by its objective."""
    file, overrides = _split(words, "pretrain")
    command = file.parent.name
    if command not in COMMANDS:
        objective = files.merge(file, overrides).get("objective")
        command = "train" if isinstance(objective, dict) and objective.get("name") == "supervised" else "pretrain"
    return read(COMMANDS[command], [str(file), *overrides])[0]
