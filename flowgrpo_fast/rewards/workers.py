"""Rewards that run elsewhere, in processes of their own or in a thread, while the next samples are rolled out."""

from __future__ import annotations

import os
import signal
import threading
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from multiprocessing import get_context, parent_process
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowgrpo_fast.names import resolve
from flowgrpo_fast.recipe import RewardTerm
from flowgrpo_fast.types import RewardFunction

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class RewardWorkers:
    """Runs reward terms as their `where` says. Processes start at the first call and end with `close`."""

    def __init__(self, num_processes: int) -> None:
        self._num_processes = num_processes
        self._pool: ProcessPoolExecutor | None = None
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def submit(
        self, term: RewardTerm, function: RewardFunction, images: Tensor, prompts: list[str]
    ) -> Future[Tensor]:
        """Starts one reward on images `[B, C, H, W]`; its result is `[B]`, wherever it was computed."""
        if term.where == "thread":
            lock = self._locks[term.function]  # one call of a function at a time, as without threads

            def call() -> Tensor:
                with lock, torch.no_grad():
                    return function(images, prompts)

            return _in_thread(call)
        arrived = _on_its_way(images)
        pool = self._started()
        return _in_thread(lambda: _result(pool, term.function, arrived(), prompts))

    def close(self) -> None:
        """Ends the processes, whatever they are at."""
        pool, self._pool = self._pool, None
        if pool is None:
            return
        processes = list((pool._processes or {}).values())  # `shutdown` alone waits for a reward that hangs
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                self._num_processes,
                mp_context=get_context("spawn"),  # a forked process cannot use CUDA
                initializer=_begin,
                initargs=(torch.get_num_threads(),),
            )
        return self._pool


def require_tensor(path: str, values: object, num_samples: int) -> None:
    """Raises ValueError for a reward that returned something else, a list or an array say."""
    if not isinstance(values, Tensor):
        raise ValueError(
            f"reward {path!r} returned a {type(values).__name__} for {num_samples} images; "
            f"it must return a tensor of shape {(num_samples,)}"
        )


def _result(pool: ProcessPoolExecutor, path: str, images: NDArray[Any], prompts: list[str]) -> Tensor:
    try:
        return torch.from_numpy(pool.submit(_call, path, images, prompts).result())
    except BrokenProcessPool:
        raise ValueError(
            f"the process of reward {path!r} died: out of memory, killed, or its script lacks the guard "
            "if __name__ == '__main__'"
        ) from None


def _in_thread(work: Callable[[], Tensor]) -> Future[Tensor]:
    """Runs `work` in a daemon thread: one that hangs does not keep the program from ending."""
    future: Future[Tensor] = Future()

    def run() -> None:
        # Processes that start from here inherit it: a Ctrl-C while they import cannot end them.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            future.set_result(work())
        except BaseException as error:  # whoever reads the result raises it
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _on_its_way(images: Tensor) -> Callable[[], NDArray[Any]]:
    """Starts the copy to the host without waiting for it; the result waits."""
    if not images.is_cuda:
        array: NDArray[Any] = images.detach().numpy()
        return lambda: array
    host = torch.empty(images.shape, dtype=images.dtype, pin_memory=True)
    host.copy_(images.detach(), non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(images.device))

    def wait() -> NDArray[Any]:
        copied.synchronize()
        return host.numpy()

    return wait


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


@lru_cache
def _function(path: str) -> RewardFunction:
    function: RewardFunction = resolve(path)
    return function


def _call(path: str, images: NDArray[Any], prompts: list[str]) -> NDArray[np.float32]:
    """One reward; every failure is a `ValueError` of one line, which any process can unpickle."""
    try:
        with torch.no_grad():
            values = _function(path)(torch.from_numpy(images), prompts)
        require_tensor(path, values, len(prompts))
        array: NDArray[np.float32] = values.detach().to("cpu", torch.float32).numpy()
        return array
    except ValueError as error:
        raise ValueError(str(error)) from None
    except Exception as error:
        line = next(iter(str(error).splitlines()), "")
        raise ValueError(f"reward {path!r} raised {type(error).__name__}: {line}") from error
