"""The GPU check's machinery, on a machine without a GPU: stages, limits, what is missing, what is reported."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check, gpu_stages, lever_rows, report
from benchmarks.gpu_check import Command, Stage

SCRIPT = Path(gpu_check.__file__)


HANGS = 1800  # seconds: no program takes as long, however busy the machine


def python(name, code, limit=HANGS, **more):
    return Command(name, [sys.executable, "-c", code], limit, **more)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so_in_one_line():
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=HANGS)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "gpu-check: no CUDA device\n")


@pytest.mark.parametrize("part", gpu_check.PARTS)
def test_the_dry_run_lists_stages_of_seven_minutes_packages_included(tmp_path, part):
    command = [sys.executable, str(SCRIPT), part, "--dry-run"]
    listed = subprocess.run(command, capture_output=True, text=True, timeout=HANGS, cwd=tmp_path).stdout
    names = [line.split()[1] for line in listed.splitlines()]
    stages = {
        "first": ["smoke", "numbers", "tests"],
        "checks": ["capture", "large", "memcheck", "racecheck", "counters"],
        "tables": ["ops", "rollout", "train_step"],
        "levers": ["levers"],
    }[part]
    assert names == ["packages", "build", *stages]
    assert {line.split()[0] for line in listed.splitlines()} == {part}
    assert sum(int(line.split()[2]) for line in listed.splitlines()) <= gpu_check.BUDGET <= 7 * 60


def test_a_part_of_another_name_is_one_line():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "last"], capture_output=True, text=True, timeout=HANGS
    )
    assert done.returncode == 2
    assert "part is 'last', must be one of first, checks, tables, levers" in done.stderr


def test_a_stage_passes_fails_or_is_stopped(tmp_path):
    assert gpu_check.run(python("good", "print(1)"), tmp_path).status == "passed"
    bad = gpu_check.run(python("bad", "print('why it broke'); raise SystemExit(3)"), tmp_path)
    assert bad.status == "failed"
    assert "exit status 3" in bad.detail
    assert "why it broke" in bad.detail
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(9999)'])"
    late = gpu_check.run(python("late", child, limit=1), tmp_path)  # and does not wait for the child
    assert (late.status, late.detail[:19]) == ("timed out", "stopped after 1 s; ")


def test_a_stage_that_fits_its_work_to_its_limit_is_told_what_is_left(tmp_path):
    told = python("levers", "import sys; print(sys.argv[1:])", limit=25, starting=20, stretches=True)
    assert (told.within(60.5).limit, told.within(3).limit, told.least) == (60, 3, 25)
    fixed = python("ops", "", 30, starting=15)
    assert (fixed.within(60).limit, fixed.within(12.5).limit, fixed.least) == (30, 12, 25)
    assert gpu_check.run(told.within(HANGS + 0.5), tmp_path).status == "passed"
    assert (tmp_path / "levers.log").read_text() == f"['--limit', '{HANGS - 20}']\n"
    ops, levers = (gpu_check.commands(part, tmp_path, "90")[1] for part in ("tables", "levers"))
    assert (ops.told[-2], int(ops.told[-1])) == ("--limit", ops.limit - ops.starting)
    assert levers.stretches
    assert levers.limit - levers.starting >= lever_rows._A_ROW  # or no row would be begun
    assert gpu_check.absent(levers, {"peft": ""}) == "needs peft"


def test_the_page_says_what_is_compiled_on_a_gpu(tmp_path):
    ops = gpu_check.commands("tables", tmp_path, "90")[1]
    size, dtype = ops.arguments[ops.arguments.index("--compiled") + 1].rsplit(" ", 1)
    assert f"compiles one size alone, {size} in {dtype}" in " ".join(report.INTRODUCTION.split())


def test_stages_share_what_is_left_and_one_without_time_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "WORK", tmp_path)
    clock, limits = [100.0], {}
    monkeypatch.setattr(gpu_check.time, "perf_counter", lambda: clock[0])

    def overrun(command, folder):
        limits[command.name] = command.limit
        clock[0] += command.limit
        return Stage(command.name)

    monkeypatch.setattr(gpu_check, "run", overrun)
    stages = [
        python("build", "", 50),
        python("tests", "", 50),
        python("ops", "", 50),
        python("rollout", "", 50),
    ]
    levers = python("levers", "", 60, stretches=True)
    done = list(gpu_check.run_all([*stages, levers], {}, deadline=100 + 145))
    assert limits == {"build": 50, "tests": 15, "ops": 10, "rollout": 10, "levers": 60}
    assert clock[0] == 100 + 145  # all of it and no more
    late = list(gpu_check.run_all([*stages, levers], {}, deadline=clock[0] + 65))
    assert [stage.status for stage in (*done, *late)] == ["passed"] * 5 + ["skipped"] * 4 + ["passed"]
    assert late[3].detail == "out of time: 5 s are left of 420"


def test_rows_measured_before_a_stage_was_stopped_are_kept(tmp_path):
    read = gpu_stages.read_levers(tmp_path)
    stage = Stage("levers", "timed out", detail="stopped after 60 s")
    read(stage, "")
    assert (stage.status, stage.numbers["rows"]) == ("timed out", 0)
    jobs = [{"job": "a", "rows": [{}, {}], "failed": {"b": "OutOfMemoryError"}}]
    (tmp_path / "levers_cuda.json").write_text(json.dumps({"jobs": jobs, "left": ["a: c"]}))
    read(stage, "")
    assert (stage.status, stage.detail) == ("passed", "stopped after 60 s, after 2 rows")
    assert stage.numbers == {"rows": 2, "left": 1, "failed_rows": {"a, b": "OutOfMemoryError"}}


def test_no_row_at_all_is_a_failure(tmp_path):
    (tmp_path / "levers_cuda.json").write_text(json.dumps({"jobs": [], "left": ["a: c"]}))
    stage = Stage("levers")
    gpu_stages.read_levers(tmp_path)(stage, "")
    assert (stage.status, stage.detail) == ("failed", "no row was measured")


@pytest.mark.parametrize("name", ["tests.xml", "levers_cuda.json"])
def test_half_a_file_fails_its_stage_and_nothing_else(tmp_path, name):
    (tmp_path / name).write_text("<testsuites><testcase" if name == "tests.xml" else '{"jobs": [')
    reader = (
        gpu_stages.read_tests(tmp_path / name) if name == "tests.xml" else gpu_stages.read_levers(tmp_path)
    )
    stage = gpu_check.run(python("half", "", read=reader), tmp_path)
    assert stage.status == "failed"
    assert "result not read: " in stage.detail


def test_stages_see_the_checkout_and_the_unpacked_wheels(tmp_path):
    code = "import sys, flowgrpo_fast; print(sys.path)"
    assert gpu_check.run(python("path", code), tmp_path).status == "passed"
    log = (tmp_path / "path.log").read_text()
    assert str(gpu_check.ROOT) in log
    assert str(gpu_check.WORK / "site") in log


REPORT = """<testsuites><testsuite>
<testcase classname="a" name="one"/><testcase classname="a" name="two"><skipped message="no"/></testcase>
<testcase classname="" name="tests.models.test_digits"><error message="collection failure">
E   ModuleNotFoundError: No module named 'diffusers'</error></testcase>{more}
</testsuite></testsuites>"""


@pytest.mark.parametrize(
    ("more", "status", "failed"),
    [
        ("", "passed", []),
        (
            '<testcase classname="a" name="three"><failure message="1 != 2">x</failure></testcase>',
            "failed",
            ["a::three"],
        ),
        (
            '<testcase classname="" name="b"><error message="c">'
            "No module named 'flowgrpo_fast.new'</error></testcase>",
            "failed",
            ["::b"],
        ),
    ],
)
def test_a_missing_package_skips_its_tests_visibly_and_nothing_else(tmp_path, more, status, failed):
    (tmp_path / "tests.xml").write_text(REPORT.format(more=more))
    stage = Stage("tests", "failed")
    gpu_stages.read_tests(tmp_path / "tests.xml")(stage, "")
    assert stage.status == status
    assert stage.numbers["failed_tests"] == failed
    assert (stage.numbers["passed"], stage.numbers["skipped"]) == (1, 2)
    result = gpu_check.summary("first", {}, [stage])
    assert result["skipped"] == {"::tests.models.test_digits": "needs diffusers"}
    assert result["failed"] == (["tests"] if failed else [])


def test_no_tests_at_all_is_a_failure(tmp_path):
    stage = Stage("tests")
    gpu_stages.read_tests(tmp_path / "none.xml")(stage, "")
    assert (stage.status, stage.detail) == ("failed", "no test ran")


@pytest.mark.parametrize(
    ("text", "before", "after", "errors"),
    [
        ("3 passed\n========= ERROR SUMMARY: 0 errors", "passed", "passed", 0),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", "passed", "passed", 0),
        ("========= ERROR SUMMARY: 2 errors", "failed", "failed", 2),
        ("========= RACECHECK SUMMARY: 1 hazard displayed", "passed", "failed", 1),
        ("3 passed", "passed", "failed", None),
        ("Error: Device not supported", "failed", "skipped", None),
    ],
)
def test_the_sanitizers_summary_decides(text, before, after, errors):
    stage = Stage("memcheck", before)
    gpu_stages.read_sanitizer(stage, text)
    assert (stage.status, stage.numbers["errors"]) == (after, errors)


def test_a_sanitizer_that_was_stopped_says_what_it_had_run():
    text = """ok   flow_step [3, 41] float32            differing        0 worst 0.00e+00
