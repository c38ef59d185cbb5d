"""Rewards that run elsewhere, in processes of their own or in a thread, while the next samples are rolled out."""

from __future__ import annotations

import os
import signal
import threading
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, CancelledError, Future, ProcessPoolExecutor
from dataclasses import fields
from multiprocessing import get_context, parent_process
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowgrpo_fast.device import DEVICE
from flowgrpo_fast.rewards.calls import RewardFailed, RewardTimedOut
from flowgrpo_fast.rewards.terms import Reward, Seen, scored
from flowgrpo_fast.types import Scores

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class RewardWorkers:
    """Runs reward terms as their `where` says. Processes start at the first call and end with `close`."""

    def __init__(self, num_processes: int) -> None:
        self._num_processes = num_processes
        self._pool: _Pool | None = None
        self._lock = threading.Lock()  # of `_pool` and what it is at
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def submit(self, term: Reward, seen: Seen) -> Future[Scores]:
        """Starts one reward, to which `seen` belongs from here on; the scores lie wherever they were computed."""
        if term.where == "thread":
            lock = self._locks[term.label]  # one call of a function at a time, as without threads

            def call() -> Scores:
                with lock, DEVICE.shared(), torch.no_grad():
                    return scored(term, seen)

            return _in_thread(call)
        arrived = _on_its_way(seen)
        with self._lock:
            if self._pool is None:
                self._pool = _Pool(self._num_processes)
            pool = self._pool
        return _in_thread(lambda: self._in_process(pool, term, arrived()))

    def close(self) -> None:
        """Ends the processes, whatever they are at."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.end()

    def _in_process(self, pool: _Pool, term: Reward, parcel: dict[str, Any]) -> Scores:
        """Waits for a process. One that died or hangs takes its pool along, and the next call starts another."""
        call = object()
        with self._lock:
            pool.calls[call] = term.label
        try:
            return Scores(**_unpacked(pool.executor.submit(_call, term, parcel).result()))
        except (BrokenExecutor, CancelledError, RewardTimedOut) as error:
            with self._lock:
                if pool.reason is None:
                    pool.reason = error if isinstance(error, RewardTimedOut) else pool.died()
                if self._pool is pool:
                    self._pool = None
            pool.end()
            raise RewardFailed(str(pool.reason), pool.reason.traceback_text) from None
        finally:
            with self._lock:
                del pool.calls[call]


class _Pool:
    """Processes, the rewards they were given, and why they ended where one of them is at fault."""

    def __init__(self, num_processes: int) -> None:
        self.num_processes = num_processes
        self.executor = ProcessPoolExecutor(
            num_processes,
            mp_context=get_context("spawn"),  # a forked process cannot use CUDA
            initializer=_begin,
            initargs=(torch.get_num_threads(),),
        )
        self.calls: dict[object, str] = {}  # rewards' labels, in the order they were given
        self.reason: RewardFailed | None = None

    def died(self) -> RewardFailed:
        """The line for a process that is gone; nobody knows which of those that ran."""
        labels = list(dict.fromkeys(map(repr, list(self.calls.values())[: self.num_processes])))
        one = f"the process of reward {labels[0]}"
        whose = one if len(labels) == 1 else f"a process of rewards {', '.join(labels)}"
        return RewardFailed(
            f"{whose} died: out of memory, killed, or left by os._exit; or its script lacks the guard "
            "if __name__ == '__main__'"
        )

    def end(self) -> None:
        """Kills the processes; what they were at fails."""
        processes = list(
            (self.executor._processes or {}).values()
        )  # `shutdown` alone waits for one that hangs
        self.executor.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()


def _in_thread(work: Callable[[], Scores]) -> Future[Scores]:
    """Runs `work` in a daemon thread: one that hangs does not keep the program from ending."""
    future: Future[Scores] = Future()

    def run() -> None:
        # Processes that start from here inherit it: a Ctrl-C while they import cannot end them.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            future.set_result(work())
        except BaseException as error:  # whoever reads the result raises it
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _on_its_way(seen: Seen) -> Callable[[], dict[str, Any]]:
    """Starts the copies to the host without waiting for them; the result waits."""
    values = {f.name: getattr(seen, f.name) for f in fields(seen)}
    for name, value in values.items():
        if isinstance(value, Tensor) and value.is_cuda:
            host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            values[name] = host.copy_(value.detach(), non_blocking=True)
    copied = torch.cuda.Event() if seen.images.is_cuda else None
    if copied is not None:
        copied.record(torch.cuda.current_stream(seen.images.device))

    def wait() -> dict[str, Any]:
        if copied is not None:
            copied.synchronize()
        packed: dict[str, Any] = _packed(values)
        return packed

    return wait


class _Bytes(NamedTuple):
    """A tensor as an array of bytes, which pickles by value; torch's own pickles hold a file open for each tensor."""

    array: NDArray[np.uint8]
    dtype: torch.dtype


def _packed(value: Any) -> Any:
    """A record's fields, with every tensor as bytes on the host; waits for those that lie elsewhere."""
    if isinstance(value, dict):
        return {name: _packed(item) for name, item in value.items()}
    if isinstance(value, Tensor):
        return _Bytes(value.detach().cpu().contiguous().view(torch.uint8).numpy(), value.dtype)
    return value


def _unpacked(value: Any) -> Any:
    """Inverse of `_packed`."""
    if isinstance(value, dict):
        return {name: _unpacked(item) for name, item in value.items()}
    return torch.from_numpy(value.array).view(value.dtype) if isinstance(value, _Bytes) else value


# -------------------------------------------------------------------------------------- in the process


def _begin(num_threads: int) -> None:
    """Signals are the parent's affair, and so is the end: a parent that is gone takes its processes along."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(num_threads)  # the parent's: sums are split alike
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _call(term: Reward, parcel: dict[str, Any]) -> dict[str, Any]:
    """One reward; every failure is a `ValueError` of one line, which any process can unpickle, see `RewardFailed`."""
    with torch.no_grad():
        scores = scored(term, Seen(**_unpacked(parcel)))
    packed: dict[str, Any] = _packed({f.name: getattr(scores, f.name) for f in fields(scores)})
    return packed
