"""The command line: train | plan | sample | bench | env | recipes | report | pretrain-digits."""

from __future__ import annotations

import io
import json as json_text
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Collection
from contextlib import closing
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from flowgrpo_fast.confirm import confirm_code, remember
from flowgrpo_fast.data.prompts import Prompts
from flowgrpo_fast.launch import Run, new_folder
from flowgrpo_fast.monitor.cost import cpu_name
from flowgrpo_fast.monitor.metrics import TrackerName
from flowgrpo_fast.monitor.progress import run_console
from flowgrpo_fast.monitor.report import write_figures, write_report
from flowgrpo_fast.names import nearest
from flowgrpo_fast.ops import build_info
from flowgrpo_fast.recipe import Recipe
from flowgrpo_fast.recipe_io import FILES, load_recipe, override, to_dict
from flowgrpo_fast.recipe_io import show as show_recipe
from flowgrpo_fast.recipes import RECIPES, digits

_VERSIONS = ("torch", "diffusers", "transformers", "peft", "safetensors", "numpy", "scikit-learn", "pybind11")


def train(
    recipe: tyro.conf.Positional[str] = "",
    overrides: tyro.conf.Positional[tuple[str, ...]] = (),
    /,
    *,
    from_: Annotated[str, tyro.conf.arg(name="from")] = "",
    resume: str = "",
    out: str = "",
    device: str = "auto",
    tracker: TrackerName = "none",
    checkpoint_every: int = 50,
    yes: bool = False,
) -> None:
    """Trains a model with a recipe; without arguments, MixGRPO on handwritten digits.

    Args:
        recipe: a recipe's name, mix_grpo if left out; `flowgrpo-fast recipes` lists them.
        overrides: field=value, e.g. group_size=12 topology.at.size=2 dynamics=CPS optimizer.lr=1e-4.
        from_: start from a run file, or from the recipe of an earlier run folder, instead of a named recipe.
        resume: go on with an interrupted run, from its last checkpoint.
        out: the run folder; default runs/<recipe>-<date>-<time>.
        device: auto, cpu, cuda or cuda:N.
        tracker: also log to this tracker.
        checkpoint_every: steps between two checkpoints.
        yes: run the code that a recipe from elsewhere names, without a question.
    """
    if resume and from_:
        raise ValueError(f"--from {from_!r} and --resume {resume!r} exclude each other; give one")
    if "=" in recipe:  # the name was left out
        recipe, overrides = "", (recipe, *overrides)
    if recipe and (resume or from_):
        raise ValueError(f"recipe {recipe!r}: {resume or from_!r} brings its own; leave the name out")
    earlier = resume or from_
    base = confirmed_recipe(earlier, yes) if earlier else fitted_recipe(recipe or "mix_grpo", overrides)
    resolved = override(base, overrides)
    remember(to_dict(resolved))
    chosen = pick_device(device)  # before a folder is made, which a wrong one would leave empty
    folder = Path(resume or out) if resume or out else new_folder(resolved.name)
    report = Run(
        recipe=resolved,
        folder=folder,
        device=chosen,
        resume=bool(resume),
        checkpoint_every=checkpoint_every,
        tracker=tracker,
    ).start()
    run_console().print(f"report: {report}", highlight=False, soft_wrap=True, markup=False)


def confirmed_recipe(path: str, yes: bool) -> Recipe:
    """The recipe of a file or run folder, once its user agrees to the code that it names."""
    confirm_code(Path(path), yes)
    return load_recipe(Path(path))


def fitted_recipe(name: str, overrides: tuple[str, ...]) -> Recipe:
    """The paper's recipe; for the default job, fitted to it."""
    paper = named_recipe(name)
    task = override(paper, [text for text in overrides if text.startswith("task.model=")]).task
    return digits(paper) if task.model == "digits" else paper


def named_recipe(name: str) -> Recipe:
    """The paper's recipe of that name.

    Raises:
        ValueError: no such recipe; names the nearest.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; {nearest(name, RECIPES)}")
    return RECIPES[name].make()


def pick_device(name: str) -> torch.device:
    """The device to run on; `auto` prefers CUDA.

    Raises:
        ValueError: not a device, or not one of this machine or build.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device {name!r} is not one; give auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} is not supported; give auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} is not here; this machine has {torch.cuda.device_count()} GPU(s)")
    if device.type == "cuda" and not build_info()["cuda_archs"]:
        raise ValueError("the extension was built without CUDA; rebuild it where nvcc is found")
    return device


