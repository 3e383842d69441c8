"""Checks on a GPU: `pytest -m gpu`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import imagereward_jax
from imagereward_jax.assembly.conditions import with_conditions
from imagereward_jax.diffusion.samplers import make_sampler
from imagereward_jax.methods import refl
from imagereward_jax.methods.base import Phase
from imagereward_jax.models import layers
from imagereward_jax.models.hardware import target_platform
from imagereward_jax.models.unet import UNet2DConditionModel
from imagereward_jax.models.unet_config import UNet2DConditionConfig
from imagereward_jax.pipelines import load_pipeline
from imagereward_jax.training.state import init_state
from imagereward_jax.training.step import Fixed, cast, make_train_step

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def gpu():
    if jax.default_backend() != "gpu":
        pytest.skip("no GPU")


@pytest.mark.parametrize("head_dim", [40, 64, 80, 160])
@pytest.mark.parametrize(("queries", "keys"), [(4096, 4096), (1024, 77), (64, 64), (1357, 1357)])
def test_attention_agrees_with_plain_float32(head_dim, queries, keys):
    """Forward and gradient in bfloat16 within its rounding (2 % of the largest entry) of float32 attention."""
    shapes = [(2, length, 4, head_dim) for length in (queries, keys, keys)]
    inputs = [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]

    def total(query, key, value):
        return jnp.sum(jnp.sin(layers.attention(query, key, value).astype(jnp.float32)))

    halves = [x.astype(jnp.bfloat16) for x in inputs]
    got = [layers.attention(*halves), *jax.grad(total, (0, 1, 2))(*halves)]
    expected = [layers.attention(*inputs), *jax.grad(total, (0, 1, 2))(*inputs)]
    for ours, plain in zip(got, expected):
        ours, plain = (np.asarray(x, np.float32) for x in (ours, plain))
        np.testing.assert_allclose(ours, plain, atol=0.02 * np.abs(plain).max())


def test_scores_of_the_built_in_reward_are_those_of_the_cpu():
    """float32 on the GPU against float32 on the CPU, within 1e-4."""
    images = list(np.random.default_rng(0).random((4, 32, 32, 3), np.float32))
    scores = [
        imagereward_jax.load("tiny-shapes", device=d).score("a small blue cross in the center", images)
        for d in ("gpu", "cpu")
    ]
    np.testing.assert_allclose(*scores, atol=1e-4)


def test_activations_that_wait_in_the_hosts_memory_give_the_same_gradient():
    """remat="offload" against "blocks", float32, by all weights of a small UNet; within 1e-4 of the largest."""
    settings = {
        "sample_size": 8,
        "block_out_channels": [32, 64],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 3],
        "attention_head_dim": [2, 4],
        "cross_attention_dim": 64,
        "norm_num_groups": 8,
    }
    keys = jax.random.split(jax.random.key(0))
    inputs = jax.random.normal(keys[0], (2, 8, 8, 4)), jnp.array([1, 900]), jax.random.normal(keys[1], (2, 7, 64))
    gradients = []
    for remat in ("blocks", "offload"):
        config = UNet2DConditionConfig.from_dict(settings)
        layout, params = nnx.split(UNet2DConditionModel(config, remat=remat, rngs=nnx.Rngs(0)))

        def loss(params, layout=layout):
            return jnp.square(nnx.merge(layout, params)(*inputs)).mean()

        gradients.append(jax.tree.leaves(jax.jit(jax.grad(loss))(nnx.to_pure_dict(params))))
    for plain, ours in zip(*gradients, strict=True):
        np.testing.assert_allclose(ours, plain, atol=1e-4 * np.abs(plain).max() + 1e-7)


class PromptRows:
    """A source of the batch that the test gives, as the run's own source prepares it."""

    updates = images = 1

    def __init__(self, pipeline):
        self.prepare = functools.partial(with_conditions, pipeline)


@functools.cache
def refl_gradient(platform, dtype="float32", quantization="none"):
    """(the built-in model's gradient of one ReFL step by the built-in reward, its metrics), computed on `platform`."""
    device = jax.devices(platform)[0]
    pipeline, params = load_pipeline("tiny-shapes", dtype=dtype, remat="blocks")
    reward = imagereward_jax.load("tiny-shapes", device=device)
    prompts = ["a small blue cross in the center", "a large red circle at the top left"]
    method = refl.Config(
        sampler="ddim", num_steps=4, stop_min=2, stop_max=3, threshold=4.0, scale=1.0,
        height=pipeline.default_size, width=pipeline.default_size, rollout_quantization=quantization,
    )  # fmt: skip
    sampler = make_sampler(method.sampler, pipeline.scheduler_config, method.num_steps)
    phase = Phase("refl", refl.make_loss(method, pipeline, reward), PromptRows(pipeline))
    step = make_train_step((phase,), optax.sgd(1.0), dtype=jnp.dtype(dtype))
    trainable = {"unet": params.pop("unet")}
    batch = {"ids": pipeline.tokenize(prompts), "reward": reward.tokenize(prompts)}
    state = init_state(trainable, optax.sgd(1.0), seed=0, ema=False)
    frozen = cast(params, jnp.dtype(dtype)) | {"reward": reward.params}
    given = jax.device_put((state, Fixed(frozen, tables={"refl": sampler}), {"refl": batch}), device)
    with target_platform(platform):
        after, metrics = jax.jit(step)(*given)
    leaves = zip(jax.tree.leaves(trainable), jax.tree.leaves(after.params), strict=True)
    gradient = np.concatenate([(np.asarray(old) - np.asarray(new)).ravel() for old, new in leaves])
    return gradient, {name: float(value) for name, value in metrics.items()}


def apart(ours, plain):
    """Relative distance of two gradients."""
    return np.linalg.norm(ours - plain) / np.linalg.norm(plain)


def test_a_refl_step_agrees_with_the_cpus():
    """float32: reward and loss within 1e-3, the gradient by all weights within 1e-2 of its length; one update each."""
    (ours, metrics), (plain, expected) = refl_gradient("gpu"), refl_gradient("cpu")
    assert expected["refl/grad_norm"] > 0 and metrics["skipped"] == 0
    for name in ("refl/reward", "refl/loss"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-3)
    assert apart(ours, plain) < 1e-2


@pytest.mark.parametrize(("quantization", "bound"), [("none", 0.05), ("int8", 0.1), ("fp8", 0.2)])
def test_a_refl_step_in_bfloat16_is_near_float32s(quantization, bound):
    """The reward within `bound`, with the sampler's steps in bfloat16, int8 or float8; the gradient points the same
    way."""
    if quantization != "none":
        pytest.importorskip("qwix")
    ours, metrics = refl_gradient("gpu", "bfloat16", quantization)
    plain, expected = refl_gradient("cpu")
    assert metrics["skipped"] == 0 and metrics["refl/reward"] == pytest.approx(expected["refl/reward"], abs=bound)
    assert ours @ plain > 0.9 * np.linalg.norm(ours) * np.linalg.norm(plain)
