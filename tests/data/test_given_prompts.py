"""Prompts that Python code brings: what a function gives depends on the seed and the call alone."""

import random

import numpy as np
import pytest

from imagereward_jax.data.errors import DataError
from imagereward_jax.data.given_prompts import GivenPrompts, draw_rows, rows_of_list, rows_of_text

ANIMALS = ["cat", "dog", "snail", "lobster", "octopus"]


def animal():
    """As in TRL's examples, of the global generators."""
    return np.random.choice(ANIMALS), {"size": random.random(), "legs": np.random.randint(9) + 0.5}


def test_a_row_follows_from_the_seed_and_the_call():
    rows = draw_rows(animal, 0, 40, seed=3, name="animal")
    assert rows[25:] == draw_rows(animal, 25, 40, seed=3, name="animal")
    assert rows != draw_rows(animal, 0, 40, seed=4, name="animal")
    assert {row["prompt"] for row in rows} == set(ANIMALS) and len({row["metadata"]["size"] for row in rows}) == 40


def test_the_generators_of_the_caller_go_on_as_if_nothing_was_drawn():
    random.seed(0)
    np.random.seed(0)
    expected = random.random(), np.random.rand()
    random.seed(0)
    np.random.seed(0)
    draw_rows(animal, 0, 3, seed=1, name="animal")
    assert (random.random(), np.random.rand()) == expected


def test_rows_come_back_from_their_text():
    rows = rows_of_list(["a\u2028cat, \u00e9", ("two\nlines", {"id": 1, "tags": ("x", None)})], "prompts")
    assert rows[1] == {"prompt": "two\nlines", "metadata": {"id": 1, "tags": ["x", None]}}
    table = GivenPrompts(rows)
    assert rows_of_text(table.to_text()) == rows and table.prompts == ["a\u2028cat, \u00e9", "two\nlines"]
    assert len(table) == 2 and table[0] == {"prompt": "a\u2028cat, \u00e9", "metadata": {}}


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "prompts: there are no prompts in it"),
        (["a", " "], r"prompts\[1\]: expected a prompt, or \(prompt, dict of metadata\); got ' '"),
        ([("a", "b")], r"prompts\[0\]: expected a prompt"),
        ([3], r"prompts\[0\]: expected a prompt"),
        ("a cat", "prompts: expected a list of prompts, or of .*; got str"),
        ({"a": {}}, "prompts: expected a list of prompts, or of .*; got dict"),
        (["a", "b\ud800"], r"prompts\[1\]: the prompt 'b\\ud800' is not valid Unicode"),
        ([("a", {"array": np.zeros(2)})], r"prompts\[0\]: metadata is kept as JSON, .*ndarray"),
    ],
)
def test_what_is_no_prompt_is_refused_with_its_place(prompts, message):
    with pytest.raises(DataError, match=message):
        rows_of_list(prompts, "prompts")


def test_a_call_that_gives_no_prompt_is_named():
    answers = iter(["a", None])
    with pytest.raises(DataError, match=r"mine:draw, call 2: expected a prompt"):
        draw_rows(lambda: next(answers), 0, 2, seed=0, name="mine:draw")


def test_a_function_that_fails_is_named_with_the_call_and_the_line():
    def failing():
        raise KeyError("colour")

    with pytest.raises(
        DataError, match=r"prompts: mine:draw, call 1: KeyError: 'colour' \(test_given_prompts.py, line \d+\)"
    ):
        draw_rows(failing, 0, 2, seed=0, name="mine:draw")
