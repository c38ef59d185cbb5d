"""The machinery of ``make sanitize`` on the ordinary build: calls are recorded, and repeated on every instruction set.

What it builds takes minutes, so the sanitizers themselves are left to ``make sanitize``.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import sanitize_cpu
import sanitized

from flowgrpo_fast import _C


@pytest.mark.slow
def test_recorded_calls_are_repeated_on_every_instruction_set(tmp_path, monkeypatch, capsys):
    tests = [sanitized.ROOT / "tests" / "ops" / "test_philox.py"]
    recorded = sanitized.record(tmp_path, tests, "not gpu")
    assert recorded.returncode == 0, recorded.stdout + recorded.stderr
    monkeypatch.setattr(sanitize_cpu, "build", lambda kind: Path(_C.__file__))
    monkeypatch.setitem(sanitize_cpu.PLANTED, "plain", ("race", "WARNING: ThreadSanitizer: data race"))
    clean = sanitize_cpu.check("plain", tmp_path / "cpu.pickle")
    first, *lines = capsys.readouterr().out.splitlines()
    assert (clean, first) == (False, "plain: the planted defect was NOT FOUND")  # nobody looks for it
    module, calls = Path(_C.__file__), tmp_path / "cpu.pickle"
    sets = sanitize_cpu.instruction_sets("plain", module, calls)
    assert _C.build_info()["isa"] in sets
    starts = [f"plain, {threads} thread(s), {isa}: " for isa in sets for threads in (1, 4)]
    assert [line.startswith(start) for line, start in zip(lines, starts, strict=True)] == [True] * len(lines)
    assert all(line.endswith(" calls repeated") for line in lines), lines


def test_the_flags_reach_the_compiler(monkeypatch):
    """Every source of the CPU is built with its sanitizer, and a build that fails says why."""
    asked = {}

    def refused(command, cwd, env, capture_output, text):
        asked[Path(env["FLOWGRPO_FAST_BUILD"]).name] = (env["CXX"], env["FLOWGRPO_FAST_CUDA"])
        return sanitize_cpu.subprocess.CompletedProcess(command, 1, "no compiler ", "here")

    monkeypatch.setattr(sanitize_cpu.subprocess, "run", refused)
    for kind in sanitized.SANITIZERS:
        with pytest.raises(SystemExit, match="no compiler here"):
            sanitize_cpu.build(kind)
    assert set(asked) == set(sanitize_cpu.PLANTED) == {"address", "thread"}
    for kind, (compiler, cuda) in asked.items():
        assert f"-fsanitize={kind}" in compiler
        assert cuda == "0"
