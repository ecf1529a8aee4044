"""A run folder has one writer, and its provenance is complete and without secrets."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from disks import mounted
from hypothesis import given
from hypothesis import strategies as st
from trackers import track

from ssl_c2f.core.files import append_line, new_folder, write_text
from ssl_c2f.core.options import UserError
from ssl_c2f.core.provenance import command_line, provenance, redact
from ssl_c2f.core.run_folder import RunFolder

HOLDER = """
import os, signal, sys
from pathlib import Path
from ssl_c2f.core.run_folder import RunFolder
with RunFolder(Path(sys.argv[1])).lock():
    child = os.fork()  # as a loader worker: it outlives the parent, and shares its open files
    if child == 0:
        print("held", flush=True)
        sys.stdin.read()
        os._exit(0)
    signal.pause()
"""


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", "a: 1\n")


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder that refuses even root."""
    with mounted(tmp_path / "read-only", "ro") as folder:
        yield folder


def test_a_second_writer_is_refused_and_told_who_holds_the_folder(run: RunFolder) -> None:
    with run.lock() as previous:
        assert previous is None
        with pytest.raises(UserError, match=f"being written by process {os.getpid()} on ") as caught, run.lock():
            pass
        assert "\n" not in str(caught.value)
        with pytest.raises(UserError), run.lock():  # the refused one broke nothing
            pass
    with run.lock() as previous:
        assert previous is None


@pytest.mark.parametrize("left", ["", json.dumps({"pid": 4242, "host": "there", "started": "before"})])
def test_one_that_looks_whether_a_run_is_locked_stops_no_writer(left: str, run: RunFolder) -> None:
    (run.path / "lock").write_text(left)  # by the last writer, which let go or died
    looking = open(run.path / "lock")  # noqa: SIM115 (closed by the timer)
    fcntl.flock(looking, fcntl.LOCK_SH)
    threading.Timer(0.05, looking.close).start()
    with run.lock() as previous:
        assert bool(previous) == bool(left) and looking.closed


def test_the_lock_of_a_killed_process_is_noticed(run: RunFolder) -> None:
    command = [sys.executable, "-c", HOLDER, str(run.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {holder.pid} "), run.lock():
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with run.lock() as previous:  # though its child is still there
            assert previous is not None and previous["pid"] == holder.pid


def test_a_lock_is_let_go_on_any_way_out(run: RunFolder) -> None:
    with pytest.raises(KeyError), run.lock():
        raise KeyError
    with run.lock() as previous:
        assert previous is None


def test_half_a_lock_file_is_no_holder(run: RunFolder) -> None:
    (run.path / "lock").write_text('{"pid": 1')
    with run.lock() as previous:
        assert previous is None


trees = st.recursive(
    st.integers() | st.text("ab") | st.none() | st.booleans(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("xyz"), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from("xyz"), trees, max_size=3), st.dictionaries(st.sampled_from("xyz"), trees))
def test_configs_are_compared_by_content(
    tmp_path_factory: pytest.TempPathFactory, old: dict[str, Any], new: dict[str, Any]
) -> None:
    run = RunFolder(tmp_path_factory.mktemp("run"))
    write_text(run.config, yaml.safe_dump(old))
    run.check_config(yaml.safe_dump(old, default_flow_style=True))
    run.check_config(yaml.safe_dump(new), allowed={"*"})
    if repr(sorted(old.items())) != repr(sorted(new.items())) and old != new:
        with pytest.raises(UserError):
            run.check_config(yaml.safe_dump(new))


def test_the_difference_is_named_and_some_may_differ(run: RunFolder) -> None:
    write_text(run.config, "optim: {lr: 0.1}\nphases: [{epochs: 1}, {epochs: 2}]\nlog_every: 10\n")
    new = "optim: {lr: 0.2}\nphases: [{epochs: 1}, {epochs: 3}, {epochs: 4}]\nlog_every: 20\nseed: 0\n"
    with pytest.raises(UserError, match=r"log_every was 10, now 20; optim\.lr was 0\.1, now 0\.2; .* and 2 more$"):
        run.check_config(new)
    run.check_config(new, allowed={"log_every", "optim.*", "phases.*.epochs", "seed"})


def test_create_leaves_an_old_run_alone(run: RunFolder) -> None:
    made = run.provenance.read_text()
    again = RunFolder.create(run.path, "a: 2\n")
    assert again.config.read_text() == "a: 1\n" and again.provenance.read_text() == made


def test_paths_and_done(run: RunFolder) -> None:
    phase = run.phase(0, "coarse")
    assert phase.checkpoints == run.path / "phases/0-coarse/checkpoints"
    assert not phase.is_done()
    phase.mark_done(7, loss=0.5)
    assert phase.is_done() and json.loads(phase.done.read_text()) == {"step": 7, "loss": 0.5}


@pytest.mark.parametrize(
    ("command", "typed"),
    [
        (["/env/bin/ssl_c2f", "train", "a b"], "ssl_c2f train 'a b'"),
        (["/src/ssl_c2f/__main__.py", "train"], "ssl_c2f train"),
        (["slurm/launch.py", "train"], "python slurm/launch.py train"),
        (["/src/ssl_c2f/other.py"], "python /src/ssl_c2f/other.py"),
        ([], ""),
    ],
)
def test_a_command_can_be_typed_again(command: list[str], typed: str) -> None:
    assert command_line(command) == typed


def test_provenance_is_complete_and_names_no_host() -> None:
    found = provenance(["ssl_c2f", "pretrain"])
    assert json.loads(json.dumps(found)) == found
    assert found["versions"].keys() >= {"python", "torch", "torchaudio", "numpy", "timm"}
    assert found["hardware"]["cores"] and found["hardware"]["memory_gib"] > 0
    assert os.uname().nodename not in json.dumps(found)


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("wandb.api_key=abc", "wandb.api_key=***"),
        ("--hf-token=abc", "--hf-token=***"),
        ("HF_TOKEN=abc", "HF_TOKEN=***"),
        ("password=a=b", "password=***"),
        ("data.root=https://me:abc@host/x", "data.root=https://me:***@host/x"),
        ("data.root=https://hf_abc@host/x", "data.root=https://***@host/x"),
        ("data.manifest=https://host/x?token=abc&part=1", "data.manifest=https://host/x?token=***&part=1"),
        ("--auth=abc", "--auth=***"),
        ("init=hf_abcdefghijk", "init=hf_***"),
        ("tracking.tags=[token=abc, esc10]", "tracking.tags=[token=***, esc10]"),
        ("tracking={api_key: abc, entity: me}", "tracking={api_key: ***, entity: me}"),
        ("num_tokens=128", "num_tokens=128"),
        ("author=me", "author=me"),
        ("data.root=/home/me@lab/esc10", "data.root=/home/me@lab/esc10"),
        ("model.class_tokens=2", "model.class_tokens=2"),
        ("optim.lr=1e-3", "optim.lr=1e-3"),
    ],
)
def test_secrets_are_hidden(word: str, shown: str) -> None:
    assert redact(["ssl_c2f", word, "x"]) == ["ssl_c2f", shown, "x"]


