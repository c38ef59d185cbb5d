"""What a run leaves behind, however it ends, and what it goes on from. The runs here train the toy network."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from rich.console import Console

from flowgrpo_fast import launch
from flowgrpo_fast.launch import Run, new_folder
from flowgrpo_fast.monitor.metrics import read_metrics
from flowgrpo_fast.monitor.progress import run_console
from flowgrpo_fast.monitor.report import write_report
from flowgrpo_fast.recipe import EMA, LoRA, Network, Recipe
from flowgrpo_fast.recipe_io import to_dict
from flowgrpo_fast.training import checkpoint
from flowgrpo_fast.training.checkpoint import changed_fields, damage, finished_checkpoints, newest_whole
from flowgrpo_fast.training.engine import Engine

CPU = torch.device("cpu")
STEPS = 4


@pytest.fixture(autouse=True)
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Charts and the measuring of a floor take most of so short a run; both have tests of their own."""
    monkeypatch.setattr(launch, "floor_of", lambda engine: None)
    monkeypatch.setattr(launch, "write_report", lambda folder: folder / "report.html")


@pytest.fixture
def job(toy_recipe: Callable[..., Recipe]) -> Callable[..., Recipe]:
    def make(**changes: Any) -> Recipe:
        recipe = toy_recipe(num_steps=STEPS, **changes)
        return replace(recipe, task=replace(recipe.task, num_eval_samples=4, eval_every=100, judge=""))

    return make


def run(recipe: Recipe, folder: Path, **settings: Any) -> str:
    """Trains; what was printed."""
    out = io.StringIO()
    Run(recipe=recipe, folder=folder, device=CPU, console=Console(file=out, width=200), **settings).start()
    return out.getvalue()


def failing(recipe: Recipe, folder: Path, kind: type[BaseException] = ValueError, **settings: Any) -> str:
    with pytest.raises(kind) as caught:
        run(recipe, folder, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def weights(folder: Path) -> bytes:
    """Of the newest checkpoint."""
    return (finished_checkpoints(folder)[-1] / "model.safetensors").read_bytes()


def rewards(folder: Path) -> list[float]:
    return [record["reward"] for record in read_metrics(folder) if "reward" in record]


def in_the_middle(monkeypatch: pytest.MonkeyPatch, name: str, at: int, error: BaseException) -> None:
    """Lets a function of the loop fail at its `at`-th call."""
    from flowgrpo_fast.training import loop

    plain, calls = getattr(loop, name), []

    def broken(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            raise error
        return plain(*args, **kwargs)

    monkeypatch.setattr(loop, name, broken)


@pytest.fixture
def whole(job: Callable[..., Recipe], tmp_path: Path) -> Path:
    """An uninterrupted run."""
    run(job(), tmp_path / "whole")
    return tmp_path / "whole"


# ------------------------------------------------------------------------------------- ends of a run


@pytest.mark.parametrize(
    "error", [KeyError("score"), ValueError("reward 'ocr' is 3 numbers"), KeyboardInterrupt()]
)
@pytest.mark.parametrize("at", [1, 3])
def test_a_failure_outside_an_update_keeps_the_last_step(
    job, whole, tmp_path, monkeypatch, error, at
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        in_the_middle(patch, "assign", at, error)
        if isinstance(error, KeyboardInterrupt):
            with pytest.raises(KeyboardInterrupt):
                run(job(), folder)
        else:
            message = failing(job(), folder)
            assert message.endswith(
                f"step {at - 1} is saved; continue with: flowgrpo-fast train --resume {folder}"
            )
            assert str(error.args[0]) in message
    assert [path.name for path in finished_checkpoints(folder)] == [f"step_{at - 1:06d}"]
    assert (folder / launch.TRACEBACK).exists() == isinstance(
        error, Exception
    )  # raised by code that is not ours
    run(job(), folder, resume=True)
    assert weights(folder) == weights(whole)
    assert rewards(folder) == rewards(whole)
    assert [record["step"] for record in read_metrics(folder)] == list(range(STEPS + 1))


def test_the_traceback_of_a_failure_is_in_a_file(job, tmp_path, monkeypatch) -> None:
    in_the_middle(monkeypatch, "assign", 2, KeyError("score"))
    message = failing(job(), tmp_path / "run")
    assert f"step 2: KeyError: 'score' (traceback in {str(tmp_path / 'run' / launch.TRACEBACK)!r})" in message
    assert "in broken" in (tmp_path / "run" / launch.TRACEBACK).read_text()


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (5, "step 2 is saved; continue with"),
        (6, "step 3 failed in the middle of its update, step 2 is the last that stands; continue with"),
    ],
    ids=["before its first optimiser step", "between two of them"],
)
def test_a_failure_in_an_update_leaves_what_stands(job, tmp_path, monkeypatch, call, told) -> None:
    """Until its first optimiser step an update has changed nothing; after that the checkpoint before it stands."""
    from flowgrpo_fast.training import update

    recipe = job()
    recipe = replace(recipe, optimizer=replace(recipe.optimizer, num_updates=2))
    run(recipe, tmp_path / "whole")
    plain, calls = update.accumulate, []

    def broken(*args: Any) -> None:
        calls.append(1)
        if len(calls) == call:
            raise RuntimeError("a kernel failed")
        plain(*args)

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(update, "accumulate", broken)
        message = failing(recipe, folder, checkpoint_every=2)
    assert told in message
    run(recipe, folder, resume=True)
    assert weights(folder) == weights(tmp_path / "whole")


def test_a_failure_at_the_end_of_an_idle_step_is_no_whole_step(job, tmp_path, monkeypatch) -> None:
    """No weight moved, but a snapshot that follows steps has: what is saved would not be the last step's state."""
    from flowgrpo_fast.training.learner import Learner

    plain, calls = Learner.follow, []

    def broken(self: Learner, moment: Any) -> None:
        plain(self, moment)
        calls.append(moment.ends_step)
        if sum(calls) == 3:
            raise RuntimeError("out of memory")

    recipe = job()
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "follow", broken)
        patch.setattr(Learner, "step", lambda self: torch.zeros(()))
        message = failing(recipe, tmp_path / "run", checkpoint_every=1)
    assert "step 3 failed in the middle of its update, step 2 is the last that stands" in message


