"""A trained model as one module from the waveform on, that the Hugging Face Hub (or a folder) can hold.

FOLDER or repository: model.safetensors and state.json, as in a checkpoint, so --ckpt takes it too; NOTICE where the
weights derive from others'.

Legend: B batch, S samples, N tokens, D width, C classes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from torch import Tensor, nn

from ssl_c2f.core.files import write_bytes, write_json, write_text
from ssl_c2f.data.front_end import Batch, FrontEnd, Items
from ssl_c2f.models.heads import Layer, Readout
from ssl_c2f.objectives.supervised import Supervised
from ssl_c2f.tasks.convert import notice
from ssl_c2f.train.weights import Weights, load_weights

_FILES = ("model.safetensors", "state.json")


class AudioModel(
    nn.Module, PyTorchModelHubMixin, library_name="ssl_c2f", tags=["audio-classification"],
    paper_url="https://arxiv.org/abs/2401.08415",
    coders={Weights: (lambda weights: weights.origin, lambda origin: origin)},  # else it would copy all tensors
):
    """Waveform to logits or features, at full resolution, with the input statistics of its training."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        # config.json, by which the Hub counts downloads; all facts are in state.json
        self._hub_mixin_config = {"model_type": "ssl_c2f"}
        self.weights, self.geometry = replace(weights, tensors={}), weights.recipe.fine_geometry  # one copy of tensors
        self.front_end = FrontEnd(self.geometry, weights.fine_statistics)
        self.objective = weights.at_full_resolution()
        self.classes = weights.classes if isinstance(self.objective, Supervised) else ()

    def batch(self, waveform: Tensor, num_samples: Tensor | None = None) -> Batch:
        """(B, S) in [-1, 1] at `geometry.sample_rate` -> what the encoder reads; beyond the clip's length it is cut.

        Args:
            num_samples: (B,) real samples of each; all of S if None. The rest is padding, to which no ViT attends.
        """
        waveform = waveform[:, : self.geometry.clip_samples]
        if num_samples is None:
            num_samples = torch.full((len(waveform),), waveform.shape[1])
        index = torch.arange(len(waveform))
        num_samples = num_samples.clamp(max=waveform.shape[1])
        batch: Batch = self.front_end(Items(waveform, num_samples, index, index, torch.zeros(len(waveform), 0)))
        return batch

    def forward(self, waveform: Tensor, num_samples: Tensor | None = None) -> Tensor:
        """(B, S) -> logits (B, C), or the mean of the tokens (B, D) where there is no classifier. See `batch`."""
        batch = self.batch(waveform, num_samples)
        if self.classes and isinstance(self.objective, Supervised):
            return self.objective.logits(batch)
        return self.objective.embed(batch)

    def embed(
        self, waveform: Tensor, num_samples: Tensor | None = None, readout: Readout = "mean", layer: Layer = "last"
    ) -> Tensor:
        """(B, S) -> (B, D) features, wider for readouts other than the mean, without gradients."""
        return self.objective.embed(self.batch(waveform, num_samples), readout, layer)

    def _save_pretrained(self, save_directory: Path) -> None:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.objective.state_dict().items()}
        write_bytes(save_directory / _FILES[0], safetensors.torch.save(tensors))
        weights = replace(self.weights, tensors=tensors, geometry=self.geometry)
        write_json(save_directory / _FILES[1], weights.to_json())
        if weights.source:
            write_text(save_directory / "NOTICE", notice(weights.source))

    @classmethod
    def _from_pretrained(
        cls, *, model_id: str, revision: str | None = None, cache_dir: Any = None, force_download: bool = False,
        local_files_only: bool = False, token: Any = None, map_location: str = "cpu", **kwargs: Any,
    ) -> AudioModel:
        folder = Path(model_id)
        if not folder.exists():
            files = [
                hf_hub_download(
                    model_id, name, revision=revision, cache_dir=cache_dir, force_download=force_download,
                    local_files_only=local_files_only, token=token,
                ) for name in _FILES
            ]
            folder = Path(files[0]).parent
        return cls(load_weights(folder)).to(map_location).eval()
