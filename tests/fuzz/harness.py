"""Commands on hostile input, each in a forked process with limits, and what is asked of all of them.

The processes are forked off a server that has imported everything: a command then takes hundredths of a second.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import multiprocessing.process
import os
import re
import resource
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

PRELOAD = (
    "ssl_c2f.train.engine", "ssl_c2f.tasks.config", "ssl_c2f.tasks.data", "ssl_c2f.tasks.embed",
    "ssl_c2f.tasks.predict",
    "ssl_c2f.tasks.evaluate", "ssl_c2f.tasks.export", "ssl_c2f.report", "ssl_c2f.report.summary", "torch._dynamo",
)
CPU_SECONDS, MEGABYTES, WALL_SECONDS = 5, 1000, 60  # of one command
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod"}


@dataclass(frozen=True)
class Case:
    """Commands to be run one after the other in a folder that they may write to."""

    name: str
    folder: Path
    commands: tuple[tuple[str, ...], ...]
    expected: str = ""  # for the test to look at


@dataclass
class Outcome:
    """What a command did."""

    words: Sequence[str]
    status: int  # negative: died of this signal
    out: str
    err: str
    seconds: float  # of CPU
    megabytes: float  # beyond what the process had before it began
    outside: Sequence[str]  # paths that it changed, or tried to, outside its folder

    def faults(self) -> list[str]:
        """What is wrong with it, whatever its input was."""
        found = []
        lines = [line for line in self.err.splitlines() if line.startswith("ssl_c2f:")]
        if self.status not in (0, 2) and (self.status, tuple(self.words[:2])) != (1, ("data", "check")):
            found.append(f"exit status {self.status}")
        if "Traceback" in self.err or "Traceback" in self.out:
            found.append(f"traceback ({self.err.strip().splitlines()[-1][:200]})")
        if self.status == 2 and (len(lines) != 1 or self.err.strip().splitlines()[-1] != lines[0]):
            found.append(f"{len(lines)} lines of error for exit status 2")
        if any(len(line) > 1500 for line in self.err.splitlines()):
            found.append("a line of more than 1,500 characters")
        if self.seconds > CPU_SECONDS:
            found.append(f"{self.seconds:.1f} s of CPU")
        if self.megabytes > MEGABYTES:
            found.append(f"{self.megabytes:.0f} MB")
        if self.outside:
            found.append(f"changed {self.outside[0]}")
        if re.search(r"(?i)(?<!\w)(nan|inf)(?!\w| or infinite)", self.out):
            found.append("prints a number that is none")
        return found


def run(cases: Iterable[Case], jobs: int | None = None) -> Iterator[tuple[Case, list[Outcome]]]:
    """Run all commands of the cases, `jobs` cases at a time; in the order of the cases."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD])
    running: deque[tuple[Case, multiprocessing.process.BaseProcess, Connection]] = deque()
    try:
        for case in chain(cases, [None]):
            if case is not None:
                receive, send = context.Pipe(duplex=False)
                process = context.Process(target=_run_case, args=(case, send), daemon=True)
                process.start()
                send.close()
                running.append((case, process, receive))
            while running and (case is None or len(running) >= (jobs or os.cpu_count() or 1)):
                yield _finish(*running.popleft())
    finally:
        for _, process, _ in running:
            process.kill()


def _finish(
    case: Case, process: multiprocessing.process.BaseProcess, receive: Connection
) -> tuple[Case, list[Outcome]]:
    outcomes: list[Outcome] = []
    limit = time.monotonic() + WALL_SECONDS * len(case.commands)
    while wait([receive], limit - time.monotonic()):
        try:
            outcomes.append(Outcome(**json.loads(receive.recv_bytes())))
        except EOFError:
            break
    else:
        process.kill()
    process.join()
    if len(outcomes) < len(case.commands):  # it died within the next one
        words = case.commands[len(outcomes)]
        log = case.folder.with_name(f"{case.folder.name}.err")
        err = log.read_text(errors="replace") if log.exists() else ""
        outcomes.append(Outcome(words, process.exitcode or -signal.SIGKILL, "", err, 0.0, 0.0, ()))
    return case, outcomes


