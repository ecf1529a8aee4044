"""Pages of runs with labels, made by the commands' own functions."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_report import Page, page_of
from tiny import records, run_options

from ssl_c2f import engine


@pytest.fixture(scope="module")
def page(sounds: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    """Of a classifier that was trained in three phases."""
    run = tmp_path_factory.mktemp("runs") / "labelled"
    engine.run(run_options(sounds, "objective={name: supervised}", "evaluation.every=1"), run, kind="train")
    assert all("mask_ratio" not in line for line in records(run))
    return page_of(run)


def test_nothing_is_said_of_masks_and_neighbours(page: Page) -> None:
    assert set(page.data["runs"][0]["curves"]) == {"classifier", "loss", "lr", "tokens"}
    assert "The classifier on held-out clips" in page.text
    assert "No validation" not in page.text
    assert "Mask ratio" not in page.text and "Nearest neighbours" not in page.text and "hidden" not in page.text


def test_every_phase_shows_and_plays_its_input(page: Page) -> None:
    assert "No film strip" not in page.text
    assert page.tags.count("img") == 3 * 3 and page.tags.count("audio") == 3
    for phase, frame in (("coarse", 40), ("middle", 20), ("fine", 10)):
        assert page.text.count(f"{phase}: frames of {frame} ms") == 3
