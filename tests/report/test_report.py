"""The report page shows what is in a run folder and names what is missing; nothing in a run can harm its reader."""

from __future__ import annotations

import base64
import fcntl
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pages import page_of
from report_runs import make_run, write

from ssl_c2f.core.options import UserError
from ssl_c2f.report import write_page
from ssl_c2f.report.read import read_runs
from ssl_c2f.report.sections import overview
from ssl_c2f.report.series import Log, curve, read_log, tokens_per_step

VOID = {"meta", "link", "input", "img"}


def test_a_complete_run_shows_everything(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "full"))
    for wanted in (
        "full", "complete", "3 of 3", "50.0 %", "87.5 %", "70.0 to 90.0 %", "80.0, 95.0", "1 copied, 1 resized",
        "pseudo-inverse", "ssl_c2f pretrain", "dog/1.wav", "probed on esc", "frames of 10 ms", "75% masked",
        "30 TFLOPs",
    ):
        assert wanted in page.text, wanted
    assert "What is missing" not in page.text
    assert set(page.data["runs"][0]["curves"]) == {"validation", "probe", "loss", "lr", "mask", "tokens"}
    assert [band["flops"] for band in page.data["runs"][0]["bands"]] == [1e13, 2e13, 3e13]
    assert page.data["matrices"]["default"]["counts"] == [[3, 1], [0, 4]]
    assert page.tags.count("audio") == 1 and page.tags.count("img") == 3


def test_objectives_without_a_comparable_loss_or_with_other_accuracies(tmp_path: Path) -> None:
    """std_of_l2_normalized is drawn; SSAST's accuracy of matching patches is no probe score."""
    run = make_run(tmp_path / "latent")
    text = (run / "metrics.jsonl").read_text()
    text = text.replace('"val/loss"', '"val/nce_accuracy"').replace('"grad_norm"', '"std_of_l2_normalized"')
    (run / "metrics.jsonl").write_text(text)
    page = page_of(run)
    curves = page.data["runs"][0]["curves"]
    assert set(curves) == {"probe", "loss", "lr", "mask", "tokens", "spread"}
    assert curves["probe"] == page_of(make_run(tmp_path / "plain")).data["runs"][0]["curves"]["probe"]
    assert "its teacher changes" in page.text


def test_the_best_fine_tuning_is_of_the_runs_own_weights_and_of_one_metric(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for name, scores in {
        "finetune/better": {"accuracy": 0.9}, "finetune/scratch": {"accuracy": 0.97, "from_scratch": True},
        "finetune/tags": {"map": 0.99}, "evaluation/all": {"accuracy": 0.98},
    }.items():
        write(run / name / "scores.json", scores)
    assert "90.0 %" in overview(read_runs([run])) and "evaluated on all" in page_of(run).text
    for name in ("default", "better"):
        shutil.rmtree(run / "finetune" / name)
    assert "99.0 % mAP" in overview(read_runs([run]))
    shutil.rmtree(run / "finetune" / "tags")
    assert "98.0 %" not in overview(read_runs([run])) and "97.0 %" not in overview(read_runs([run]))


def test_no_file_from_elsewhere_gets_into_the_page(tmp_path: Path) -> None:
    """A run from someone else could otherwise make its page show files of the person who opens it."""
    run, secret = make_run(tmp_path / "run"), tmp_path / "secret"
    secret.write_text("planted")
    pictures = run / "phases" / "0-coarse" / "pictures"
    clip = {"clip": "dog", "pictures": {"a": "../../../../secret", "b": str(secret), "c": "..", "d": "x/0-input.png"}}
    write(pictures / "pictures.json", {"clips": [clip | {"sound": "../../../../secret"}]})
    (shown,) = read_runs([run])[0].phases[0].clips
    assert list(shown.images) == ["d"] and shown.sound is None
    assert base64.b64encode(b"planted").decode() not in page_of(run).source


def test_the_page_needs_no_network(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "full"))
    assert all(str(address).startswith("data:") for address in page.addresses)
    assert not re.findall(r"url\(|@import|fetch\(|import\(", page.source)
    assert set(re.findall(r"https?://[^\"' )]+", page.source)) == {"http://www.w3.org/2000/svg"}  # never fetched
    assert "default-src 'none'" in page.source


def test_an_empty_folder_gives_a_page(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    page = page_of(tmp_path / "empty")
    assert "The folder is empty: no run was started here." in page.text
    assert page.data["runs"][0]["curves"] == {}


def test_crashed_running_and_stopped_runs_are_distinguished(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    shutil.rmtree(run / "phases" / "2-fine")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:15]) + lines[15][:20])
    assert "stopped early" in page_of(run).text
    write(run / "lock", {"pid": 1, "host": "x", "started": "y"})
    page = page_of(run)
    assert "crashed" in page.text and "The process that wrote this run died." in page.text
    assert "1 lines of metrics.jsonl are broken" in page.text
    assert "Not started: fine." in page.text
    with open(run / "lock") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        assert "running" in page_of(run).text


