"""Recipes from elsewhere: what they name is asked about before it runs, and what they hold cannot do harm."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from flowgrpo_fast import cli
from flowgrpo_fast.confirm import confirm_code, remember
from flowgrpo_fast.json_files import check_links, write_whole
from flowgrpo_fast.launch import Run
from flowgrpo_fast.recipe import Optimizer, RewardTerm
from flowgrpo_fast.recipe_io import load_recipe, override, save_recipe, to_dict
from flowgrpo_fast.recipes.trajectory import mix_grpo

EVIL = {"is": "RewardTerm", "function": "evil_module:reward"}


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe that names code, in the folder one stands in; importing it leaves a trace."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.chdir(tmp_path)
    values = to_dict(mix_grpo())
    values["task"] |= {"rewards": [EVIL], "judge": "evil_module:Judge"}
    (tmp_path / "recipe.json").write_text(json.dumps(values))
    (tmp_path / "evil_module.py").write_text("open('trace', 'w').close()")
    return tmp_path / "recipe.json"


@pytest.mark.parametrize("command", ["train --from", "train --resume", "sample"])
def test_nobody_to_ask_is_a_refusal_that_lists_the_code(elsewhere, command, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([*command.split(), str(elsewhere)])
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert "names code that would run: 'evil_module:reward', 'evil_module:Judge'" in message
    assert "add --yes" in message
    assert message.count("\n") == 1
    assert not Path("trace").exists()


def test_yes_is_remembered_for_this_file_in_this_folder(elsewhere, monkeypatch) -> None:
    confirm_code(elsewhere, yes=True)
    confirm_code(elsewhere, yes=False)
    changed = json.loads(elsewhere.read_text())
    changed["task"]["rewards"].append({**EVIL, "function": "other:reward"})
    other = elsewhere.with_name("other.json")
    other.write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="'other:reward'"):
        confirm_code(other, yes=False)
    (elsewhere.parent / "inner").mkdir()
    monkeypatch.chdir(elsewhere.parent / "inner")  # whose modules of these names may be others
    with pytest.raises(ValueError, match="add --yes"):
        confirm_code(elsewhere, yes=False)


@pytest.mark.parametrize(("answer", "agreed"), [("y", True), ("Yes\n", True), ("", False), ("n", False)])
def test_who_can_be_asked_is_asked_once(elsewhere, monkeypatch, answer, agreed) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    asked: list[str] = []

    def ask(question: str) -> str:
        asked.append(question)
        return answer

    for _ in range(2):
        if agreed:
            confirm_code(elsewhere, yes=False, ask=ask)
        else:
            with pytest.raises(ValueError, match="you do not want to run"):
                confirm_code(elsewhere, yes=False, ask=ask)
    assert len(asked) == (1 if agreed else 2)
    assert "'evil_module:reward', 'evil_module:Judge'" in asked[0]


def test_ones_own_run_and_a_recipe_without_code_are_not_asked_about(elsewhere, tmp_path: Path) -> None:
    save_recipe(mix_grpo(), tmp_path / "plain.json")
    confirm_code(tmp_path / "plain.json", yes=False)
    assert not (tmp_path / "state").exists()
    remember(json.loads(elsewhere.read_text()))
    confirm_code(elsewhere, yes=False)


def test_a_home_that_cannot_be_written_asks_again(elsewhere, monkeypatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/dev/null")
    confirm_code(elsewhere, yes=True)
    with pytest.raises(ValueError, match="add --yes"):
        confirm_code(elsewhere, yes=False)


def test_a_terminal_is_shown_no_control_characters(elsewhere) -> None:
    elsewhere.write_text(json.dumps({"model": "a:\u001b[2J"}))
    with pytest.raises(ValueError, match="would run") as caught:
        confirm_code(elsewhere, yes=False)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("optimizer.lr=1e999", "optimizer.lr is Infinity; it must be a finite number"),
        ("optimizer.lr=1e4", "Optimizer.lr is 10000.0; it must be at most 10"),
        (
            "optimizer.weight_decay=-Infinity",
            "optimizer.weight_decay is -Infinity; it must be a finite number",
        ),
        ("task.rewards.0.weight=1e308", "task.rewards.0.weight is 1e+308; it must be between"),
        ("task.rewards.0.weight=-1e20", "task.rewards.0.weight is -1e+20; it must be between"),
        ("guidance_scale=NaN", "guidance_scale is NaN; it must be a finite number"),
        ("num_steps=1000000000", "Recipe.num_steps is 1000000000; it must be at most 1e+07"),
        ("group_size=100000000", "Recipe.group_size is 100000000; it must be at most 1e+06"),
        (
            "task.evaluation.num_inference_steps=1000000",
            "Evaluation.num_inference_steps is 1000000; it must be",
        ),
    ],
)
def test_absurd_numbers_are_refused(assignment: str, message: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        override(mix_grpo(), [assignment])
    assert message in str(caught.value)


def test_numbers_made_in_python_are_checked_as_well() -> None:
    for make in (
        lambda: Optimizer(lr=float("inf")),
        lambda: Optimizer(weight_decay=float("nan")),
        lambda: RewardTerm(function="a:b", weight=float("inf")),
        lambda: replace(mix_grpo(), guidance_scale=float("nan")),
    ):
        with pytest.raises(ValueError, match=r"finite number|at least 0"):
            make()


def test_links_are_not_written_through(tmp_path: Path) -> None:
    precious, link = tmp_path / "precious", tmp_path / "run" / "summary.json"
    precious.write_text("precious")
    link.parent.mkdir()
    link.symlink_to(precious)
    with pytest.raises(ValueError, match=r"summary.json' is a link"):
        check_links(link.parent)
    write_whole(link, "new")
    assert (precious.read_text(), link.read_text(), link.is_symlink()) == ("precious", "new", False)
    # What is written aside first has a name that can be guessed.
    other = tmp_path / "run" / "recipe.json"
    aside = other.with_name(f".recipe.json.{__import__('os').getpid()}")
    aside.symlink_to(precious)
    write_whole(other, "recipe")
    assert (precious.read_text(), other.read_text()) == ("precious", "recipe")
    check_links(link.parent)
    check_links(tmp_path / "nowhere")


def test_a_run_folder_with_a_link_is_refused(tmp_path: Path, capsys) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "samples").symlink_to(tmp_path / "precious")
    with pytest.raises(SystemExit):
        cli.main(["train", "num_steps=1", "group_size=2", "--device", "cpu", "--out", str(tmp_path / "run")])
    assert "samples' is a link" in capsys.readouterr().err
    assert not list((tmp_path / "precious").iterdir())


def test_markup_in_names_is_text(toy_recipe, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "toy[red]", sys.modules["toy_job"])
    recipe = toy_recipe(num_steps=1)
    recipe = replace(recipe, name="a[red]b[/nope]", task=replace(recipe.task, model="toy[red]:load"))
    console = Console(file=io.StringIO(), width=200)
    Run(recipe=recipe, folder=tmp_path / "run[bold]", device=torch.device("cpu"), console=console).start()
    text = console.file.getvalue()
    assert "a[red]b[/nope] on toy[red]:load" in text
    assert "run[bold]" in text


@pytest.mark.parametrize(
    ("words", "terms"),
    [
        (["task.rewards=mine:ocr"], [("mine:ocr", 1.0)]),
        (['task.rewards=["mine:ocr", "a.b:c"]'], [("mine:ocr", 1.0), ("a.b:c", 1.0)]),
        (["task.rewards=mine:ocr", "task.rewards.0.weight=0.5"], [("mine:ocr", 0.5)]),
        (
            ['task.rewards=["mine:ocr", {"is": "RewardTerm", "function": "a:b", "weight": 2}]'],
            [("mine:ocr", 1.0), ("a:b", 2.0)],
        ),
    ],
)
def test_a_function_stands_for_its_reward(words, terms, tmp_path: Path) -> None:
    recipe = override(mix_grpo(), words)
    assert [(term.function, term.weight) for term in recipe.task.rewards] == terms
    save_recipe(recipe, tmp_path / "recipe.json")
    assert load_recipe(tmp_path) == recipe


def test_a_run_file_may_name_a_reward_by_its_function(tmp_path: Path) -> None:
    values = to_dict(mix_grpo())
    values["task"]["rewards"] = ["mine:ocr"]
    (tmp_path / "recipe.json").write_text(json.dumps(values))
    assert load_recipe(tmp_path).task.rewards == (RewardTerm(function="mine:ocr"),)
