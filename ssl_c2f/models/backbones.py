"""The encoders to choose from (`model.name`)."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Tag

from ssl_c2f.models.htsat import HTSATOptions
from ssl_c2f.models.vit import ViTOptions


def _name(given: Any) -> Any:
    """Of options or a mapping; configs from before there was a choice have no name."""
    return given.get("name", "vit") if isinstance(given, dict) else getattr(given, "name", None)


ModelOptions = Annotated[
    Annotated[ViTOptions, Tag("vit")] | Annotated[HTSATOptions, Tag("htsat")], Discriminator(_name)
]