@pytest.mark.parametrize("part", [
    "config.yaml", "provenance.json", "plan.json", "metrics.jsonl", "phases", "finetune", "probe",
    "phases/1-middle/pictures", "phases/1-middle/transfer.json", "phases/1-middle/pictures/0-input.png",
])
@pytest.mark.parametrize("how", ["gone", "half"])
def test_any_part_may_be_missing_or_half_written(tmp_path: Path, part: str, how: str) -> None:
    run = make_run(tmp_path / "run")
    path = run / part
    if path.is_dir():
        shutil.rmtree(path)
    elif how == "half":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.unlink()
    page = page_of(run)
    if part in ("plan.json", "provenance.json") or (part == "config.yaml" and how == "gone"):
        assert f"No {part}." in page.text
    if part == "finetune":
        assert "No fine-tuning yet" in page.text


@given(st.sampled_from(['<img src=x onerror="alert(1)">', "</script><script>alert(1)</script>", "<!--", "a&b\"c'd"]))
def test_names_are_shown_as_text(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        safe = name.replace("/", "_")  # no slash can be in the name of a folder
        run = make_run(Path(folder) / safe, phases=(safe, "b"))
        scores = {"accuracy": 1.0, "classes": [name, name + "2"], "confusion": [[1, 0], [0, 1]]}
        write(run / "finetune" / safe / "scores.json", scores)
        clip = {"clip": name, "pictures": {name: "0-input.png"}, "sound": None}
        write(run / "phases" / f"0-{safe}" / "pictures" / "pictures.json", {"mask_shape": name, "clips": [clip]})
        write(run / "provenance.json", {"command": [name], "commit": name, "versions": {name: name}})
        write(run / "config.yaml", f"root: {json.dumps(name)}\n")
        page = page_of(run, make_run(Path(folder) / "other"))
        assert page.text.count(name) >= 5  # clip, alternative, command, commit, options
        assert page.data["matrices"][f"{safe}/{safe}"]["classes"][0] == name
        assert page.tags.count("script") == 2 and page.tags.count("img") == 2 + 3
        assert not {a for a in page.attributes if a.startswith("on")}


def test_runs_are_compared(tmp_path: Path) -> None:
    a, b, same = make_run(tmp_path / "a"), make_run(tmp_path / "b", loss=2.0), make_run(tmp_path / "x" / "a")
    page = page_of(a, b)
    assert [run["name"] for run in page.data["runs"]] == ["a", "b"]
    assert "Options that differ" in page.source and "note" in page.text
    assert [run.name for run in read_runs([a, same])] == [str(a), str(same)]


def test_a_run_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run folder"):
        write_page([tmp_path / "none"], tmp_path / "page.html")


@pytest.mark.slow
def test_a_long_run_gives_a_small_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "long", steps=99_999)
    page = page_of(run)
    assert len(page.source) < 1_000_000
    loss = page.data["runs"][0]["curves"]["loss"]
    assert len(loss["y"]) <= 503 and loss["flops"][-1] == 99_999e12
    assert all(low <= y <= high for low, y, high in zip(loss["low"], loss["y"], loss["high"], strict=True))


@given(
    st.lists(st.tuples(st.integers(0, 3), st.floats(-1e3, 1e3) | st.none()), min_size=1, max_size=60),
    st.integers(1, 70),
)
def test_thinning_keeps_ends_means_and_extremes(rows: list[tuple[int, float | None]], points: int) -> None:
    rows.sort(key=lambda row: row[0])
    records = [
        {"phase": str(phase), "flops": i, "samples": i, "train_seconds": i, "loss": value}
        for i, (phase, value) in enumerate(rows)
    ]
    log = Log(records)
    found = curve(log, log.column("loss"), points)
    there = [(i, phase, value) for i, (phase, value) in enumerate(rows) if value is not None]
    if found is None:
        assert not there
        return
    y, ends = np.array(found["y"]), found["flops"]
    assert ends == sorted(set(ends)) and ends[-1] == there[-1][0]
    assert len(y) <= points + 3
    assert {rows[int(end)][0] for end in ends} == {phase for _, phase, _ in there}  # no point covers two phases
    values = np.array([value for _, _, value in there])
    low, high = np.array(found.get("low", y)), np.array(found.get("high", y))
    assert np.isclose(low.min(), values.min(), rtol=1e-5) and np.isclose(high.max(), values.max(), rtol=1e-5)
    edges = np.searchsorted([i for i, _, _ in there], ends, side="right")
    means = [values[a:b].mean() for a, b in zip([0, *edges[:-1]], edges, strict=True)]
    np.testing.assert_allclose(y, means, rtol=1e-4, atol=1e-3)


def test_broken_lines_are_counted(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_bytes(b'{"a": 1}\n[1]\n\xff\n{"a": tr')
    assert (len(read_log(tmp_path / "m.jsonl").records), read_log(tmp_path / "m.jsonl").broken) == (1, 3)
    log = Log([{"step": 2, "tokens": 20}, {"step": 2}, {"step": 4, "tokens": 60}, {"step": 4, "loss": True}])
    np.testing.assert_array_equal(tokens_per_step(log)[[0, 2]], [10.0, np.nan])
    assert np.isnan(log.column("loss")).all()


def test_reports_need_no_torch() -> None:
    code = "import sys, ssl_c2f.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
