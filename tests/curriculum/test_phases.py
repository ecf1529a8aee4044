"""Phases and schedules are pure functions of the step."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from phase_lists import NUM_CLIPS, phase_list
from pydantic import ValidationError

from ssl_c2f.curriculum.phases import LENGTHS, PhaseOptions, learning_rate

options = st.builds(
    PhaseOptions,
    name=st.just("any"),
    steps=st.integers(1, 40),
    batch_size=st.integers(1, 30),
    lr=st.none() | st.floats(1e-5, 1e-2),
    warmup_steps=st.none() | st.integers(0, 50),
    mask_ratio=st.none() | st.floats(0.1, 0.9),
)
runs = st.lists(options, min_size=1, max_size=4)


@given(runs)
def test_every_step_stands_in_exactly_one_phase(phases: list[PhaseOptions]) -> None:
    run = phase_list(phases)
    places = [run.lookup(step) for step in range(run.steps + 1)]
    assert run.steps == sum(phase.steps or 0 for phase in phases)
    for step, (phase, t, _) in enumerate(places[:-1]):
        assert [phase] == [p for p in run.phases if p.first_step <= step < p.last_step]
        assert t == (step - phase.first_step) / phase.steps < 1
    assert places[-1] == (run.phases[-1], 1.0, 1.0) and run.phases[-1].index == len(phases) - 1
    assert places[0] == (run.phases[0], 0.0, 0.0)
    for (before, t, u), (after, later_t, later_u) in pairwise(places):
        assert after.index - before.index in (0, 1) and later_u > u
        assert later_t == 0 if after.index > before.index else later_t > t


@given(runs)
def test_counters_add_up_what_each_step_costs(phases: list[PhaseOptions]) -> None:
    run, clips = phase_list(phases, flops=3.0), 0
    for step in range(run.steps + 1):
        assert run.counters(step) == {"samples": clips, "tokens": 7 * clips, "flops": 3.0 * clips}
        clips += run.lookup(step)[0].batch_size


@given(runs)
def test_samples_count_the_batches_before_a_step(phases: list[PhaseOptions]) -> None:
    run, seen = phase_list(phases), 0
    for step in range(run.steps):
        assert run.samples(step) == seen
        seen += run.lookup(step)[0].batch_size
    assert run.samples(run.steps) == seen


@pytest.mark.parametrize("step", [-1, 8])
def test_steps_outside_of_the_run_are_refused(step: int) -> None:
    with pytest.raises(ValueError, match=f"step {step} is outside of the run's 7 steps"):
        phase_list([PhaseOptions(name="a", steps=4), PhaseOptions(name="b", steps=3)]).lookup(step)


@given(
    phase=options, floor=st.none() | st.floats(0, 1), schedule=st.sampled_from(["cosine", "constant"]),
)
def test_the_learning_rate_warms_up_and_falls_without_jumps(
    phase: PhaseOptions, floor: float | None, schedule: Literal["cosine", "constant"]
) -> None:
    run = phase_list([phase.model_copy(update={"min_lr_ratio": floor})])
    (only,) = run.phases
    rates = [learning_rate(*run.lookup(step)[:2], schedule) for step in range(run.steps + 1)]
    peak, warmup = phase.lr or 1e-3, only.warmup_steps
    assert warmup == min(phase.warmup_steps or 0, only.steps)
    assert max(rates) == pytest.approx(peak)
    assert rates[0] == pytest.approx(peak / max(warmup, 1))
    assert rates[warmup] == pytest.approx(peak)
    assert all(b > a for a, b in pairwise(rates[:warmup]))
    assert all(b <= a for a, b in pairwise(rates[warmup:]))
    steepest = max(1 / warmup if warmup else 0, math.pi / 2 / max(1, only.steps - warmup)) * peak
    assert all(abs(b - a) <= steepest * 1.0001 for a, b in pairwise(rates))
    if warmup < only.steps:
        assert rates[-1] == pytest.approx(peak * ((0.1 if floor is None else floor) if schedule == "cosine" else 1.0))


@given(runs)
def test_the_learning_rate_restarts_with_every_phase(phases: list[PhaseOptions]) -> None:
    run = phase_list(phases)
    alone = [phase_list([phase]) for phase in phases]
    expected = [learning_rate(*a.lookup(step)[:2]) for a in alone for step in range(a.steps)]
    assert [learning_rate(*run.lookup(step)[:2]) for step in range(run.steps)] == pytest.approx(expected)


def test_a_cosine_halfway_down() -> None:
    (phase,) = phase_list([PhaseOptions(name="a", steps=110, warmup_steps=10, lr=1.0, min_lr_ratio=0.2)]).phases
    assert learning_rate(phase, 60 / 110) == pytest.approx(0.6)


@given(batches=st.integers(1, 50), batch_size=st.integers(1, 20), flops=st.floats(1, 1e12))
def test_one_length_in_four_measures(batches: int, batch_size: int, flops: float) -> None:
    clips = batches * batch_size
    lengths: dict[str, Any] = {
        "epochs": clips / NUM_CLIPS, "steps": batches, "samples": clips, "flops": clips * flops,
    }
    assert tuple(lengths) == LENGTHS
    for measure, length in lengths.items():
        run = phase_list([PhaseOptions(name="a", batch_size=batch_size, **{measure: length})], flops)
        assert run.steps == batches, measure
        assert run.samples(run.steps) == clips


@pytest.mark.parametrize("length", [{"epochs": 1e-6}, {"samples": 1}, {"flops": 1e-3}])
def test_no_phase_is_empty(length: dict[str, Any]) -> None:
    assert phase_list([PhaseOptions(name="a", batch_size=8, **length)]).steps == 1


def test_what_a_phase_leaves_out_is_the_runs() -> None:
    bare, full = phase_list([
        PhaseOptions(name="a", epochs=2, batch_size=10, warmup_epochs=0.5),
        PhaseOptions(name="b", epochs=1, lr=2.0, min_lr_ratio=0.0, warmup_steps=3),
    ]).phases
    assert (bare.lr, bare.min_lr_ratio, bare.warmup_steps, bare.steps) == (1e-3, 0.1, 2, 8)
    assert (full.lr, full.min_lr_ratio, full.warmup_steps, full.steps) == (2.0, 0.0, 1, 1)
    assert (full.index, full.name, full.first_step, full.first_sample) == (1, "b", 8, 80)


@given(st.sets(st.sampled_from(LENGTHS)))
def test_exactly_one_length(given_lengths: set[str]) -> None:
    lengths: dict[str, Any] = dict.fromkeys(given_lengths, 1)
    if len(lengths) == 1:
        assert PhaseOptions(name="a", **lengths)
        return
    with pytest.raises(ValidationError, match="exactly one of epochs, steps, samples, flops, not"):
        PhaseOptions(name="a", **lengths)


@pytest.mark.parametrize(
    "wrong",
    [{"warmup_steps": 1, "warmup_epochs": 1.0}, {"name": "a/b"}, {"steps": 0}, {"mask_ratio": 1.0}, {"time_factor": 0}],
)
def test_impossible_phases_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        PhaseOptions(**{"name": "a", "steps": 1, **wrong})


@pytest.mark.parametrize("schedule", ["trunk", "run_cosine"])
@given(phases=runs, floor=st.floats(0, 1))
def test_one_schedule_over_the_run_takes_no_notice_of_switches(
    schedule: Literal["trunk", "run_cosine"], phases: list[PhaseOptions], floor: float
) -> None:
    """Of equal peaks, and but for the warm-up of the first phase, the rate is a function of the FLOPs alone."""
    cold = {"lr": 1e-3, "min_lr_ratio": floor, "warmup_steps": None, "warmup_epochs": None}
    run = phase_list([phase.model_copy(update=cold) for phase in phases])
    rates, spent = [], []
    for step in range(run.steps + 1):
        phase, t, _ = run.lookup(step)
        spent.append(run.spent(step))
        rates.append(learning_rate(phase, t, schedule, spent[-1]))
    assert spent[0] == 0 and spent[-1] == 1 and all(b > a for a, b in pairwise(spent))
    assert rates[0] == pytest.approx(1e-3) and rates[-1] == pytest.approx(floor * 1e-3)
    for share, rate in zip(spent, rates, strict=True):
        left = 1 - math.sqrt(max(share - 0.8, 0) / 0.2) if schedule == "trunk" else (1 + math.cos(math.pi * share)) / 2
        assert rate == pytest.approx(1e-3 * (floor + (1 - floor) * left))
