"""The web UI's syntax: the examples of its documentation and of its prompt_parser, at their last step."""

import pytest

from imagereward_jax.integrations.webui_prompts import drawn_last

# {prompt: what is drawn last of 10 steps}, by the examples of modules/prompt_parser.py (AUTOMATIC1111, Forge)
SCHEDULED = {
    "test": "test",
    "a [b:3]": "a b",
    "a [b: 3]": "a b",
    "a [[[b]]:2]": "a b",
    "[(a:2):3]": "a",
    "a [b : c : 1] d": "a c d",
    "a[b:[c:d:2]:1]e": "ade",
    "a [unbalanced": "a unbalanced",
    "a [b:.5] c": "a b c",
    "((a][:b:c [d:3]": "a]:b:c d",
    "[a|(b:1.1)]": "b",
    "[fe|]male": "male",
    "[fe|||]male": "male",
    "fantasy landscape with a [mountain:lake:0.25] and [an oak:a christmas tree:0.75][ in foreground::0.6]"
    "[: in background:0.25] [shoddy:masterful:0.5]": (
        "fantasy landscape with a lake and a christmas tree in background masterful"
    ),
}
EMPHASIS = {
    "normal text": "normal text",
    "an (important) word": "an important word",
    "(unbalanced": "unbalanced",
    r"\(literal\]": "(literal]",
    "(unnecessary)(parens)": "unnecessaryparens",
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": "a house on a hill, sun, sky.",
}
OTHERS = {
    "[a:b:0.5]": "b",
    "[a::0.5] c": "c",
    "[a:b:10]": "a",  # there is no step after the tenth
    "[a:b:1.0]": "a",  # 1.0 is all of the steps, 1 the first
    "[a:b:1]": "b",
    "[a:b:-1]": "b",
    "[a:b]": "a:b",
    "[a:b:c:0.5]": "a:b:c:0.5",
    "[x [a:b:0.5]|y [c|d]]": "y d",
    "a | [b:c:0.5]": "a | b:c:0.5",  # a bar outside of brackets: the web UI reads no schedule
    "a\\": "a",
    "time 10:30 (at night:1.2)": "time 10:30 at night",
    r"a \[b:c:0.5\]": "a [b:c:0.5]",
    "a cat BREAK on a mat": "a cat, on a mat",
    "a cat AND a dog :1.2 AND rain :-1": "a cat, a dog",
    "a [cat:dog:0.5] AND ANDES": "a dog, ANDES",
    "<lora:style:0.8> a\n cat": "a cat",
    "": "",
}


@pytest.mark.parametrize("prompt", [*SCHEDULED, *EMPHASIS, *OTHERS])
def test_the_last_of_ten_steps(prompt):
    assert drawn_last(prompt, 10) == {**SCHEDULED, **EMPHASIS, **OTHERS}[prompt]


@pytest.mark.parametrize(
    ("prompt", "steps", "options", "expected"),
    [
        ("[a|b|c]", 20, {}, "b"),
        ("[a|b|c]", 20, {"last": 6}, "c"),
        ("[a:b:0.5]", 20, {"last": 10}, "a"),
        ("[a:b:0.5]", 20, {"last": 11}, "b"),
        # hires. fix: shares of the second pass count from 1, steps go on after those of the first
        ("[a:b:0.9]", 10, {"first_steps": 10}, "b"),
        ("[a:b:1.5]", 10, {"first_steps": 10}, "b"),
        ("[a:b:1.5]", 10, {"first_steps": 10, "last": 5}, "a"),
        ("[a:b:2.0]", 10, {"first_steps": 10}, "a"),
        ("[a:b:12]", 8, {"first_steps": 10}, "b"),
        ("[a:b:18]", 8, {"first_steps": 10}, "a"),
    ],
)
def test_the_last_step_of_a_pass(prompt, steps, options, expected):
    assert drawn_last(prompt, steps, **options) == expected
