"""What a checkpoint says of itself: the recipe and geometry of its tensors, their input statistics, the step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ssl_c2f.core.files import one_line
from ssl_c2f.core.options import UserError
from ssl_c2f.curriculum.geometry import Geometry
from ssl_c2f.data.front_end import Statistics
from ssl_c2f.train.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class CheckpointState:
    """What state.json of a checkpoint holds: what its tensors need to be used, and where training stands."""

    recipe: Recipe
    geometry: Geometry  # that the tensors are for
    statistics: Mapping[str, Statistics] = field(default_factory=dict)  # by Geometry.digest()
    classes: tuple[str, ...] = ()
    source: Mapping[str, str] = field(default_factory=dict)  # whose weights they come from: kind, licence, url, file
    step: int = 0
    phase: str = ""
    train_seconds: float = 0.0
    skipped: int = 0
    first_loss: float | None = None  # of the phase

    @classmethod
    def read(cls, state: Mapping[str, Any], folder: Path) -> CheckpointState:
        """From the content of a checkpoint's state.json, which was written by this version or one before.

        Raises:
            UserError: it is of another program, or of a version to come.
        """
        try:
            options = state["options"]
            recipe = {name: options[name] for name in Recipe.model_fields if name in options}
            read = _READER.validate_python({**state, "recipe": Recipe.model_validate(recipe, strict=False)})
            if not read.recipe.makes(read.geometry):
                raise ValueError("its geometry does not follow from its options")
            for statistics in read.statistics.values():
                statistics.check()
            return read
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{folder / 'state.json'} is not of this version of ssl_c2f ({_reason(error)})") from None

    def to_json(self) -> dict[str, Any]:
        # the seed and the EMA decay of a run are not needed to use it, but said for those who look
        options = self.recipe.model_dump(mode="json", include={*Recipe.model_fields, "seed", "ema"})
        return {
            "step": self.step, "phase": self.phase, "train_seconds": self.train_seconds, "skipped": self.skipped,
            "first_loss": self.first_loss,
            "geometry": self.geometry.to_dict(),
            "statistics": {digest: asdict(statistics) for digest, statistics in self.statistics.items()},
            "classes": list(self.classes), "options": options, **({"source": dict(self.source)} if self.source else {}),
        }


_READER = TypeAdapter(CheckpointState)


def _reason(error: Exception) -> str:
    """A line about a KeyError or about what pydantic did not like."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        return f"{place[:100]}{place and ': '}{first['msg'].removeprefix('Value error, ')[:200]}"
    return f"no {error}" if isinstance(error, KeyError) else one_line(error)
