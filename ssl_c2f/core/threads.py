"""Threads for work that waits for a disk.

None of them keeps a process alive that was told to end: a read from a network disk that is gone may never return.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")

_own = threading.local()  # each thread's helper


def in_threads(function: Callable[[T], R], items: Sequence[T], threads: int) -> Iterator[R]:
    """The function of each item, in their order. What it raises is raised here, and then nothing more is begun."""
    todo = iter(enumerate(items))
    lock, done, over = threading.Lock(), SimpleQueue[tuple[int, R | None, BaseException | None]](), threading.Event()

    def work() -> None:
        while not over.is_set():
            with lock:
                index, item = next(todo, (-1, None))
            if index < 0:
                return
            try:
                done.put((index, function(item), None))  # type: ignore[arg-type]
            except BaseException as error:
                over.set()
                done.put((index, None, error))

    for _ in range(min(threads, len(items))):
        threading.Thread(target=work, daemon=True).start()
    early: dict[int, R] = {}
    try:
        for wanted in range(len(items)):
            while wanted not in early:
                index, result, error = done.get()
                if error is not None:
                    raise error
                early[index] = result  # type: ignore[assignment]
            yield early.pop(wanted)
    finally:
        over.set()


class _Helper(Generic[R]):
    """A thread that does one thing at a time for another one."""

    def __init__(self) -> None:
        self.process = os.getpid()  # a forked child has its parent's helper, but not the thread
        self.alive = 0  # counts signs of life
        self.todo: SimpleQueue[Callable[[], Any]] = SimpleQueue()
        self.done: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        _own.working_for = self
        while True:
            function = self.todo.get()
            try:
                self.done.put((function(), None))
            except BaseException as error:
                self.done.put((None, error))
            del function


def within(seconds: float, function: Callable[[], R]) -> R:
    """What the function returns or raises. It runs in another thread, so that a signal is heard meanwhile.

    Raises:
        TimeoutError: it has not called `sign_of_life` for so many seconds, and is left alone.
    """
    helper: _Helper[R] | None = getattr(_own, "helper", None)
    if helper is None or helper.process != os.getpid():
        helper = _Helper()
    _own.helper = None  # until it is free again: an exception may end this wait
    helper.todo.put(function)
    while True:
        seen = helper.alive
        try:
            result, error = helper.done.get(timeout=seconds)
            break
        except Empty:
            if helper.alive == seen:
                raise TimeoutError from None
    _own.helper = helper
    if error is not None:
        raise error
    return result  # type: ignore[no-any-return]


def sign_of_life() -> None:
    """Said by a function that `within` runs."""
    if helper := getattr(_own, "working_for", None):
        helper.alive += 1
