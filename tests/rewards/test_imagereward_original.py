"""The full-size scorer against the original ImageReward (PyPI image-reward 1.5), with random weights.

`IMAGEREWARD_PYTHON` names the Python of an environment that has the original; see tests/reference. Needs some
10 GiB of memory and 6 GiB of disk for a few minutes.
"""

import json
import os
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import imagereward_jax

VOCAB = Path(__file__).parents[3] / "shared" / "real" / "bert-base-uncased"
SCRIPT = Path(__file__).parents[1] / "reference" / "imagereward_reference.py"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """(folder, arrays, what they are of) that the original wrote."""
    python = os.environ.get("IMAGEREWARD_PYTHON")
    if not python:
        pytest.skip("needs IMAGEREWARD_PYTHON, the Python of an environment with image-reward 1.5")
    if not VOCAB.is_dir():
        pytest.skip(f"needs the vocabulary of bert-base-uncased in {VOCAB}")
    folder = tmp_path_factory.mktemp("original")
    command = [python, str(SCRIPT), str(folder), "--tokenizer", str(VOCAB.parent)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with np.load(folder / "reference.npz") as arrays:
        yield folder, dict(arrays), json.loads((folder / "reference.json").read_text())
    for path in folder.glob("ImageReward.pt*"):
        path.unlink()


@pytest.fixture(scope="module")
def reward(reference):
    return imagereward_jax.load(reference[0] / "ImageReward.pt", tokenizer=VOCAB, device="cpu", batch_size=4)


def test_scores_of_pictures_of_every_mode_and_shape(reference, reward):
    """RGB, RGBA, grey, grey with alpha, palette, 1 bit, CMYK, wide, tall, 5 x 3 pixels: within 1e-4, ranks equal."""
    folder, expected, names = reference
    paths = [folder / name for name in names["pictures"]]
    ranks, rewards = reward.inference_rank(names["prompts"][0], paths)
    assert np.ptp(rewards) > 1
    np.testing.assert_allclose(rewards, expected["by_image"], atol=1e-4)
    assert ranks == expected["ranks"].tolist()


def test_scores_of_prompts(reference, reward):
    """Empty, Unicode, overlong and ordinary prompts: equal tokens, scores within 1e-4."""
    folder, expected, names = reference
    np.testing.assert_array_equal(reward.tokenize(names["prompts"])["input_ids"], expected["tokens"])
    rewards = reward.score(names["prompts"], folder / names["pictures"][0])
    assert np.ptp(rewards) > 0.1
    np.testing.assert_allclose(rewards, expected["by_prompt"], atol=1e-4)


@pytest.mark.parametrize("case", ["exact", "resized"])
def test_image_gradients(case, reference, reward):
    """`score_grad` against `score_gard`, without and with the resize: scores within 1e-4, gradients within 1e-3."""
    _, expected, names = reference
    images = jnp.asarray(expected[f"{case}_images"])

    def total(images):
        scores = reward.score_grad(names["prompts"][: len(images)], images)
        return scores.sum(), scores

    (_, scores), gradients = jax.value_and_grad(total, has_aux=True)(images)
    np.testing.assert_allclose(scores, expected[f"{case}_scores"], atol=1e-4)
    largest = np.abs(expected[f"{case}_gradients"]).max()
    np.testing.assert_allclose(gradients, expected[f"{case}_gradients"], atol=1e-3 * largest)
