"""Rewards and judge: held-out accuracy, hand-computed numbers, and errors that name what is wrong."""

from __future__ import annotations

import importlib

import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from flowgrpo_fast.models.digits_data import digit_images
from flowgrpo_fast.models.digits_text import DIGIT_WORDS
from flowgrpo_fast.rewards.judges import DigitJudge
from flowgrpo_fast.rewards.rules import digit_log_prob, ink_contrast


def asking_for(digits: torch.Tensor) -> list[str]:
    return [f"a handwritten {DIGIT_WORDS[d]}" for d in digits.tolist()]


@pytest.fixture(scope="module")
def judge() -> DigitJudge:
    return DigitJudge()


def test_rewards_are_found_by_path():
    module = importlib.import_module("flowgrpo_fast.rewards.rules")
    assert module.digit_log_prob is digit_log_prob
    assert module.ink_contrast is ink_contrast


def test_the_classifier_reads_digits_it_has_not_seen():
    data = digit_images("judge")
    every = torch.stack(
        [digit_log_prob(data.images, asking_for(torch.full_like(data.digits, d))) for d in range(10)]
    )
    assert (every.argmax(0) == data.digits).float().mean() > 0.96
    right = digit_log_prob(data.images, asking_for(data.digits))
    assert right.shape == (len(data.digits),)
    assert right.dtype == torch.float32
    assert right.max() <= 0
    assert torch.equal(right, digit_log_prob(data.images, asking_for(data.digits)))


def test_the_judge_reads_digits_it_has_not_seen(judge):
    data = digit_images("training")
    assert judge.accuracy(data.images, asking_for(data.digits)) > 0.98
    wrong = asking_for((data.digits + 1) % 10)
    assert judge.accuracy(data.images, wrong) < 0.02


def test_the_judge_agrees_with_another_reader(judge):
    """Nearest neighbours on the same half: the two read almost every unseen digit alike."""
    own, unseen = digit_images("judge"), digit_images("training")
    neighbours = KNeighborsClassifier(1).fit(own.images.flatten(1), own.digits)
    other = torch.from_numpy(neighbours.predict(unseen.images.flatten(1)))
    assert (judge.read(unseen.images) == other).float().mean() > 0.97


def test_correct_is_per_sample(judge):
    data = digit_images("judge")
    images, asked = data.images[:4], data.digits[:4].clone()
    asked[2] = (asked[2] + 5) % 10
    assert judge.correct(images, asking_for(asked)).tolist() == [True, True, False, True]
    assert judge.accuracy(images, asking_for(asked)) == 0.75


def test_ink_contrast_by_hand():
    image = torch.zeros(1, 1, 1, 10)
    image[..., :] = torch.tensor([0.1, 0.9, 0.7, 0.0, 0.2, 0.3, 0.5, 0.4, 0.6, 0.8])
    # fifth of 10 = 2 brightest: (0.9 + 0.8) / 2; two fifths = 4 darkest: (0 + 0.1 + 0.2 + 0.3) / 4
    torch.testing.assert_close(ink_contrast(image, ["anything"]), torch.tensor([0.85 - 0.15]))
    flat = torch.full((2, 3, 4, 4), 0.5)
    assert ink_contrast(flat, ["a", "b"]).tolist() == [0.0, 0.0]
    blot = (torch.arange(64.0) < 32).float().reshape(1, 1, 8, 8)
    torch.testing.assert_close(ink_contrast(blot, ["a"]), torch.tensor([0.92]))  # no more than a real digit's


def test_real_digits_have_contrast_and_noisy_ones_less():
    images = digit_images("training").images
    prompts = [""] * len(images)
    noisy = (0.5 * images + 0.5 * torch.rand_like(images)).clamp(0, 1)
    assert ink_contrast(images, prompts).mean() > 0.88
    assert ink_contrast(noisy, prompts).mean() < 0.75


GOOD = torch.rand(2, 1, 8, 8)
PROMPTS = ["a handwritten one", "a handwritten two"]


def with_pixel(value: float) -> torch.Tensor:
    images = GOOD.clone()
    images[1, 0, 3, 3] = value
    return images


@pytest.mark.parametrize("reader", ["digit_log_prob", "ink_contrast", "correct"])
@pytest.mark.parametrize(
    ("images", "prompts", "message"),
    [
        (GOOD[:, 0], PROMPTS, r"images.*\[2, 8, 8\]"),
        (GOOD[:0], [], r"images.*\[0, 1, 8, 8\]"),
        (GOOD, PROMPTS[:1], "2 images but 1 prompts"),
        (GOOD.mul(255).to(torch.uint8), PROMPTS, "uint8"),
        (with_pixel(float("nan")), PROMPTS, "image 1 holds nan"),
        (with_pixel(float("inf")), PROMPTS, "image 1 holds inf"),
        (with_pixel(-0.5), PROMPTS, "image 1 holds -0.5"),
    ],
)
def test_bad_input_is_named(judge, reader, images, prompts, message):
    call = (
        judge.correct
        if reader == "correct"
        else {"digit_log_prob": digit_log_prob, "ink_contrast": ink_contrast}[reader]
    )
    with pytest.raises(ValueError, match=message) as caught:
        call(images, prompts)
    assert "\n" not in str(caught.value)


def test_digits_need_eight_by_eight_and_a_digit_word(judge):
    for call in (digit_log_prob, judge.correct):
        with pytest.raises(ValueError, match=r"\[B, 1, 8, 8\]"):
            call(torch.rand(2, 3, 8, 8), PROMPTS)
        with pytest.raises(ValueError, match="'won'"):
            call(GOOD, ["a handwritten one", "a handwritten won"])
