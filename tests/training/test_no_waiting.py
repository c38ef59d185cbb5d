"""Rollout and update under a mode in which the host may ask the device for one thing: its numbers, at the end."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from flowgrpo_fast.models.digits import DigitsConfig, DigitsModel, DigitsNetwork
from flowgrpo_fast.recipe import Cuts, LowPrecision, Scouts, TrainingPrecision
from flowgrpo_fast.recipes import RECIPES, digits
from flowgrpo_fast.sampling.walk import walk
from flowgrpo_fast.training import loop
from flowgrpo_fast.training.engine import build_engine
from flowgrpo_fast.training.loop import train_step
from flowgrpo_fast.training.update import update
from flowgrpo_fast.types import Scored
from tests.training.steps import CPU, drawn

PACKAGE = str(Path(loop.__file__).parents[1])
# Ops that give the host a number, or a result whose size the host must learn.
NUMBERS = {"_local_scalar_dense", "is_nonzero", "item", "equal", "nonzero", "masked_select", "unique"}
NUMBERS |= {"_unique2", "unique_dim", "unique_consecutive", "bincount", "repeat_interleave", "index_put_bool"}
# Python's ways to the same, and to the host's memory; a list's are not ops at all on a CPU.
READS = {
    "tolist",
    "item",
    "numpy",
    "cpu",
    "cuda",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "__array__",
}


def caller(through_torch: bool = True) -> str:
    """The function of this package that is running; empty within another, or where only torch called for it."""
    frame = sys._getframe(2)
    while through_torch and frame and ("/torch/" in frame.f_code.co_filename or frame.f_globals is globals()):
        frame = frame.f_back
    return frame.f_code.co_name if frame is not None and frame.f_code.co_filename.startswith(PACKAGE) else ""


class Python(TorchFunctionMode):
    """Sees what never reaches the dispatcher: reads of host memory, and copies that do nothing on a CPU."""

    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self.log = log

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name, where, direct = getattr(function, "__name__", ""), caller(), caller(through_torch=False)
        moves = name == "to" and any(isinstance(a, torch.device) for a in (*args, *kwargs.values()))
        if name in READS or (moves and direct and not kwargs.get("non_blocking")):
            self.log.append(f"{name} {where}")
        if name in ("tensor", "as_tensor") and direct and kwargs.get("device") is not None:
            self.log.append(f"{name} {where}")  # copies from the host, and waits
        if name in ("__getitem__", "__setitem__") and any(map(waits, index_of(args))):
            self.log.append(f"{name} {where}")
        return function(*args, **kwargs)


def index_of(args) -> tuple:
    return args[1] if isinstance(args[1], tuple) else (args[1],)


def waits(index) -> bool:
    """A list is copied to the device, a mask has a size that only the device knows, a scalar tensor is read."""
    if isinstance(index, Tensor):
        return index.dtype is torch.bool or (index.ndim == 0 and index.dtype is torch.int64)
    return isinstance(index, list)


class Dispatched(TorchDispatchMode):
    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self.log = log

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.partition("::")[2]
        if name in NUMBERS:
            self.log.append(f"{name} {caller()}")
        return function(*args, **(kwargs or {}))


def waited(run) -> tuple[object, list[str]]:
    """What `run` returns, and all it asked the device for."""
    log: list[str] = []
    with Dispatched(log), Python(log):
        result = run()
    return result, log


@pytest.fixture
def network(monkeypatch) -> None:
    torch.manual_seed(0)
    network = DigitsNetwork(DigitsConfig(num_layers=1)).eval()
    network.words.requires_grad_(False)
    for parameter in network.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    monkeypatch.setattr("flowgrpo_fast.models.digits.load", lambda device, setup: DigitsModel(network))


def small(name: str, **changes):
    recipe = digits(RECIPES[name].make())
    if isinstance(recipe.topology, Cuts):
        topology = replace(recipe.topology, steps=(3, 6), sizes=(12, 8), score="latents", pool=2)
        recipe = replace(recipe, group_size=4, topology=topology)
    if isinstance(recipe.experience, Scouts):
        scouts = replace(recipe.experience, num_scouts=8, precision=TrainingPrecision())
        recipe = replace(recipe, group_size=4, experience=scouts)
    size = recipe.topology.only_group_size(10) or 4
    recipe = replace(recipe, num_prompts=4, group_size=size, num_steps=3)
    machine = {name: changes.pop(name) for name in list(changes) if hasattr(recipe.machine, name)}
    return replace(
        recipe,
        task=replace(recipe.task, judge=""),
        machine=replace(recipe.machine, **machine),
        **changes,
    )


def check(recipe, spared: tuple[str, ...] = ()) -> None:
    """`spared`: functions whose reads do not count, for a network that needs a number; "" are other packages'."""

    def counted(log: list[str]) -> list[str]:
        return [line for line in log if line.partition(" ")[2] not in spared]

    engine = build_engine(recipe, CPU)
    train_step(engine)  # what is made once: states of the optimiser
    stage, plan = engine.stage, recipe.plan(engine.step, engine.seq_len)
    draws = drawn(recipe, engine.step, len(engine.prompts))
    if recipe.num_drawn > recipe.num_candidates:  # whom scouts chose; they read rewards, which wait
        draws = recipe.experience.collect(stage, draws, engine.step).samples.draws
    conditioning = stage.conditioning.rows(draws.prompt_index[draws.group_id])
    trajectory, log = waited(lambda: walk(stage.sampler, plan, conditioning, draws))
    assert counted(log) == [
        "__bool__ check_finite",
        "_local_scalar_dense check_finite",
    ]  # once, when the walk is over
    scores = stage.score(trajectory).result()
    owners = stage.scorer.owners(scores)
    credited = {name: term.weight for name, term in zip(scores.objectives, owners, strict=True)}
    batch = loop.make_batch(engine, Scored(trajectory, scores, credited))
    metrics, log = waited(lambda: update(engine.learner, batch))
    assert counted(log) == ["tolist metrics"]  # all at once, when the update is over
    assert metrics["network_backwards"] > 0


