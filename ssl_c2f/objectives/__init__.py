"""Objectives: an encoder and its heads, from a batch to a loss. Adding one is a file, and its name in one line here."""

from __future__ import annotations

import operator
from functools import reduce
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from ssl_c2f.objectives import latent, mae, ssast, supervised  # noqa: F401 (each file has its options)
from ssl_c2f.objectives.step import Objective, ObjectiveOptions, StepResult

if TYPE_CHECKING:
    AnyOptions = ObjectiveOptions
else:
    AnyOptions = Annotated[reduce(operator.or_, ObjectiveOptions.__subclasses__()), Field(discriminator="name")]

__all__ = ["AnyOptions", "Objective", "ObjectiveOptions", "StepResult"]
