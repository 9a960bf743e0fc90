"""SIGINT and SIGTERM end a run by an exception, where one does no harm.

A handler's exception may come up between any two instructions. Python's queues and conditions do not stand that: a lock
just taken is never given back, and what waits for it when the run ends (TensorBoard's writer, a progress bar) waits for
ever. So such code runs inside `held`, and what belongs together, as a checkpoint and the status that names it. And code
in C now and then drops an exception: `check` raises it again.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_asked: int | None = None  # the signal that came
_holds = 0


class Stopped(BaseException):
    """A signal asked the run to stop. Not an Exception, so that no library swallows it."""

    def __init__(self, number: int) -> None:
        super().__init__("interrupted" if number == signal.SIGINT else "terminated")
        self.code = 128 + number


def check() -> None:
    """Raise `Stopped` if a signal has come."""
    if _asked is not None:
        raise Stopped(_asked)


def _handle(number: int, _: FrameType | None) -> None:
    global _asked
    _asked = number
    if not _holds:
        check()


@contextmanager
def handled() -> Iterator[None]:
    """Inside, the two signals raise `Stopped`."""
    global _asked
    # SIGINT too: a shell starts background jobs with it ignored, and Python then leaves it so.
    before = {number: signal.signal(number, _handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _asked = None


@contextmanager
def held() -> Iterator[None]:
    """Inside, a signal waits for the end. Also a decorator: `@held()`."""
    global _holds
    _holds += 1
    try:
        yield
    finally:
        _holds -= 1
    if not _holds:
        check()
