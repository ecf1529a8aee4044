"""metrics.jsonl has every step once, and a failure of W&B (real, offline) never harms a run."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trackers import track
from wandb_files import sent
from wandb_stub import KEY, WandbStub

from ssl_c2f.core.options import UserError
from ssl_c2f.track import AXES, wandb_run
from ssl_c2f.track.tracker import cut_back


@pytest.fixture(autouse=True)
def nobody_is_logged_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    monkeypatch.setattr(wandb_run, "_failed", [])  # servers that did not answer in other tests


@pytest.fixture
def silent_server() -> Iterator[str]:
    """The address of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@given(
    steps=st.lists(st.integers(0, 20), max_size=10).map(sorted),
    resume=st.none() | st.integers(0, 20),
    tail=st.binary(max_size=20).filter(lambda raw: b"\n" not in raw),
)
def test_a_file_is_cut_back_to_the_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], resume: int | None, tail: bytes
) -> None:
    file = tmp_path_factory.mktemp("m") / "metrics.jsonl"
    file.write_bytes(b"".join(b'{"step": %d}\n' % step for step in steps) + tail)
    kept = [step for step in steps if resume is None or step <= resume]
    assert cut_back(file, resume) == ({"step": kept[-1]} if kept else {})
    assert [record["step"] for record in lines(file.parent)] == kept


