"""The scorer's own promises, on a tiny random model: scores, ranks, gradients, batching, devices, saving."""

import child
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import imagereward_jax
from imagereward_jax.rewards.base import cast_params, local_devices, ranks_of
from imagereward_jax.rewards.imagereward import ImageReward

DEVICES_PROGRAM = """
import json, sys
import jax, numpy as np
import imagereward_jax
reward = imagereward_jax.load(sys.argv[1], batch_size=3)
images = np.load(sys.argv[2])
scores = reward.score("a red cat", images)
gradient = jax.grad(lambda x: reward.score_grad("a red cat", x).sum())(images)
kernel = reward.params["mlp"]["layers"][0]["kernel"]
one = reward.score("a red cat", images[0])
print(json.dumps([scores, np.asarray(gradient).sum(axis=(1, 2, 3)).tolist(), len(kernel.devices()), one]))
"""


@pytest.fixture(scope="module")
def images():
    """Six smooth images [6, 40, 48, 3] within [0, 1], of few extremes (only the host path clips)."""
    coarse = (np.random.default_rng(3).uniform(0.2, 0.8, (6, 4, 4, 3)) * 255).astype(np.uint8)
    return np.stack([np.asarray(Image.fromarray(c).resize((48, 40), Image.BICUBIC)) for c in coarse]) / np.float32(255)


@pytest.fixture(scope="module")
def scores(tiny_reward, images):
    return tiny_reward.score("a red cat", images)


def test_scores_do_not_depend_on_the_batch(tiny_reward, images, scores):
    """One at a time, in a list, or with more prompts: the same within 1e-5. Batches of 4 leave a padded rest of 2."""
    assert len(scores) == 6 and np.ptp(scores) > 0.1
    single = tiny_reward.score("a red cat", images[1])
    assert isinstance(single, float)
    np.testing.assert_allclose(single, scores[1], atol=1e-5)
    listed = tiny_reward.score("a red cat", [Image.fromarray((images[1] * 255).round().astype(np.uint8))])
    assert isinstance(listed, list) and len(listed) == 1
    np.testing.assert_allclose(listed, scores[1:2], atol=1e-5)


def test_prompts_may_come_one_an_image_or_several_for_one(tiny_reward, images, scores):
    prompts = ["a red cat", "the blue ball", "", "a dog", "ocean", "a red cat"]
    pairs = tiny_reward.score(prompts, list(images))
    np.testing.assert_allclose([pairs[0], pairs[5]], [scores[0], scores[5]], atol=1e-5)
    assert abs(pairs[1] - scores[1]) > 1e-3
    shared = tiny_reward.score(prompts, images[1])
    np.testing.assert_allclose(shared[:2], [scores[1], pairs[1]], atol=1e-5)


def test_ranks_follow_the_scores(tiny_reward, images, scores):
    ranks, rewards = tiny_reward.inference_rank("a red cat", list(images))
    np.testing.assert_allclose(rewards, scores, atol=1e-5)
    assert [rewards[ranks.index(rank)] for rank in range(1, 7)] == sorted(rewards, reverse=True)
    assert tiny_reward.inference_rank("a red cat", images[0])[0] == [1]


def test_of_equal_rewards_the_first_ranks_better():
    """As torch.sort(descending=True) and the original's second sort give."""
    rewards = [0.5, 2.0, 0.5, 2.0, -1.0]
    assert ranks_of(rewards) == [3, 1, 4, 2, 5]
    torch = pytest.importorskip("torch")
    _, order = torch.sort(torch.tensor(rewards), descending=True)
    assert (torch.sort(order)[1] + 1).tolist() == ranks_of(rewards)


def test_the_gradient_is_that_of_the_score(tiny_reward, images):
    """score_grad agrees with score to 8-bit rounding, and its gradient with a central difference."""
    prompts = ["a red cat", "the blue ball", "a dog", "ocean"]
    x = jnp.asarray(images[:4])
    np.testing.assert_allclose(tiny_reward.score_grad(prompts, x), tiny_reward.score(prompts, images[:4]), atol=0.02)
    gradient = jax.grad(lambda x: tiny_reward.score_grad(prompts, x).sum())(x)
    direction = np.random.default_rng(0).standard_normal(x.shape).astype(np.float32)
    step = 1e-2
    ahead, behind = (np.asarray(tiny_reward.score_grad(prompts, x + s * direction), float) for s in (step, -step))
    slope = (np.asarray(gradient) * direction).sum(axis=(1, 2, 3))
    assert np.abs(slope).max() > 0.01
    np.testing.assert_allclose((ahead - behind) / (2 * step), slope, atol=0.02 * np.abs(slope).max())


