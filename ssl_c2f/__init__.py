"""Coarse-to-fine self-supervised pretraining of audio spectrogram transformers.

`ssl_c2f.create_model(name_or_path)`, `ssl_c2f.list_models()` and `ssl_c2f.AudioModel` (Hub) are imported when they are
first asked for, so that `ssl_c2f --help` answers at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssl_c2f.tasks.auto import create_model, list_models
    from ssl_c2f.tasks.hub import AudioModel

__version__ = "0.1.0"
__all__ = ["AudioModel", "__version__", "create_model", "list_models"]


def __getattr__(name: str) -> Any:
    if name not in ("AudioModel", "create_model", "list_models"):
        raise AttributeError(f"module 'ssl_c2f' has no attribute {name!r}")
    from ssl_c2f.tasks import auto

    return getattr(auto, name)
