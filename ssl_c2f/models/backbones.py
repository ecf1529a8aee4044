"""The encoders to choose from (`model.name`), and what depends on which it is. Adding one is a line in each place.

Legend: B batch, N tokens, D width.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Tag

from ssl_c2f.curriculum import cost
from ssl_c2f.curriculum.geometry import Geometry
from ssl_c2f.models.htsat import HTSAT, HTSATOptions, htsat_bytes, htsat_cost
from ssl_c2f.models.vit import Encoder, EncoderOptions, encoder_cost


def _name(given: Any) -> Any:
    """Of options, or of a mapping for them: options written before there was a choice have none."""
    return given.get("name", "vit") if isinstance(given, dict) else getattr(given, "name", None)


AnyModel = EncoderOptions | HTSATOptions
ModelOptions = Annotated[
    Annotated[EncoderOptions, Tag("vit")] | Annotated[HTSATOptions, Tag("htsat")], Discriminator(_name)
]
AnyEncoder = Encoder | HTSAT


def build_encoder(options: AnyModel, geometry: Geometry) -> AnyEncoder:
    """Freshly initialised: called with all of a clip's patches (B, N, P), it gives `num_prefix` tokens of its own and
    then those that `real` says are no padding, all of `width` D."""
    match options:
        case EncoderOptions():
            return Encoder(options, geometry)
        case HTSATOptions():
            return HTSAT(options, geometry)


def whole_cost(options: AnyModel, geometry: Geometry, passes: float = 3.0) -> list[cost.Part]:
    """The encoder over all tokens of a clip."""
    match options:
        case EncoderOptions():
            return encoder_cost(options, geometry, geometry.num_tokens, passes)
        case HTSATOptions():
            return htsat_cost(options, geometry, passes)


def activation_bytes(options: AnyModel, geometry: Geometry, tokens: int, bytes_per_value: int = 4) -> float:
    """What the encoder keeps of one clip for the backward pass, `tokens` of whose tokens it sees: of values of
    `bytes_per_value`, 2 under bf16."""
    match options:
        case EncoderOptions():
            return cost.transformer_bytes(tokens, options.width, options.depth, options.mlp_ratio, bytes_per_value)
        case HTSATOptions():
            return htsat_bytes(options, geometry, bytes_per_value)


def strides_and_folds(options: AnyModel) -> tuple[tuple[int, int], tuple[int, int]]:
    """What `make_geometries` takes as `stride` and `fold`."""
    match options:
        case EncoderOptions():
            return (options.stride_f or options.patch_f, options.stride_t or options.patch_t), (1, 1)
        case HTSATOptions():
            return (options.patch_f, options.patch_t), (options.folds, options.merge)
