"""Finding and loading the weights that `--ckpt` names: checkpoints of ours, and published ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import Field, ValidationError
from torch import Tensor

from ssl_c2f.core import checkpoint
from ssl_c2f.core.files import one_line
from ssl_c2f.core.options import Options, UserError
from ssl_c2f.core.run_folder import PhaseFolder, RunFolder
from ssl_c2f.curriculum.geometry import Geometry
from ssl_c2f.curriculum.transfer import Moved, TransferReport, transfer
from ssl_c2f.data.front_end import Statistics
from ssl_c2f.models import published
from ssl_c2f.models.patches import sincos_positions
from ssl_c2f.objectives import Objective
from ssl_c2f.train.checkpoint_state import CheckpointState
from ssl_c2f.train.recipe import Recipe

Which = Literal["auto", "model", "ema"]
RELEASED = Path(__file__).resolve().parents[1] / "released"  # NAME/, a checkpoint in half precision that comes with us


@dataclass(frozen=True, kw_only=True)
class Weights(CheckpointState):
    """Trained weights, and all that is needed to use them."""

    tensors: Mapping[str, Tensor]
    origin: str
    notes: tuple[str, ...] = ()  # on an import, a line each

    @property
    def factor(self) -> float:
        """What the input's std is multiplied with before it divides the input."""
        return next((statistics.factor for statistics in self.statistics.values()), 1.0)

    def objective(self, geometry: Geometry | None = None, device: torch.device | str = "cpu") -> Objective:
        """The network, ready for inference, in a geometry (by default its own). The global generator is left alone.

        Raises:
            UserError: the tensors do not fit.
        """
        geometry = geometry or self.geometry
        try:
            with torch.random.fork_rng([]), torch.device("meta"):
                self._check(self.recipe.build(self.geometry, len(self.classes)).state_dict())
            with torch.random.fork_rng([]):
                objective = self.recipe.build(geometry, len(self.classes))
        except (MemoryError, RuntimeError, ValueError) as error:
            raise UserError(f"{self.origin}: its options make no network here ({one_line(error)[:200]})") from None
        fitted, _ = transfer(self.tensors, self.geometry, objective.state_dict(), geometry)
        objective.load_state_dict(fitted)
        return objective.to(device).eval()

    def _check(self, expected: Mapping[str, Tensor]) -> None:
        """Raises UserError: other tensors than the options make, or values that are no numbers."""
        if beside := next(iter(self.tensors.keys() ^ expected.keys()), None):
            where = "its options make none" if beside in self.tensors else "it is missing"
            raise UserError(f"{self.origin}: tensor {beside[:100]}: {where}")
        for name, tensor in self.tensors.items():
            if tensor.shape != expected[name].shape or tensor.is_floating_point() != expected[name].is_floating_point():
                there, ours = tuple(tensor.shape), tuple(expected[name].shape)
                raise UserError(f"{self.origin}: {name} is {there} of {tensor.dtype}, its options make {ours}")
            if not tensor.isfinite().all():
                raise UserError(f"{self.origin}: {name} holds NaN or infinite values")

    def at_full_resolution(self, device: torch.device | str = "cpu") -> Objective:
        """The network in the fine geometry: a fine model tested on coarse input collapses, and losses on coarse input
        are other quantities, so this is where weights are compared and used."""
        return self.objective(self.recipe.fine_geometry, device)

    @property
    def fine_statistics(self) -> Statistics:
        """Of the input at full resolution. Raises UserError: they were not measured."""
        if found := self.statistics.get(self.recipe.fine_geometry.digest()):
            return found
        raise UserError(f"{self.origin}: no statistics of its input at full resolution")

    @property
    def results(self) -> RunFolder:
        """Where what is done with these weights is kept."""
        return RunFolder(results_folder(Path(self.origin)))


def released() -> list[str]:
    """Names of the encoders that come with the package."""
    return sorted(folder.name for folder in RELEASED.iterdir())


