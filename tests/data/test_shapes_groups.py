"""convert/shapes_groups.py: groups that training a scorer reads, ranked as the checker says."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imagereward_jax.data import shapes
from imagereward_jax.data.groups import load_groups
from imagereward_jax.data.prompts import load_prompts

SCRIPT = Path(__file__).parents[2] / "convert" / "shapes_groups.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("shapes_groups", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def written(script, tmp_path_factory):
    out = tmp_path_factory.mktemp("groups") / "out"
    options = ["--guidance=3", "--drawn=6", "--prompts=4", "--steps=3", "--images=3"]
    assert script.main([str(out), "tiny-shapes", *options]) == 0
    return out


def test_sampled_groups_are_ranked_by_the_words_that_the_checker_finds(written):
    rows = json.loads((written / "groups.json").read_text())
    ranked = 0
    for row in rows:
        images = [np.asarray(Image.open(written / name)) for name in row["generations"]]
        wrong = [4 - sum(shapes.words_right(row["prompt"], image).values()) for image in images]
        ranked += row["ranking"] == list(np.unique(wrong, return_inverse=True)[1] + 1)
        assert len(set(row["ranking"])) > 1
    assert ranked >= len(rows) - 12 > 0  # the drawn ones are ranked by how they were drawn


def test_groups_are_there_mirrored_unless_that_prompt_is_held_out(script):
    """A group in the center as well; nothing is mirrored into a prompt that tuned models are evaluated with."""
    image = np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3)
    prompts = ["a small red cross at the top left", "a small red cross in the center"]
    groups = [(prompt, image, [0]) for prompt in (*prompts, "a small red cross at the bottom left")]
    made = list(script.with_mirrored(groups, {*prompts, "a small red cross at the top right"}))
    exchanged = "a small red cross at the top right"
    assert [one[0] for one in made] == [prompts[0], exchanged, prompts[1], prompts[1], groups[2][0]]
    np.testing.assert_array_equal(made[1][1][0, 0, 0], image[0, 0, 1])


@pytest.mark.parametrize(("flags", "split"), [([], "shapes:train"), (["--held-out"], "shapes:held_out")])
def test_groups_that_train_a_reward_and_groups_that_judge_it_share_no_prompt(script, flags, split):
    args = script.parse_args(["out", "tiny-shapes", "--drawn=20", *flags])
    assert {prompt for prompt, *_ in script.drawn_groups(args, 32)} <= set(load_prompts(split))


def test_they_are_read_for_training_a_scorer(written):
    groups = load_groups(written / "groups.json", image_size=32)
    assert groups[0]["images"].shape[1:] == (32, 32, 3) and groups.largest == 3


def test_what_is_there_is_kept_and_bad_input_refused(script, written, capsys):
    assert script.main([str(written), "tiny-shapes"]) == 2 and "exists" in capsys.readouterr().err
    assert script.main([str(written / "new"), "tiny-shape"]) == 2 and "tiny-shapes" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script.main([str(written / "new"), "tiny-shapes", "--images=1"])