========= Invalid __global__ read of size 4 bytes
=========     at 0x10 in kernel
DIFF flow_step log_prob [3, 41] float32   differing        1 worst 3.00e-01
"""
    stage = Stage("memcheck", "timed out", detail="stopped after 45 s")
    gpu_stages.read_sanitizer(stage, text)
    assert (stage.status, stage.numbers) == ("timed out", {"errors": 1, "lines": 2})
    assert stage.detail == "stopped after 45 s, after 2 lines of the smoke test and 1 errors"


@pytest.mark.parametrize(
    "text",
    [
        """tests/ops/a.py::test_one[a b-cuda] PASSED  [ 1%]
tests/ops/a.py::test_two[cuda-PASSED] FAILED [ 2%]
tests/ops/a.py::test_three SKIPPED (no) [ 3%]
tests/ops/a.py::test_four[cuda] """,
        """tests/ops/a.py::test_one[a b-cuda]
[gw0] [  1%] PASSED tests/ops/a.py::test_one[a b-cuda]
[gw1] [  2%] FAILED tests/ops/a.py::test_two[cuda-PASSED]
[gw1] [  3%] SKIPPED tests/ops/a.py::test_three
tests/ops/a.py::test_four[cuda] """,
    ],
    ids=["alone", "workers"],
)
def test_tests_that_were_stopped_say_what_they_had_run(tmp_path, text):
    stage = Stage("tests", "timed out", detail="stopped after 130 s")
    gpu_stages.read_tests(tmp_path / "none.xml")(stage, text)
    assert stage.status == "timed out"
    assert stage.numbers["failed_tests"] == ["tests/ops/a.py::test_two[cuda-PASSED]"]
    assert [stage.numbers[name] for name in ("passed", "failed", "skipped")] == [1, 1, 1]


def wheel(folder, name):
    """One of version 1.0."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{name}/__init__.py", "")
        info = f"{name}-1.0.dist-info"
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", "")


