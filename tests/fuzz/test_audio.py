"""No recording, however damaged, stops a command, fills the memory, or leaves a number that is none."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fuzz import audio, harness
from fuzz.harness import Case, Outcome

COUNT, FAST = 1000, 20


def cases(folder: Path, classifier: Path, count: int) -> Iterator[Case]:
    """Each hostile file beside a good one."""
    for file in audio.files(count):
        place = folder / file.name.partition("-")[0]
        (place / "in").mkdir(parents=True)
        (place / "in" / "good.wav").write_bytes(audio.sound("pcm16"))
        (place / "in" / file.name).write_bytes(file.data)
        ckpt = ("--ckpt", str(classifier))
        yield Case(file.name, place, (
            ("data", "check", "data.root=in"),
            ("data", "stats", "data.root=in", "audio.sample_rate=8000", "time_factors=[1]"),
            ("predict", *ckpt, f"in/{file.name}", "in/good.wav", "out=p.json"),
            ("embed", *ckpt, "data.root=in", "out=f.npz"),
        ), file.expected)


def wrong(case: Case, outcomes: list[Outcome]) -> Iterator[str]:
    """What is wrong with what the commands made of a hostile file and a good one."""
    check, stats, predict, embed = outcomes
    counts = re.search(r"(\d) good, (\d) bad", check.out)
    good, bad = map(int, counts.groups()) if counts else (0, 0)
    if good + bad != 2 or not good:
        yield f"data check: {check.out[-200:]}"
    if case.expected and (case.expected == "good") != (good == 2):
        yield f"data check: not {case.expected}: {check.out[-200:]}"
    hours = re.search(r"recordings, ([\d.]+) h", stats.out)
    if not hours or float(hours[1]) > 1:
        yield f"data stats: {stats.out[:200]} {stats.err}"
    rows = json.loads((case.folder / "p.json").read_text(), parse_constant=harness.refuse)
    if len(rows) != good:
        yield f"predict: {len(rows)} rows, and {good} good files"
    if (skipped := predict.err.count("skipped in/")) != bad:
        yield f"predict: {skipped} skipped, {bad} bad"
    features = np.load(case.folder / "f.npz")
    if features["features"].shape[0] != good or not np.isfinite(features["features"]).all():
        yield f"embed: {features['features'].shape}, {good} good files"
    if (skipped := embed.err.count("skipped ")) != bad:
        yield f"embed: {skipped} skipped, {bad} bad"


def check(folder: Path, classifier: Path, count: int) -> None:
    found = harness.faults(harness.run(cases(folder, classifier, count)), wrong)
    assert not found, f"{len(found)} faults in {count} files:\n" + "\n".join(found)


def test_some_files(tmp_path: Path, classifier: Path) -> None:
    check(tmp_path, classifier, FAST)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # of a busy machine
def test_a_thousand_files(tmp_path: Path, classifier: Path) -> None:
    check(tmp_path, classifier, COUNT)