def _run_case(case: Case, send: Connection) -> None:
    """In the child."""
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # for loader workers, as in a process started by hand
    os.chdir(case.folder)
    spent = resource.getrusage(resource.RUSAGE_SELF)
    usual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    most = usual + 3 * 10**9  # of addresses, of which threads reserve many: what is used is asked for below
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * 10**9, 2 * 10**9))
    cpu = math.ceil(spent.ru_utime + spent.ru_stime) + 3 * CPU_SECONDS * len(case.commands)
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))
    outside: list[str] = []
    sys.addaudithook(lambda event, arguments: _watch(event, arguments, case.folder, outside))
    logs = [case.folder.with_name(f"{case.folder.name}.{end}") for end in ("out", "err")]
    for words in case.commands:
        outside.clear()
        outcome = _run_command(words, logs)
        outcome.outside = list(dict.fromkeys(path for path in outside if path not in map(str, logs)))
        send.send_bytes(json.dumps(asdict(outcome)).encode())
    os._exit(0)


def _run_command(words: Sequence[str], logs: Sequence[Path]) -> Outcome:
    from ssl_c2f import cli

    before = resource.getrusage(resource.RUSAGE_SELF)
    Path("/proc/self/clear_refs").write_text("5")  # forget the most memory so far
    rss = _status("VmRSS")
    for number, log in enumerate(logs, 1):
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdout = open(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    try:
        status = cli.main(words)
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
        status = 70
    sys.stdout.flush()
    sys.stderr.flush()
    after = resource.getrusage(resource.RUSAGE_SELF)
    out, err = (log.read_text(encoding="utf-8", errors="replace") for log in logs)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Outcome(words, status, out[-100_000:], err[-20_000:], seconds, (_status("VmHWM") - rss) / 1e3, ())


def _status(key: str) -> int:
    """A line of /proc/self/status in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])


def _watch(event: str, arguments: tuple[Any, ...], folder: Path, outside: list[str]) -> None:
    if event == "open":
        changes = isinstance(arguments[2], int) and bool(arguments[2] & _WRITES)
        paths = arguments[:1]
    else:
        changes, paths = event in _CHANGES, arguments[: 2 if event == "os.rename" else 1]
    for path in paths if changes else ():
        if isinstance(path, str | bytes | os.PathLike):
            place = os.path.realpath(os.fsdecode(path))
            if event in ("os.rename", "os.remove"):  # of a link itself, not of what it points to
                parent, name = os.path.split(os.path.abspath(os.fsdecode(path)))
                place = os.path.join(os.path.realpath(parent), name)
            if not f"{place}/".startswith((f"{folder}/", "/dev/null/", "/dev/shm/", f"/proc/{os.getpid()}/")):
                outside.append(place)


def faults(
    results: Iterable[tuple[Case, list[Outcome]]], more: Callable[[Case, list[Outcome]], Iterable[str]]
) -> list[str]:
    """A line for each thing that is wrong; `more` looks at what no command may do with this kind of input."""
    found = []
    for case, outcomes in results:
        said: dict[str, list[str]] = {}  # fault -> the commands that have it
        for outcome in outcomes:
            for fault in outcome.faults():
                said.setdefault(fault, []).append(" ".join(outcome.words[: 1 + (outcome.words[0] == "data")]))
        lines = [f"{', '.join(commands)}: {fault}" for fault, commands in said.items()]
        if not lines and len(outcomes) == len(case.commands):
            try:
                lines += more(case, outcomes)
            except Exception as error:  # what it looks for is not there
                lines.append(f"{type(error).__name__}: {error}; {outcomes[-1].err[-200:]}")
        found += [f"{case.name}: {line}" for line in lines]
    return found


def refuse(name: str) -> None:
    """What JSON has no word for."""
    raise ValueError(f"{name} in JSON")