def test_apply_is_pure_and_takes_its_parameters(tiny_reward, images):
    tokens = tiny_reward.tokenize(["a red cat"] * 2)
    assert tokens["input_ids"].shape == (2, 12)
    assert jax.eval_shape(tiny_reward.apply, tiny_reward.params, images[:2], tokens).shape == (2,)
    zeros = jax.tree.map(jnp.zeros_like, tiny_reward.params)
    expected = -tiny_reward.config.score_mean / tiny_reward.config.score_std
    np.testing.assert_allclose(jax.jit(tiny_reward.apply)(zeros, images[:2], tokens), expected, rtol=1e-6)


def test_eight_devices_give_the_scores_and_gradients_of_one(tiny_reward, tiny_reward_folder, images, scores, tmp_path):
    """8 virtual CPU devices, a batch size that they do not divide: equal within 1e-5."""
    np.save(tmp_path / "images.npy", images)
    arguments = (tiny_reward_folder, tmp_path / "images.npy")
    sharded, gradient, devices, one = child.run(DEVICES_PROGRAM, *arguments, devices=8)
    assert devices == 8
    np.testing.assert_allclose(sharded, scores, atol=1e-5)
    np.testing.assert_allclose(one, scores[0], atol=1e-5)
    expected = jax.grad(lambda x: tiny_reward.score_grad("a red cat", x).sum())(jnp.asarray(images))
    np.testing.assert_allclose(gradient, expected.sum(axis=(1, 2, 3)), atol=1e-4)


def test_bfloat16_is_near_float32(tiny_reward_folder, images, scores):
    reward = imagereward_jax.load(tiny_reward_folder, dtype="bfloat16", device="cpu")
    assert reward.params["blip"]["vision_proj"]["kernel"].dtype == jnp.bfloat16
    assert reward.params["mlp"]["layers"][0]["kernel"].dtype == jnp.float32
    rounded = reward.score("a red cat", images)
    np.testing.assert_allclose(rounded, scores, atol=0.15 * np.ptp(scores) + 0.05)


def test_a_saved_model_is_the_same_and_is_not_overwritten_unasked(tiny_reward, images, tmp_path):
    tiny_reward.save(tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "config.json",
        "model.safetensors",
        "vocab.txt",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["new"], "no partial folder may be left"
    again = imagereward_jax.load(tmp_path / "new", device="cpu")
    for one, other in zip(jax.tree.leaves(tiny_reward.params), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(FileExistsError, match="already holds a model"):
        tiny_reward.save(tmp_path / "new")
    tiny_reward.save(tmp_path / "new", jax.tree.map(np.zeros_like, again.params), overwrite=True)
    assert not np.any(imagereward_jax.load(tmp_path / "new").params["blip"]["vision_proj"]["kernel"])


def test_bad_requests_are_refused(tiny_reward, images):
    for prompt, message in (
        (["a"] * 3, "3 prompts for 6 images"),
        ([], "non-empty list of texts"),
        (None, "prompt must be text"),
        (["a"] * 5 + [None], "prompt 5 must be text"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny_reward.score(prompt, images)
    with pytest.raises(ValueError, match="2 prompts for 1 images"):
        tiny_reward.inference_rank(["a", "b"], images[0])
    with pytest.raises(ValueError, match="image 2: expected an array"):
        tiny_reward.score("a", [images[0], images[1], np.zeros((3, 9, 9), np.uint8)])
    with pytest.raises(ValueError, match=r"expected images \[B, H, W, 3\]"):
        tiny_reward.score_grad("a", images[0])
    with pytest.raises(ValueError, match="2 prompts for 6 images"):
        tiny_reward.score_grad(["a", "b"], images)


def test_bad_settings_are_refused(tiny_reward_folder, tiny_reward, vocab_file):
    for options, message in (
        ({"batch_size": 0}, "batch_size must be a positive whole number, not 0"),
        ({"dtype": "float16"}, "dtype must be one of float32, bfloat16, not 'float16'"),
        ({"device": "abacus"}, "device 'abacus' does not exist; this machine has cpu:0"),
        ({"device": "cpu:99"}, "device 'cpu:99' does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            imagereward_jax.load(tiny_reward_folder, **options)
    wrong = {**tiny_reward.config.to_dict(), "text": {**tiny_reward.config.text.to_dict(), "vocab_size": 1000}}
    with pytest.raises(ValueError, match=r"the tokenizer has 93 tokens .* the network 1,000"):
        ImageReward.from_config(wrong, vocab_file, jax.random.key(0))


def test_devices_by_name():
    assert local_devices("cpu:0") == [jax.local_devices(backend="cpu")[0]]
    assert local_devices(jax.devices()[0]) == [jax.devices()[0]]
    assert local_devices() == jax.local_devices()


def test_only_matrices_outside_the_head_are_narrowed():
    params = {"mlp": {"kernel": np.ones((2, 2))}, "blip": {"kernel": np.ones((2, 2)), "bias": np.ones(2)}}
    cast = cast_params(params, jnp.bfloat16)
    assert [cast["mlp"]["kernel"].dtype, cast["blip"]["kernel"].dtype, cast["blip"]["bias"].dtype] == [
        jnp.float32,
        jnp.bfloat16,
        jnp.float32,
    ]