def plan(
    model: tyro.conf.Positional[str],
    recipe: tyro.conf.Positional[str] = "flow_grpo",
    overrides: tyro.conf.Positional[tuple[str, ...]] = (),
    /,
    *,
    gpu: str = "h100",
    gpus: int = 1,
    json: bool = False,
) -> None:
    """Plans one step without a GPU: FLOPs, floor in GPU-seconds, memory, and what each lever would save.

    Args:
        model: a published name, e.g. sd3.5-medium, its name on the hub, or a diffusers pipeline's folder.
        recipe: a recipe's name; it is planned in bf16 unless overridden.
        overrides: field=value, e.g. network.height=720 network.train=FullFineTuning.
        gpu: h100, h200, b200, a100 or 4090, which the tables of work, memory and levers are for.
        gpus: how many of them share a step's samples.
        json: print plain values instead of tables.
    """
    from flowgrpo_fast.planner.devices import named_gpu
    from flowgrpo_fast.planner.show import make_plan, show, to_json

    if "=" in recipe:  # the name was left out
        recipe, overrides = "flow_grpo", (recipe, *overrides)
    paper = named_recipe(recipe)
    resolved = override(replace(paper, machine=replace(paper.machine, precision="bf16")), overrides)
    result = make_plan(model, resolved, named_gpu(gpu), gpus)
    if json:
        print(json_text.dumps(to_json(result), indent=2))
    else:
        show(result, Console())


def recipes(
    action: tyro.conf.Positional[Literal["list", "show"]] = "list",
    name: tyro.conf.Positional[str] = "",
    /,
) -> None:
    """Lists the recipes by family, or shows one with all its parts.

    Args:
        action: list, or show.
        name: the recipe that is shown.
    """
    if action == "show":
        for path, value in show_recipe(named_recipe(name)):
            print(f"{path:44} {value}")
        return
    for family in dict.fromkeys(entry.family for entry in RECIPES.values()):
        table = Table(box=None, pad_edge=False, title=family, title_justify="left", title_style="bold")
        for column in ("recipe", "paper", "idea"):
            table.add_column(column, style="bold" if column == "recipe" else "")
        for recipe_name, entry in RECIPES.items():
            if entry.family == family:
                idea = (entry.make.__doc__ or "").splitlines()[0]
                table.add_row(recipe_name, entry.paper, idea)
        Console().print(table, highlight=False)


def env() -> None:
    """Prints versions, what was built, instruction sets and devices."""
    rows = {"flowgrpo-fast": version("flowgrpo-fast"), "python": platform.python_version()}
    for name in _VERSIONS:
        try:
            rows[name] = version(name)
        except PackageNotFoundError:
            rows[name] = "not installed"
    rows["platform"] = platform.platform()
    rows["cpu"] = f"{cpu_name()}, {torch.get_num_threads()} threads"
    rows |= {f"build {key}": str(value) for key, value in build_info().items()}
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    rows["gpus"] = ", ".join(gpus) or "none"
    for key, value in rows.items():
        print(f"{key:24} {value}")


def report(run: tyro.conf.Positional[str], /, *, figures: str = "") -> None:
    """Writes a run's report again; with --figures DIR also the pictures the docs show.

    Args:
        run: a run folder.
        figures: where to put before_after.png and curves.png.
    """
    print(write_report(Path(run)))
    for path in write_figures(Path(run), Path(figures)) if figures else ():
        print(path)


def sample(
    run: tyro.conf.Positional[str] = "",
    /,
    *,
    prompt: str = "",
    prompts: str = "",
    num_samples: int = 0,
    seed: int | None = None,
    checkpoint: str = "",
    out: str = "samples.png",
    out_dir: str = "",
    device: str = "auto",
    yes: bool = False,
) -> None:
    """Samples with a run's final weights, or with the pretrained start, and saves a grid; no reward is called.

    Args:
        run: a run folder; empty samples the pretrained digits.
        prompt: one prompt, in place of the run's.
        prompts: a file of prompts, in place of the run's.
        num_samples: how many in all; left out, 120 of the run's prompts, or 4 of each that is given here.
        seed: of the start noise; left out, that of the run's evaluations.
        checkpoint: one of the run's, by its step or its folder; left out, the newest.
        out: the PNG to write: a grid of all samples.
        out_dir: where each sample goes as a file of its own, in full size.
        device: auto, cpu, cuda or cuda:N.
        yes: run the code that a recipe from elsewhere names, without a question.
    """
    from flowgrpo_fast.monitor.pictures import sample_grid, save_picture, save_samples
    from flowgrpo_fast.training.checkpoint import load_checkpoint
    from flowgrpo_fast.training.engine import build_engine
    from flowgrpo_fast.training.evaluate import sampled

    if prompt and prompts:
        raise ValueError(f"--prompt {prompt!r} and --prompts {prompts!r} exclude each other; give one")
    if checkpoint and not run:
        raise ValueError(f"--checkpoint {checkpoint!r} is one of a run; name the run folder before it")
    if num_samples < 0 or (seed or 0) < 0:
        raise ValueError(f"--num-samples {num_samples} and --seed {seed} must not be negative")
    recipe = confirmed_recipe(run, yes) if run else digits(named_recipe("mix_grpo"))
    folder = chosen_checkpoint(Path(run), checkpoint) if run else None
    given = Prompts(path=prompts).load((prompt,)) if prompt or prompts else None
    with closing(build_engine(recipe, pick_device(device), scored=False)) as engine:
        if folder is not None:
            load_checkpoint(engine, folder)
        images, texts = sampled(engine, given, num_samples or (4 * len(given) if given else 120), seed)
    save_picture(sample_grid(images, texts), Path(out))
    for file in save_samples(images, texts, Path(out_dir)) if out_dir else ():
        print(file)
    print(out)


