"""Prompt files: what they may hold, what comes with a prompt, and mistakes named by file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from flowgrpo_fast.data.prompts import Prompts, read_lines, read_text
from flowgrpo_fast.recipe_io import load_recipe, save_recipe
from flowgrpo_fast.types import PromptSet

ODD = "a cat\u2028in\u0085the\x0crain\x0bat\x1cnight"  # each of these ends a line for str.splitlines


@pytest.fixture
def file(tmp_path: Path):
    def write(content: str | bytes, name: str = "prompts.txt") -> str:
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(data)
        return str(tmp_path / name)

    return write


def test_a_text_file_holds_one_prompt_a_line(file) -> None:
    found = Prompts(path=file(f"\ufeffhigh\r\n\r\n  low \n{ODD}\nhigh")).load(["ignored"])
    assert found == PromptSet(("high", "low", ODD, "high"), ({}, {}, {}, {}))
    assert Prompts().load(["one", "two"]) == PromptSet(("one", "two"), ({}, {}))
    assert found.metadata[0] is not found.metadata[3]


def test_a_jsonl_file_brings_metadata_and_images(file, tmp_path) -> None:
    lines = [
        {"prompt": ODD, "tag": "counting", "include": [{"class": "clock", "count": 2}], "image": "a/1.png"},
        {"image": "2.png", "prompt": ""},
    ]
    text = "\r\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    found = Prompts(path=file("\ufeff" + text + "\n", "set.JSONL")).load()
    assert found.prompts == (ODD, "")
    assert found.metadata == ({"tag": "counting", "include": [{"class": "clock", "count": 2}]}, {})
    assert found.images == (tmp_path / "a/1.png", tmp_path / "2.png")


def test_images_may_be_a_list_of_their_own(file, tmp_path) -> None:
    images = file("1.png\nx/2.png\n", "images.txt")
    found = Prompts(path=file("make it red\nmake it blue"), images=images).load()
    assert found.images == (tmp_path / "1.png", tmp_path / "x/2.png")
    assert Prompts(images=images).load(["a", "b"]).images == found.images
    with pytest.raises(ValueError, match=r"names 2 images for 1 prompts; give one for each"):
        Prompts(path=file("alone"), images=images).load()
    own = file('{"prompt": "a", "image": "1.png"}', "own.jsonl")
    with pytest.raises(ValueError, match=r"Prompts.images is .*names images itself; use one"):
        Prompts(path=own, images=images).load()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a cat", "not JSON, Expecting value at column 1"),
        ('{"prompt": "a cat"', "not JSON, Expecting ',' delimiter at column 19"),
        ('["a cat"]', 'not an object; each line must be one, such as {"prompt": "a cat"}'),
        ("3", 'not an object; each line must be one, such as {"prompt": "a cat"}'),
        ('{"text": "a cat"}', 'no "prompt"; each line must have one, such as {"prompt": "a cat"}'),
        ('{"prompt": ["a cat"]}', '"prompt" is ["a cat"]; it must be a string'),
        ('{"prompt": null}', '"prompt" is null; it must be a string'),
        ('{"prompt": "a", "image": 3}', '"image" is 3; it must be a string'),
        ('{"prompt": "a", "prompt": "b"}', 'the key "prompt" stands there twice'),
        ('{"prompt": "a", "of": {"x": 1, "x": 2}}', 'the key "x" stands there twice'),
        ('{"prompt": "a", "image": "a.png"}', 'only some lines have an "image"; give one for each prompt'),
        ('{"prompt": "a\\ud800"}', "surrogates not allowed"),
    ],
)
def test_a_bad_line_is_named(file, line, message) -> None:
    path = file('{"prompt": "fine"}\n\n' + line + '\n{"prompt": "fine"}\n', "set.jsonl")
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        Prompts(path=path).load()
    text = str(caught.value)
    assert text.startswith(f"{path}:3: ")
    assert message in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("data", "place", "value"),
    [
        (b"a cat\na caf\xe9\n", 11, 0xE9),
        (b"\xef\xbb\xbfa caf\xe9\n", 8, 0xE9),
        (b"\xff\xfea\x00", 0, 0xFF),
        (b"cut off \xe2\x82", 8, 0xE2),
    ],
)
def test_text_that_is_not_utf8_is_named_by_its_byte(file, data, place, value) -> None:
    path = file(data)
    assert data[place] == value
    with pytest.raises(
        ValueError, match=rf"is not UTF-8 text: its byte {place} is 0x{value:02x}; save"
    ) as caught:
        Prompts(path=path).load()
    assert path in str(caught.value)


def test_nothing_to_read_is_one_line(file, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"Prompts.path is empty and the model brings no prompts of its own"):
        Prompts().load([])
    for name in ("empty.txt", "empty.jsonl"):
        with pytest.raises(ValueError, match="holds no prompt; write one a line"):
            Prompts(path=file(" \r\n\n", name)).load()
    with pytest.raises(ValueError, match=r"cannot read prompts from '.*none.jsonl': No such file"):
        Prompts(path=str(tmp_path / "none.jsonl")).load()
    with pytest.raises(ValueError, match=r"cannot read images from .*: Is a directory"):
        read_lines(str(tmp_path), "image")


def test_run_files_are_read_alike(toy_recipe, tmp_path) -> None:
    """A byte order mark, as some editors leave it, is no error; bytes that are not UTF-8 are one line."""
    file = tmp_path / "recipe.json"
    save_recipe(toy_recipe(), file)
    text = read_text(file, "recipe")
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert load_recipe(file) == toy_recipe()
    file.write_bytes(text.replace("toy", "to\xfd").encode("latin-1"))
    with pytest.raises(ValueError, match=r"recipe.json' is not UTF-8 text: its byte \d+ is 0xfd"):
        load_recipe(file)


def test_rows_repeat_what_comes_with_a_prompt() -> None:
    every = PromptSet(("a", "b", "c"), ({"n": 0}, {"n": 1}, {"n": 2}), (Path("a"), Path("b"), Path("c")))
    some = every.rows(torch.tensor([2, 2, 0]))
    assert some == PromptSet(
        ("c", "c", "a"), ({"n": 2}, {"n": 2}, {"n": 0}), (Path("c"), Path("c"), Path("a"))
    )
    assert PromptSet(("a",), ({},)).rows(torch.tensor([0, 0])) == PromptSet(("a", "a"), ({}, {}))
    assert len(some) == 3
