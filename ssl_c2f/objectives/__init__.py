"""Objectives: an encoder and its heads, from a batch to a loss. A new one is a file, and its options in the union."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ssl_c2f.objectives.base import Objective, ObjectiveOptions, StepResult
from ssl_c2f.objectives.latent import LatentOptions
from ssl_c2f.objectives.mae import MAEOptions
from ssl_c2f.objectives.ssast import SSASTOptions
from ssl_c2f.objectives.supervised import SupervisedOptions
from ssl_c2f.objectives.views import ViewsOptions

AnyOptions = Annotated[
    MAEOptions | SSASTOptions | LatentOptions | ViewsOptions | SupervisedOptions,
    Field(discriminator="name"),
]

__all__ = ["AnyOptions", "Objective", "ObjectiveOptions", "StepResult"]
