"""Objectives: an encoder and its heads, from a batch to a loss. Adding one is one file, and a line in each place."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ssl_c2f import cost
from ssl_c2f.geometry import Geometry
from ssl_c2f.models.backbones import AnyModel
from ssl_c2f.models.vit import EncoderOptions
from ssl_c2f.objectives.latent import Latent, LatentOptions, latent_cost
from ssl_c2f.objectives.mae import MAE, MAEOptions, mae_cost
from ssl_c2f.objectives.ssast import SSAST, SSASTOptions, ssast_cost
from ssl_c2f.objectives.step import StepResult
from ssl_c2f.objectives.supervised import Supervised, SupervisedOptions, supervised_cost

AnyOptions = MAEOptions | SSASTOptions | LatentOptions | SupervisedOptions
ObjectiveOptions = Annotated[AnyOptions, Field(discriminator="name")]
Objective = MAE | SSAST | Latent | Supervised

__all__ = ["AnyOptions", "Objective", "ObjectiveOptions", "StepResult", "build_objective", "objective_cost"]


def build_objective(model: AnyModel, options: AnyOptions, geometry: Geometry, num_classes: int) -> Objective:
    """The objective in a geometry, freshly initialised from torch's global generator."""
    if isinstance(options, SupervisedOptions):
        return Supervised(model, options, geometry, num_classes)
    model = _vit(model)
    match options:
        case MAEOptions():
            return MAE(model, options, geometry)
        case SSASTOptions():
            return SSAST(model, options, geometry)
        case LatentOptions():
            return Latent(model, options, geometry)


def objective_cost(
    model: AnyModel, options: AnyOptions, geometry: Geometry, mask_ratio: float, num_classes: int
) -> list[cost.Part]:
    """Costs of one clip in one training step."""
    if isinstance(options, SupervisedOptions):
        return supervised_cost(model, options, geometry, num_classes)
    model = _vit(model)
    match options:
        case MAEOptions():
            return mae_cost(model, options, geometry, mask_ratio)
        case SSASTOptions():
            return ssast_cost(model, options, geometry, mask_ratio)
        case LatentOptions():
            return latent_cost(model, options, geometry, mask_ratio)


def _vit(model: AnyModel) -> EncoderOptions:
    """The encoder that can leave tokens out, as masked objectives need it; `RunOptions` lets them have no other."""
    assert isinstance(model, EncoderOptions)
    return model
