"""ReFL whose steps without gradient run in int8 or fp8: what is narrow, and what the gradient is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_sd1
from refl_reference import TinyReward, method_config, refl_batch, refl_function

pytest.importorskip("qwix")

from imagereward_jax.diffusion.rollout import Rolled, rollout
from imagereward_jax.methods import reward_tuning
from imagereward_jax.planning.counts import flops_by_dtype

NARROW = {"int8": "int8", "fp8": "float8_e4m3fn"}
KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(pipeline, trainable, frozen, reward, batch)"""
    pipeline, params = tiny_sd1.make_one_level(tmp_path_factory.mktemp("model"))
    reward = TinyReward()
    frozen = {"vae": params["vae"], "text_encoder": params["text_encoder"], "reward": reward.params}
    return pipeline, {"unet": params["unet"]}, frozen, reward, refl_batch(pipeline, params, reward)


def predict_at(state, denoise, sampler, noise, keys, *, params, stop, **_):
    """The rollout's prediction at the stop, from latents that are given."""
    state = jax.tree.map(jnp.asarray, state)
    output = denoise(params, sampler.model_input(state, stop), sampler.timestep(stop), stop)
    return Rolled(state, sampler.pred_original(state, output, stop), None)


def settings(kind):
    return method_config(num_steps=3, stop_min=1, stop_max=2, height=8, width=8, rollout_quantization=kind)


def gradient_of(made, kind):
    """Function of (trainable, frozen, batch, key): ((loss, metrics), gradient)."""
    pipeline, _, _, reward, _ = made
    return jax.value_and_grad(refl_function(pipeline, reward, settings(kind), "ddim"), has_aux=True)


def run(made, kind):
    _, trainable, frozen, _, batch = made
    return jax.jit(gradient_of(made, kind))(trainable, frozen, batch, KEY)


@pytest.fixture(scope="module")
def runs(made):
    """({kind: ((loss, metrics), gradient)}, the latents at which the int8 sampler stopped)"""
    states = []

    def recording(*args, **options):
        rolled = rollout(*args, **options)
        jax.debug.callback(states.append, rolled.state)
        return rolled

    found = {"none": run(made, "none")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reward_tuning, "rollout", recording)
        found["int8"] = run(made, "int8")
        jax.effects_barrier()
    return found, states[0]


@pytest.mark.parametrize("kind", NARROW)
def test_the_sampler_is_narrow_and_nothing_else_is(made, kind):
    """FLOPs by dtype with the sampler's loop run never and once: its UNet is narrow (some 90 % of it here), and what is
    outside of it is float32 and the same as without."""
    _, trainable, frozen, _, batch = made
    counted = {}
    for name in ("none", kind):
        jaxpr = jax.jit(gradient_of(made, name)).trace(trainable, frozen, batch, KEY).jaxpr
        counted[name] = [flops_by_dtype(jaxpr, while_trips=trips) for trips in (0, 1)]
    (outside, once), (outside_narrow, once_narrow) = counted["none"], counted[kind]
    assert set(once) == {"float32"} and outside_narrow == outside
    assert set(once_narrow) == {"float32", NARROW[kind]} and once_narrow.total() == once.total()
    assert once_narrow[NARROW[kind]] > 0.8 * (once.total() - outside.total())


def test_the_gradient_is_that_of_the_loss_in_float32_at_the_latents_of_the_int8_sampler(made, runs, monkeypatch):
    """1e-5 of each gradient's largest entry; at the float32 sampler's latents it is another one."""
    found, state = runs
    (value, _), gradient = found["int8"]
    monkeypatch.setattr(reward_tuning, "rollout", functools.partial(predict_at, state))
    (expected, _), expected_gradient = run(made, "none")
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected_gradient))
    for got, same in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
        np.testing.assert_allclose(got, same, rtol=0, atol=1e-5 * np.abs(same).max() + 1e-8 * largest)
    kernel = lambda tree: np.asarray(tree["unet"]["conv_in"]["kernel"])  # noqa: E731
    assert np.abs(kernel(gradient) - kernel(found["none"][1])).max() > 1e-3 * np.abs(kernel(gradient)).max()


def test_a_step_in_int8_is_near_the_step_in_float32(runs):
    """Random weights of unit gain, one or two steps: rewards within 0.1 of 8 (their range is from -8 to 8)."""
    found, _ = runs
    (value, metrics), gradient = found["int8"]
    assert np.isfinite(value) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(gradient))
    difference = abs(float(metrics["reward"] - found["none"][0][1]["reward"]))
    assert 0 < difference < 0.1, difference
