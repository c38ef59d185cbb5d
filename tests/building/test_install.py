"""install.py: installs and compiles side by side, and ends both where one fails or somebody interrupts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = """#!/bin/sh
echo $$ $* >> "{log}"  # unquoted: one line
case "$*" in
  *setup.py*) {compile} ;;
  *tomllib*) echo numpy ;;
  *torch==*) {torch} ;;
  *) exit 0 ;;
esac
"""
WAITS = "exec sleep 60"


class Pretended:
    """A virtual environment whose Python writes down what it is asked for."""

    def __init__(self, folder: Path, compile: str = "exit 0", torch: str = "exit 0") -> None:
        self.folder, self.log = folder / "venv", folder / "log"
        (self.folder / "bin").mkdir(parents=True)
        python = self.folder / "bin" / "python"
        python.write_text(PYTHON.format(log=self.log, compile=compile, torch=torch))
        python.chmod(0o755)
        (self.folder / "bin" / "pip").touch()

    def start(self) -> subprocess.Popen[str]:
        command = [sys.executable, str(ROOT / "install.py"), "--venv", str(self.folder), "--torch", "1.2.3"]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def asked(self, what: str) -> list[int]:
        """Processes that were asked for something."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [int(line.split()[0]) for line in lines if what in line]


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_all_is_installed_in_order_and_torch_once(tmp_path):
    pretended = Pretended(tmp_path)
    first = pretended.start()
    out, err = first.communicate(timeout=60)
    assert (first.returncode, err) == (0, "")
    assert out.splitlines()[0].startswith("set-up: installing packages and compiling csrc side by side")
    assert out.splitlines()[-1].startswith("set-up: done in ")
    lines = [line.split(maxsplit=1)[1] for line in pretended.log.read_text().splitlines()]
    assert "pybind11" in lines[0]
    assert lines[-1].endswith("--no-deps --no-build-isolation --editable .")
    assert any(line.endswith("install --no-compile numpy") for line in lines[1:-1])
    assert (len(pretended.asked("torch==1.2.3")), len(pretended.asked("setup.py"))) == (1, 1)
    assert pretended.start().wait(timeout=60) == 0
    assert (len(pretended.asked("torch==1.2.3")), len(pretended.asked("setup.py"))) == (1, 2)


@pytest.mark.parametrize(
    ("failing", "other", "step"),
    [("compile", "torch", "compiling csrc"), ("torch", "compile", "installing torch 1.2.3")],
)
def test_a_failure_ends_the_other_and_is_one_line(tmp_path, failing, other, step):
    what = {"compile": "setup.py", "torch": "torch==1.2.3"}
    waits_for_the_other = f'until grep -q "{what[other]}" "{tmp_path / "log"}"; do sleep 0.02; done; exit 3'
    pretended = Pretended(tmp_path, **{failing: waits_for_the_other, other: WAITS})
    done = pretended.start()
    out, err = done.communicate(timeout=50)
    assert (done.returncode, err) == (1, f"set-up failed: {step}; the message is above\n")
    assert "done" not in out
    assert pretended.asked(what[other])
    assert not any(map(is_alive, pretended.asked(what[other])))


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_both(tmp_path, how):
    pretended = Pretended(tmp_path, compile=WAITS, torch=WAITS)
    running = pretended.start()
    wait_for(lambda: pretended.asked("setup.py") and pretended.asked("torch==1.2.3"))
    running.send_signal(how)
    _, err = running.communicate(timeout=30)
    assert (running.returncode, err) == (130, "set-up: interrupted; run it again to go on\n")
    assert not any(map(is_alive, pretended.asked("setup.py") + pretended.asked("torch==1.2.3")))
