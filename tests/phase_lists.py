"""Lists of phases over a small set of clips, whose geometry does not matter."""

from __future__ import annotations

from collections.abc import Sequence

from ssl_c2f.curriculum.cost import Part
from ssl_c2f.curriculum.geometry import AudioOptions, make_geometry
from ssl_c2f.curriculum.phases import Curriculum, Phase, PhaseOptions, make_phase

NUM_CLIPS = 40
GEOMETRY = make_geometry(AudioOptions(), "frame_shift", (16, 16))


def phase_list(options: Sequence[PhaseOptions], flops: float = 1.0) -> Curriculum:
    """The run's own learning rate is 1e-3, and falls to a tenth."""
    phases: list[Phase] = []
    for one in options:
        phases.append(make_phase(
            one, phases[-1] if phases else None, geometry=GEOMETRY, masking=None,
            costs=(Part("any", flops, 1.0, tokens=7),), num_clips=NUM_CLIPS, lr=1e-3, min_lr_ratio=0.1,
        ))
    return Curriculum(tuple(phases), NUM_CLIPS)
