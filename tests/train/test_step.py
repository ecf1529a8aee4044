"""The training step: a run against the same steps written out by hand, and the options of each phase."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from engine_runs import before, go, open_job, watch
from tiny_runs import checkpoints, records, run_options
from torch import Tensor, nn

from ssl_c2f.core import checkpoint
from ssl_c2f.data.front_end import Batch
from ssl_c2f.models.vit import ViT
from ssl_c2f.objectives.mae import MAE
from ssl_c2f.train.recipe import RunOptions
from ssl_c2f.train.validate import validate
from ssl_c2f.train.weights import Weights

State = dict[str, Tensor]


# --- the step

LR, BETAS, DECAY, CLIP, EMA = 0.01, (0.8, 0.9), 0.1, 0.05, 0.15
RATES = (LR / 2, LR, LR, LR / 2, 2 * LR, LR)  # two steps of warm-up and half a cosine; then half a cosine from 2 LR
BY_HAND = (
    "phases=[{name: coarse, steps: 4, time_factor: 2, batch_size: 7, warmup_steps: 2},"
    f" {{name: fine, steps: 2, batch_size: 7, lr: {2 * LR}}}]",
    f"optim={{lr: {LR}, betas: [0.8, 0.9], weight_decay: {DECAY}, clip_norm: {CLIP}}}", f"ema={EMA}",
    "model.drop_path=0", "train.checkpoint_every=1", "train.keep=9",
)


@pytest.mark.parametrize("moments", ["keep", "reset"])
def test_steps_are_those_written_by_hand(moments: str, sounds: Path, tmp_path: Path) -> None:
    """Micro-batches of 3 and 4 clips, gradients far above the norm that they are clipped to, and a boundary."""
    o = run_options(sounds, *BY_HAND, f"optim.moments={moments}")
    batches: list[Batch] = []
    states: list[State] = []

    def look(model: MAE, batch: Batch) -> None:
        batches.append(batch)
        states.append({name: value.clone() for name, value in model.named_parameters()})

    with before(MAE, look):
        go(o, tmp_path)
    assert [len(batch.spec) for batch in batches] == [3, 4] * 6
    own = ByHand(o, states[0])
    for i, (record, rate) in enumerate(zip(records(tmp_path), RATES, strict=True)):
        if i == 4 and moments == "reset":
            own.forget()
        loss, norm = own.step(0 if i < 4 else 1, batches[2 * i : 2 * i + 2], rate)
        assert norm > 2 * CLIP, "or clipping is not tried"
        assert (record["loss"], record["grad_norm"]) == (pytest.approx(loss, rel=1e-4), pytest.approx(norm, rel=1e-4))
        assert record["lr"] == pytest.approx(rate)
        (folder,) = tmp_path.glob(f"phases/*/checkpoints/step-{i + 1:08}")
        saved = checkpoint.load(folder)
        assert saved.ema and saved.optimizer
        close(saved.model, own.weights)
        close(saved.ema, own.ema)
        for name, state in saved.optimizer.items():
            close({name: state["exp_avg"]}, own.first, 1e-7)
            close({name: state["exp_avg_sq"]}, own.second, 1e-9)


def close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], atol: float = 2e-5) -> None:
    for name, value in found.items():
        torch.testing.assert_close(settled(name, value.double()), settled(name, expected[name]), rtol=1e-3, atol=atol)


def settled(name: str, value: Tensor) -> Tensor:
    """Without the keys' bias, which no softmax feels: its gradient is rounding alone, and AdamW blows that up."""
    third = len(value) // 3
    return torch.cat([value[:third], value[2 * third :]]) if name.endswith("qkv.bias") else value


