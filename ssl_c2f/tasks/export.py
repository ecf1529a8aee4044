"""`ssl_c2f export`: trained weights for those who do not have ssl_c2f, at full resolution (time factor 1).

hf           config.json, preprocessor_config.json, model.safetensors: transformers' ASTForAudioClassification
onnx         model.onnx from log-mel (B, T, F), normalisation inside; model.json
safetensors  encoder.safetensors and encoder.json

Legend: B batch, T frames, F mel bins, (F', T') grid of N tokens, D width, C classes.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_c2f.core.files import new_folder, write_bytes, write_json, write_text
from ssl_c2f.core.options import UserError
from ssl_c2f.models.heads import read_out
from ssl_c2f.models.published import to_hf
from ssl_c2f.models.vit import ViT, ViTOptions
from ssl_c2f.objectives import Objective
from ssl_c2f.objectives.supervised import Supervised
from ssl_c2f.tasks.convert import notice
from ssl_c2f.tasks.inference import open_weights
from ssl_c2f.train.recipe import Recipe
from ssl_c2f.train.weights import Weights

Format = Literal["hf", "onnx", "safetensors"]


def export(ckpt: Path, format: Format, out: Path) -> Path:
    """Write weights in a format of others' into the new folder `out`, and return it.

    Raises:
        UserError: `out` holds something, what the format cannot express, or a library that is not installed.
    """
    with new_folder(out) as folder:
        weights = open_weights(ckpt)
        if (name := weights.recipe.model.name) != "vit":
            raise UserError(f"{weights.origin}: only model vit can be exported, not {name}")
        match format:
            case "hf":
                _to_hf(weights, folder)
            case "onnx":
                _to_onnx(weights, folder)
            case "safetensors":
                _to_safetensors(weights, folder)
        if weights.source:
            write_text(folder / "NOTICE", notice(weights.source))
    print(out)
    return out


def _vit(objective: Objective) -> ViT:
    assert isinstance(objective.encoder, ViT)
    return objective.encoder


def _facts(weights: Weights) -> dict[str, Any]:
    """What one has to know to feed the weights."""
    recipe = weights.recipe
    return {
        "audio": recipe.audio.model_dump(mode="json"), "model": recipe.model.model_dump(mode="json"),
        "geometry": recipe.fine_geometry.to_dict(), "statistics": asdict(weights.fine_statistics),
        "classes": list(weights.classes),
        "input": "natural log-mel filterbank (B, T, F) as Kaldi computes it; normalised: (x - mean) / (factor std)",
        "source": dict(weights.source),
    }


def _to_safetensors(weights: Weights, out: Path) -> None:
    encoder = _vit(weights.at_full_resolution())
    tensors = {name: tensor.contiguous().clone() for name, tensor in encoder.state_dict().items()}
    tensors["positions"] = encoder.positions.detach().contiguous().clone()  # also those that are made anew
    write_bytes(out / "encoder.safetensors", safetensors.torch.save(tensors))
    write_json(out / "encoder.json", _facts(weights))


def _to_hf(weights: Weights, out: Path) -> None:
    weights = _whole_patches(weights)
    _require_ast(weights)
    model, geometry = weights.at_full_resolution(), weights.recipe.fine_geometry
    patch = geometry.patch_f, geometry.patch_t
    tensors = to_hf(model.state_dict(), patch, _vit(model).positions.detach())
    write_bytes(out / "model.safetensors", safetensors.torch.save(tensors, {"format": "pt"}))
    for name, content in _hf_configs(weights).items():
        write_text(out / name, json.dumps(content, indent=2) + "\n")
    licence = weights.source.get("licence", "")
    known = re.match(r"[\w.-]+", licence)
    said = f"license: {known[0].lower()}\nlicense_name: {json.dumps(licence)}\n" if known else ""
    write_text(out / "README.md", (
        f"---\n{said}library_name: transformers\npipeline_tag: audio-classification\n---\n"
        f"An audio spectrogram transformer of {len(weights.classes)} classes, exported by ssl_c2f for clips of "
        f"{geometry.covered} frames.\nTransformers fills shorter clips up with zeros and attends to them.\n"
    ))
    print(f"for clips of {geometry.covered} frames ({weights.recipe.audio.clip_seconds:g} s), grid {geometry.grid}")


def _whole_patches(weights: Weights) -> Weights:
    """The same for clips that end where a patch does: AST knows no padding. Loses less than a stride of frames."""
    recipe, g = weights.recipe, weights.recipe.fine_geometry
    columns = (g.frames(g.clip_samples) - g.patch_t) // g.stride_t + 1
    if columns < 1:
        raise UserError(f"{weights.origin}: a clip of {recipe.audio.clip_seconds:g} s is shorter than a patch")
    samples = g.window + (g.patch_t + (columns - 1) * g.stride_t - 1) * g.hop
    audio = recipe.audio.model_copy(update={"clip_seconds": samples / g.sample_rate})
    shorter = Recipe.model_validate({**recipe.model_dump(mode="json"), "audio": audio.model_dump()}, strict=False)
    return replace(weights, recipe=shorter)


def _require_ast(weights: Weights) -> None:
    """Raises UserError: it is no AST, in one line that says what would be."""
    m, audio, o = weights.recipe.model, weights.recipe.audio, weights.recipe.objective
    assert isinstance(m, ViTOptions)
    again = "fine-tune one that is"
    for wrong, what in (
        (not weights.classes or o.name != "supervised", "it has no classifier: ssl_c2f finetune makes one"),
        (m.class_tokens != 2, f"it has one class token, AST two: {again} (model.class_tokens=2)"),
        (getattr(o, "head", "") != "ast", f"its head is no AST head: {again} (objective.head=ast)"),
        (m.patch_f != m.patch_t, f"its patch {m.patch_f}x{m.patch_t} is no square: export it as onnx"),
        (
            (audio.hop_ms, audio.window_ms, audio.f_min, audio.f_max or audio.sample_rate / 2)
            != (10.0, 25.0, 20.0, audio.sample_rate / 2),
            "transformers knows frames of 25 ms every 10 ms from 20 Hz up only: export it as onnx",
        ),
    ):
        if wrong:
            raise UserError(f"{weights.origin} cannot become ASTForAudioClassification: {what}")


def _hf_configs(weights: Weights) -> dict[str, dict[str, Any]]:
    m, labels = weights.recipe.model, dict(enumerate(weights.classes))
    geometry, statistics = weights.recipe.fine_geometry, weights.fine_statistics
    assert isinstance(m, ViTOptions)
    several = getattr(weights.recipe.objective, "labels", "single") == "multi"
    shared = {"max_length": geometry.covered, "num_mel_bins": geometry.num_mels}
    return {
        "config.json": {
            "architectures": ["ASTForAudioClassification"], "model_type": "audio-spectrogram-transformer",
            "hidden_size": m.width, "num_hidden_layers": m.depth, "num_attention_heads": m.heads,
            "intermediate_size": int(m.width * m.mlp_ratio), "hidden_act": "gelu", "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0, "initializer_range": 0.02, "layer_norm_eps": 1e-6, "qkv_bias": True,
            "patch_size": m.patch_f, "frequency_stride": geometry.stride_f, "time_stride": geometry.stride_t,
            "id2label": {str(i): name for i, name in labels.items()},
            "label2id": {name: i for i, name in labels.items()}, "dtype": "float32",
            "problem_type": "multi_label_classification" if several else "single_label_classification", **shared,
        },
        "preprocessor_config.json": {  # it divides by twice the deviation
            "feature_extractor_type": "ASTFeatureExtractor", "feature_size": 1, "do_normalize": True,
            "mean": statistics.mean, "std": statistics.factor * statistics.std / 2, "padding_side": "right",
            "padding_value": 0.0, "return_attention_mask": False, "sampling_rate": geometry.sample_rate, **shared,
        },
    }


class FromLogMel(nn.Module):
    """A model from log-mel on, of traceable operations: a convolution in place of patches, and positions cut to T.

    Any T up to the trained clip's; the last column's missing frames are 0 after normalisation, as in training.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        objective, statistics = weights.at_full_resolution(), weights.fine_statistics
        g = self.geometry = weights.recipe.fine_geometry
        self.encoder = _vit(objective)
        self.head = objective.head if weights.classes and isinstance(objective, Supervised) else None
        self.register_buffer("mean", torch.tensor(statistics.mean))
        self.register_buffer("scale", torch.tensor(statistics.factor * statistics.std))
        kernel = self.encoder.patch_embed.weight.detach().view(-1, 1, g.patch_f, g.patch_t)
        self.kernel = nn.Parameter(kernel.clone())
        self.table = nn.Parameter(self.encoder.positions.detach().view(*g.grid, -1).permute(2, 0, 1).clone())

    def forward(self, log_mel: Tensor) -> Tensor:
        """(B, T, F) -> logits (B, C); without a classifier the mean of the tokens (B, D)."""
        g = self.geometry
        x = ((log_mel - self.mean) / self.scale).transpose(1, 2)[:, None]
        x = F.pad(x, (0, g.stride_t - 1))  # the last column needs a single real frame beyond the one before
        x = F.conv2d(x, self.kernel, self.encoder.patch_embed.bias, (g.stride_f, g.stride_t))
        x = (x + self.table[:, :, : x.shape[3]]).flatten(2).transpose(1, 2)
        x = torch.cat([self.encoder.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        for block in self.encoder.blocks:
            x = block(x)
        x = self.encoder.norm(x)
        if self.head is not None:
            logits: Tensor = self.head(x, None)
            return logits
        return read_out(x, None, "mean", self.encoder.num_prefix)


def _to_onnx(weights: Weights, out: Path) -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install ssl_c2f[export]") from None
    geometry = weights.recipe.fine_geometry
    wrapped = FromLogMel(weights).eval()
    frames = geometry.frames(geometry.clip_samples)
    sizes = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("frames", min=geometry.patch_t, max=frames)}
    program = torch.onnx.export(
        wrapped, (torch.zeros(2, frames, geometry.num_mels),), dynamo=True, dynamic_shapes={"log_mel": sizes},
        input_names=["log_mel"], output_names=["logits" if wrapped.head is not None else "embedding"], verbose=False,
    )
    assert program is not None
    out.mkdir(parents=True, exist_ok=True)
    program.save(str(out / "model.onnx"), external_data=False)
    facts = _facts(weights) | {
        "input": f"log_mel (B, T, F): natural log-mel filterbank as Kaldi computes it, not normalised; "
        f"T from {geometry.patch_t} to {frames}",
    }
    write_json(out / "model.json", facts)