@pytest.mark.parametrize("at", [2, 4], ids=["a step", "the last step"])
def test_signals_do_not_interrupt_a_save(job, whole, tmp_path, monkeypatch, at) -> None:
    """Two while a checkpoint is written, as a cluster sends them: the first stops the run, the save is finished."""
    folder, plain = tmp_path / "run", checkpoint._write

    def sending(engine: Engine, *args: Any) -> None:
        if engine.step == at:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
        plain(engine, *args)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write", sending)
        said = run(job(), folder, checkpoint_every=1)
    assert f"stopped after step {at}; " in said
    assert finished_checkpoints(folder)[-1].name == f"step_{at:06d}"
    run(job(), folder, resume=True)
    assert weights(folder) == weights(whole)


def test_a_signal_that_is_ignored_stays_ignored(job, whole, tmp_path, monkeypatch) -> None:
    """As `nohup` starts a run, and then the terminal is closed."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        self_sent(monkeypatch, signal.SIGHUP, at=2)
        assert "stopped" not in run(job(), tmp_path / "run")
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert weights(tmp_path / "run") == weights(whole)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_stops_after_its_step_and_saves(job, whole, tmp_path, monkeypatch, name) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        self_sent(patch, signal.Signals[name], at=2)
        said = run(job(), folder)
    assert f"stopped after step 2; continue with: flowgrpo-fast train --resume {folder}" in said
    run(job(), folder, resume=True)
    assert weights(folder) == weights(whole)


def test_sigusr1_saves_and_goes_on(job, whole, tmp_path, monkeypatch) -> None:
    self_sent(monkeypatch, signal.SIGUSR1, at=2)
    run(job(), tmp_path / "run")
    assert [path.name for path in finished_checkpoints(tmp_path / "run")] == ["step_000002", "step_000004"]
    assert weights(tmp_path / "run") == weights(whole)


def self_sent(monkeypatch: pytest.MonkeyPatch, number: int, at: int) -> None:
    """Sends this process a signal in the middle of a step."""
    from flowgrpo_fast.training import loop

    plain, calls = loop.assign, []

    def sending(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), number)
        return plain(*args)

    monkeypatch.setattr(loop, "assign", sending)


def test_a_run_may_start_in_a_thread(job, whole, tmp_path) -> None:
    failures: list[BaseException] = []

    def start() -> None:
        try:
            run(job(), tmp_path / "run")
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert failures == []
    assert weights(tmp_path / "run") == weights(whole)


def test_sigterm_wins_over_what_hangs(job, whole, tmp_path, monkeypatch) -> None:
    """A step that does not end is interrupted after a while, and the last whole one saved."""
    from flowgrpo_fast.training import loop

    folder, plain, calls = tmp_path / "run", loop.assign, []

    def hanging(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait(60)
        return plain(*args)

    with monkeypatch.context() as patch:
        patch.setattr(launch, "_GRACE", 0.1)
        patch.setattr(loop, "assign", hanging)
        with pytest.raises(KeyboardInterrupt):
            run(job(), folder)
    assert [path.name for path in finished_checkpoints(folder)] == ["step_000002"]
    run(job(), folder, resume=True)
    assert weights(folder) == weights(whole)


def test_a_run_without_an_output_stream(job, whole, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdout", None)
    Run(recipe=job(), folder=tmp_path / "run", device=CPU, console=run_console()).start()
    assert weights(tmp_path / "run") == weights(whole)


def test_a_closed_output_does_not_end_a_run(job, whole, tmp_path, monkeypatch) -> None:
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr("sys.stdout", os.fdopen(write, "w"))
    Run(recipe=job(), folder=tmp_path / "run", device=CPU, console=run_console()).start()
    assert weights(tmp_path / "run") == weights(whole)


# ------------------------------------------------------------------------------------- the folder


def test_a_run_killed_before_its_first_checkpoint_begins_again(job, whole, tmp_path) -> None:
    folder = tmp_path / "run"
    run(job(), folder)
    for path in finished_checkpoints(folder):
        path.rename(tmp_path / path.name)
    assert "no checkpoint yet: the run begins again at its start" in run(job(), folder, resume=True)
    assert weights(folder) == weights(whole)
    assert [record["step"] for record in read_metrics(folder)] == list(range(STEPS + 1))


def test_a_folder_without_a_run_is_not_resumed(job, tmp_path) -> None:
    assert "holds no run to resume" in failing(job(), tmp_path, resume=True)


def test_a_run_that_never_began_leaves_no_folder(job, tmp_path) -> None:
    recipe = job()
    broken = replace(recipe, task=replace(recipe.task, model="no_such_module:load"))
    failing(broken, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_one_run_a_folder(job, tmp_path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with FileLock(folder / ".lock"):
        assert "is in use by another run" in failing(job(), folder)
    run(job(), folder)


def test_another_runs_folder_is_left_as_it_is(job, tmp_path) -> None:
    """One that loads its model holds the lock and nothing else: whoever is refused takes nothing away from it."""
    folder = tmp_path / "run"
    (folder / "samples").mkdir(parents=True)
    with FileLock(folder / ".lock"):
        assert "is in use by another run" in failing(job(), folder)
        failing(job(), folder, checkpoint_every=0)
        assert (folder / "samples").is_dir()
        assert (folder / ".lock").exists()


def test_a_lock_of_the_users_code_is_not_the_runs(job, tmp_path, monkeypatch) -> None:
    with FileLock(tmp_path / "data.lock"):

        def loading(*args: Any) -> Engine:
            FileLock(tmp_path / "data.lock").acquire(timeout=0)
            raise AssertionError

        monkeypatch.setattr(launch, "build_engine", loading)
        message = failing(job(), tmp_path / "run")
    assert "data.lock" in message
    assert "in use by another run" not in message
    assert "--resume" not in message  # there is nothing to go on from
    assert not (tmp_path / "run").exists()


def test_checkpoints_of_an_earlier_run_are_not_a_new_runs(job, whole) -> None:
    """A new run would leave them in its place: a step that is saved already is not saved again."""
    for name in ("metrics.jsonl", "recipe.json"):
        (whole / name).unlink()
    assert "already holds a run" in failing(replace(job(), seed=7), whole)


def test_runs_of_one_second_get_folders_of_their_own(tmp_path) -> None:
    folders = {new_folder("mix_grpo", tmp_path) for _ in range(5)}
    assert len(folders) == 5
    assert all(folder.is_dir() for folder in folders)


def test_processes_of_torchrun_are_refused(job, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    folder = new_folder("toy", tmp_path)
    assert "WORLD_SIZE is 2" in failing(job(), folder)
    assert not folder.exists()
    monkeypatch.setenv("WORLD_SIZE", "")
    run(replace(job(), num_steps=1), folder)


def test_a_file_that_is_unchanged_is_not_written_again(job, whole) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
    said = run(job(), whole, resume=True)
    assert f"nothing to train: step {STEPS} of {STEPS} is done" in said
    after = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
    same = ["recipe.json", "model.safetensors", "optimizer.pt", "state.json", "metrics.jsonl"]
    assert all(after[path] == before[path] for path in before if path.name in same)


# ------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("how", ["cut", "flipped", "missing", "state", "empty state"])
def test_a_damaged_checkpoint_is_passed_over(job, whole, tmp_path, how) -> None:
    folder = tmp_path / "run"
    run(job(), folder, checkpoint_every=2)
    last = finished_checkpoints(folder)[-1]
    file = last / ("state.json" if "state" in how else "model.safetensors")
    data = bytearray(file.read_bytes())
    if how == "missing":
        file.unlink()
    else:
        data[-3] ^= how in ("flipped", "state") and 0x01
        file.write_bytes(data[: -5 if how == "cut" else 0 if how == "empty state" else len(data)])
    if how == "state":  # still JSON, perhaps: what counts is that nothing is lost
        file.write_bytes(b"{]")
    assert damage(last)
    said = run(job(), folder, resume=True)
    assert f"'{last}' is damaged and passed over: " in said.replace("\n", "")
    assert weights(folder) == weights(whole)
    assert damage(last) == ""  # written anew


def test_a_checkpoint_under_another_steps_name_is_passed_over(job, whole) -> None:
    """A copy that was renamed: the run goes on from the one that is what it says."""
    (last,) = finished_checkpoints(whole)
    copy = last.with_name("step_000009")
    shutil.copytree(last, copy)
    assert damage(copy) == f"it is of step {STEPS}"
    assert newest_whole(whole) == (last, [f"'{copy}' is damaged and passed over: it is of step {STEPS}"])


def test_a_resume_under_other_versions_says_so(job, whole) -> None:
    """Versions are recorded, not refused: only the promise of equal bits is taken back, in one line."""
    (last,) = finished_checkpoints(whole)
    state = json.loads((last / "state.json").read_text())
    state["versions"]["torch"] = "1.0.0"
    (last / "state.json").write_text(json.dumps(state))
    said = run(replace(job(), num_steps=STEPS + 1), whole, resume=True)
    assert f"step {STEPS} was saved with torch 1.0.0" in said


def test_no_whole_checkpoint_is_an_error(job, whole) -> None:
    for path in finished_checkpoints(whole):
        (path / "optimizer.pt").write_bytes(b"")
    assert "is whole; " in failing(job(), whole, resume=True)


def test_only_own_names_are_listed_and_cleaned_up(job, tmp_path) -> None:
    folder = tmp_path / "run"
    run(job(), folder, checkpoint_every=1)
    for name in ("step_000001_best", "step_1", "step_x"):
        (folder / "checkpoints" / name).mkdir()
        (folder / "checkpoints" / name / "state.json").write_text("{}")
    names = [path.name for path in finished_checkpoints(folder)]
    assert names == ["step_000003", "step_000004"]
    later = folder / "checkpoints" / "step_1000000"  # a number, not a text: after 999999
    later.mkdir()
    (later / "state.json").write_text("{}")
    assert finished_checkpoints(folder)[-1] == later
    (later / "state.json").unlink()
    recipe = replace(job(), num_steps=STEPS + 2)
    run(recipe, folder, resume=True, checkpoint_every=1)
    left = {path.name for path in (folder / "checkpoints").iterdir()}
    assert left == {"step_000001_best", "step_1", "step_x", "step_1000000", "step_000005", "step_000006"}


def test_a_save_never_removes_before_it_replaces(job, tmp_path, monkeypatch) -> None:
    """A step that is there is left alone; a damaged one makes way only for one that is complete."""
    folder = tmp_path / "run"
    run(job(), folder)
    (last,) = finished_checkpoints(folder)
    before = {path.name: path.stat().st_mtime_ns for path in last.iterdir()}
    from flowgrpo_fast.training.engine import build_engine
    from flowgrpo_fast.training.loop import train_step

    engine = build_engine(job(), CPU)
    for _ in range(STEPS):
        train_step(engine)
    assert checkpoint.save_checkpoint(engine, folder) == last
    assert {path.name: path.stat().st_mtime_ns for path in last.iterdir()} == before
    (last / "optimizer.pt").write_bytes(b"torn")
    alive: list[bool] = []
    plain = checkpoint._write

    def watching(*args: Any) -> None:
        plain(*args)
        alive.append(last.exists())

    monkeypatch.setattr(checkpoint, "_write", watching)
    checkpoint.save_checkpoint(engine, folder)
    assert alive == [True]
    assert damage(last) == ""


@pytest.mark.parametrize("where", ["weight", "moment"])
def test_what_is_not_finite_is_never_saved(job, tmp_path, monkeypatch, where) -> None:
    from flowgrpo_fast.training import loop

    plain, folder = loop.update, tmp_path / "run"

    def poisoned(learner: Any, batch: Any) -> dict[str, float]:
        metrics = plain(learner, batch)
        if learner.num_updates == 3:
            parameter = learner.parameters[0]
            broken = parameter.data if where == "weight" else learner.optimizer.state[parameter]["exp_avg"]
            broken[0] = torch.nan
        return metrics

    recipe = job()
    recipe = replace(recipe, num_steps=3, optimizer=replace(recipe.optimizer, num_updates=1))
    with monkeypatch.context() as patch:
        patch.setattr(loop, "update", poisoned)
        message = failing(recipe, folder, checkpoint_every=2)
    assert "tensors are not finite, the first " in message
    assert [path.name for path in finished_checkpoints(folder)] == ["step_000002"]
    run(recipe, folder, resume=True)
    assert finished_checkpoints(folder)[-1].name == "step_000003"


def test_metrics_stay_json(tmp_path) -> None:
    from flowgrpo_fast.monitor.metrics import MetricsLog

    log = MetricsLog(tmp_path)
    log.write({"step": 1, "reward": 0.5, "kl": float("nan"), "loss": float("inf")})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    strict = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert strict == {"step": 1, "reward": 0.5, "not_finite": ["kl", "loss"]}


def test_a_resume_makes_the_metrics_of_an_earlier_edition_json(tmp_path) -> None:
    from flowgrpo_fast.monitor.metrics import MetricsLog

    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "kl": NaN, "reward": 0.5}\n{"step": "2"}\n')
    MetricsLog(tmp_path, last_step=1)
    assert file.read_text() == '{"step": 1, "reward": 0.5, "not_finite": ["kl"]}\n'


def test_torn_lines_in_the_middle_lose_nothing_else(tmp_path) -> None:
    lines = [
        b'{"step": 1, "reward": 1.0}',
        b'{"step": 2, "rew',
        b"\xff\xfe",
        b"7",
        b'{"step": 3, "reward": 3.0}',
    ]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 3]


# ------------------------------------------------------------------------------------- resuming otherwise


def test_a_resume_takes_the_recipes_rates(job, tmp_path, monkeypatch) -> None:
    """The moments are those that were saved; lr, betas and weight decay are what the recipe says now."""
    folder, recipe = tmp_path / "run", job()
    run(replace(recipe, num_steps=2), folder)
    rates = {"lr": 7e-3, "betas": (0.5, 0.7), "weight_decay": 0.25, "max_grad_norm": 0.125}
    engines: list[Engine] = []
    plain = launch.build_engine
    monkeypatch.setattr(launch, "build_engine", lambda *args: engines.append(plain(*args)) or engines[-1])
    changed = replace(recipe, num_steps=3, optimizer=replace(recipe.optimizer, **rates))
    said = run(changed, folder, resume=True)
    (group,) = engines[0].learner.optimizer.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (7e-3, (0.5, 0.7), 0.25)
    assert engines[0].learner.max_grad_norm == 0.125
    assert group["fused"]
    assert "from step 3 on, optimizer.lr is 0.007" in said

    # Step 3 written out: AdamW on the saved weights and moments, with the new rates.
    assert (
        engines[0].learner.optimizer.state[group["params"][0]]["step"].item()
        == 3 * recipe.optimizer.num_updates
    )

    entries = json.loads((folder / launch.CHANGES).read_text())
    assert [entry["step"] for entry in entries] == [2]
    assert entries[0]["changed"]["optimizer.lr"] == [recipe.optimizer.lr, 7e-3]
    assert (
        json.loads((folder / "recipe_to_step_000002.json").read_text())["optimizer"]["lr"]
        == recipe.optimizer.lr
    )
    assert json.loads((folder / "recipe.json").read_text())["optimizer"]["lr"] == 7e-3
    assert "<td>from step 3</td><td>optimizer.lr</td>" in write_report(folder).read_text()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda r: replace(r, seed=r.seed + 1), "seed"),
        (lambda r: replace(r, group_size=2 * r.group_size), "group_size"),
        (lambda r: replace(r, num_prompts=2 * r.num_prompts), "num_prompts"),
        (lambda r: replace(r, network=Network(train=LoRA(rank=4))), "network"),
        (lambda r: replace(r, optimizer=replace(r.optimizer, ema_decay=0.9)), "optimizer.ema_decay"),
    ],
    ids=["seed", "group_size", "num_prompts", "network", "ema"],
)
def test_what_a_resume_cannot_change_is_refused_by_name(job, tmp_path, change, field) -> None:
    folder = tmp_path / "run"
    run(replace(job(), num_steps=1), folder)
    before = (folder / "recipe.json").read_bytes()
    assert field in failing(change(job()), folder, resume=True)
    assert (folder / "recipe.json").read_bytes() == before
    assert finished_checkpoints(folder)[-1].name == "step_000001"


def test_other_prompts_are_refused(job, tmp_path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("low\nhigh\n")
    recipe = job()
    recipe = replace(recipe, data=replace(recipe.data, path=str(file)), num_steps=1)
    run(recipe, tmp_path / "run")
    file.write_text("high\nlow\n")
    longer = replace(recipe, num_steps=2)
    assert "data: the prompts" in failing(longer, tmp_path / "run", resume=True)
    file.write_text("low\nhigh\n")
    run(longer, tmp_path / "run", resume=True)


def test_changed_fields() -> None:
    recipe = Recipe(name="a", optimizer=replace(Recipe(name="a").optimizer, lr=1.0))
    other = replace(recipe, name="b", optimizer=replace(recipe.optimizer, lr=2.0, betas=(0.5, 0.9)))
    assert changed_fields(to_dict(recipe), to_dict(other)) == {
        "name": ("a", "b"),
        "optimizer.lr": (1.0, 2.0),
        "optimizer.betas": ([0.9, 0.999], [0.5, 0.9]),
    }
    assert newest_whole(Path("nowhere")) == (None, [])
    assert EMA().moves
