"""A pytest plugin: ``-p record_calls --record-calls folder`` writes down the calls into `_C` that tests make.

``cpu.pickle`` gets those of the ordinary module, ``cuda.pickle`` those of the CUDA code on the host, ``launched.txt``
the kernels of that which ran.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from types import ModuleType

import kernels_on_host
import pytest
from recorded_calls import Recorder

MOST = 2  # calls of a kind

recorders: dict[str, Recorder] = {}
loaded: list[Path] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-calls", type=Path, required=True)


def pytest_sessionstart() -> None:
    import flowgrpo_fast.ops

    recorders["cpu"] = Recorder(flowgrpo_fast.ops._C, MOST)
    for name, module in list(sys.modules.items()):
        if name.startswith("flowgrpo_fast.ops.") and hasattr(module, "_C"):
            module._C = recorders["cpu"]
    load = kernels_on_host.load

    def recorded(path: Path) -> ModuleType:
        loaded.append(path)
        recorders["cuda"] = Recorder(load(path), MOST)
        return recorders["cuda"]  # type: ignore[return-value]

    kernels_on_host.load = recorded


def pytest_sessionfinish(session: pytest.Session) -> None:
    folder = session.config.getoption("--record-calls")
    folder.mkdir(parents=True, exist_ok=True)
    for name, recorder in recorders.items():
        (folder / f"{name}.pickle").write_bytes(pickle.dumps(recorder.calls))
    launched = set().union(*map(kernels_on_host.launched, loaded))
    (folder / "launched.txt").write_text("\n".join(sorted(launched)))