def test_wheels_fill_in_what_is_missing_beside_the_machines_own(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "WORK", tmp_path / "work")
    monkeypatch.setattr(
        gpu_check, "NEEDED", {"torch": "all", "not_here_a": "its tests", "not_here_b": "its own"}
    )
    wheel(tmp_path, "not_here_a")
    wheel(tmp_path, "torch")  # the machine's own stays
    stage = gpu_check.install(tmp_path)
    assert stage.status == "passed", stage.detail
    assert stage.numbers == {
        "installed": ["not_here_a-1.0-py3-none-any.whl"],
        "missing": {"not_here_b": "its own"},
    }
    assert (tmp_path / "work/site/not_here_a/__init__.py").exists()


def test_a_package_older_than_the_project_needs_is_taken_from_the_wheels(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "WORK", tmp_path / "work")
    monkeypatch.setattr(gpu_check, "NEEDED", {})
    wheel(tmp_path, "torch")
    monkeypatch.setattr(gpu_check, "needed", lambda name: "9999.1")
    assert gpu_check.install(tmp_path).numbers["installed"] == ["torch-1.0-py3-none-any.whl"]
    monkeypatch.setattr(gpu_check, "needed", lambda name: "0.9")
    assert gpu_check.install(tmp_path).numbers["installed"] == []


@pytest.mark.parametrize(("part", "name"), [("first", "tests"), ("checks", "large")])
def test_without_diffusers_the_tests_of_the_ops_run(tmp_path, part, name):
    """One conftest that cannot be imported ends pytest before its first test."""
    for lacking, folder in (
        ({}, "tests"),
        ({"rich": ""}, "tests"),
        ({"diffusers": "", "peft": ""}, "tests/ops"),
    ):
        stages = {each.name: each for each in gpu_check.commands(part, tmp_path, "90", lacking)}
        assert stages[name].arguments[-1] == folder


def test_versions_are_compared_as_numbers():
    assert gpu_check.numbers_of("77") < gpu_check.numbers_of("84.2.1") < gpu_check.numbers_of("100.0+cu129")
    assert gpu_check.needed("setuptools") == "77"
    assert gpu_check.needed("nvidia-ml-py") == "12"
    assert gpu_check.needed("ruff") == "0.17.5"
    assert gpu_check.needed("unheard") == "0"


