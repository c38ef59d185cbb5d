"""What a model is: the defaults of the base class, and what a loader may return."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from flowgrpo_fast.models.loading import load_model
from flowgrpo_fast.models.network import FullFineTuning, LoRA, ModelSetup, Network
from flowgrpo_fast.sampling.policy import Policy
from flowgrpo_fast.training.engine import build_engine
from flowgrpo_fast.types import Conditioning, FlowModel

CPU = torch.device("cpu")
SETUP = ModelSetup(network=Network(), precision="fp32", seed=3)


class Least(FlowModel):
    """A module and a shape, and nothing that a model does."""

    latent_shape = (2,)

    def __init__(self) -> None:
        self.module = nn.Linear(2, 2)


class Words(Least):
    """A model that encodes."""

    def encode(self, prompts, images=()):
        return Conditioning(torch.tensor([[[float(len(prompt))]] for prompt in prompts]))


class Whole(Words):
    """A model with all that it must define; keywords replace its parts."""

    def __init__(self, **parts) -> None:
        super().__init__()
        for name, value in parts.items():
            setattr(self, name, value)

    def velocity(self, latents, sigma, conditioning):
        return latents

    def decode(self, latents):
        return latents.view(-1, 1, 1, 2)


@pytest.fixture
def load(monkeypatch):
    """What `load_model` makes of a loader's result."""

    def load(result, name: str = "loaders:load"):
        seen = []
        monkeypatch.setitem(
            sys.modules, "loaders", SimpleNamespace(load=lambda *given: seen.append(given) or result)
        )
        model = load_model(name, CPU, SETUP)
        assert seen == [(CPU, SETUP)]
        return model

    return load


def test_a_loader_is_given_the_device_and_the_setup(load) -> None:
    model = Whole()
    assert load(model) is model
    # What is defined on the instance counts as well.
    own = Words()
    own.velocity, own.decode = model.velocity, model.decode
    assert load(own) is own


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"latent_shape": [2]}, r"whose latent_shape is \[2\]; it must be a tuple of sizes above 0"),
        ({"latent_shape": (2, 0)}, r"whose latent_shape is \(2, 0\); "),
        ({"latent_shape": ()}, r"whose latent_shape is \(\); "),
        ({"module": {"a": 1}}, r"whose module is {'a': 1}; it must be a torch.nn.Module"),
        ({"image_seq_len": "256"}, "whose image_seq_len is '256'; it must be a number of tokens or None"),
        ({"latent_grid": 8}, "whose latent_grid is 8; it must be a tuple"),
        ({"sensitive": "norm"}, "whose sensitive is 'norm'; it must be a tuple of regular expressions"),
        ({"takes_images": None}, "whose takes_images is None; it must be True or False"),
        ({"mixes_guidance": 1}, "whose mixes_guidance is 1; it must be True or False"),
        ({"decode": torch.zeros(2)}, "whose decode is Tensor; it must be a method"),
        ({"expert": "high"}, "whose expert is 'high'; it must be a method"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_part_of_the_wrong_kind_is_named(load, parts, message) -> None:
    with pytest.raises(ValueError, match=f"^'loaders:load' made a Whole {message}") as caught:
        load(Whole(**parts))
    assert "\n" not in str(caught.value)


def _of_one(device):
    return Whole()


def _of_three(device, setup, extra):
    return Whole()


def _fails_inside(device, setup):
    return len(3)


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (_of_one, r"^'loaders:load' takes \(device\): too many .*: declare it as load\(device, setup\)$"),
        (
            _of_three,
            r"^'loaders:load' takes \(device, setup, extra\): missing .* 'extra'; a loader is called",
        ),
        (Least(), "^'loaders:load' is a Least; a loader is a function load"),
    ],
    ids=["one argument", "three", "no function"],
)
def test_what_is_no_loader_is_refused_in_one_line(monkeypatch, loader, message) -> None:
    monkeypatch.setitem(sys.modules, "loaders", SimpleNamespace(load=loader))
    with pytest.raises(ValueError, match=message) as caught:
        load_model("loaders:load", CPU, SETUP)
    assert "\n" not in str(caught.value)


def test_an_error_inside_a_loader_is_its_own(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "loaders", SimpleNamespace(load=_fails_inside))
    with pytest.raises(TypeError, match="'int' has no len"):
        load_model("loaders:load", CPU, SETUP)


def test_a_family_goes_by_the_name_of_its_file() -> None:
    assert type(load_model("digits", CPU, SETUP)).__name__ == "DigitsModel"
    with pytest.raises(ValueError, match=r"there is no module 'flowgrpo_fast.models.digitz'"):
        load_model("digitz", CPU, SETUP)