@pytest.mark.usefixtures("network")
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("flow_grpo", {}),
        ("flow_grpo", {"guidance_scale": 3.0, "precision": "bf16", "rows_per_forward": 4}),
        ("mix_grpo_flash", {}),
        ("mix_grpo_flash", {"graphs": True, "rows_per_forward": 8}),
        ("dance_grpo", {}),
        ("pro_grpo", {}),
        ("pro_grpo", {"graphs": True}),
        ("diffusion_nft", {}),
        ("diffusion_nft", {"rollout_precision": LowPrecision(mode="merged")}),
        ("sol_rl", {}),
        ("tree_grpo", {}),
        ("gcpo", {}),
        ("op_grpo", {}),
        ("awm", {}),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:fp8_rows is emulated")
def test_digits(name, changes) -> None:
    check(small(name, **changes))


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: bool(x.any()),
        lambda x: float(x.sum()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: x.nonzero(),
        lambda x: x[[0, 1]],
        lambda x: x[x > 0],
        lambda x: x[torch.tensor(1)],
        lambda x: x.unique(),
        lambda x: x.masked_select(x > 0),
        lambda x: torch.equal(x, x),
        lambda x: x.sum().item(),
    ],
)
def test_the_mode_sees_what_waits(wait) -> None:
    assert waited(lambda: wait(torch.arange(3.0)))[1]


def test_the_mode_sees_copies_from_the_host() -> None:
    """In the package's own lines; libraries move to the device where things already are."""
    code = "result = [torch.tensor([1.0], device=d), x.to(d), x.to(d, non_blocking=True)]"
    planted = compile(code, f"{PACKAGE}/planted.py", "exec")
    names = {"torch": torch, "x": torch.ones(2), "d": CPU}
    assert waited(lambda: exec(planted, names))[1] == ["tensor <module>", "to <module>"]