def test_an_installation_that_hangs_is_a_stage_timed_out(tmp_path, monkeypatch):
    """And what it did install is used."""
    monkeypatch.setattr(gpu_check, "WORK", tmp_path / "work")
    monkeypatch.setattr(gpu_check, "NEEDED", {"not_here_a": "its tests"})
    monkeypatch.setattr(gpu_check, "INSTALLING", 0.01)
    wheel(tmp_path, "not_here_a")
    stage = gpu_check.install(tmp_path)
    assert (stage.status, stage.detail) == ("timed out", "stopped after 0.01 s")
    assert set(stage.numbers) == {"installed", "missing"}


def test_a_stage_without_its_packages_is_skipped_and_listed(tmp_path):
    commands = {command.name: command for command in gpu_check.commands("tables", tmp_path, "90")}
    assert commands["build"].environment["FLOWGRPO_FAST_ARCHS"] == "90"
    assert gpu_check.absent(commands["rollout"], {"diffusers": ""}) == "needs diffusers"
    assert gpu_check.absent(commands["ops"], {"diffusers": ""}) == ""
    counters = Command("counters", [sys.executable], 1)
    assert gpu_check.absent(counters, {}) == "ncu not found"
    bare = Command("memcheck", [sys.executable], 1)
    assert gpu_check.absent(bare, {}) == "compute-sanitizer not found"


@pytest.mark.slow
def test_a_whole_check_goes_on_after_a_failure_and_writes_one_file(tmp_path, monkeypatch, capsys):
    machine = {"gpu": "pretended", "arch": "90", "torch": "2", "python": "3"}
    monkeypatch.setattr(gpu_check, "WORK", tmp_path / "work")
    monkeypatch.setattr(gpu_check, "gpu", lambda: machine)
    stages = [
        python("build", "1 / 0"),
        Command("memcheck", ["python"], 1),
        python("ops", "print('measured')"),
    ]
    monkeypatch.setattr(gpu_check, "commands", lambda part, folder, arch, lacking: stages)
    monkeypatch.setattr(
        sys, "argv", ["gpu_check.py", "tables", "--output", str(tmp_path / "out"), "--wheels", str(tmp_path)]
    )
    assert gpu_check.main() == 1
    result = json.loads((tmp_path / "out/gpu_check_tables.json").read_text())
    assert [stage["status"] for stage in result["stages"][1:]] == ["failed", "skipped", "passed"]
    assert result["failed"] == ["build"]
    assert result["skipped"]["memcheck"] == "compute-sanitizer not found"
    assert {target["verdict"] for target in result["targets"]} == {"not measured"}
    assert "ZeroDivisionError" in capsys.readouterr().out
    with tarfile.open(tmp_path / "out/gpu_check_tables.tar.gz") as archive:
        assert {"build.log", "ops.log", "gpu_check_tables.json"} <= set(archive.getnames())


def test_what_a_stage_has_is_written_before_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "WORK", tmp_path / "work")
    seen = []
    out = tmp_path / "out"

    def later(command, folder):
        kept = json.loads((out / "gpu_check_first.json").read_text())
        with tarfile.open(out / "gpu_check_first.tar.gz") as archive:
            seen.append(([stage["name"] for stage in kept["stages"]], archive.getnames()))
        (folder / f"{command.name}.log").write_text("said")
        return Stage(command.name)

    monkeypatch.setattr(gpu_check, "run", later)
    monkeypatch.setattr(gpu_check, "commands", lambda *_: [python("smoke", ""), python("numbers", "")])
    assert gpu_check.check("first", {"arch": "90"}, tmp_path, out) == []
    assert seen == [
        (["packages"], ["gpu_check_first.json"]),
        (["packages", "smoke"], ["gpu_check_first.json", "smoke.log"]),
    ]


@pytest.mark.parametrize("script", ["gpu_smoke.py", "gpu_numbers.py"])
def test_the_first_scripts_run_on_a_cpu(tmp_path, script):
    """As a rehearsal: what they print there says nothing of a GPU, but that they run."""
    command = [sys.executable, str(SCRIPT.with_name(script)), "--device", "cpu"]
    command += ["--output", str(tmp_path)] if script == "gpu_numbers.py" else []
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    if script == "gpu_numbers.py":
        found = json.loads((tmp_path / "numbers_cpu.json").read_text())["numbers"]
        assert {int(name.split()[0]) for name in found} == set(range(1, 13))
        assert all(number["us"] > 0 for number in found.values())
    else:
        assert done.stdout.splitlines()[-1] == "smoke: 75 lines, all equal"
