"""The prompts of the digits model: a fixed vocabulary, a few phrasings, and errors that name the nearest word."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

import torch
from torch import Tensor

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PHRASINGS = ("a handwritten {}", "the digit {}", "the number {}")
PADDING = ""  # token 0; a prompt of nothing but padding is the unconditional one
VOCABULARY = (PADDING, "a", "the", "handwritten", "digit", "number", *DIGIT_WORDS)
NUM_TOKENS = 4

_TOKEN = {word: index for index, word in enumerate(VOCABULARY) if word != PADDING}
_TOKEN |= {str(digit): _TOKEN[word] for digit, word in enumerate(DIGIT_WORDS)}  # "7" reads as "seven"
_FIRST_DIGIT = VOCABULARY.index(DIGIT_WORDS[0])


def all_prompts() -> list[str]:
    """Every prompt of pretraining: the ten digits in the first phrasing, then in the next."""
    return [phrasing.format(word) for phrasing in PHRASINGS for word in DIGIT_WORDS]


def digits_of(prompts: Sequence[str]) -> Tensor:
    """The digit `[P]` int64 each prompt asks for. Raises ValueError as `tokenize` does."""
    tokens = tokenize(prompts)
    return tokens.max(dim=1).values - _FIRST_DIGIT  # digit words are the last of the vocabulary


def tokenize(prompts: Sequence[str]) -> Tensor:
    """Tokens `[P, NUM_TOKENS]` int64, padded at the end.

    Raises ValueError (one line, naming the prompt) for an unknown word, for no digit word or more than one, for a
    prompt that is too long, and for prompts that are not a sequence of strings.
    """
    if isinstance(prompts, str):
        raise ValueError(f"prompts must be a sequence of strings, got the single string {prompts!r}")
    if len(prompts) == 0:
        raise ValueError("prompts is empty; give at least one, such as 'a handwritten seven'")
    return torch.tensor([_tokens_of(prompt) for prompt in prompts], dtype=torch.int64)


def empty_tokens(num_prompts: int) -> Tensor:
    """Tokens `[num_prompts, NUM_TOKENS]` of the unconditional prompt."""
    return torch.zeros(num_prompts, NUM_TOKENS, dtype=torch.int64)


def _tokens_of(prompt: str) -> list[int]:
    if not isinstance(prompt, str):
        raise ValueError(f"a prompt must be a string, got {prompt!r}")
    words = prompt.lower().split()
    for word in words:
        if word not in _TOKEN:
            near = get_close_matches(word, _TOKEN, n=1, cutoff=0.0)[0]
            raise ValueError(f"unknown word {word!r} in prompt {prompt!r}; nearest known word: {near!r}")
    tokens = [_TOKEN[word] for word in words]
    num_digits = sum(token >= _FIRST_DIGIT for token in tokens)
    if num_digits != 1:
        raise ValueError(
            f"prompt {prompt!r} has {num_digits} digit words; it needs one of {', '.join(DIGIT_WORDS)}"
        )
    if len(tokens) > NUM_TOKENS:
        raise ValueError(f"prompt {prompt!r} has {len(tokens)} words; at most {NUM_TOKENS} are read")
    return tokens + [0] * (NUM_TOKENS - len(tokens))
