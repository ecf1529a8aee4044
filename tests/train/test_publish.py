"""What W&B is told of a run besides its metrics. The whole of it, against a server, is in tests/track."""

from __future__ import annotations

from pathlib import Path

import pytest

from ssl_c2f.train.publish import group_of


@pytest.mark.parametrize("depth", range(5))
def test_the_group_of_an_imported_file_is_its_name(depth: int, tmp_path: Path) -> None:
    """At any depth below the root: nothing is derived from its place in a run folder that it is not in."""
    file = tmp_path.joinpath(*"abcde"[:depth], "x.pth")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    assert group_of(str(file)) == "x"
    assert group_of("/x.pth").startswith("x")


def test_the_group_of_a_checkpoint_is_its_run(tmp_path: Path) -> None:
    folder = tmp_path / "runs/mine/phases/0-coarse/checkpoints/step-00000001"
    folder.mkdir(parents=True)
    assert group_of(str(folder)) == "mine"
    (tmp_path / "runs/mine/phases/0-coarse/wandb.json").write_text('{"id": "abc", "group": "theirs"}')
    assert group_of(str(folder)) == "theirs"