class ByHand:
    """AdamW on the mean over all clips of a step, as in the papers, and the moving average of the weights."""

    def __init__(self, o: RunOptions, weights: State) -> None:
        self.models = [o.build(geometry, 0) for geometry in o.geometries]
        self.weights = {name: value.double() for name, value in weights.items()}
        self.ema, self.done = dict(self.weights), 0
        self.forget()

    def forget(self) -> None:
        self.first = {name: torch.zeros_like(value) for name, value in self.weights.items()}
        self.second, self.adam_steps = dict(self.first), 0

    def gradients(self, phase: int, batches: list[Batch]) -> tuple[float, State]:
        model = self.models[phase]
        model.load_state_dict(self.weights)
        model.zero_grad()
        clips = sum(len(batch.spec) for batch in batches)
        loss = sum(len(batch.spec) * model(batch).loss for batch in batches) / clips
        loss.backward()
        return float(loss.detach()), {name: p.grad.double() for name, p in model.named_parameters()}

    def step(self, phase: int, batches: list[Batch], lr: float) -> tuple[float, float]:
        """The loss, and the norm of the gradients before they are clipped."""
        loss, gradients = self.gradients(phase, batches)
        norm = float(sum(g.square().sum() for g in gradients.values()) ** 0.5)
        self.adam_steps += 1
        decay = min(EMA, (1 + self.done) / (10 + self.done))
        for name, g in gradients.items():
            g, w = g * min(1.0, CLIP / norm), self.weights[name]
            self.first[name] = BETAS[0] * self.first[name] + (1 - BETAS[0]) * g
            self.second[name] = BETAS[1] * self.second[name] + (1 - BETAS[1]) * g**2
            mean = self.first[name] / (1 - BETAS[0] ** self.adam_steps)
            square = self.second[name] / (1 - BETAS[1] ** self.adam_steps)
            plain = w.ndim < 2 or name.endswith("_token")
            w = w * (1 if plain else 1 - lr * DECAY) - lr * mean / (square.sqrt() + 1e-8)
            self.weights[name], self.ema[name] = w, decay * self.ema[name] + (1 - decay) * w
        self.done += 1
        return loss, norm


def test_bf16_is_the_precision_of_the_products_and_not_of_the_weights(sounds: Path, tmp_path: Path) -> None:
    seen: list[torch.dtype] = []

    def hook(module: nn.Module, inputs: tuple[object, ...], output: Tensor) -> None:
        if isinstance(module, nn.Linear) and module.training:
            seen.append(output.dtype)

    handle = nn.modules.module.register_module_forward_hook(hook)
    go(run_options(sounds, "phases=[{name: only, steps: 1, batch_size: 8}]", "train.precision=bf16"), tmp_path)
    handle.remove()
    saved = checkpoint.load(checkpoints(tmp_path)[0])
    assert set(seen) == {torch.bfloat16}
    assert {value.dtype for value in saved.model.values()} == {torch.float32}


# --- what a phase asks for

THREE_MASKS = (
    "phases=[{name: a, steps: 1, time_factor: 4, batch_size: 4, mask_ratio: 0.5, mask_shape: frequency},"
    " {name: b, steps: 1, time_factor: 2, batch_size: 4, mask_ratio: 0.4, mask_shape: uniform},"
    " {name: c, steps: 1, batch_size: 4}]", "mask={ratio: 0.8, shape: time}",
)


def test_each_phase_masks_as_it_says(sounds: Path, tmp_path: Path) -> None:
    """2 x 5, 2 x 10 and 2 x 20 tokens. Phases `a` and `b` have masks of their own, `c` those of the run."""
    masked: list[Tensor] = []

    def look(model: MAE, batch: Batch) -> None:
        masked.append(batch.masks[0].masked.view(-1, *batch.geometry.grid))

    with watch(ViT) as encoded, before(MAE, look):
        go(run_options(sounds, *THREE_MASKS), tmp_path)
    assert [shape[1] for training, shape in encoded if training] == [1 + 5, 1 + 12, 1 + 8]
    assert [record["mask_ratio"] for record in records(tmp_path)] == [0.5, 0.4, 0.8]
    whole_columns = [bool((m.any(1) == m.all(1)).all()) for m in masked]
    whole_rows = [bool((m.any(2) == m.all(2)).all()) for m in masked]
    assert (whole_columns, whole_rows) == ([False, False, True], [True, False, False])


# --- what is validated


def test_the_moving_average_is_what_is_validated(sounds: Path, tmp_path: Path) -> None:
    o = run_options(
        sounds, "ema=0.5", "evaluation.every=9", "optim.lr=0.05",
        "phases=[{name: only, steps: 2, batch_size: 8, time_factor: 2}]",
    )
    job = open_job(o, tmp_path)
    saved = checkpoint.load(checkpoints(go(o, tmp_path))[0])
    (record,) = (record for record in records(tmp_path) if "val/loss" in record)

    def loss(state: State) -> float:
        classes = job.corpus.manifest.classes
        weights = Weights(recipe=o, geometry=o.geometries[0], classes=classes, tensors=state, origin="")
        return validate(weights.at_full_resolution(), o, job.runner(o.fine_geometry))["val/loss"]

    assert saved.ema and record["val/loss"] == pytest.approx(loss(saved.ema), rel=1e-6)
    assert abs(loss(saved.model) / record["val/loss"] - 1) > 1e-3