class Stranger:
    latent_shape = (2,)

    def velocity(self, latents, sigma, conditioning):
        return latents


class Near(Stranger):
    module = nn.Linear(2, 2)
    encode = decode = Stranger.velocity


@dataclass
class Compared(Least):
    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__init__()


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "'loaders:load' made a NoneType; .* subclass of flowgrpo_fast.types.FlowModel; it lacks "),
        (Stranger(), "made a Stranger; .* it lacks 'module', 'encode', 'decode'$"),
        (Near(), "made a Near; .* a subclass of .*FlowModel$"),
        (FlowModel(), "made a FlowModel; .* it lacks 'latent_shape', 'module'$"),
        (
            Words(),
            "made a Words that does not define 'velocity', 'decode'; a FlowModel defines encode, velocity",
        ),
        (Compared(), r"a Compared that compares by its values; .* @dataclass\(eq=False\)"),
    ],
    ids=["nothing", "parts", "all but the class", "no module", "a part undefined", "by value"],
)
def test_what_is_no_model_is_refused_in_one_line(load, result, message) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load(result)
    assert "\n" not in str(caught.value)


def test_what_a_model_does_not_define_it_refuses_by_name() -> None:
    model, x = Least(), torch.zeros(1, 2)
    for name, call in {
        "encode": lambda: model.encode(["a"]),
        "velocity": lambda: model.velocity(x, torch.ones(1), None),
        "decode": lambda: model.decode(x),
    }.items():
        with pytest.raises(ValueError, match=f"^Least has no {name}; a FlowModel defines encode, velocity"):
            call()
    with pytest.raises(ValueError, match=r"^Least decodes without gradient, which a differentiable reward"):
        model.decode_with_grad(x)


def test_the_defaults_of_a_model() -> None:
    model = Words()
    assert model.transformer is model.module
    assert model.own_prompts() == []
    assert model.expert(torch.tensor(0.5)) is model
    policy = Policy(model)
    assert policy.at(torch.tensor(0.5)) is policy
    assert torch.equal(
        model.prompt_rows(["a", "bcd"]).rows(torch.tensor([1])).prompt_embeds, torch.tensor([[[3.0]]])
    )
    with pytest.raises(ValueError, match=r"^data.images is set; Words makes images from text alone$"):
        model.prompt_rows(["a"], ["a.png"])
    velocity, negative = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 4.0]])
    assert torch.equal(model.guided(velocity, negative, 3.0), torch.tensor([[2.0, -2.0]]))


def test_a_model_without_prompts_needs_a_file(toy_recipe, monkeypatch) -> None:
    monkeypatch.setattr("tests.conftest.ToyModel.own_prompts", FlowModel.own_prompts)
    message = r"^Prompts.path is empty and the model brings no prompts of its own; set it to a text file"
    with pytest.raises(ValueError, match=message):
        build_engine(toy_recipe(), CPU)


def test_a_model_that_takes_no_images_refuses_a_file_of_them(toy_recipe, tmp_path) -> None:
    recipe = toy_recipe()
    (tmp_path / "images.txt").write_text("a.png\nb.png\n")
    data = replace(recipe.data, images=str(tmp_path / "images.txt"))
    with pytest.raises(ValueError, match=r"^data.images is set; ToyModel makes images from text alone$"):
        build_engine(replace(recipe, data=data), CPU)


def test_what_is_trained_says_what_it_asks_of_a_transformer() -> None:
    family = ("to_q", "to_k")
    fresh, resumed, named = LoRA(rank=4), LoRA(path="adapter"), LoRA(targets=("to_v",))
    assert (fresh.adapter_rank, fresh.adapted(family), named.adapted(family)) == (4, family, ("to_v",))
    assert (fresh.starts_from_base, resumed.starts_from_base) == (True, False)
    assert fresh.held_dtype(torch.bfloat16) is torch.bfloat16
    whole = FullFineTuning()
    assert (whole.adapter_rank, whole.adapted(family), whole.starts_from_base) == (0, (), False)
    assert whole.held_dtype(torch.bfloat16) is torch.float32
    assert whole.trains_every_weight
    assert not fresh.trains_every_weight
    frozen = nn.Linear(2, 2).requires_grad_(False)
    whole.prepare(frozen, family, 0, "transformer")
    assert all(parameter.requires_grad for parameter in frozen.parameters())
    assert replace(SETUP, precision="bf16").dtype is torch.bfloat16
    assert SETUP.dtype is torch.float32
