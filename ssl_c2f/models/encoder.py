"""What every encoder is: the interface between the encoders (`vit`, `htsat`) and what is built on them.

A new encoder is a file with both classes, and a line in `backbones`.
Legend: B batch, N tokens of a clip, K tokens that come out, P values of a patch, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

from torch import Tensor, nn

from ssl_c2f.core.options import UserError
from ssl_c2f.curriculum.cost import Part
from ssl_c2f.curriculum.geometry import Geometry
from ssl_c2f.models.heads import Layer


class Encoder(nn.Module, ABC):
    """From the patches of a clip to its tokens."""

    width: int  # D of the tokens that come out
    num_prefix: int  # class tokens, which stand before the others
    layout: tuple[int, int]  # (bands of time, frequency rows) of the others: ((band rows + row) columns + column)

    @abstractmethod
    def forward(self, patches: Tensor, *, valid: Tensor | None = None) -> Tensor:
        """(B, N, P) -> (B, num_prefix + K, D). `valid` is (B, N) bool, False where a token is padding; None: none is.

        The ViT takes a choice of tokens too, which masked objectives need.
        """

    def read(self, patches: Tensor, valid: Tensor | None, layer: Layer) -> Tensor:
        """As `forward`, of a `layer`: the last one's is `forward`'s.

        Raises:
            UserError: the encoder has no such layer.
        """
        if layer != "last":
            raise UserError(f"layer {layer}: the stages of this encoder differ in size; read layer=last")
        tokens: Tensor = self(patches, valid=valid)
        return tokens

    def real(self, valid: Tensor | None) -> Tensor | None:
        """(B, N) bool -> (B, K) bool: which of the tokens that come out, the prefix aside, are not padding. None: all.
        """
        return valid


class EncoderOptions(Protocol):
    """The options of an encoder. They make it, and know its cost."""

    @property
    def width(self) -> int: ...
    @property
    def depth(self) -> int:
        """Blocks, for layer-wise learning rates."""
    @property
    def patch_f(self) -> int:
        """Mel bins of a patch."""
    @property
    def patch_t(self) -> int:
        """Frames of a patch at time factor 1."""
    @property
    def stride(self) -> tuple[int, int]:
        """Mel bins and frames to the next patch at time factor 1; less than the patch: patches overlap."""
    @property
    def fold(self) -> tuple[int, int]:
        """Bands that time is folded into at most, and tokens on a side that become one; (1, 1) for neither."""

    def __hash__(self) -> int: ...

    def build(self, geometry: Geometry) -> Encoder:
        """Freshly initialised from torch's global generator."""

    def costs(self, geometry: Geometry, tokens: int | None = None, passes: float = 3.0) -> list[Part]:
        """Of one clip, `tokens` of whose tokens the encoder sees (all by default). Training is 3 passes, and forward
        only is 1."""

    def activation_bytes(self, geometry: Geometry, tokens: int, bytes_per_value: int = 4) -> float:
        """What is kept of one clip for the backward pass; values have 2 bytes under bf16."""
