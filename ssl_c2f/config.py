"""One set of options per command, filled from a shipped or own YAML file and dotted overrides."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import Field, model_validator

from ssl_c2f import options as files
from ssl_c2f.finetune import FinetuneOptions
from ssl_c2f.options import Options, UserError
from ssl_c2f.recipe import RunOptions

DEFAULT = {"pretrain": "pretrain/mae_c2f", "train": "train/vit_c2f", "finetune": "finetune/default"}


class FolderOptions(RunOptions):
    """A run with a folder of its own."""

    run_dir: str | None = Field(None, description="the run's folder; runs/CONFIG by default; given again, it resumes")


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


COMMANDS: Mapping[str, type[RunOptions]] = {
    "pretrain": PretrainOptions, "train": TrainOptions, "finetune": FinetuneOptions
}
T = TypeVar("T", bound=Options)


def read(
    command: str, model: type[T], words: Sequence[str], defaults: Mapping[str, Any] | None = None
) -> tuple[T, str]:
    """Options from `[CONFIG] [key=value ...]`, and the config's short name.

    Raises:
        UserError: see `options.load`.
    """
    names = [word for word in words if "=" not in word]
    if len(names) > 1:
        raise UserError(f"give one config, not {' and '.join(names)} (overrides are KEY=VALUE)")
    file = files.find_config(names[0] if names else DEFAULT[command], command)
    return files.load(model, file, [word for word in words if "=" in word], defaults), file.stem


def read_any(words: Sequence[str]) -> RunOptions:
    """Options of a config for whichever command it is: by its folder's name, else by what its objective says."""
    names = [word for word in words if "=" not in word]
    file = files.find_config(names[0] if names else DEFAULT["pretrain"], "pretrain")
    command = file.parent.name
    if command not in COMMANDS:
        labelled = re.search(r"\bname:\s*supervised\b", file.read_text(encoding="utf-8", errors="replace"))
        command = "train" if labelled else "pretrain"
    return read(command, COMMANDS[command], [str(file), *words[len(names):]] if names else words)[0]
