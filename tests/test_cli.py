"""The commands as a user types them, in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from flowgrpo_fast import cli
from flowgrpo_fast.cli import fitted_recipe, main, pick_device
from flowgrpo_fast.recipe_io import load_recipe, show
from flowgrpo_fast.recipes import RECIPES, digits
from flowgrpo_fast.recipes.trajectory import mix_grpo

SMALL = ["num_steps=3", "group_size=4", "task.num_eval_samples=20", "task.eval_every=2"]
HANGS = 1800  # seconds: no program takes as long, however busy the machine
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "flowgrpo_fast.cli", *arguments]


def failing(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    main(["train", *SMALL, "--out", str(folder), "--device", "cpu"])
    return folder


def test_a_run_folder_is_complete(finished: Path) -> None:
    names = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    checkpoint = {f"checkpoints/step_000003/{n}" for n in ("model.safetensors", "optimizer.pt", "state.json")}
    samples = {f"samples/step_00000{step}.png" for step in (0, 2, 3)}
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    samples |= {
        f"samples/step_00000{step}/{place:03d}_a_handwritten_{words[place % 10]}.png"
        for step in (0, 2, 3)
        for place in range(16)
    }
    files = {"recipe.json", "metrics.jsonl", "summary.json", "report.html", ".lock"}
    assert names == files | checkpoint | samples
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert [("eval/judge" in line) for line in lines] == [True, False, True, True]
    assert lines[1]["ratio_self_test"] == 0.0
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["recipe"] == "mix_grpo"
    assert summary["judge_before"] == lines[0]["eval/judge"]
    assert summary["judge_after"] == lines[-1]["eval/judge"]
    assert summary["cost"]["seconds"] > 0


def test_the_report_is_one_self_contained_file(finished: Path) -> None:
    text = (finished / "report.html").read_text()
    for part in ("Before and after", "Reward and judge", "Importance ratio", "Time and cost", "recipe.json"):
        assert part in text
    assert text.count("data:image/png;base64,") == 3  # a look each
    assert text.count("<svg") == 4
    assert "max |ratio &minus; 1| = 0" in text
    for outside in ("src='http", 'src="http', "<link", "<script", "@import"):
        assert outside not in text


def test_from_an_earlier_run_gives_the_same_numbers(finished: Path, tmp_path: Path) -> None:
    main(["train", "--from", str(finished), "--out", str(tmp_path / "again"), "--device", "cpu"])
    assert (tmp_path / "again/recipe.json").read_text() == (finished / "recipe.json").read_text()
    first, again = (
        [
            {k: v for k, v in json.loads(line).items() if not k.startswith(("seconds", "time"))}
            for line in (folder / "metrics.jsonl").read_text().splitlines()
        ]
        for folder in (finished, tmp_path / "again")
    )
    assert first == again


def test_from_with_an_override(finished: Path, tmp_path: Path) -> None:
    main(["train", "--from", str(finished), "num_steps=1", "--out", str(tmp_path / "short"), "task.judge="])
    assert json.loads((tmp_path / "short/recipe.json").read_text())["num_steps"] == 1
    assert json.loads((tmp_path / "short/recipe.json").read_text())["group_size"] == 4
    assert json.loads((tmp_path / "short/recipe.json").read_text())["task"]["judge"] == ""


def test_ctrl_c_saves_everything_and_the_run_resumes(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "run"
    small = [*SMALL[1:], "num_steps=100000"]  # more than are done before the signal on any machine
    process = subprocess.Popen(
        command("train", *small, "--out", str(folder)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ENVIRONMENT,
    )
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + HANGS
    while time.monotonic() < deadline and (not metrics.exists() or metrics.read_text().count("\n") < 4):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=HANGS)
    assert process.returncode == 0, output
    assert "continue with" in output
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    last = lines[-1]["step"]
    assert 3 <= last < 100000
    assert "eval/judge" in lines[-1]
    assert (folder / "checkpoints" / f"step_{last:06d}" / "state.json").exists()
    assert (folder / "report.html").exists()
    main(["train", f"num_steps={last}", "--resume", str(folder), "--device", "cpu"])
    assert f"nothing to train: step {last} of {last} is done; to go on, raise" in capsys.readouterr().out
    main(["train", f"num_steps={last + 2}", "--resume", str(folder), "--device", "cpu"])
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(last + 3))


def test_sample_and_report(finished: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    def refused(*arguments: object) -> None:
        raise AssertionError("a reward was called")

    monkeypatch.setattr("flowgrpo_fast.rewards.rules.ink_contrast", refused)
    monkeypatch.setattr("flowgrpo_fast.rewards.judges.DigitJudge.correct", refused)
    main(["sample", str(finished), "--out", str(tmp_path / "s.png"), "--num-samples", "20"])
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "s.png")]
    assert Image.open(tmp_path / "s.png").size[0] > 100
    kept = [
        (finished / "samples/step_000003" / f"{p:03d}_a_handwritten_{w}.png")
        for p, w in ((0, "zero"), (11, "one"))
    ]
    main(
        [
            "sample",
            str(finished),
            "--out",
            str(tmp_path / "s.png"),
            "--num-samples",
            "20",
            "--out-dir",
            str(tmp_path),
        ]
    )
    for path in kept:  # the evaluation's own noise and the newest weights: the same pictures
        assert Image.open(tmp_path / path.name).tobytes() == Image.open(path).tobytes()
    (finished / "report.html").unlink()
    main(["report", str(finished), "--figures", str(tmp_path / "figures")])
    assert (finished / "report.html").exists()
    for name in ("before_after.png", "curves.png"):
        assert min(Image.open(tmp_path / "figures" / name).size) > 200


def test_sample_takes_prompts_seeds_and_checkpoints(finished: Path, tmp_path: Path, capsys) -> None:
    def pixels(*words: str) -> dict[str, bytes]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        main(["sample", str(finished), *words, "--out", str(tmp_path / "s.png"), "--out-dir", str(folder)])
        return {path.name[4:]: Image.open(path).tobytes() for path in sorted(folder.iterdir())[:2]}

    file = tmp_path / "prompts.txt"
    file.write_text("a handwritten two\na handwritten six\n")
    one = pixels("--prompt", "a handwritten two", "--seed", "1", "--num-samples", "1")
    assert one == pixels(
        "--prompt", "a handwritten two", "--seed", "1", "--checkpoint", "3", "--num-samples", "1"
    )
    assert one != pixels("--prompt", "a handwritten two", "--seed", "2", "--num-samples", "1")
    two = pixels("--prompts", str(file), "--seed", "1", "--checkpoint", "step_000003", "--num-samples", "2")
    assert list(two) == ["a_handwritten_two.png", "a_handwritten_six.png"]
    assert two["a_handwritten_two.png"] == one["a_handwritten_two.png"]  # noise goes by the sample's place
    for words, message in (
        (["--checkpoint", "2"], "has no checkpoint '2'; it has step_000003"),
        (["--prompt", "a", "--prompts", "b"], "exclude each other"),
        (["--seed", "-1"], "must not be negative"),
        (["--prompts", str(tmp_path / "none.txt")], "cannot read prompts"),
    ):
        assert message in failing(capsys, "sample", str(finished), *words)
    assert "name the run folder" in failing(capsys, "sample", "--checkpoint", "2")


def test_recipes_and_env(capsys: pytest.CaptureFixture[str]) -> None:
    main(["recipes"])
    listed = capsys.readouterr().out
    for text in ("flow_grpo", "mix_grpo_flash", "2507.21802", "sliding window"):
        assert text in listed
    lines = [line.strip() for line in listed.splitlines()]
    assert all(lines.count(entry.family) == 1 for entry in RECIPES.values())
    main(["recipes", "list"])
    assert capsys.readouterr().out == listed
    main(["env"])
    shown = capsys.readouterr().out
    for text in ("torch", "diffusers", "build isa", "gpus", "cpu "):
        assert text in shown


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_shown_with_all_its_parts(name, capsys: pytest.CaptureFixture[str]) -> None:
    """One line a field, each a path and a value that an override takes."""
    main(["recipes", "show", name])
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert lines == [[path, value] for path, value in show(RECIPES[name].make())]
    shown = dict(lines)
    assert shown["name"] == f'"{name}"'
    window = "topology.inner.at" if shown["topology"] == "Cuts" else "topology.at"
    assert {"objective", window, "experience", "data", "machine.precision"} <= set(shown)


def test_overrides_that_need_each_other_come_in_any_order(tmp_path: Path) -> None:
    """A cut's sizes and the group, a loss and its fields: the recipe is checked once, when all is said."""
    words = [
        "topology=Cuts",
        "topology.steps=[2]",
        "topology.sizes=[4]",
        "group_size=2",
        "num_prompts=2",
        "num_steps=1",
        "task.judge=",
        "task.num_eval_samples=4",
    ]
    written = []
    for folder, order in (
        ("a", words),
        ("b", [*reversed(words[1:]), words[0]]),
        ("c", words[3:] + words[:3]),
    ):
        if folder == "b":  # a part is chosen before its fields are
            order = ["topology=Cuts", *order[:-1]]
        main(["train", *order, "--out", str(tmp_path / folder), "--device", "cpu"])
        written.append(load_recipe(tmp_path / folder))
    assert written[0] == written[1] == written[2]
    assert written[0].topology.sizes == (4,)


