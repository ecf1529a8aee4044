"""Which clips form which batch, for any number of devices and interruptions."""

from __future__ import annotations

from collections import Counter
from itertools import islice

from hypothesis import given
from hypothesis import strategies as st
from phase_lists import phase_list

from ssl_c2f.curriculum.phases import Curriculum, PhaseOptions
from ssl_c2f.data.sampler import clip_at, micro_batches, positions

seeds = st.integers(0, 2**31)
limits = st.none() | st.integers(1, 9)
worlds = st.sampled_from([1, 2, 3, 4, 6])


def curriculum(phases: list[tuple[int, int]]) -> Curriculum:
    """Of (steps, batch size of twelfths): every world size divides it."""
    return phase_list([PhaseOptions(name="any", steps=steps, batch_size=12 * size) for steps, size in phases])


runs = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=3).map(curriculum)


@given(seed=seeds, num_clips=st.integers(1, 50), first=st.integers(0, 5))
def test_every_epoch_is_a_permutation(seed: int, num_clips: int, first: int) -> None:
    for epoch in (first, first + 1):
        found = [clip_at(seed, epoch * num_clips + i, num_clips) for i in range(num_clips)]
        assert {e for e, _ in found} == {epoch}
        assert sorted(clip for _, clip in found) == list(range(num_clips))


@given(seed=seeds, position=st.integers(0, 10**12), num_clips=st.integers(1, 50))
def test_a_position_is_asked_for_in_any_order(seed: int, position: int, num_clips: int) -> None:
    found = clip_at(seed, position, num_clips)
    for other in range(5):
        clip_at(seed + other, other * num_clips, num_clips)
    assert clip_at(seed, position, num_clips) == found


def test_epochs_and_seeds_differ_and_orders_are_fair() -> None:
    orders = {tuple(clip_at(seed, first + i, 20)[1] for i in range(20)) for seed in (0, 1) for first in (0, 20)}
    assert len(orders) == 4
    first = Counter(clip_at(0, epoch * 4, 4)[1] for epoch in range(400))
    assert all(60 < n < 140 for n in first.values()) and len(first) == 4


@given(per_device=st.integers(1, 200), limit=limits)
def test_micro_batches_share_a_batch_evenly(per_device: int, limit: int | None) -> None:
    sizes = micro_batches(per_device, limit)
    assert sum(sizes) == per_device
    assert max(sizes) - min(sizes) <= 1 and min(sizes) > 0
    assert max(sizes) <= (limit or per_device)
    assert len(sizes) == -(-per_device // (limit or per_device))  # no more of them than must be


@given(run=runs, world=worlds, limit=limits)
def test_ranks_share_the_global_batch(run: Curriculum, world: int, limit: int | None) -> None:
    """The samples of a step are the same for any number of devices, each is seen once, and none is left out."""
    streams = [positions(run, 0, run.steps, rank, world, limit) for rank in range(world)]
    for step in range(run.steps):
        batch_size = run.lookup(step)[0].batch_size
        sizes = micro_batches(batch_size // world, limit)
        seen: list[int] = []
        for stream in streams:
            micro = list(islice(stream, len(sizes)))
            assert [len(m) for m in micro] == sizes
            seen += [p for m in micro for p in m]
        assert seen == list(range(run.samples(step), run.samples(step) + batch_size))
    assert all(next(stream, None) is None for stream in streams)


@given(run=runs, world=worlds, limit=limits, data=st.data())
def test_a_run_resumed_at_any_step_goes_on_as_it_would_have(
    run: Curriculum, world: int, limit: int | None, data: st.DataObject
) -> None:
    rank, start = data.draw(st.integers(0, world - 1)), data.draw(st.integers(0, run.steps))
    whole = list(positions(run, 0, run.steps, rank, world, limit))
    before = list(positions(run, 0, start, rank, world, limit))
    assert before + list(positions(run, start, run.steps, rank, world, limit)) == whole


@given(run=runs, data=st.data())
def test_accumulation_changes_no_batch(run: Curriculum, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, 1))
    flat = [[p for m in positions(run, 0, run.steps, rank, 2, limit) for p in m] for limit in (None, 1, 5)]
    assert flat[0] == flat[1] == flat[2]
