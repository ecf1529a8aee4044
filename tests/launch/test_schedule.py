"""What a launch submits, for every state that runs and the queue can be in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssl_c2f.core.options import UserError
from ssl_c2f.launch.jobs import Job
from ssl_c2f.launch.schedule import Schedule, Task, make_schedule, remember

STATES = ("done", "missing", "RUNNING", "PENDING (Dependency)", "PENDING (Priority)")


def task(folder: Path, run: int, stage: int, place: int, state: str, wanted: bool = True) -> Task:
    path = folder / f"run-{run}"
    made = Task(Job("pretrain", f"{stage}-{place}", "", str(path)), lambda: state == "done", wanted=wanted)
    remember(made, f"{run}{stage}{place}", path)
    return made


def schedule(folder: Path, runs: Sequence[Sequence[Sequence[str]]]) -> tuple[list[list[list[Task]]], Schedule]:
    """Runs of tasks in the given states, and what is left to do of them."""
    tasks = [[[task(folder, r, s, p, state) for p, state in enumerate(stage)] for s, stage in enumerate(run)]
             for r, run in enumerate(runs)]
    states = {t.number: state for made, run in zip(tasks, runs, strict=True) for there, stage in
              zip(made, run, strict=True) for t, state in zip(there, stage, strict=True)}
    queue = {number: state for number, state in states.items() if state not in ("done", "missing")}
    return tasks, make_schedule(tasks, queue)


@given(st.lists(st.lists(st.lists(st.sampled_from(STATES), min_size=1, max_size=2), max_size=3), max_size=3))
def test_every_task_is_done_queued_or_submitted_behind_what_it_needs(
    tmp_path_factory: pytest.TempPathFactory, states: list[list[list[str]]]
) -> None:
    runs, plan = schedule(tmp_path_factory.mktemp("s"), states)
    submitted = plan.tasks
    assert len(set(submitted)) == len(submitted) and not set(submitted) & set(plan.queued)
    ready = set(plan.queued)
    for batch in plan.batches:
        assert set(batch.after) <= ready, "what is waited for is in the queue by then"
        assert not batch.pairwise or [t.run for t in batch.tasks] == [t.run for t in batch.after] or not batch.after
        ready |= set(batch.tasks)
    assert set(plan.lost) <= set(submitted), "what is cancelled is submitted anew"
    needs = {t: batch.after[i : i + 1] if batch.pairwise else batch.after
             for batch in plan.batches for i, t in enumerate(batch.tasks)}
    for stages in runs:
        before: list[Task] = []
        for stage in stages:
            for one in stage:
                assert one.is_done() or one in plan.queued or one in submitted
                if one in plan.queued:
                    assert not set(before) & set(submitted), "it waits for a job of before, not for the new one"
            left = [t for t in stage if t in submitted or t in plan.queued]
            for one in set(stage) & set(submitted):
                assert set(needs[one]) == set(before)
            before = left or before


def test_runs_that_are_alike_are_arrays(tmp_path: Path) -> None:
    runs, plan = schedule(tmp_path, [[["missing"], ["missing"], ["missing"] * 2]] * 3)
    first, second, *rest = plan.batches
    assert [t.run.name for t in first.tasks] == ["run-0", "run-1", "run-2"] and not first.after
    assert second.pairwise and second.after == first.tasks
    assert second.dependency(lambda t: f"7_{runs.index(next(r for r in runs if r[0][0] is t))}") == "aftercorr:7"
    assert [list(batch.after) for batch in rest] == [[t] for t in second.tasks]
    assert rest[0].dependency(lambda t: "8_0") == "afterok:8_0"


def test_what_is_left_out_must_not_be_needed(tmp_path: Path) -> None:
    left_out, fine = task(tmp_path, 0, 0, 0, "missing", wanted=False), task(tmp_path, 0, 1, 0, "missing")
    with pytest.raises(UserError, match="phase 0-0 is neither done nor queued, and others need it"):
        make_schedule([[[left_out], [fine]]], {})
    assert make_schedule([[[fine], [left_out]]], {}).tasks == [fine]
    assert make_schedule([[[left_out], [fine]]], {left_out.number: "RUNNING"}).batches[0].after == [left_out]
