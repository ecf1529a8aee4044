"""The demo, shortened: it makes everything that it should, and a second call repeats no work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ssl_c2f.core.options import UserError
from ssl_c2f.data.synthetic import CLASSES
from ssl_c2f.tasks import demo


@pytest.mark.slow
def test_the_demo_tells_its_story_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "UNLABELLED", 5)
    monkeypatch.setattr(demo, "LABELLED", 5)
    page = demo.demo(tmp_path / "demo", epochs=(2.0, 1.0, 1.0), tuning_epochs=1.0)
    first = capsys.readouterr().out
    for wanted in ("log-mel", "random encoder", "mean+std", "scratch", "chance 8.3%", page.resolve().as_uri()):
        assert wanted in first, wanted
    text = page.read_text()
    assert text.count("<img ") == 3 * 3 * 3  # clips, phases, views
    assert "What is missing" not in text
    labelled, unlabelled = (
        {file.read_bytes() for file in (tmp_path / "demo" / "sounds" / name).rglob("*.wav")}
        for name in ("labelled", "unlabelled")
    )
    assert len(labelled) == len(unlabelled) == 5 * len(CLASSES) and not labelled & unlabelled
    steps = (tmp_path / "demo" / "metrics.jsonl").read_text()
    demo.demo(tmp_path / "demo", epochs=(2.0, 1.0, 1.0), tuning_epochs=1.0)
    again = capsys.readouterr().out
    assert (tmp_path / "demo" / "metrics.jsonl").read_text() == steps
    assert table_of(again) == table_of(first)


def table_of(output: str) -> list[str]:
    """The lines of the last table."""
    lines = output.splitlines()
    return lines[lines.index("What came out"):-2]


def test_what_is_compared_differs_in_the_weights_alone(tmp_path: Path) -> None:
    tuned, scratch = (demo.finetune_options(tmp_path, name) for name in ("pretrained", "scratch"))
    changed = {k for k, v in tuned.model_dump().items() if v != scratch.model_dump()[k]}
    assert changed == {"name", "run_dir", "from_scratch"}
    options = demo.pretrain_options(tmp_path)
    assert [p.time_factor for p in options.phases] == [4, 2, 1]
    assert options.data.root != tuned.data.root
    assert json.loads(options.model_dump_json())["tracking"]["wandb"] == "off"


def test_a_file_in_the_way_is_told(tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        demo.demo(tmp_path / "demo")
