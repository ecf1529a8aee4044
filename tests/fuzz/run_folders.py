"""Run folders of which something is damaged, gone, a link or a folder: 300 of them from one seed and two good ones."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

Draw = random.Random
SECRET = "what stands in somebody else's file"


def damage(run: Path, number: int, elsewhere: Path, seed: int = 0) -> str:
    """Do the `number`-th harm to a run; every file comes again and again. Returns what was done to which file.

    `elsewhere` is a file outside it, of SECRET, that nobody may show or change.
    """
    draw = Draw(f"{seed} {number}")
    files = sorted(path for path in run.rglob("*") if path.is_file())
    file = files[number * 7 % len(files)] if number % 3 else draw.choice(files)
    if file.name == "lock" or draw.random() < 0.05:
        return draw.choice((old_copy, stray))(draw, run)
    kind = KINDS[number % len(KINDS)]
    kind(draw, file, elsewhere)
    return f"{kind.__name__} {file.relative_to(run)}"


def flip(draw: Draw, file: Path, elsewhere: Path) -> None:
    data = bytearray(file.read_bytes())
    for _ in range(draw.choice((1, 1, 10)) if data else 0):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(data)


def cut(draw: Draw, file: Path, elsewhere: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: draw.randrange(len(data) + 1)])


def zero(draw: Draw, file: Path, elsewhere: Path) -> None:
    """As a disk that lost power leaves a file: of the right length, of zeros."""
    file.write_bytes(bytes(file.stat().st_size))


def empty(draw: Draw, file: Path, elsewhere: Path) -> None:
    file.write_bytes(b"")


def gone(draw: Draw, file: Path, elsewhere: Path) -> None:
    file.unlink()


def link(draw: Draw, file: Path, elsewhere: Path) -> None:
    file.unlink()
    file.symlink_to(elsewhere)


def broken_link(draw: Draw, file: Path, elsewhere: Path) -> None:
    """A link to nothing, or to itself."""
    file.unlink()
    file.symlink_to(draw.choice(("nowhere", file.name)))


def folder(draw: Draw, file: Path, elsewhere: Path) -> None:
    file.unlink()
    file.mkdir()
    (file / "inside").write_text("x")


def other(draw: Draw, file: Path, elsewhere: Path) -> None:
    """Content of another kind: valid JSON and YAML of the wrong shape, or no text."""
    file.write_bytes(draw.choice((
        b"[]", b"{}", b"null", b"1", b'"x"', b'{"phases": 1}', b'{"phases": [{"name": 1}]}', b"[" * 5000,
        b"\xff\xfe\x00",
        b'{"clips": [{}]}', b'{"clips": [1], "grid": 5}', b'{"tensors": [1], "count": 5}', b'{"accuracy": "x"}', b"NaN",
        b'{"versions": [], "hardware": 5, "command": {"a": 1}}', b'{"step": "x", "flops": []}', b'{"mean": null}',
        b'{"phase": 5, "step": "a", "loss": {}}\n' * 3, b"a: [1\n", b"a" * 10**6,
    )))


def old_copy(draw: Draw, run: Path) -> str:
    """A copy of a phase, under a name that a person would give it."""
    name = draw.choice(("old-copy", "backup of 1-fine", "1-fine.old", "copy-1-fine", "x", "9-", "-1-a"))
    shutil.copytree(run / "phases" / "1-fine", run / "phases" / name)
    return f"copy to phases/{name}"


def stray(draw: Draw, run: Path) -> str:
    """Files of the user's own where a run has its own."""
    name = draw.choice(("phases/notes.txt", "phases/1-fine/checkpoints/step-9", "finetune/notes.txt", "statistics/x"))
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).write_text("mine")
    return f"stray {name}"


KINDS: tuple[Callable[[Draw, Path, Path], None], ...] = (
    flip, cut, zero, empty, gone, link, broken_link, folder, other, flip, other,
)
