"""Calls of a reward's own code: whatever it raises is one line, and one that hangs ends by a time limit."""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from queue import SimpleQueue
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class RewardFailed(ValueError):  # noqa: N818 - what happened, as users read it
    """A reward's own code raised, whatever it was; one line that names both. It pickles, traceback included.

    Args:
        line: what the user reads.
        traceback_text: where the reward's code was, as `traceback` prints it.
    """

    def __init__(self, line: str, traceback_text: str = "") -> None:
        super().__init__(line)
        self.traceback_text = traceback_text

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.traceback_text)

    @classmethod
    def by(cls, label: str, error: BaseException) -> RewardFailed:
        """What reward `label` raised."""
        try:
            line = next(iter(str(error).splitlines()), "")
        except Exception:  # an exception of the user's own that cannot even be printed
            line = ""
        says = f"{type(error).__name__}: {line}" if line else type(error).__name__
        return cls(f"reward {label!r} raised {says}", "".join(traceback.format_exception(error)))


class RewardTimedOut(RewardFailed):
    """A reward took longer than it may, and is still at it."""


def limited(call: Callable[[], T], seconds: float, label: str) -> T:
    """What `call()` returns or raises; it runs in another thread unless `seconds` is 0, and then has no limit.

    Grad mode, inference mode, autocast and CUDA's current device and stream are the caller's. The wait gives way to
    signals: a handler that raises ends it. A call that ran out of time is left to itself, as no thread can be ended.

    Raises:
        RewardTimedOut: after so many seconds.
    """
    if seconds == 0.0:
        return call()
    caller = _idle.pop() if _idle else _Caller()
    done = threading.Event()
    answer: list[Any] = []
    failure: list[BaseException] = []
    modes = _entered(
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        [(d, torch.get_autocast_dtype(d)) for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)],
        torch.cuda.current_stream() if torch.cuda.is_initialized() else None,
    )
    context = copy_context()

    def work() -> None:
        try:
            with modes:
                answer.append(context.run(call))
        except BaseException as error:  # raised again where the answer is waited for
            failure.append(error)
        done.set()

    caller.work.put(work)
    if not done.wait(seconds):
        frame = sys._current_frames().get(caller.thread.ident or 0)
        raise RewardTimedOut(
            f"reward {label!r} took longer than {seconds:g} s; raise RewardTerm.timeout (0 = no limit) "
            "if it may take that long",
            "".join(traceback.format_stack(frame)) if frame is not None else "",
        )
    _idle.append(caller)
    if failure:
        raise failure[0]
    result: T = answer[0]
    return result


class _Caller:
    """A thread that runs one call after another; a new one for each would start torch's own threads anew."""

    def __init__(self) -> None:
        self.work: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self.thread = threading.Thread(target=self._run, daemon=True, name="reward")
        self.thread.start()

    def _run(self) -> None:
        while True:
            self.work.get()()


_idle: list[_Caller] = []
if sys.platform != "win32":
    os.register_at_fork(after_in_child=_idle.clear)  # threads stay in the parent


@contextmanager
def _entered(
    grad: bool, inference: bool, autocast: list[tuple[str, torch.dtype]], stream: torch.cuda.Stream | None
) -> Iterator[None]:
    """Torch's modes, which every thread has its own of."""
    with ExitStack() as stack:
        if inference:
            stack.enter_context(torch.inference_mode())
        stack.enter_context(torch.set_grad_enabled(grad))
        for device, dtype in autocast:
            stack.enter_context(torch.autocast(device, dtype=dtype))
        if stream is not None:
            stack.enter_context(torch.cuda.stream(stream))
        yield
