"""What a run waits for may never come: a disk that is gone, shared memory that is full. It ends all the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import checkpoints, run_options, training_steps

from ssl_c2f.core import options
from ssl_c2f.tasks.config import PretrainOptions

pytestmark = pytest.mark.slow

# The command; a disk hangs when it is asked for the N-th time to open a recording (in any one process).
HANGS = """
import itertools, os, sys, threading
from ssl_c2f import cli
from ssl_c2f.data import decode
asked, really = itertools.count(1), decode._descriptor
def descriptor(place):
    if next(asked) >= int(sys.argv[1]):
        open(sys.argv[2] + ".hangs", "w").close()
        threading.Event().wait()
    return really(place)
decode._descriptor = descriptor
sys.exit(cli.main(["pretrain", sys.argv[3], "run_dir=" + sys.argv[2], *sys.argv[4:]]))
"""


@pytest.fixture(scope="module")
def config(sounds: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("config") / "tiny.yaml"
    # one micro-batch per step: amid a step of several, nothing can be saved
    words = ("data.cache_gb=0", "phases.0.steps=50", "train.max_batch_per_device=8")
    o = run_options(sounds, *words, model=PretrainOptions)
    file.write_text(options.dump(o))
    return file


@pytest.mark.parametrize(
    ("number", "workers", "opened", "stage"),
    [(signal.SIGTERM, 0, 20, "scan"), (signal.SIGINT, 0, 80, "statistics"), (signal.SIGHUP, 2, 60, "statistics"),
     (signal.SIGTERM, 0, 700, "training"), (signal.SIGINT, 2, 150, "training"), (signal.SIGHUP, 0, 700, "training")],
)
def test_a_signal_ends_a_wait_for_a_disk(
    tmp_path: Path, config: Path, number: signal.Signals, workers: int, opened: int, stage: str
) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-c", HANGS, str(opened), str(run), str(config), f"data.workers={workers}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        hangs = Path(f"{run}.hangs")
        while not hangs.exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        time.sleep(2.0)  # what was read before is worked off meanwhile
        asked = time.monotonic()
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert time.monotonic() - asked < 6  # 3 s, on a busy machine
    assert process.returncode == 128 + number, err
    assert f"ssl_c2f: stopped by {number.name}" in err and "Traceback" not in err, err
    if stage == "training" and workers == 0:
        assert checkpoints(run), err
        assert checkpoints(run)[-1].name == f"step-{training_steps(run)[-1]:08d}"
    else:
        assert stage == "training" or not list(run.glob("phases/*"))


@pytest.mark.parametrize("change", ["size=64k", "ro"])
def test_shared_memory_that_does_not_do_is_one_line(tmp_path: Path, config: Path, change: str) -> None:
    if os.geteuid() != 0 or subprocess.run(["unshare", "-m", "true"]).returncode:
        pytest.skip("needs the right to mount")
    run = f"{sys.executable} -m ssl_c2f pretrain {config} run_dir={tmp_path / 'run'} data.workers=2"
    script = f"mount -t tmpfs -o {change} tmpfs /dev/shm && exec {run}"
    done = subprocess.run(["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and "data.workers=0 does without them" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