def locate(name: str | Path) -> Path:
    """The path that `name` means: itself where it exists, else the folder of the released encoder of that name."""
    return RELEASED / name if str(name) in released() and not Path(name).exists() else Path(name)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint folder that `path` means: itself, its model.safetensors, a phase (its newest), a run (the newest
    of its furthest phase), or a released encoder by name.

    Raises:
        UserError: there is none.
    """
    path = locate(path)
    if path.is_file() and (path.parent / "state.json").exists():
        return path.parent
    if (path / "state.json").exists():
        return path
    if found := PhaseFolder(path).newest() or RunFolder(path).newest():
        return found
    if not path.exists():
        raise UserError(f"--ckpt {path}: no such file or folder")
    folds = [fold.path.name for fold in RunFolder(path).folds()]
    hint = f"; choose one of its folds: {', '.join(folds)}" if folds else " yet"
    raise UserError(f"--ckpt {path}: no checkpoint in it{hint}")


def find_published(path: Path) -> Path | None:
    """The published file that `path` means, if any: itself, or the weights in a folder of transformers'."""
    if path.is_file():
        return None if (path.parent / "state.json").exists() else path
    if (path / "state.json").exists() or not (path / "config.json").exists():
        return None
    return next((path / name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).exists()), None)


def results_folder(origin: Path) -> Path:
    """Where results of weights go: runs/NAME of runs/NAME/phases/0-coarse/checkpoints/step-00000001, FOLDER of
    FOLDER/checkpoints/step-00000000 (what `convert` writes), runs/NAME of a published file NAME.pth, and
    runs/released/NAME of a released encoder, as runs/NAME is what pretraining anew with its config writes."""
    if origin.parent == RELEASED:
        return Path("runs/released") / origin.name
    if origin.is_file():
        return Path("runs") / (origin.parent.name if origin.stem in ("model", "pytorch_model") else origin.stem)
    inside = RunFolder.of(origin) or PhaseFolder.of(origin)
    return inside.path if inside else origin


def load_weights(path: Path, which: Which = "auto") -> Weights:
    """Load a checkpoint, ours, published or released by name, in fp32; `auto` takes the EMA where there is one.

    Raises:
        UserError: no checkpoint there, it is damaged, or it has no moving average.
    """
    if find_published(path):
        return import_published(path)[0]
    folder = find_checkpoint(path)
    saved = checkpoint.load(folder, training=False)
    if which == "ema" and saved.ema is None:
        raise UserError(f"{folder} has no moving average of the weights: use weights=model")
    stored = saved.ema if saved.ema is not None and which != "model" else saved.model
    tensors = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in stored.items()}
    return Weights(**vars(CheckpointState.read(saved.state, folder)), tensors=tensors, origin=str(folder))


def initial_weights(name: str) -> Weights:
    """What `init=` names: whatever --ckpt takes, or a Vision Transformer of timm's by its name, fetched from the Hub.

    Weights of images bring no statistics of sounds: those are measured.

    Raises:
        UserError: nothing of that name, it cannot be fetched, or what `load_weights` refuses.
    """
    path = locate(name)
    weights = load_weights(path) if path.exists() else _from_timm(name)
    return replace(weights, statistics={}) if weights.source.get("kind") == published.TIMM.name else weights


def _from_timm(name: str) -> Weights:
    import timm

    known = [*timm.list_models(module="vision_transformer"), *timm.list_models(module="deit")]
    if name.partition(".")[0] not in known:
        near = get_close_matches(name, known, n=1)
        raise UserError(f"init={name}: no such file, and no ViT of timm's{f' ({near[0]}?)' if near else ''}")
    try:
        model = timm.create_model(name, pretrained=True)
    except Exception as error:  # of a network or the Hub: there are many kinds
        raise UserError(
            f"init={name}: its weights cannot be fetched ({one_line(error)[:120]}); without a network give "
            "a file, init=FILE"
        ) from None
    heads: list[Any] = [module.num_heads for module in model.modules() if hasattr(module, "num_heads")]
    options = ImportOptions(heads=heads[0] if heads else None)
    return _imported(model.state_dict(), f"init={name}", Path(name), options)[0]


class ImportOptions(Options):
    """What a published file does not say. What is left out here is as usual for its kind."""

    sample_rate: int | None = Field(None, ge=1000, description="Hz; 16000")
    num_mels: int | None = Field(None, ge=4, description="128")
    stride_f: int | None = Field(
        None, ge=1, description="mel bins to the next patch; for AST stride_t or 10, else its height"
    )
    stride_t: int | None = Field(
        None, ge=1, description="frames to the next patch; for AST stride_f or 10, else its length"
    )
    heads: int | None = Field(None, ge=1, description="of attention; width / 64")
    frames: int = Field(1024, ge=1, description="of a clip, where the weights are an image's")
    mean: float | None = Field(None, description="of the log-mel input; AudioSet's")
    std: float | None = Field(None, gt=0, description="of the log-mel input; AudioSet's; twice of it divides")
    labels: str | None = Field(None, description="a text file with the name of a class in each line")
    several: bool | None = Field(None, description="several labels per clip; true with AudioSet's 527 classes")


