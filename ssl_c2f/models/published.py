"""Published checkpoints (AST, SSAST, AudioMAE, transformers, timm): their names, axes and order of tokens to ours, and
ours to those of transformers.

Names and layouts were read off the published code: AST (github.com/YuanGongND/ast; Gong et al., Interspeech 2021),
SSAST (github.com/YuanGongND/ssast; Gong et al., AAAI 2022), AudioMAE (github.com/facebookresearch/AudioMAE; Huang et
al., NeurIPS 2022), transformers' AST, timm's ViT.

Legend: D width, (F', T') grid of N = F' T' tokens (ours has index f T' + t), P values of a patch (index f patch_t + t).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_c2f.core.options import UserError

AUDIOSET = (-4.2677393, 4.5689974)  # mean and std of its log-mel, with which AST, SSAST and AudioMAE normalise


@dataclass(frozen=True)
class Kind:
    """One kind of published checkpoint. Patterns are regular expressions for whole names."""

    name: str
    licence: str
    source: str
    signs: tuple[str, ...]  # names of tensors: the first kind of KINDS whose signs are all there is taken
    renames: tuple[tuple[str, str], ...] = ()  # to timm's names, which our blocks have too
    heads: tuple[tuple[str, str], ...] = ()  # to ours; tensors are copied
    dropped: tuple[str, ...] = ()  # what it may have and is not needed


_AST_HEAD = ((r"mlp_head\.0\.(weight|bias)", r"head.norm.\1"), (r"mlp_head\.1\.(weight|bias)", r"head.classifier.\1"))
_IMAGENET_HEADS = (r"(v\.)?(head|head_dist|pre_logits)\..*",)
_SSAST_HEADS = (
    ("mask_embed", "mask_token"),
    (r"cpredlayer\.0\.(weight|bias)", r"match_head.hidden.\1"),
    (r"cpredlayer\.2\.(weight|bias)", r"match_head.to_match.\1"),
    (r"gpredlayer\.0\.(weight|bias)", r"draw_head.hidden.\1"),
    (r"gpredlayer\.2\.(weight|bias)", r"draw_head.to_patch.\1"),
)
_LAYER = r"(?:audio_spectrogram_transformer\.)?(?:encoder\.layer|layers)\.(\d+)\."  # transformers 4 | 5
_STEM = r"(?:audio_spectrogram_transformer\.)?"
_HF = (
    (_STEM + r"embeddings\.cls_token", "cls_token"),
    (_STEM + r"embeddings\.distillation_token", "dist_token"),
    (_STEM + r"embeddings\.position_embeddings", "pos_embed"),
    (_STEM + r"embeddings\.patch_embeddings\.projection\.(weight|bias)", r"patch_embed.proj.\1"),
    (_LAYER + r"attention\.(?:attention\.query|q_proj)\.(weight|bias)", r"blocks.\1.attn.q.\2"),
    (_LAYER + r"attention\.(?:attention\.key|k_proj)\.(weight|bias)", r"blocks.\1.attn.k.\2"),
    (_LAYER + r"attention\.(?:attention\.value|v_proj)\.(weight|bias)", r"blocks.\1.attn.v.\2"),
    (_LAYER + r"attention\.(?:output\.dense|o_proj)\.(weight|bias)", r"blocks.\1.attn.proj.\2"),
    (_LAYER + r"(?:intermediate\.dense|mlp\.fc1)\.(weight|bias)", r"blocks.\1.mlp.fc1.\2"),
    (_LAYER + r"(?:output\.dense|mlp\.fc2)\.(weight|bias)", r"blocks.\1.mlp.fc2.\2"),
    (_LAYER + r"layernorm_before\.(weight|bias)", r"blocks.\1.norm1.\2"),
    (_LAYER + r"layernorm_after\.(weight|bias)", r"blocks.\1.norm2.\2"),
    (_STEM + r"layernorm\.(weight|bias)", r"norm.\1"),
)
_HF_HEAD = (
    (r"classifier\.layernorm\.(weight|bias)", r"head.norm.\1"),
    (r"classifier\.dense\.(weight|bias)", r"head.classifier.\1"),
)

HF = Kind(
    "Hugging Face AST", "BSD-3-Clause, as the AST on the Hub (no model card beside these says otherwise)",
    "https://huggingface.co/MIT/ast-finetuned-audioset-10-10-0.4593, or as the model card says",
    (_STEM + r"embeddings\.patch_embeddings\.projection\.weight",), _HF, _HF_HEAD,
)
TIMM = Kind(
    "timm ViT", "Apache-2.0 (timm); its weights may have one of their own",
    "https://github.com/huggingface/pytorch-image-models",
    (r"patch_embed\.proj\.weight", "pos_embed"), (), (), _IMAGENET_HEADS,
)
KINDS = (
    HF,
    Kind(
        "SSAST", "BSD-3-Clause, Copyright (c) 2022 Yuan Gong", "https://github.com/YuanGongND/ssast",
        (r"v\.patch_embed\.proj\.weight", "mask_embed"), ((r"v\.(.*)", r"\1"),), _SSAST_HEADS,
        (*_IMAGENET_HEADS, "p_input_fdim", "p_input_tdim"),
    ),
    Kind(
        "AST", "BSD-3-Clause, Copyright (c) Yuan Gong", "https://github.com/YuanGongND/ast",
        (r"v\.patch_embed\.proj\.weight", r"mlp_head\.1\.weight"), ((r"v\.(.*)", r"\1"),), _AST_HEAD, _IMAGENET_HEADS,
    ),
    Kind(
        "AudioMAE", "CC-BY-NC-4.0: not for commercial use", "https://github.com/facebookresearch/AudioMAE",
        (r"patch_embed\.proj\.weight", "pos_embed", "one channel"), (), (),
        ("mask_token", r"decoder_.*", r"(head|head_dist)\..*"),
    ),
    TIMM,
)


@dataclass(frozen=True)
class Facts:
    """What a state dict does not say; None: what is usual for its kind."""

    num_mels: int = 128
    stride: tuple[int | None, int | None] = (None, None)  # mel bins, frames
    heads: int | None = None
    num_frames: int = 1024  # that the positions of an image are spread over


@dataclass(frozen=True)
class Published:
    """A published checkpoint in our names and layout."""

    kind: Kind
    num_mels: int
    state: dict[str, Tensor]
    how: dict[str, str]  # our tensors that are not plain copies -> what was done
    dropped: dict[str, Tensor]  # under their own names
    heads: int
    patch: tuple[int, int]
    stride: tuple[int, int]
    grid: tuple[int, int]
    notes: tuple[str, ...]


def recognise(state: Mapping[str, Tensor]) -> Kind:
    """The kind that has these names (without `module.`).

    Raises:
        UserError: no kind that is known.
    """
    kernel = next((t for name, t in state.items() if name.endswith("patch_embed.proj.weight")), None)
    names = [*state, *(["one channel"] if kernel is not None and kernel.ndim == 4 and kernel.shape[1] == 1 else [])]
    for kind in KINDS:
        if all(any(re.fullmatch(sign, name) for name in names) for sign in kind.signs):
            return kind
    known = ", ".join(kind.name for kind in KINDS)
    raise UserError(f"these names are of no kind that is known ({known}): {', '.join([*state][:3])}, ...")


def convert(state: Mapping[str, Tensor], facts: Facts = Facts()) -> Published:
    """Recognise a state dict and bring it into our names, axes and order of tokens.

    The positions of the class tokens are added to them. All results are float32.

    Raises:
        UserError: no known kind, a name that its kind does not have, or a tensor that is missing or of another shape.
    """
    state, beside = _unwrapped(state)
    kind = recognise(state)
    if "p_input_fdim" in state and state["p_input_fdim"].numel() == 1:
        facts = replace(facts, num_mels=int(state["p_input_fdim"]))
    encoder, result, dropped = _sorted(kind, state)
    dropped |= beside
    how: dict[str, str] = {}
    _merge_qkv(encoder, how)
    if "fc_norm.weight" in encoder or "norm.weight" not in encoder:
        raise UserError(f"{kind.name}: norm.weight is missing (fine-tuning with fc_norm drops it: not supported)")
    _complete(kind, encoder)
    kernel, table = (_need(kind, encoder, name) for name in ("patch_embed.proj.weight", "pos_embed"))
    tokens = [_need(kind, encoder, "cls_token"), *([encoder.pop("dist_token")] if "dist_token" in encoder else [])]
    prefix, width = len(tokens), kernel.shape[0]

    kernel, patch = _kernel(kind, kernel, how)
    if facts.num_mels < patch[0]:
        few = f"{facts.num_mels} mel bins are less than the {patch[0]} of a patch"
        raise UserError(f"{kind.name}: {few}: give num_mels")
    if table.shape[1] <= prefix:
        raise UserError(f"{kind.name}: pos_embed has positions of {prefix} class tokens and of no patch")
    stride, note = _stride(kind, table.shape[1] - prefix, patch, facts, how)
    rows = (facts.num_mels - patch[0]) // stride[0] + 1
    positions, grid = _positions(kind, table[:, prefix:], rows, patch, facts, how)
    result |= {
        "encoder.patch_embed.weight": kernel, "encoder.patch_embed.bias": _need(kind, encoder, "patch_embed.proj.bias"),
        "encoder.cls_token": torch.cat(tokens, 1) + table[:, :prefix], "encoder.positions": positions,
        **{f"encoder.{name}": tensor for name, tensor in encoder.items()},
    }
    how["encoder.cls_token"] = f"{prefix} with their positions"
    heads = facts.heads or max(width // 64, 1)
    if not facts.heads:
        note = (*note, f"heads {heads} taken, which the file does not say (width / 64)")
    return Published(
        kind, facts.num_mels, {name: tensor.float().contiguous() for name, tensor in result.items()}, how, dropped,
        heads, patch, stride, grid, note,
    )


def _unwrapped(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The state dict, and what is beside it where a training loop kept it under `model.` (`module.` is DDP's)."""
    inside = {name.removeprefix("model."): tensor for name, tensor in state.items() if name.startswith("model.")}
    beside = {name: tensor for name, tensor in state.items() if inside and not name.startswith("model.")}
    return {name.removeprefix("module."): tensor for name, tensor in (inside or state).items()}, beside