@pytest.mark.parametrize(
    ("word", "replaced"),
    [
        ("window.size=2", "Recipe.window was replaced by topology.at"),
        ("share_start_noise=true", "Recipe.share_start_noise was replaced by topology"),
        ("loss.clip_range=0.1", "Recipe.loss was replaced by objective"),
        ("prune=Prune", "Recipe.prune was replaced by topology"),
        ("explore=Scouts", "Recipe.explore was replaced by experience"),
        ("precision=bf16", "Recipe.precision was replaced by machine.precision"),
        ("rows_per_forward=2", "Recipe.rows_per_forward was replaced by machine.rows_per_forward"),
        ("graphs=true", "Recipe.graphs was replaced by machine.graphs"),
        ("task.prompts=a.txt", "Task.prompts was replaced by data.path"),
        ("credit=Credit", "credit: Credit was replaced by a list of credit steps"),
        ("objective=ClippedRatio", "objective: ClippedRatio was replaced by PolicyGradient"),
    ],
)
def test_a_field_of_the_first_edition_says_what_replaced_it(word, replaced, capsys, tmp_path) -> None:
    out = ["--out", str(tmp_path / "run")]
    assert replaced in failing(capsys, "train", word, *out)
    assert not (tmp_path / "run").exists()


def test_a_run_file_of_the_first_edition_is_refused_in_one_line(capsys, tmp_path: Path) -> None:
    earlier = {
        "is": "Recipe",
        "name": "mix_grpo",
        "window": {"is": "SlidingWindow"},
        "share_start_noise": True,
    }
    (tmp_path / "recipe.json").write_text(json.dumps(earlier))
    message = failing(capsys, "train", "--from", str(tmp_path))
    assert "Recipe.window was replaced by topology.at in the second edition" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "mix_gpro"], "unknown recipe 'mix_gpro'; did you mean 'mix_grpo'?"),
        (["train", "mix_grpo", "group_sise=4"], "did you mean 'group_size'?"),
        (["train", "mix_grpo", "--group_size", "12"], "--group_size is not an option; write group_size=12"),
        (["plan", "sd3.5-medium", "--lr=1e-4"], "--lr is not an option; write optimizer.lr=1e-4"),
        (["train", "lr=1"], "Recipe has no field 'lr'; did you mean 'optimizer.lr'?"),
        (["train", "flow_grpo", "task.model=sd35"], "'flowgrpo_fast.models.sd35'; did you mean 'sd3'?"),
        (["train", "task.rewards=my_rewards:orc"], "module my_rewards has no 'orc'; did you mean 'ocr'?"),
        (["train", "task.rewards=my_reward:ocr"], "no module 'my_reward'; did you mean 'my_rewards'?"),
        (["train", "optimizr.lr=1"], "Recipe has no field 'optimizr'; did you mean 'optimizer.lr'?"),
        (["train", "name=../outside"], "Recipe.name is '../outside'; it names a run's folder"),
        (["train", "group_size=1"], "needs at least 2 samples per prompt"),
        (["train", "sigmas.num_inference_steps=1"], "must be at least 2"),
        (["train", "topology.at.size=20"], "outside the schedule"),
        (["train", "--checkpoint-every", "0"], "checkpoint_every is 0; it must be at least 1"),
        (["plan", "sd3.5-mediun"], "no folder with a model_index.json; did you mean 'sd3.5-medium'?"),
        (["train", "--from", "nowhere"], "no recipe at 'nowhere'"),
        (["train", "--resume", "nowhere"], "no recipe at"),
        (["train", "--resume", "a", "--from", "b"], "exclude each other"),
        (["train", "dance_grpo", "--from", "b"], "recipe 'dance_grpo': 'b' brings its own"),
        (["train", "--device", "cuda:7"], "device 'cuda:7' is not here"),
        (["train", "--device", "gpu"], "device 'gpu' is not one"),
        (["train", "task.model=digit"], "there is no module 'flowgrpo_fast.models.digit'"),
        (["train", "data.path=none.txt"], "cannot read prompts from 'none.txt'"),
        (["recipes", "show", "flow_gpo"], "unknown recipe 'flow_gpo'; did you mean 'flow_grpo'?"),
        (["plan", "sd3.5-medium", "--json", "flow_gpo"], "unknown recipe 'flow_gpo'"),
        (["train", "task.judge=math:pi"], "judge 'math:pi' is a float; name a class with a method correct"),
        (
            ["train", 'task.rewards=[{"is": "RewardTerm", "function": "math:pi"}]'],
            "reward 'math:pi' is a float, which cannot be called",
        ),
        (["sample", "nowhere"], "no recipe at"),
        (["report", "nowhere"], "holds no run"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))  # which the current folder is added to
    (tmp_path / "my_rewards.py").write_text("def ocr(images, prompts): ...")
    monkeypatch.chdir(tmp_path)
    assert message in failing(capsys, *arguments)
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_a_run_folder_is_not_overwritten(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / "metrics.jsonl").read_text()
    assert "already holds a run" in failing(capsys, "train", *SMALL, "--out", str(finished))
    assert (finished / "metrics.jsonl").read_text() == before


