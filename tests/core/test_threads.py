from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_c2f.core.threads import in_threads, sign_of_life, within


@settings(max_examples=30)
@given(st.lists(st.integers(0, 3), max_size=20), st.integers(1, 20))
def test_results_come_in_order(items: list[int], threads: int) -> None:
    def work(item: int) -> int:
        time.sleep(item / 2000)
        return item + 1

    assert list(in_threads(work, items, threads)) == [item + 1 for item in items]


def test_an_error_ends_it() -> None:
    begun: list[int] = []

    def work(item: int) -> float:
        begun.append(item)
        return 1 / (item - 3)

    with pytest.raises(ZeroDivisionError):
        list(in_threads(work, range(10_000), 2))
    assert len(begun) < 10_000


def test_what_takes_too_long_is_left_alone() -> None:
    never = threading.Event()
    with pytest.raises(TimeoutError):
        within(0.05, never.wait)
    assert within(5.0, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        within(5.0, lambda: 1 / 0)


def test_a_sign_of_life_gives_more_time() -> None:
    def work() -> str:
        for _ in range(10):
            time.sleep(0.02)
            sign_of_life()
        return "done"

    assert within(0.1, work) == "done"


def test_one_thread_does_it_all() -> None:
    assert len({within(5.0, threading.get_ident) for _ in range(5)}) == 1
    assert within(5.0, threading.get_ident) != threading.get_ident()


def test_a_forked_child_has_a_helper_of_its_own() -> None:
    within(5.0, int)
    child = os.fork()
    if not child:
        os._exit(within(5.0, lambda: 3))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3


@pytest.mark.parametrize("wait", ["within(60.0, threading.Event().wait)",
                                  "list(in_threads(lambda _: threading.Event().wait(), [1, 2], 2))"])
def test_a_signal_ends_any_wait_and_the_process(wait: str) -> None:
    code = ("import signal, threading; from ssl_c2f.core.threads import in_threads, within; "
            # a shell's background job, as these tests may be, ignores it
            f"signal.signal(signal.SIGINT, signal.default_int_handler); print(1, flush=True); {wait}")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert b"KeyboardInterrupt" in process.communicate(timeout=20)[1]