def chosen_checkpoint(run: Path, name: str) -> Path:
    """A finished checkpoint of a run, by its step or its folder; the newest without a name.

    Raises:
        ValueError: there is none, or none of that name; names those there are.
    """
    from flowgrpo_fast.training.checkpoint import finished_checkpoints, newest_whole

    found = finished_checkpoints(run)
    if not found:
        raise ValueError(f"{str(run)!r} holds no checkpoint; give a folder that `train` made")
    wanted = f"step_{int(name):06d}" if name.isascii() and name.isdecimal() else Path(name).name
    newest, passed_over = newest_whole(run)
    for line in () if name else passed_over:
        print(line, file=sys.stderr)
    chosen = [path for path in found if path.name == wanted] if name else [newest]
    if not chosen:
        known = ", ".join(path.name for path in found)
        raise ValueError(f"{str(run)!r} has no checkpoint {name!r}; it has {known}")
    (checkpoint,) = chosen
    assert checkpoint is not None
    return checkpoint


def bench(
    level: tyro.conf.Positional[Literal["ops", "rollout", "train_step", "levers"]] = "ops",
    /,
    *,
    only: str = "",
) -> None:
    """Times ours against unfused PyTorch and torch.compile and prints the table, from a source checkout.

    Args:
        level: single ops, a whole rollout, a training step, or one of a transformer lever by lever.
        only: cases whose name contains this, e.g. "replay" or "toy".
    """
    suite = Path(__file__).parents[1] / "benchmarks" / "measure.py"
    if not suite.exists():
        raise ValueError(f"no benchmark suite at {str(suite)!r}; run this in a source checkout")
    command = [sys.executable, str(suite), level, "--print-only", "--only", only]
    raise SystemExit(subprocess.call(command))


def pretrain_digits(*, out: str = "digits.safetensors", seed: int = 0) -> None:
    """Makes the pretrained start of the digits model.

    Args:
        out: the safetensors file to write.
        seed: of initialisation and training.
    """
    from flowgrpo_fast.models.pretrain_digits import pretrain

    pretrain(Path(out), seed=seed)


def _flags(commands: Collection[Callable[..., None]]) -> set[str]:
    """The options that take no value."""
    switches = {
        name.replace("_", "-")
        for command in commands
        for name, kind in command.__annotations__.items()
        if kind == "bool"
    }
    return {"-h", "--help"} | {f"--{sign}{name}" for name in switches for sign in ("", "no-")}


def _words_first(arguments: list[str], flags: Collection[str]) -> list[str]:
    """Names and field=value before the options, which the parser asks for; a user may write them in any order."""
    words: list[str] = []
    options: list[str] = []
    left = iter(arguments)
    for argument in left:
        if not argument.startswith("-"):
            words.append(argument)
            continue
        options.append(argument)
        if "=" not in argument and argument not in flags:
            options += islice(left, 1)
    return words + options


def _refuse_fields_as_options(words: list[str], command: Callable[..., None]) -> None:
    """Raises ValueError for `--group_size 12`, where a recipe's field was meant: the parser knows options alone."""
    parameters = command.__annotations__
    options = {"help", *(name.rstrip("_").replace("_", "-") for name in parameters)}
    for index, word in enumerate(words):
        name, separator, value = word.partition("=")
        if not name.startswith("--") or name[2:].replace("_", "-").removeprefix("no-") in options:
            continue
        known = FILES.as_assignment(name, value if separator else "".join(words[index + 1 : index + 2]))
        if known and "overrides" in parameters:
            raise ValueError(f"{name} is not an option; write {known}")


def _speak_utf8() -> None:
    """Whatever the locale: a prompt or a name is printed as it is, and no character ends a run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def _as_utf8(word: str) -> str:
    """A word of the command line that the locale could not decode, as the UTF-8 that it is."""
    if word.isprintable():
        return word
    try:
        return os.fsencode(word).decode("utf-8")
    except UnicodeDecodeError:
        return word


def main(arguments: list[str] | None = None) -> None:
    """Entry point; a user's mistake is one line on stderr and exit code 2."""
    commands: dict[str, Callable[..., None]] = {
        "train": train,
        "plan": plan,
        "sample": sample,
        "bench": bench,
        "env": env,
        "recipes": recipes,
        "report": report,
        "pretrain-digits": pretrain_digits,
    }
    _speak_utf8()
    given = [_as_utf8(word) for word in sys.argv[1:]] if arguments is None else arguments
    words = _words_first(given, _flags(commands.values()))
    if (
        os.getcwd() not in sys.path
    ):  # what the user wrote here; last, so that no file of theirs hides a library
        sys.path.append(os.getcwd())
    try:
        if words and words[0] in commands:
            _refuse_fields_as_options(words, commands[words[0]])
        tyro.extras.subcommand_cli_from_dict(commands, prog="flowgrpo-fast", args=words)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