def test_a_damaged_line_costs_no_other(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    whole = [b'{"step": %d}\n' % step for step in range(1, 9)]
    for bad in (b'{"stap": 3}\n', b"{\n", b"[3]\n", b'{"step": "3"}\n', b'{"step": 3000}\n', b"\x80" * 12 + b"\n"):
        file.write_bytes(b"".join([*whole[:2], bad, *whole[3:]]))
        assert cut_back(file, 6) == {"step": 6}
        assert file.read_bytes() == b"".join([*whole[:2], bad, *whole[3:6]])


@given(st.integers(1, 30), st.data())
def test_interruptions_leave_every_step_once(
    tmp_path_factory: pytest.TempPathFactory, total: int, data: st.DataObject
) -> None:
    folder, saved = tmp_path_factory.mktemp("m"), 0
    for _ in range(3):
        killed = data.draw(st.integers(saved, total))
        tracker = track(folder, resume_step=saved)
        for step in range(saved + 1, killed + 1):
            tracker.log({"step": step})
        tracker.finish()
        saved = data.draw(st.integers(saved, killed))
    tracker = track(folder, resume_step=saved)
    for step in range(saved + 1, total + 1):
        tracker.log({"step": step})
    tracker.finish()
    assert [record["step"] for record in lines(folder)] == list(range(1, total + 1))


def test_every_line_is_on_disk_at_once_and_strict_json(tmp_path: Path) -> None:
    tracker = track(tmp_path)
    tracker.log({"step": 1, "loss": float("nan"), "grad": float("-inf"), "lr": torch.tensor(0.5)})
    expected = {"step": 1, "loss": None, "loss_nonfinite": "nan", "grad": None, "grad_nonfinite": "-inf", "lr": 0.5}
    assert lines(tmp_path) == [expected]
    tracker.finish()


def test_offline_run(tmp_path: Path) -> None:
    tracker = track(tmp_path, "auto", resume_step=0)
    assert tracker.wandb.run is not None and tracker.wandb.run.offline
    assert (tracker.wandb.run.group, tracker.wandb.run.job_type) == ("run", "pretrain/coarse")
    for step in range(1, 4):
        tracker.log({"phase": "coarse", "step": step, "samples": 8 * step, "loss": 1 / step})
    tracker.finish()
    tracker.finish()
    assert [record["step"] for record in sent(tmp_path)] == [1, 2, 3]


def test_a_resumed_offline_run_is_one_whole_file_under_the_same_id(tmp_path: Path) -> None:
    """W&B's own file lost its tail, or has steps that were rolled back: the next one begins again, from our file."""
    ids = []
    for resume_step in (0, 2):
        tracker = track(tmp_path, "offline", resume_step=resume_step)
        assert tracker.wandb.run is not None
        ids.append(tracker.wandb.run.id)
        for step in range(resume_step + 1, resume_step + 4):
            tracker.log({"phase": "coarse", "step": step, "loss": float("nan") if step == 2 else 1.0})
        tracker.finish()
    found = sent(tmp_path)
    assert ids[0] == ids[1]
    assert [(record["step"], record["_step"]) for record in found] == [(1, 2), (2, 4), (3, 6), (4, 8), (5, 10)]
    assert [str(record["loss"]) for record in found] == ["1", "nan", "1", "1", "1"]


@pytest.mark.slow
def test_a_lost_process_of_wandb_leaves_a_whole_copy(tmp_path: Path) -> None:
    """It dies of the signal by which a scheduler ends a job, or is killed for want of memory."""
    script = f"""
import os, subprocess
from pathlib import Path
from trackers import track
tracker = track(Path({str(tmp_path)!r}), "offline", resume_step=0)
for step in range(1, 6):
    if step == 4:
        subprocess.run(["pkill", "-KILL", "-P", str(os.getpid()), "wandb-core"], check=True)
    tracker.log({{"phase": "coarse", "step": step}})
tracker.finish()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and "wandb sync" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 1
    assert [record["step"] for record in sent(tmp_path)] == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_the_server_gets_what_it_missed_and_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def go(resume_step: int, last: int, log_every: int = 1) -> list[tuple[int, int]]:
        tracker = track(tmp_path / "run", "online", resume_step=resume_step, timeout_seconds=30.0)
        assert tracker.wandb.run is not None and not tracker.wandb.run.offline
        for step in range(resume_step + log_every, last + 1, log_every):
            tracker.log({"phase": "coarse", "step": step})
        tracker.finish()
        (run,) = stub.runs.values()
        return [(row["_step"], row["step"]) for row in run.rows]

    with WandbStub() as stub:
        for name, value in stub.environment(tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        assert go(0, 4) == [(2 * step, step) for step in range(1, 5)]
        with open(tmp_path / "run/metrics.jsonl", "a") as file:  # it was killed before W&B had sent these
            file.writelines(json.dumps({"phase": "coarse", "step": step}) + "\n" for step in (5, 6))
        assert go(5, 7) == [(2 * step, step) for step in range(1, 8)]
        steps = range(1, 9)
        assert go(3, 8) == [(2 * step, step) for step in steps], "the server had the steps that were rolled back"
        steps = [*steps, 10, 12]
        assert go(2, 12, log_every=2) == [(2 * step, step) for step in steps], "which are fewer lines now"
        (run,) = stub.runs.values()
        metrics = run.config["_wandb"]["m"]  # as define_metric codes them: 1 name, 2 pattern, 5 place of its axis
        (rest,) = [metric for metric in metrics if metric.get("2") == "*"]
        assert {metric["1"] for metric in metrics if "1" in metric} == set(AXES)
        assert metrics[rest["5"] - 1]["1"] == "samples", "the order of W&B's own steps says nothing"


def test_records_of_other_phases_are_not_replayed(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"phase": "before", "step": 1}\n{"phase": "coarse", "step": 2}\n')
    tracker = track(tmp_path, "offline", resume_step=None)
    tracker.log({"phase": "coarse", "step": 3})
    tracker.finish()
    assert [(record["step"], record["_step"]) for record in sent(tmp_path)] == [(2, 4), (3, 6)]


def test_pictures_and_artifacts(tmp_path: Path) -> None:
    import wandb
    from PIL import Image

    Image.new("RGB", (4, 4)).save(tmp_path / "mask.png")
    notes: list[str] = []
    tracker = track(tmp_path, "offline", note=notes.append)
    tracker.log({"step": 1, "samples": 8})
    tracker.publish(lambda run: run.log({"mask": wandb.Image(str(tmp_path / "mask.png"))}))
    tracker.publish(lambda run: run.log_artifact(tmp_path / "mask.png", name="mask", type="picture"))
    assert notes == []
    for _ in range(2):
        tracker.publish(lambda run: run.log({"mask": wandb.Image(str(tmp_path / "missing.png"))}))
    tracker.log({"step": 2})
    tracker.finish()
    assert len(notes) == 1 and "W&B failed" in notes[0]
    assert [record["step"] for record in lines(tmp_path)] == [1, 2]
    first, _ = sent(tmp_path)
    assert first["step"] == 1 and first["mask._type"] == "image-file", "in the row of the last record"
    assert list(tmp_path.glob("wandb/*/files/media/images/mask*.png"))


@pytest.mark.parametrize("mode", ["auto", "online"])
def test_a_server_that_never_answers_leaves_the_run_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silent_server: str, mode: str
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", silent_server)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    notes: list[str] = []
    tracker = track(tmp_path / "run", mode, note=notes.append)
    assert tracker.wandb.run is not None and tracker.wandb.run.offline
    assert len(notes) == 1 and "wandb sync" in notes[0]
    tracker.log({"step": 1, "loss": 1.0})
    tracker.finish()
    assert len(lines(tmp_path / "run")) == 1
    assert not [file for file in (tmp_path / "run").rglob("*") if file.is_file() and KEY.encode() in file.read_bytes()]


def test_off_makes_no_wandb_folder(tmp_path: Path) -> None:
    tracker = track(tmp_path, "off")
    tracker.log({"step": 1})
    tracker.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_folder_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        track(tmp_path / "run")
