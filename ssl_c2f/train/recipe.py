"""The options of a run, and what follows from them before it starts: geometries and phases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from pydantic import Field, model_validator

from ssl_c2f.core.options import Options
from ssl_c2f.curriculum import cost
from ssl_c2f.curriculum.geometry import AudioOptions, Compression, Geometry, make_geometries, make_geometry
from ssl_c2f.curriculum.phases import Curriculum, Masking, Phase, PhaseOptions, make_phase
from ssl_c2f.data.augment import AugmentOptions
from ssl_c2f.data.masks import MaskOptions
from ssl_c2f.data.recordings import DataOptions
from ssl_c2f.models.backbones import ModelOptions
from ssl_c2f.models.heads import Readout
from ssl_c2f.models.htsat import HTSATOptions
from ssl_c2f.models.vit import ViTOptions
from ssl_c2f.objectives import AnyOptions, Objective
from ssl_c2f.objectives.mae import MAEOptions
from ssl_c2f.objectives.supervised import SupervisedOptions
from ssl_c2f.objectives.views import ViewsOptions
from ssl_c2f.track.wandb_run import TrackingOptions
from ssl_c2f.train.optim import OptimOptions

_MOST = 2**20  # tokens of a clip, and values of a patch: more is a slip of the pen


class LoopOptions(Options):
    """How the loop runs. Of these, only the precision changes what is computed."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    max_batch_per_device: int | None = Field(None, ge=1, description="larger batches are accumulated; none: no limit")
    compile: bool = False
    rehearse: bool = Field(True, description="a dry run of two steps of every phase before the job starts")
    log_every: int = Field(10, ge=1, description="steps")
    checkpoint_every: int = Field(500, ge=1, description="steps; the end of a phase is always kept")
    keep: int = Field(2, ge=1, description="checkpoints of a phase")
    max_nonfinite: int = Field(20, ge=0, description="steps skipped for a non-finite loss before the run stops")


class EvaluationOptions(Options):
    """Validation during training: at full resolution, with raw targets and fixed masks."""

    every: float = Field(0.0, ge=0, description="epochs between validations, besides the end of a phase; 0: never")
    mask_ratio: float = Field(0.75, gt=0, lt=1)
    mask_draws: int = Field(4, ge=1)
    batch_size: int = Field(50, ge=1)
    max_clips: int = Field(2000, ge=2, description="clips of the validation loss, and of each side of the kNN probe")
    knn: int = Field(10, ge=1, description="neighbours")
    readout: Readout = Field("mean", description="of the features that neighbours are found in, and that are watched")