def _sorted(kind: Kind, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Tensors of the encoder (timm's names), of the heads (our names), and dropped ones (names in the file)."""
    encoder: dict[str, Tensor] = {}
    heads: dict[str, Tensor] = {}
    dropped: dict[str, Tensor] = {}
    names: dict[str, str] = {}  # of what is kept, in the file
    for name, tensor in state.items():
        if any(re.fullmatch(pattern, name) for pattern in kind.dropped):
            dropped[name] = tensor
        elif new := _renamed(name, kind.heads):
            heads[new], names[new] = tensor, name
        elif (new := _renamed(name, kind.renames) if kind.renames else name) and re.fullmatch(_TIMM, new):
            encoder[new], names[new] = tensor, name
        else:
            raise UserError(f"{kind.name}: {name} is no name of this kind")
    _check_shapes(kind, encoder | heads, names)
    return encoder, heads, dropped


_TIMM = (
    r"cls_token|dist_token|pos_embed|patch_embed\.proj\.(weight|bias)|(norm|fc_norm)\.(weight|bias)"
    r"|blocks\.\d+\.(norm1|norm2|attn\.(qkv|q|k|v|proj)|mlp\.fc[12])\.(weight|bias)"
)


# Of tensors whose sizes are used before our model is built and compared. D is the width; other letters are any number
_SHAPES = (
    (r"patch_embed\.proj\.weight", "D C F T"), ("cls_token|dist_token", "1 1 D"), ("pos_embed", "1 N D"),
    (r"blocks\.\d+\.mlp\.fc1\.weight", "H D"), (r"blocks\.\d+\.attn\.[qkv]\.weight", "D D"),
    (r"blocks\.\d+\.attn\.[qkv]\.bias", "D"), (r"head\.classifier\.bias", "C"),
)


def _check_shapes(kind: Kind, tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
    width = next(iter(tensors["patch_embed.proj.weight"].shape), 0)
    for name, tensor in tensors.items():
        wanted = next((shape.split() for pattern, shape in _SHAPES if re.fullmatch(pattern, name)), None)
        if wanted and not _fits(tensor.shape, wanted, {"1": 1, "D": width}):
            there, shape = tuple(tensor.shape), ", ".join(wanted)
            raise UserError(f"{kind.name}: {names[name]} has shape {there}, not ({shape}) with D = {width}")


def _fits(shape: Sequence[int], wanted: Sequence[str], sizes: Mapping[str, int]) -> bool:
    pairs = zip(shape, wanted, strict=False)
    return len(shape) == len(wanted) and all(size > 0 and size == sizes.get(letter, size) for size, letter in pairs)


_BLOCK = [f"{part}.{kind}" for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
          for kind in ("weight", "bias")]


def _complete(kind: Kind, encoder: Mapping[str, Tensor]) -> None:
    """Raises UserError: blocks are not numbered from 0 on, or one lacks a tensor."""
    depth = len({name.split(".")[1] for name in encoder if name.startswith("blocks.")})
    wanted = (f"blocks.{i}.{part}" for i in range(max(depth, 1)) for part in _BLOCK)
    if lost := next((name for name in wanted if name not in encoder), None):
        raise UserError(f"{kind.name}: {lost} is missing")


def _renamed(name: str, table: Sequence[tuple[str, str]]) -> str | None:
    return next((found.expand(new) for old, new in table if (found := re.fullmatch(old, name))), None)


def _need(kind: Kind, tensors: dict[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise UserError(f"{kind.name}: {name} is missing")
    return tensors.pop(name)


def _merge_qkv(encoder: dict[str, Tensor], how: dict[str, str]) -> None:
    """Query, key and value of transformers -> the one matrix of timm."""
    for name in [name for name in encoder if ".attn.q." in name]:
        parts = [name.replace(".q.", f".{part}.") for part in "qkv"]
        if lost := next((part for part in parts if part not in encoder), None):
            raise UserError(f"{HF.name}: {lost} is missing")
        merged = name.replace(".q.", ".qkv.")
        encoder[merged] = torch.cat([encoder.pop(part) for part in parts])
        how[f"encoder.{merged}"] = "query, key and value in one"


def _kernel(kind: Kind, kernel: Tensor, how: dict[str, str]) -> tuple[Tensor, tuple[int, int]]:
    """(D, channels, ., .) -> (D, P), and the patch (mel bins, frames). AudioMAE's last two axes are [t, f]."""
    if kind.name == "AudioMAE":
        kernel = kernel.transpose(2, 3)
        how["encoder.patch_embed.weight"] = "axes [t, f] -> [f, t]"
    if kernel.shape[1] > 1:  # AST does the same to images' kernels
        how["encoder.patch_embed.weight"] = f"sum over {kernel.shape[1]} colours"
        kernel = kernel.sum(1, keepdim=True)
    return kernel.flatten(1), (kernel.shape[2], kernel.shape[3])


def _stride(
    kind: Kind, num_tokens: int, patch: tuple[int, int], facts: Facts, how: dict[str, str]
) -> tuple[tuple[int, int], tuple[str, ...]]:
    """Mel bins and frames to the next patch. A file of AST does not say: its recipe is 10 in both directions, which is
    taken unless it does not fit the number of tokens."""
    (f, t), (high, long) = facts.stride, patch
    if f and t:
        return (f, t), ()
    if kind is not HF and kind.name != "AST":
        return (f or high, t or long), ()
    if f or t:
        stride = f or min(t or high, high), t or min(f or long, long)
        return stride, (f"stride {stride[0]}x{stride[1]} taken, of which stride_{'f' if f else 't'} was given",)
    fitting = [
        stride for stride in ((10, 10), patch)
        if stride[0] <= patch[0] and stride[1] <= patch[1]
        and num_tokens % ((facts.num_mels - patch[0]) // stride[0] + 1) == 0
    ]
    if not fitting:
        neither = f"neither stride 10x10 nor {patch[0]}x{patch[1]}"
        raise UserError(f"{kind.name}: {num_tokens} tokens fit {neither}: give stride_f and stride_t")
    other = f"; {num_tokens} tokens would fit stride_f={patch[0]} stride_t={patch[1]} too" if len(fitting) > 1 else ""
    return fitting[0], (f"stride {fitting[0][0]}x{fitting[0][1]} taken, which the file does not say{other}",)


def _positions(
    kind: Kind, table: Tensor, rows: int, patch: tuple[int, int], facts: Facts, how: dict[str, str]
) -> tuple[Tensor, tuple[int, int]]:
    """(1, N, D) in the kind's order of tokens -> (N, D) in ours, and the grid."""
    table = table[0]
    if kind is TIMM:
        columns = facts.num_frames // patch[1]
        if not columns:
            raise UserError(f"{kind.name}: {facts.num_frames} frames are less than the {patch[1]} of a patch")
        return _from_image(table, rows, columns, how), (rows, columns)
    if len(table) % rows:
        whole = f"no whole number of columns of {rows}"
        raise UserError(f"{kind.name}: {len(table)} positions are {whole}: give num_mels or stride_f")
    columns = len(table) // rows
    if kind.name == "AudioMAE":
        how["encoder.positions"] = "order t F' + f -> f T' + t"
        table = table.view(columns, rows, -1).transpose(0, 1).flatten(0, 1)
    return table, (rows, columns)


def _from_image(table: Tensor, rows: int, columns: int, how: dict[str, str]) -> Tensor:
    """Positions of an image for a spectrogram, as in AST: the middle rows, and columns stretched over time."""
    side = int(len(table) ** 0.5)
    if side * side != len(table):
        raise UserError(f"timm ViT: {len(table)} positions are no square")
    grid = table.view(side, side, -1).permute(2, 0, 1)[None].float()
    grid = F.interpolate(grid, (max(rows, side), columns), mode="bilinear")
    top = (max(rows, side) - rows) // 2
    how["encoder.positions"] = f"image of {side}x{side} -> {rows}x{columns}: middle rows, columns stretched over time"
    return grid[0, :, top : top + rows].flatten(1).T


def to_hf(state: Mapping[str, Tensor], patch: tuple[int, int], positions: Tensor) -> dict[str, Tensor]:
    """Ours (two class tokens, `ast` head) in the names that transformers 4 and 5 both load.

    Class tokens contain their positions, so their rows of the table are 0. `positions` are (N, D).
    """
    stem = "audio_spectrogram_transformer."
    cls = state["encoder.cls_token"]
    kernel = state["encoder.patch_embed.weight"]
    result = {
        stem + "embeddings.cls_token": cls[:, :1], stem + "embeddings.distillation_token": cls[:, 1:],
        stem + "embeddings.position_embeddings": torch.cat([torch.zeros_like(cls[0]), positions])[None],
        stem + "embeddings.patch_embeddings.projection.weight": kernel.view(len(kernel), 1, *patch),
        stem + "embeddings.patch_embeddings.projection.bias": state["encoder.patch_embed.bias"],
    }
    for name, tensor in state.items():
        if found := re.fullmatch(r"encoder\.blocks\.(\d+)\.attn\.qkv\.(weight|bias)", name):
            for part, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                result[f"{stem}encoder.layer.{found[1]}.attention.attention.{part}.{found[2]}"] = piece
        elif new := _renamed(name, _TO_HF):
            result[new if new.startswith("classifier") else stem + new] = tensor
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in result.items()}


_OWN = r"encoder\.blocks\.(\d+)\."
_TO_HF = (
    (_OWN + r"attn\.proj\.(weight|bias)", r"encoder.layer.\1.attention.output.dense.\2"),
    (_OWN + r"mlp\.fc1\.(weight|bias)", r"encoder.layer.\1.intermediate.dense.\2"),
    (_OWN + r"mlp\.fc2\.(weight|bias)", r"encoder.layer.\1.output.dense.\2"),
    (_OWN + r"norm1\.(weight|bias)", r"encoder.layer.\1.layernorm_before.\2"),
    (_OWN + r"norm2\.(weight|bias)", r"encoder.layer.\1.layernorm_after.\2"),
    (r"encoder\.norm\.(weight|bias)", r"layernorm.\1"),
    (r"head\.norm\.(weight|bias)", r"classifier.layernorm.\1"),
    (r"head\.classifier\.(weight|bias)", r"classifier.dense.\1"),
)
