"""convert/shapes_groups.py: groups that training a scorer reads, ranked as the checker says."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imagereward_jax.data import shapes
from imagereward_jax.data.groups import load_groups

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
    assert ranked >= len(rows) - 6 > 0  # the drawn ones are ranked by how they were drawn


def test_they_are_read_for_training_a_scorer(written):
    groups = load_groups(written / "groups.json", image_size=32)
    assert groups[0]["images"].shape[1:] == (32, 32, 3) and groups.largest == 3


def test_what_is_there_is_kept_and_bad_input_refused(script, written, capsys):
    assert script.main([str(written), "tiny-shapes"]) == 2 and "exists" in capsys.readouterr().err
    assert script.main([str(written / "new"), "tiny-shape"]) == 2 and "tiny-shapes" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script.main([str(written / "new"), "tiny-shapes", "--images=1"])