def import_published(path: Path, options: ImportOptions = ImportOptions()) -> tuple[Weights, TransferReport]:  # noqa: B008
    """Published weights in our layout, and what became of each tensor. `path` is a file or a folder of transformers'.

    Raises:
        UserError: no kind that is known, a tensor that is missing or has another name or shape, unsafe content.
    """
    file = find_published(path)
    if file is None:
        raise UserError(f"{path}: no published weights (a file, or a folder with config.json and model.safetensors)")
    config, extractor = (_json(file.parent / name) for name in ("config.json", "preprocessor_config.json"))
    return _imported(checkpoint.load_published(file), str(file), file, options, config, extractor)


def _imported(
    state: Mapping[str, Tensor], name: str, file: Path, options: ImportOptions, config: Mapping[str, Any] = {},
    extractor: Mapping[str, Any] = {},
) -> tuple[Weights, TransferReport]:
    """Published tensors in our layout, and a report; errors begin with `name`."""
    try:
        if config.get("hidden_act", "gelu") != "gelu":
            raise UserError(f"hidden_act {config['hidden_act']} of config.json is not supported, only gelu")
        found = published.convert(state, _facts(options, config))
        weights = _as_weights(found, file, options, config, extractor)
        report = _check(weights, found)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    except ValueError as error:  # impossible options or geometry
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise UserError(f"{name}: {reason.removeprefix('Value error, ')}") from None
    rearranged = [f"  {name}: {how}" for name, how in found.how.items() if ".blocks." not in name]
    return replace(weights, notes=(*weights.notes, *report.lines(), *rearranged)), report


def _facts(options: ImportOptions, config: Mapping[str, Any]) -> published.Facts:
    return published.Facts(
        num_mels=options.num_mels or config.get("num_mel_bins", 128),
        stride=(options.stride_f or config.get("frequency_stride"), options.stride_t or config.get("time_stride")),
        heads=options.heads or config.get("num_attention_heads"), num_frames=options.frames,
    )


def _as_weights(
    found: published.Published, file: Path, options: ImportOptions, config: Mapping[str, Any],
    extractor: Mapping[str, Any],
) -> Weights:
    """With geometry, statistics, options and classes; the clip is as long as the positions are."""
    rate = options.sample_rate or extractor.get("sampling_rate", 16000)
    frames = found.patch[1] + (found.grid[1] - 1) * found.stride[1]
    samples = (frames - 1) * int(0.010 * rate) + int(0.025 * rate)
    tensors = dict(found.state)
    num_classes = len(tensors["head.classifier.bias"]) if "head.classifier.bias" in tensors else 0
    objective: dict[str, Any] = {"name": "supervised", "head": "ast" if num_classes else "mean_pool"}
    if num_classes:
        multi = config.get("problem_type") == "multi_label_classification" or num_classes == 527
        objective["labels"] = "multi" if (multi if options.several is None else options.several) else "single"
    if "mask_token" in tensors:
        objective = {"name": "ssast"}
    hidden, width = tensors["encoder.blocks.0.mlp.fc1.weight"].shape
    depth = len({name.split(".")[2] for name in tensors if name.startswith("encoder.blocks.")})
    model = {
        "width": width, "depth": depth, "heads": found.heads, "mlp_ratio": hidden / width,
        "patch_f": found.patch[0], "patch_t": found.patch[1], "stride_f": found.stride[0], "stride_t": found.stride[1],
        "positions": "learned", "class_tokens": tensors["encoder.cls_token"].shape[1],
    }
    audio = {"sample_rate": rate, "clip_seconds": samples / rate, "num_mels": found.num_mels}
    recipe = Recipe.model_validate({"audio": audio, "model": model, "objective": objective}, strict=False)
    geometry = recipe.fine_geometry
    table, positions = sincos_positions(geometry, width), tensors["encoder.positions"]
    if table.shape == positions.shape and torch.allclose(table, positions, atol=1e-5):
        del tensors["encoder.positions"]
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"positions": "sincos"})})
        found.how["encoder.positions"] = "sine-cosine, made anew for any geometry"
    mean, std, whose = _statistics(options, extractor)
    licence = _licence(found, file)
    eps = config.get("layer_norm_eps", 1e-12 if config else 1e-6)
    other_eps = (f"layer_norm_eps is {eps:g} in config.json and 1e-06 here",) if eps != 1e-6 else ()
    (f, t), s = found.grid, found.stride
    notes = (
        f"{file}: {found.kind.name}, width {width}, depth {depth}, {f}x{t} patches of "
        f"{found.patch[0]}x{found.patch[1]} at stride {s[0]}x{s[1]}, {model['class_tokens']} class tokens, "
        f"{num_classes or 'no'} classes",
        f"input: (x - {mean:g}) / (2 x {std:g}), {whose}", f"licence of the source: {licence}",
        *found.notes, *other_eps,
    )
    return Weights(
        recipe=recipe, geometry=geometry, statistics={geometry.digest(): Statistics(mean, std, 2.0)},
        classes=_classes(num_classes, options, config), tensors=tensors, origin=str(file), notes=notes,
        source={"kind": found.kind.name, "licence": licence, "url": found.kind.source, "file": file.name},
    )