def test_a_full_disk_ends_the_run_with_one_line(finished: Path, tmp_path, monkeypatch, capsys) -> None:
    import errno

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("flowgrpo_fast.training.checkpoint.save_model", full)
    message = failing(capsys, "train", *SMALL, "--out", str(tmp_path / "run"), "--device", "cpu")
    assert "No space left on device" in message
    assert (tmp_path / "run/report.html").exists()  # what was measured is still told


@pytest.mark.slow
def test_bench_prints_the_table(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["bench", "ops", "--only", "top_bottom toy"])
    out = capfd.readouterr().out
    assert caught.value.code == 0, out
    header, *rows = out.splitlines()[1:]
    assert header.split()[:4] == ["operation", "size", "dtype", "ours"]
    assert [row.split()[:2] for row in rows] == [["top_bottom", "toy"]]


def test_bench_needs_the_source_checkout(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "flowgrpo_fast" / "cli.py"))
    error = failing(capsys, "bench", "ops")
    suite = str(tmp_path / "benchmarks" / "measure.py")
    assert error == f"error: no benchmark suite at {suite!r}; run this in a source checkout\n"


def test_only_the_default_job_is_fitted() -> None:
    assert fitted_recipe("mix_grpo", ()) == digits(mix_grpo())
    assert fitted_recipe("mix_grpo", ("task.model=a.b:load", "group_size=2")) == mix_grpo()


def test_pick_device() -> None:
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type in ("cpu", "cuda")
