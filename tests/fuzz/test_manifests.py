"""No manifest, however damaged, stops a command other than by one line, or leads it to files that are not its own."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fuzz import audio, harness, manifests
from fuzz.harness import Case, Outcome

COUNT, FAST = 200, 9


def cases(folder: Path, classifier: Path, count: int) -> Iterator[Case]:
    for file in manifests.files(count):
        place = folder / file.name.partition("-")[0]
        (place / "in" / "sub").mkdir(parents=True)
        for name in manifests.RECORDINGS:
            (place / "in" / name).write_bytes(audio.sound("pcm16"))
        os.mkfifo(place / "in" / "fifo")
        (place / "in" / "link").symlink_to("/etc/passwd")
        (place / "in" / "loop").symlink_to("loop")
        (place / "in" / file.name).write_bytes(file.data)
        data = f"data.manifest=in/{file.name}"
        yield Case(file.name, place, (
            ("data", "check", data),
            ("data", "stats", data, "audio.sample_rate=8000", "time_factors=[1]"),
            ("data", "shard", data, "--out", "shards"),
            ("data", "manifest", data, "--out", "again.csv"),
            ("embed", "--ckpt", str(classifier), data, "out=f.npz"),
        ))


def wrong(case: Case, outcomes: list[Outcome]) -> Iterator[str]:
    check, stats, shard, again, embed = outcomes
    counts = re.search(r"(\d+) good, (\d+) bad", check.out)
    if counts is None:
        if any(outcome.status != 2 for outcome in outcomes):
            yield f"data check refuses it, others do not: {check.err}"
        return
    good = int(counts[1])
    hours = re.search(r"recordings, ([\d.]+) h", stats.out)
    if hours and float(hours[1]) > 1:
        yield f"data stats: {stats.out[:200]}"
    if embed.status == 0:
        features = np.load(case.folder / "f.npz")["features"]
        if features.shape[0] != good or not np.isfinite(features).all():
            yield f"embed: {features.shape}, {good} good files"
    elif good:
        yield f"embed: {embed.err}"
    if (shards := case.folder / "shards" / "manifest.jsonl").exists() and shard.status == 2:
        yield "data shard: refused, and left a manifest"
    if (case.folder / "again.csv").exists() == (again.status == 2):
        yield f"data manifest: {again.status}, {shards.exists()}"


def check(folder: Path, classifier: Path, count: int) -> None:
    found = harness.faults(harness.run(cases(folder, classifier, count)), wrong)
    assert not found, f"{len(found)} faults in {count} manifests:\n" + "\n".join(found)


def test_some_manifests(tmp_path: Path, classifier: Path) -> None:
    check(tmp_path, classifier, FAST)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # of a busy machine
def test_two_hundred_manifests(tmp_path: Path, classifier: Path) -> None:
    check(tmp_path, classifier, COUNT)
