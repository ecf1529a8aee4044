"""A run that is killed, at any moment, ends with the very bits of one that is not.

Each run is a process of its own at default threads, with loader workers, accumulation, a moving average, drop path,
mixup, SpecAugment and validation. They are forked off a server that has imported everything, which saves their start.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import pytest
from tiny_runs import checkpoints, records, run_options, training_steps, weights

from ssl_c2f import cli
from ssl_c2f.core import options
from ssl_c2f.tasks.config import PretrainOptions

pytestmark = pytest.mark.slow

STEPS = 36
OPTIONS = (
    *(f"phases.{i}.steps=12" for i in range(3)), "data.workers=2", "data.cache_gb=0", "evaluation.every=0.3",
    "train.checkpoint_every=4", "train.rehearse=true",
)
Start = Callable[..., ForkServerProcess]


def pretrain(config: Path, run: Path, kill_at: str) -> None:
    """The command, in a session of its own; dies when it is about to do something whose description has `kill_at`."""
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # for loader workers, as in a process started by hand
    with open(f"{run}.log", "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)

    def die(event: str, arguments: tuple[object, ...]) -> None:
        if event in ("open", "os.rename", "os.mkdir") and kill_at in f"{event} {arguments[0]}":
            os.kill(os.getpid(), signal.SIGKILL)

    if kill_at:
        sys.addaudithook(die)
    sys.exit(cli.main(["pretrain", str(config), f"run_dir={run}"]))


@pytest.fixture(scope="module")
def start(sounds: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """start(run folder, kill_at="") -> its process."""
    config = tmp_path_factory.mktemp("config") / "tiny.yaml"
    config.write_text(options.dump(run_options(sounds, *OPTIONS, model=PretrainOptions)))
    context: ForkServerContext = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ssl_c2f.train.engine", "ssl_c2f.tasks.config", "ssl_c2f.report.summary"])
    started: list[ForkServerProcess] = []

    def begin(run: Path, kill_at: str = "") -> ForkServerProcess:
        started.append(context.Process(target=pretrain, args=(config, run, kill_at)))
        started[-1].start()
        return started[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("OMP_NUM_THREADS", raising=False)
        yield begin
    for process in started:
        process.kill()
        process.join()


@pytest.fixture(scope="module")
def straight(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbs."""
    run = tmp_path_factory.mktemp("straight") / "run"
    finish(start, run)
    assert training_steps(run) == [*range(1, STEPS + 1)]
    assert sum("val/loss" in record for record in records(run)) > 10
    return run


def finish(start: Start, run: Path) -> None:
    process = start(run)
    process.join()
    assert process.exitcode == 0, log(run)


def log(run: Path) -> str:
    return Path(f"{run}.log").read_text()


def lines(run: Path) -> int:
    """Complete lines of metrics.jsonl."""
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def wait_until(process: ForkServerProcess, condition: Callable[[], bool]) -> None:
    while process.is_alive() and not condition():
        process.join(0.002)


def assert_same(run: Path, straight: Path) -> None:
    assert len(weights(straight)) == 9  # model, moving average and optimiser, after each phase
    assert weights(run) == weights(straight)
    assert records(run) == records(straight)
    assert [folder.name for folder in checkpoints(run)] == ["step-00000012", "step-00000024", "step-00000036"]


def test_killed_at_random_moments(start: Start, straight: Path, tmp_path: Path) -> None:
    run, total, kills = tmp_path / "run", lines(straight), 0
    for moment in sorted(random.Random(0).sample(range(total), 12)):
        process = start(run)
        wait_until(process, lambda moment=moment: lines(run) > moment)  # type: ignore[misc]
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
    assert kills >= 10
    finish(start, run)
    assert_same(run, straight)
    assert "ended without letting go" in log(run)


WORST = (  # in the order in which a run comes to them
    "open {run}/phases/0-coarse/checkpoints/.tmp-step-00000004/model",
    "os.rename {run}/phases/0-coarse/checkpoints/.tmp-step-00000008",
    "open {run}/phases/0-coarse/.done",  # after the last checkpoint of a phase
    "os.mkdir {run}/phases/1-middle",  # after the end of one and before the start of the next
    "open {run}/phases/1-middle/checkpoints/.tmp-step-00000016/optimizer.pt",
    "open {run}/phases/1-middle/checkpoints/.tmp-step-00000024/state.json",
    "os.rename {run}/phases/1-middle/.done",
    "open {run}/phases/2-fine/.transfer.json",
    "os.rename {run}/phases/2-fine/checkpoints/step-",  # an old one is removed
    "open {run}/phases/2-fine/.done",
)


def test_killed_at_the_worst_moments(start: Start, straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for moment in WORST:
        process = start(run, moment.format(run=run))
        process.join()
        assert process.exitcode == -signal.SIGKILL, log(run)
        assert ("/.tmp-" in moment) == bool(list(run.glob("phases/*/checkpoints/.tmp-*")))
    finish(start, run)
    assert_same(run, straight)


def test_signals_save_and_say_so(start: Start, straight: Path, tmp_path: Path) -> None:
    """Ctrl-C in a terminal and Slurm's SIGTERM reach the loader's workers as well."""
    run = tmp_path / "run"
    for number, after in ((signal.SIGINT, 3), (signal.SIGTERM, 12), (signal.SIGINT, 30)):
        process = start(run)
        wait_until(process, lambda after=after: lines(run) > after)  # type: ignore[misc]
        assert process.pid
        os.killpg(process.pid, number)
        process.join()
        assert process.exitcode == 128 + number, log(run)
        *_, last = log(run).splitlines()
        step = training_steps(run)[-1]
        assert last == (
            f"ssl_c2f: stopped by {number.name} at step {step}, which is saved; the same command goes on from there"
        )
        assert checkpoints(run)[-1].name == f"step-{step:08d}"
    finish(start, run)
    assert_same(run, straight)
    assert "Traceback" not in log(run)


def test_a_second_writer_is_refused_while_the_first_runs(start: Start, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = start(run)
    wait_until(first, lambda: lines(run) > 0)
    second = start(run)
    second.join()
    assert second.exitcode == 2 and f"is being written by process {first.pid} on" in log(run)
    assert first.is_alive()
    first.kill()