def _statistics(options: ImportOptions, extractor: Mapping[str, Any]) -> tuple[float, float, str]:
    """Mean, std, and where they come from."""
    mean, std = published.AUDIOSET
    whose = "AudioSet's, as its kind has it"
    if "mean" in extractor and "std" in extractor:
        mean, std, whose = extractor["mean"], extractor["std"], "of preprocessor_config.json"
    if extractor.get("do_normalize") is False:
        mean, std, whose = 0.0, 0.5, "preprocessor_config.json does not normalise"
    if options.mean is not None or options.std is not None:
        whose = "as given"
    return mean if options.mean is None else options.mean, std if options.std is None else options.std, whose


def _classes(num_classes: int, options: ImportOptions, config: Mapping[str, Any]) -> tuple[str, ...]:
    names = [f"class {i}" for i in range(num_classes)]
    if len(labels := config.get("id2label", {})) == num_classes:
        names = [str(labels[key]) for key in sorted(labels, key=int)]
    if options.labels:
        try:
            names = Path(options.labels).read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"labels {options.labels}: {error}") from None
        names = [name.strip() for name in names if name.strip()]
        if len(names) != num_classes:
            raise UserError(f"labels {options.labels}: {len(names)} names, but the weights have {num_classes} classes")
    return tuple(names)


def _licence(found: published.Published, file: Path) -> str:
    """That of the model card beside the file, else that of the kind."""
    readme = file.parent / "README.md"
    if found.kind is published.HF and readme.exists():
        head = readme.read_text(encoding="utf-8", errors="replace").split("---")
        try:
            card = yaml.safe_load(head[1]) if len(head) > 2 else {}
            said = card.get("license_name") or card.get("license")
        except (yaml.YAMLError, AttributeError):
            said = None
        return str(said) if said else found.kind.licence
    return found.kind.licence


def _check(weights: Weights, found: published.Published) -> TransferReport:
    """Raises UserError: a tensor of our model is missing or has another shape, or there are others."""
    with torch.random.fork_rng([]):
        target = weights.recipe.build(weights.geometry, len(weights.classes)).state_dict()
    for name, tensor in target.items():
        if name not in weights.tensors:
            raise UserError(f"{found.kind.name}: nothing in it becomes our {name}")
        if tensor.shape != weights.tensors[name].shape:
            there, ours = tuple(weights.tensors[name].shape), tuple(tensor.shape)
            raise UserError(f"{found.kind.name}: {name} has {there}, our model {ours}")
    if beside := next((name for name in weights.tensors if name not in target), None):
        raise UserError(f"{found.kind.name}: our model has no {beside}")
    moved = [Moved(name, "copied", found.how.get(name, "")) for name in target]
    moved += [Moved(name, "dropped", str(tuple(tensor.shape))) for name, tensor in found.dropped.items()]
    return TransferReport(tuple(moved))


def _json(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {error}") from None
    return content if isinstance(content, dict) else {}