class Recipe(Options):
    """What a network is made from, as its checkpoints record it. The other options of a run say how it is trained."""

    audio: AudioOptions = AudioOptions()
    compression: Compression = "frame_shift"
    model: ModelOptions = ViTOptions()
    objective: AnyOptions = MAEOptions()

    @model_validator(mode="after")
    def _go_together(self) -> Recipe:
        name = self.objective.name
        if isinstance(self.model, HTSATOptions):
            if not isinstance(self.objective, SupervisedOptions):
                raise ValueError(f"model htsat learns from labels only, and objective {name} hides tokens that its "
                                 "windows need: use model.name=vit, or ssl_c2f train")
            if self.objective.head in ("class_token", "ast"):
                raise ValueError(f"objective.head {self.objective.head}: model htsat has no class token; use mean_pool")
        if self.fine_geometry.overlaps and name != "supervised":
            raise ValueError("model.stride_f and model.stride_t: patches that overlap show objective "
                             f"{name} what it should predict")
        g = self.fine_geometry
        if max(g.num_tokens, g.patch_dim) > _MOST:
            raise ValueError(f"{g.num_tokens} patches of {g.patch_f}x{g.patch_t} in a clip: none of these may be above "
                             f"{_MOST}; audio.clip_seconds, audio.hop_ms, model.patch_f and model.patch_t make them")
        return self

    def makes(self, geometry: Geometry) -> bool:
        """Whether a phase of this recipe can have the geometry; how far the clip is padded depends on other phases."""
        g, m = geometry, self.model
        wider = g.time_factor if self.compression == "patch" else 1
        patch, own = (m.patch_f, m.patch_t), (g.patch_f, g.patch_t // wider)
        try:
            again = make_geometry(self.audio, self.compression, own, g.time_factor, unit=patch, fold=m.fold,
                                  stride=m.stride if own == patch else own)
        except (ValueError, ArithmeticError):
            return False
        columns = (g.num_frames - g.patch_t) // again.stride_t + 1
        padded = again.num_frames <= g.num_frames <= 64 * again.num_frames
        return padded and g == replace(again, num_frames=g.num_frames, grid_t=columns)

    @property
    def fine_geometry(self) -> Geometry:
        """Full resolution, and the model's own patch: where validation losses are taken and weights are used."""
        return self._geometries([])[-1]

    def _geometries(self, phases: Sequence[PhaseOptions]) -> list[Geometry]:
        """Of each phase, and the fine one."""
        patch = (self.model.patch_f, self.model.patch_t)
        wanted = [(phase.time_factor, phase.patch(patch)) for phase in phases]
        return make_geometries(
            self.audio, self.compression, patch, [*wanted, (1, None)], self.model.stride, self.model.fold
        )

    def build(self, geometry: Geometry, num_classes: int) -> Objective:
        """The network, freshly initialised from torch's global generator."""
        return self.objective.build(self.model, geometry, num_classes)


class RunOptions(Recipe):
    """All options of one run."""

    seed: int = Field(0, ge=0)
    data: DataOptions = DataOptions()
    mask: MaskOptions = MaskOptions()
    augment: AugmentOptions = AugmentOptions()
    optim: OptimOptions = OptimOptions()
    ema: float = Field(0.0, ge=0, lt=1, description="decay of a moving average of the weights; 0: none is kept")
    phases: tuple[PhaseOptions, ...] = Field(min_length=1)
    train: LoopOptions = LoopOptions()
    evaluation: EvaluationOptions = EvaluationOptions()
    tracking: TrackingOptions = TrackingOptions()

    @model_validator(mode="after")
    def _possible(self) -> RunOptions:
        names = [phase.name for phase in self.phases]
        if len(set(names)) < len(names):
            raise ValueError(f"phases: names must differ, not {', '.join(names)}")
        if self.optim.lr is not None and all(phase.lr is not None for phase in self.phases):
            raise ValueError("optim.lr has no effect: every phase sets its own lr (phases.0.lr=...)")
        if isinstance(self.objective, ViewsOptions) and self.augment.mixup_prob:
            raise ValueError("augment.mixup_prob mixes whole clips: objective views takes augment.mix_prob instead")
        if self.optim.schedule in ("trunk", "run_cosine"):
            warm = (phase.name for phase in self.phases[1:] if phase.warmup_epochs or phase.warmup_steps)
            if name := next(warm, None):
                raise ValueError(f"phase {name}: optim.schedule={self.optim.schedule} warms up in the first phase only")
        for phase, geometry in zip(self.phases, self.geometries, strict=True):
            if self.fine_geometry.overlaps and phase.patch((1, 1)):
                raise ValueError(f"model.stride_f and model.stride_t: phase {phase.name} has a patch of its own; "
                                 "patches that overlap need one for all")
            if geometry.num_tokens < 2:
                raise ValueError(f"phase {phase.name}: a clip of {self.audio.clip_seconds:g} s is a single token")
            if isinstance(self.objective, ViewsOptions) and self.objective.seen(geometry).num_tokens < 2:
                raise ValueError(f"phase {phase.name}: a view of {self.objective.seconds:g} s is a single token")
        return self

    @property
    def geometries(self) -> list[Geometry]:
        """Of each phase."""
        return self._geometries(self.phases)[:-1]

    @property
    def fine_geometry(self) -> Geometry:
        return self._geometries(self.phases)[-1]  # padded to the span of all phases

    def curriculum(self, num_clips: int, num_classes: int) -> Curriculum:
        """The phases for a training set of so many clips and classes. What they leave to the run is filled in here."""
        phases: list[Phase] = []
        for phase, geometry in zip(self.phases, self.geometries, strict=True):
            phases.append(make_phase(
                phase, phases[-1] if phases else None, geometry=geometry, masking=self._masking(phase),
                costs=self.costs(phase, geometry, num_classes), num_clips=num_clips, lr=self.optim.lr or 5e-4,
                min_lr_ratio=self.optim.min_lr_ratio,
            ))
        return Curriculum(tuple(phases), num_clips)

    def _masking(self, phase: PhaseOptions) -> Masking | None:
        shape = phase.mask_shape or self.mask.shape or self.objective.mask_shape
        count = self.objective.num_masks
        ratio = phase.mask_ratio or self.mask.ratio
        o = self.objective
        views = (o.shapes, o.seconds) if isinstance(o, ViewsOptions) else ((), None)
        return Masking(shape, ratio, self.mask.size, count, self.mask.seconds, *views) if count else None

    def costs(self, phase: PhaseOptions, geometry: Geometry, num_classes: int) -> tuple[cost.Part, ...]:
        """Of one clip in one step of a phase, were it in `geometry`."""
        ratio = phase.mask_ratio or self.mask.ratio
        return tuple(self.objective.costs(self.model, geometry, ratio, num_classes))
