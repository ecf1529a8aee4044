"""`ssl_c2f.create_model` and `ssl_c2f.list_models`: a model by name, path or repository on the Hub.

Legend: B batch, S samples, C classes, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from ssl_c2f.core.files import one_line
from ssl_c2f.core.options import UserError
from ssl_c2f.data.front_end import Statistics
from ssl_c2f.models.published import AUDIOSET
from ssl_c2f.tasks.hub import AudioModel
from ssl_c2f.train.recipe import Recipe
from ssl_c2f.train.weights import Weights, load_weights, locate, released

_SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}  # width, heads; as DeiT's (Touvron et al., ICML 2021)
_AST: Mapping[str, Any] = {"class_tokens": 2, "positions": "learned"}
_KINDS: Mapping[str, Mapping[str, Any]] = {
    "vit": {}, "ast": {**_AST, "stride_f": 10, "stride_t": 10}, "ssast_patch": _AST,
    "ssast_frame": {**_AST, "patch_f": 128, "patch_t": 2},
}


def list_models() -> list[str]:
    """What `create_model` knows by name: first the pretrained encoders that come with the package (`c2f_...`), then
    those that it makes with random weights, 12 blocks deep over 128 mel bins."""
    return [*released(), *(f"{kind}_{size}" for kind in _KINDS for size in _SIZES)]


def create_model(
    name: str | Path, *, classes: Sequence[str] = (), clip_seconds: float = 10.0, seed: int = 0
) -> AudioModel:
    """A model in evaluation mode: waveforms (B, S) to logits (B, C) or features (B, D).

    Args:
        name: a path that --ckpt takes (run, checkpoint, published file, folder of transformers'), a name of
            `list_models`, or a repository on the Hub (`user/name`).
        classes: of a classifier with random weights; () makes the encoder alone. The rest is about random weights too.

    Raises:
        UserError: no such model, or what `load_weights` refuses.
    """
    if (path := locate(name)).exists():
        return AudioModel(load_weights(path)).eval()
    if name in list_models():
        return AudioModel(_random(str(name), tuple(classes), clip_seconds, seed)).eval()
    if str(name).count("/") == 1 and not str(name).startswith((".", "/")):
        return _from_hub(str(name))
    near = get_close_matches(str(name), list_models(), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"names: {', '.join(list_models())}"
    raise UserError(f"no model or path {str(name)!r}; {hint}")


def _from_hub(name: str) -> AudioModel:
    try:
        model: AudioModel = AudioModel.from_pretrained(name)
    except UserError:
        raise
    except Exception as error:  # whatever a hub and a network can come up with
        raise UserError(f"no path {name!r}, and not found on the Hub ({one_line(error)[:120]})") from None
    return model


def _random(name: str, classes: tuple[str, ...], clip_seconds: float, seed: int) -> Weights:
    """Fresh weights, with AudioSet's input statistics."""
    kind, _, size = name.rpartition("_")
    width, heads = _SIZES[size]
    recipe = Recipe.model_validate({
        "audio": {"clip_seconds": clip_seconds},
        "model": {"width": width, "heads": heads, "depth": 12, **_KINDS[kind]},
        "objective": {"name": "supervised", "head": "mean_pool" if kind == "vit" else "ast"},
    }, strict=False)
    geometry = recipe.fine_geometry
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(seed)
        tensors = recipe.build(geometry, len(classes)).state_dict()
    statistics = Statistics(*AUDIOSET, factor=1.0 if kind == "vit" else 2.0)  # 2 as AST and SSAST have it
    return Weights(
        recipe=recipe, geometry=geometry, statistics={geometry.digest(): statistics}, classes=classes, tensors=tensors,
        origin=name,
    )
