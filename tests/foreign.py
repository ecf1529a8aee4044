"""Tiny models in the formats of published checkpoints, made with timm; and outputs of the published codes."""

from __future__ import annotations

import pytest
import torch
from paths import FIXTURES
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

WIDTH, MELS, FRAMES = 64, 32, 80  # 64: one head, as imports take width / 64
State = dict[str, Tensor]


def fixture(name: str) -> tuple[State, State]:
    """A published code's state dict, and its inputs and outputs; skips the test where the file is missing."""
    file = FIXTURES / f"{name}.safetensors"
    if not file.exists():
        pytest.skip(f"no {file} (SSL_C2F_FIXTURES names another folder)")
    tensors = load_file(file)
    state = {key.removeprefix("model."): value for key, value in tensors.items() if key.startswith("model.")}
    return state, {key: value for key, value in tensors.items() if not key.startswith("model.")}


def vit(size: tuple[int, int], patch: tuple[int, int] = (16, 16), channels: int = 1) -> VisionTransformer:
    """A ViT from timm with random values in every parameter, so that a wrong mapping always shows."""
    with torch.random.fork_rng([]), torch.no_grad():
        torch.default_generator.manual_seed(0)
        model = VisionTransformer(
            img_size=size, patch_size=patch, in_chans=channels, embed_dim=WIDTH, depth=2, num_heads=1, num_classes=0,
        )
        for tensor in model.parameters():
            tensor.add_(0.1 * torch.randn(tensor.shape))
    return model.eval()


def audiomae() -> State:
    return dict(vit((FRAMES, MELS)).state_dict()) | {"decoder_pos_embed": torch.zeros(1, 11, 8)}


def image() -> State:
    return dict(vit((64, 64), channels=3).state_dict()) | {"head.weight": torch.zeros(7, WIDTH)}


def ast(classes: int = 3, stride: int = 10) -> State:
    """An AST, with an ImageNet head as well, which an import must ignore."""
    rows, columns = (MELS - 16) // stride + 1, (FRAMES - 16) // stride + 1
    state = {f"module.v.{name}": value for name, value in vit((MELS, FRAMES)).state_dict().items()}
    state |= {
        "module.v.pos_embed": torch.randn(1, 2 + rows * columns, WIDTH), "module.v.head.weight": torch.zeros(9, WIDTH),
        "module.v.dist_token": torch.randn(1, 1, WIDTH), "module.mlp_head.0.weight": torch.randn(WIDTH),
        "module.mlp_head.0.bias": torch.randn(WIDTH), "module.mlp_head.1.weight": torch.randn(classes, WIDTH),
        "module.mlp_head.1.bias": torch.randn(classes),
    }
    return state


def ssast(patch: tuple[int, int] = (16, 16)) -> State:
    tokens = (MELS // patch[0]) * (FRAMES // patch[1])
    state = {f"module.v.{name}": value for name, value in vit((MELS, FRAMES), patch).state_dict().items()}
    for head in ("cpredlayer", "gpredlayer"):
        for place, size in ((0, WIDTH), (2, patch[0] * patch[1])):
            state |= {f"module.{head}.{place}.weight": torch.randn(size, WIDTH)}
            state |= {f"module.{head}.{place}.bias": torch.randn(size)}
    return state | {
        "module.v.pos_embed": torch.randn(1, 2 + tokens, WIDTH), "module.v.dist_token": torch.randn(1, 1, WIDTH),
        "module.mask_embed": torch.randn(1, 1, WIDTH), "module.p_input_fdim": torch.tensor(MELS),
        "module.p_input_tdim": torch.tensor(FRAMES),
    }
