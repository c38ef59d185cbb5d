"""A run file may name anyone's part, of every kind: it is read, checked, trained, saved and read again like ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flowgrpo_fast.cli import main
from flowgrpo_fast.recipe_io import load_recipe
from tests.training import own_parts

HERE = "tests.training.own_parts"
JOB = {
    "is": "Recipe",
    "name": "mine",
    "sigmas": {"is": "Sigmas", "num_inference_steps": 6, "shift": 1.0},
    "group_size": 4,
    "num_prompts": 2,
    "num_steps": 2,
    "objective": {"is": "PolicyGradient", "trust": {"is": "Clip", "range": 0.05}},
    "task": {
        "is": "Task",
        "model": f"{HERE}:load_wide",
        "rewards": [{"is": "RewardTerm", "function": f"{HERE}:bright"}],
        "judge": "",
        "num_eval_samples": 4,
    },
}
PARTS = {
    "MyObjective": {"objective": {"is": f"{HERE}:MyObjective", "scale": 2.0}},
    "MyCreditStep": {"credit": [{"is": "Normalise"}, {"is": f"{HERE}:MyCreditStep", "power": 0.7}]},
    "MyDynamics": {"dynamics": {"is": f"{HERE}:MyDynamics", "noise_level": 0.9}},
    "MyWindow": {"topology": {"is": "SharedStart", "at": {"is": f"{HERE}:MyWindow", "second": 2}}},
    "MyTopology": {"topology": {"is": f"{HERE}:MyTopology"}},
    "MyReward": {"task": {**JOB["task"], "rewards": [{"is": f"{HERE}:MyReward", "goal": 0.6}]}},
    "MySource": {"data": {"is": f"{HERE}:MySource", "dataset": "theirs"}},
}
PARTS["all of them"] = {
    **{name: value for part in PARTS.values() for name, value in part.items()},
    "topology": {"is": f"{HERE}:MyTopology", "at": {"is": f"{HERE}:MyWindow", "second": 2}},
}


def trained(folder: Path, *words: str) -> list[dict[str, float]]:
    main(["train", *words, "--out", str(folder), "--device", "cpu"])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["step"] > 0]


@pytest.mark.parametrize("name", PARTS)
def test_it_trains_from_a_run_file(name, tmp_path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({**JOB, **PARTS[name]}))
    lines = trained(tmp_path / "run", "--yes", "--from", str(file))
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert line["grad_norm"] > 0
        assert line["first_ratio_error"] == 0.0
    written = (tmp_path / "run" / "recipe.json").read_text()
    named = [part for part in dir(own_parts) if part.startswith("My") and f"{HERE}:{part}" in written]
    assert (named == [name]) or (name == "all of them" and len(named) == 7) or name == "MyTopology"
    assert load_recipe(tmp_path / "run") == load_recipe(file)
    again = trained(tmp_path / "again", "--from", str(tmp_path / "run"))
    assert [line["reward"] for line in again] == [line["reward"] for line in lines]


def test_it_trains_from_the_command_line(tmp_path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(JOB))
    words = [
        f"objective={HERE}:MyObjective",
        "objective.scale=3.0",
        f"topology.at={HERE}:MyWindow",
        "topology.at.first=1",
        f"dynamics={HERE}:MyDynamics",
        f"data={HERE}:MySource",
        f'credit=[{{"is": "Normalise"}}, {{"is": "{HERE}:MyCreditStep"}}]',
        "credit.1.power=0.9",
        f'task.rewards=[{{"is": "{HERE}:MyReward"}}]',
        "task.rewards.0.goal=0.7",
    ]
    lines = trained(tmp_path / "run", "--yes", "--from", str(file), *words)
    assert [line["window_start"] for line in lines] == [1.0, 1.0]
    assert all("reward/mine" in line for line in lines)
    recipe = load_recipe(tmp_path / "run")
    assert recipe.objective == own_parts.MyObjective(scale=3.0)
    assert recipe.credit[1] == own_parts.MyCreditStep(power=0.9)
    assert recipe.task.rewards == (own_parts.MyReward(goal=0.7),)
    assert recipe.topology.at == own_parts.MyWindow(first=1)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (f"objective={HERE}:MyCreditStep", "objective is a MyCreditStep, which has"),
        (f"dynamics={HERE}:MyWindow", "dynamics is a MyWindow, which has no method 'row'"),
        (f"objective={HERE}:NoSuchPart", "has no 'NoSuchPart'"),
        (f"objective={HERE}:bright", "is a function; a part must be a frozen dataclass"),
        ("objective=no_such_module:Part", "there is no module 'no_such_module'"),
    ],
)
def test_what_is_no_such_part_is_one_line(word, message, tmp_path, capsys) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(JOB))
    with pytest.raises(SystemExit) as caught:
        main(["train", "--yes", "--from", str(file), word, "--out", str(tmp_path / "run")])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()