def test_a_secret_in_the_next_word_is_hidden() -> None:
    assert redact(["--token", "abc", "token", "x"]) == ["--token", "***", "token", "x"]


def test_a_new_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "made") as folder:
        (folder / "a").write_text("a")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    # of a process that was killed, and of one at work
    stale, fresh = tmp_path / ".made.1.tmp", tmp_path / ".made.2.tmp"
    for left in (stale, fresh):
        left.mkdir()
    os.utime(stale, (0, 0))
    (tmp_path / "made").mkdir()  # empty: it may be used
    with new_folder(tmp_path / "made") as folder:
        (folder / "a").write_text("a")
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".made.2.tmp", "a", "made"]
    with pytest.raises(UserError, match="there is something"), new_folder(tmp_path / "made"):
        pass


def test_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    left = tmp_path / ".file.77.tmp"
    left.write_text("half")
    os.utime(left, (0, 0))
    write_text(tmp_path / "file", "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("mine")
    for name in ("metrics.jsonl", "lock"):
        (tmp_path / name).symlink_to(other)
    with pytest.raises(UserError, match=r"metrics\.jsonl: it is a link"):
        append_line(tmp_path / "metrics.jsonl", "x")
    with pytest.raises(UserError, match=r"metrics\.jsonl: it is a link"):
        track(tmp_path)
    with pytest.raises(UserError, match="lock: it is a link"), RunFolder(tmp_path).lock():
        pass
    write_text(tmp_path / "metrics.jsonl", "x")  # in its place
    assert other.read_text() == "mine"


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "file"
    write_text(file, "é\n")
    assert file.read_text(encoding="utf-8") == "é\n"
    with pytest.raises(UnicodeEncodeError):
        write_text(file, "half\ud800")
    assert file.read_text(encoding="utf-8") == "é\n"


def test_read_only_folder_is_one_line(read_only: Path) -> None:
    with pytest.raises(UserError, match="Read-only file system"):
        RunFolder.create(read_only, "a: 1\n")
    with pytest.raises(UserError, match=r"cannot write .*lock: Read-only file system"), RunFolder(read_only).lock():
        pass
