"""A reward's three signatures, and what it may return."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flowgrpo_fast.recipe import RewardTerm
from flowgrpo_fast.recipe_io import from_dict, to_dict
from flowgrpo_fast.rewards.terms import Seen, as_scores, scored
from flowgrpo_fast.types import Scores
from tests.rewards.own_reward import OwnReward

HERE = "tests.rewards.functions"
NUMBERS = [0.1, -2.0, 3.5]


def seen_of(images: torch.Tensor, **changes) -> Seen:
    values = {
        "images": images,
        "prompts": ["a", "bb", "ccc"],
        "metadata": [{"count": 2}, {"count": 5}, {"count": 1}],
        "source_images": None,
        "group": torch.tensor([0, 0, 1]),
        "latents": images.to(torch.bfloat16),
        "num_groups": 2,
    }
    return Seen(**{**values, **changes})


IMAGES = torch.rand(3, 1, 2, 2, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "returned",
    [
        torch.tensor(NUMBERS),
        torch.tensor(NUMBERS, dtype=torch.float64),
        NUMBERS,
        tuple(NUMBERS),
        np.array(NUMBERS),
        np.array(NUMBERS, dtype=np.float32)[::-1][::-1],
        [np.float64(x) for x in NUMBERS],
        [torch.tensor(x, dtype=torch.float64) for x in NUMBERS],
        {"avg": NUMBERS},
        {"only": np.array(NUMBERS)},
        Scores(total=NUMBERS),
        torch.tensor(NUMBERS)[:, None],
        np.array(NUMBERS)[:, None],
        [[x] for x in NUMBERS],
        [torch.tensor([x]) for x in NUMBERS],
        [NUMBERS[0], torch.tensor(NUMBERS[1]), np.float64(NUMBERS[2])],
        torch.tensor(NUMBERS).to_sparse(),
        (NUMBERS, {}),
        (torch.tensor(NUMBERS), None),
        ({"avg": NUMBERS}, [{}, {}, {}]),
        (Scores(total=torch.tensor(NUMBERS)), {"info": 1}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_numbers_come_in_any_container(returned) -> None:
    scores = as_scores(returned, 3, "r")
    assert torch.equal(scores.total, torch.tensor(NUMBERS))
    assert scores.total.dtype == torch.float32
    assert (scores.objectives, scores.signals, scores.valid) == ({}, {}, None)


@pytest.mark.parametrize("returned", [[True, False, True], np.array([1, 0, 1]), torch.tensor([1, 0, 1])])
def test_so_do_whole_numbers(returned) -> None:
    assert as_scores(returned, 3, "r").total.tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "returned a NoneType for 3 images; it must return 3 numbers, as a tensor, an array or a list"),
        (0.5, "returned a float for 3 images"),
        ("abc", "returned a str for 3 images"),
        (["a", "b", "c"], "returned a list for 3 images"),
        ([1.0, None, 2.0], "returned a list for 3 images"),
        ([[1.0], [1.0, 2.0], []], "returned a list for 3 images"),
        ([torch.zeros(1), torch.zeros(2), torch.zeros(3)], "returned a list for 3 images"),
        (
            torch.zeros(3, dtype=torch.complex64),
            "reward 'r' returned a Tensor of complex numbers for 3 images",
        ),
        (np.zeros(3, dtype=np.complex128), "returned a ndarray of complex numbers for 3 images"),
        ([1j, 0.0, torch.tensor(1.0)], "returned a list of complex numbers for 3 images"),
        ([1.0, None, torch.tensor(1.0)], "returned a list for 3 images"),
        (torch.zeros(3, device="meta"), "returned a Tensor for 3 images"),
        (([1.0, 2.0], {}), r"returned shape \(2,\) for 3 images"),
        (np.array(["a", "b", "c"]), "returned a ndarray for 3 images"),
        ([], r"returned shape \(0,\) for 3 images; it must return \(3,\)"),
        ([1.0, 2.0], r"returned shape \(2,\) for 3 images; it must return \(3,\)"),
        (torch.zeros(3, 2), r"returned shape \(3, 2\) for 3 images; it must return \(3,\)"),
        (torch.tensor(1.0), r"returned shape \(\) for 3 images; it must return \(3,\)"),
        (
            {"a": NUMBERS, "b": NUMBERS},
            "returned scores named 'a', 'b'; one of several must be 'avg', the total",
        ),
        ({}, "returned scores named nothing"),
        ({"avg": NUMBERS, "b": [1.0]}, r"reward 'r: b' returned shape \(1,\)"),
        (Scores(total=torch.zeros(2)), r"reward 'r' returned shape \(2,\)"),
        (Scores(torch.zeros(3), {"x": torch.zeros(3, 2)}), r"reward 'r: x' returned shape \(3, 2\)"),
        (Scores(torch.zeros(3), signals={"x": torch.zeros(2, 3)}), r"reward 'r: x' returned shape \(2, 3\)"),
        (Scores(torch.zeros(3), valid=torch.ones(2)), r"reward 'r: valid' returned shape \(2,\)"),
    ],
    ids=str,
)
def test_anything_else_is_one_line(returned, message) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        as_scores(returned, 3, "r")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "valid", [[True, False, True], np.array([1, 0, 1]), torch.tensor([True, False, True])]
)
def test_what_is_valid_comes_in_any_container(valid) -> None:
    made = as_scores(Scores(torch.zeros(3), valid=valid), 3, "r").valid
    assert made.dtype == torch.bool
    assert made.tolist() == [True, False, True]


def test_mixed_lists_keep_their_gradient() -> None:
    value = torch.tensor(2.0, requires_grad=True)
    as_scores([1.0, value * 3, 0], 3, "r").total.sum().backward()
    assert value.grad == 3.0


def test_scores_do_not_change_with_the_memory_they_came_from() -> None:
    for memory in (torch.zeros(3), np.zeros(3, dtype=np.float32)):
        total = as_scores(memory, 3, "r").total
        memory[:] = 1.0
        assert total.tolist() == [0.0, 0.0, 0.0]


def test_prompts_form() -> None:
    seen = seen_of(IMAGES)
    assert torch.equal(scored(RewardTerm(function=f"{HERE}:mean"), seen).total, IMAGES.flatten(1).mean(1))
    assert scored(RewardTerm(function=f"{HERE}:length"), seen).total.tolist() == [1.0, 2.0, 3.0]


def test_flow_grpos_form() -> None:
    seen = seen_of(IMAGES)
    term = RewardTerm(function=f"{HERE}:counted", takes="metadata")
    assert scored(term, seen).total.tolist() == [2.0, 5.0, 1.0]
    scores = scored(RewardTerm(function=f"{HERE}:several", takes="metadata"), seen)
    brightest = IMAGES.flatten(1).amax(1)
    torch.testing.assert_close(scores.total, brightest + 0.5 * torch.tensor([1.0, 2.0, 3.0]))
    assert scores.objectives == {}
    assert list(scores.signals) == ["strict", "loose"]
    assert torch.equal(scores.signals["strict"], brightest)
    assert scores.signals["loose"].tolist() == [1.0, 2.0, 3.0]
    assert seen.metadata[0] == {"count": 2}


def test_two_scores_are_no_pair_of_scores_and_info(monkeypatch) -> None:
    term = RewardTerm(function=f"{HERE}:counted", takes="metadata")
    seen = seen_of(
        IMAGES[:2],
        prompts=["a", "b"],
        metadata=[{}, {}],
        group=torch.tensor([0, 0]),
        latents=None,
        num_groups=1,
    )
    for answer in ((1.0, 2.0), ((1.0, 2.0), {}), ([1.0, 2.0], {"info": 1})):
        monkeypatch.setattr(f"{HERE}.counted", lambda *arguments, answer=answer: answer)
        assert scored(term, seen).total.tolist() == [1.0, 2.0]


def test_record_form() -> None:
    scores = scored(RewardTerm(function=f"{HERE}:everything", takes="record"), seen_of(IMAGES))
    base = IMAGES.to(torch.bfloat16).float().flatten(1).sum(1) + torch.tensor([0, 0, 1])
    assert torch.equal(scores.total, base)
    assert torch.equal(scores.objectives["style"], base + 1)
    assert scores.objectives["text"].tolist() == [2.0, 5.0, 1.0]
    assert torch.equal(scores.signals["map"], (IMAGES[:, 0] > 0.5).float())
    assert torch.equal(scores.signals["frames"], IMAGES.flatten(1)[:, :3])
    assert scores.valid.tolist() == [True, True, False]


def test_gradient_is_that_of_the_reward() -> None:
    images = IMAGES.clone().requires_grad_()
    total = RewardTerm(function=f"{HERE}:smooth", differentiable=True).with_gradient(seen_of(images))
    assert torch.equal(total, IMAGES.square().flatten(1).sum(1))
    (total * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    torch.testing.assert_close(images.grad, 2 * IMAGES * torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1, 1))


def test_where_there_is_no_gradient_it_is_refused() -> None:
    images = IMAGES.clone().requires_grad_()
    with pytest.raises(
        ValueError, match=r"functions:smooth' is asked for its gradient; set RewardTerm.differ"
    ):
        RewardTerm(function=f"{HERE}:smooth").with_gradient(seen_of(images))
    term = RewardTerm(function=f"{HERE}:without_graph", differentiable=True)
    with pytest.raises(ValueError, match=r"functions:without_graph' is .* but its scores carry no gradient"):
        term.with_gradient(seen_of(images))
    for where in ("thread", "process"):
        with pytest.raises(ValueError, match=rf"differentiable is true and where is '{where}'"):
            RewardTerm(function="a:b", differentiable=True, where=where)


def test_names_and_settings() -> None:
    assert RewardTerm(function="a.b:c").objective == "c"
    assert RewardTerm(function="a.b:c", name="d").objective == "d"
    with pytest.raises(
        ValueError, match=r"RewardTerm.takes is 'all'; it must be 'prompts', 'metadata' or 'rec"
    ):
        RewardTerm(function="a:b", takes="all")
    with pytest.raises(ValueError, match=r"RewardTerm.name is 'a/b'"):
        RewardTerm(function="a:b", name="a/b")
    with pytest.raises(ValueError, match=r"reward '.*:not_a_function' is a int, which cannot be called"):
        RewardTerm(function=f"{HERE}:not_a_function").resolve()
    with pytest.raises(ValueError, match=r"has no 'nothing'"):
        RewardTerm(function=f"{HERE}:nothing").resolve()
    term = RewardTerm(function="a:b", takes="record", group_wise=True, name="c")
    assert from_dict(to_dict(term)) == term


def test_a_part_of_ones_own_scores_as_well() -> None:
    own = OwnReward(function=lambda seen: [len(p) for p in seen.prompts], whole=True)
    assert scored(own, seen_of(IMAGES)).total.tolist() == [1.0, 2.0, 3.0]
