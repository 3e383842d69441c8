"""Reward gradients on a flow against the same computation in PyTorch, step by step with diffusers' schedulers."""

import dataclasses
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_flow import SD3, ToyFlow, ToyReward

from imagereward_jax.config import ConfigError
from imagereward_jax.diffusion.rollout import Gradient, rollout
from imagereward_jax.diffusion.samplers import make_sampler
from imagereward_jax.methods import ddpo, refl, reward_gradient
from imagereward_jax.methods.base import Models
from imagereward_jax.methods.reward_gradient import call_scale, draw_different, draw_gradient
from imagereward_jax.methods.reward_tuning import draw_stop

torch = pytest.importorskip("torch", reason="the reference is PyTorch")
diffusers = pytest.importorskip("diffusers", reason="the reference is PyTorch diffusers")

WEIGHT, ROWS, STEPS = 0.7, 3, 7
NUMBERS = np.array([0.5, 1.0, -1.5], np.float32)  # of the prompts, that the reward multiplies the images by
CONDITIONS = np.array([0.1, -0.4, 0.7], np.float32)
BATCH = {"cond": {"x": CONDITIONS}, "reward": NUMBERS}
SHAPE = (8, 8, 4)
PIPELINE = ToyFlow()
SCHEDULERS = {
    "euler": (diffusers.FlowMatchEulerDiscreteScheduler, SD3, STEPS),
    "heun": (diffusers.FlowMatchHeunDiscreteScheduler, SD3, (STEPS + 1) // 2),
    "dpmpp_2m": (
        diffusers.DPMSolverMultistepScheduler,
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
        STEPS,
    ),
}


def jax_gradient(module, config, key):
    """(loss, gradient by the network's weight, metrics) of a method's loss."""
    loss = module.make_loss(config, PIPELINE, ToyReward())
    sampler = PIPELINE.make_sampler(config.sampler, config.num_steps, config.eta, 8, 8)

    @jax.jit
    def function(weight, sampler):
        return jax.value_and_grad(lambda w: loss(Models({"toy": w}, tables=sampler), BATCH, key), has_aux=True)(weight)

    (value, metrics), slope = function(WEIGHT, sampler)
    return float(value), float(slope), metrics


class TorchFlow:
    """One sample's flow, its network and reward in PyTorch."""

    def __init__(self, row, sampler="euler"):
        kind, config, steps = SCHEDULERS[sampler]
        self.scheduler = kind.from_config(config)
        self.scheduler.set_timesteps(steps)
        self.row, self.weight = row, torch.tensor(WEIGHT, requires_grad=True)
        # Of each call of the network.
        self.timesteps = self.scheduler.timesteps
        self.sigmas = (self.scheduler.timesteps / 1000 if sampler == "heun" else self.scheduler.sigmas).tolist()

    def network(self, latents, step):
        timestep = float(self.timesteps[step])
        return PIPELINE.network(self.weight, latents, timestep, torch.sin, float(CONDITIONS[self.row]))

    def reward(self, latents):
        image = (0.5 + 0.1 * latents).clamp(0, 1)
        return ToyReward.score(image, float(NUMBERS[self.row]), torch.tanh).sum()

    def clean(self, noise, stop, carries, through_input=True):
        """The last latents, or those predicted at `stop`; a model output is a constant unless carries(step)."""
        latents = torch.tensor(np.array(noise))[None]
        for step, timestep in enumerate(self.timesteps):
            output = self.network(latents if through_input else latents.detach(), step)
            output = output if carries(step) else output.detach()
            if step == stop:
                return latents - self.sigmas[step] * output
            latents = self.scheduler.step(output, timestep, latents).prev_sample
        return latents

    def noised_copy(self, clean, noise):
        """DRaFT-LV: the clean latents predicted from `clean` noised to the last step."""
        step = len(self.timesteps) - 1
        sigma = self.sigmas[step]
        noised = (1 - sigma) * clean.detach() + sigma * torch.tensor(np.array(noise))[None]
        return noised - sigma * self.network(noised, step)

    def kept(self, noise):
        """All latents and velocities of a rollout without gradient, by Euler's formula."""
        latents, velocities = [torch.tensor(np.array(noise))[None]], []
        with torch.no_grad():
            for step in range(STEPS):
                velocities.append(self.network(latents[-1], step))
                latents.append(latents[-1] + (self.sigmas[step + 1] - self.sigmas[step]) * velocities[-1])
        return latents, velocities

    def sparse(self, noise, chosen, rescale):
        """FlowBP-Sparse: the image composed of velocities, those of `chosen` computed again with gradient."""
        latents, velocities = self.kept(noise)
        ways = [abs(self.sigmas[step + 1] - self.sigmas[step]) for step in range(STEPS)]
        factor = 1 + rescale * (sum(ways) / sum(ways[step] for step in chosen) - 1)
        composed = latents[0]
        for step, velocity in enumerate(velocities):
            if step in chosen:
                again = self.network(latents[step], step)
                velocity = again.detach() + factor * (again - again.detach())
            composed = composed + (self.sigmas[step + 1] - self.sigmas[step]) * velocity
        return composed + (latents[-1] - composed).detach()

    def leap(self, noise, first, second, share, tolerance):
        """LeapAlign: (the image, the sample's weight)."""
        latents, _ = self.kept(noise)
        reached = latents[first] + (self.sigmas[second] - self.sigmas[first]) * self.network(latents[first], first)
        middle = reached + (latents[second] - reached).detach()
        seen = share * middle + (1 - share) * middle.detach()
        landed = middle - self.sigmas[second] * self.network(seen, second)
        errors = [(reached - latents[second]).abs().mean(), (landed - latents[-1]).abs().mean()]
        weight = 1 / sum(max(error.item(), tolerance) for error in errors)
        return landed + (latents[-1] - landed).detach(), weight


def check(found, rewards, flows, loss):
    """The loss within 1e-5 relative, the gradient within 1e-4."""
    expected = loss(torch.stack(rewards))
    expected.backward()
    value, slope, _ = found
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    total = sum(flow.weight.grad.item() for flow in flows)
    assert total != 0
    np.testing.assert_allclose(slope, total, rtol=1e-4)


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_refl_on_a_flow(sampler):
    config = refl.Config(sampler=sampler, num_steps=STEPS, stop_min=2, stop_max=6, height=8, width=8, pretrain="off")
    config = dataclasses.replace(config, threshold=60.0, scale=0.1)
    key = jax.random.key(1)
    stop_key, image_key = jax.random.split(key)
    stops = draw_stop(stop_key, ROWS, 2, 6)
    assert len(set(stops.tolist())) > 1
    noise = jax.random.normal(jax.random.split(image_key)[0], (ROWS, *SHAPE))
    flows = [TorchFlow(row, sampler) for row in range(ROWS)]
    rewards = []
    for row, flow in enumerate(flows):
        stop = int(stops[row])
        rewards.append(flow.reward(flow.clean(noise[row], stop, lambda step, stop=stop: step == stop)))
    found = jax_gradient(refl, config, key)
    check(found, rewards, flows, lambda rewards: 0.1 * torch.relu(60.0 - rewards).mean())


VARIANTS = {
    "draft_1": {},
    "draft_3_heun": {"gradient_steps": 3, "sampler": "heun"},
    "draft_3_dpmpp": {"gradient_steps": 3, "sampler": "dpmpp_2m"},
    "full": {"gradient_steps": STEPS},
    "draw_per_step": {"truncation": "per_step"},
    "drtune": {"truncation": "spaced", "gradient_steps": 2, "stop_min": 4},
    "draft_lv": {"noisings": 2},
    "draft_lv_heun": {"noisings": 2, "sampler": "heun"},
    "flowbp_sparse": {"truncation": "weighted", "gradient_steps": 3},
    "flowbp_sparse_rescaled": {"truncation": "weighted", "gradient_steps": 2, "gradient_rescale": 0.5},
    "leapalign": {"truncation": "leap", "leap_tolerance": 0.05},
    "leapalign_all_gradient": {"truncation": "leap", "leap_share": 1.0, "loss": "hinge", "target": 60.0},
}


def method_config(**changes):
    options = {"sampler": "euler", "num_steps": STEPS, "guidance_scale": 1.0, "height": 8, "width": 8, "target": 100.0}
    return reward_gradient.Config(**{**options, **changes})


def torch_images(config, flow, row, noise, drawn, stop, copies):
    """(images' latents, the sample's weight)"""
    if config.truncation == "weighted":
        return [flow.sparse(noise, drawn.calls[row].tolist(), config.gradient_rescale)], 1.0
    if config.truncation == "leap":
        image, weight = flow.leap(noise, *drawn.leaps[row].tolist(), config.leap_share, config.leap_tolerance)
        return [image], weight
    marked = range(STEPS - drawn.last, STEPS) if drawn.steps is None else np.flatnonzero(drawn.steps)
    marked = {int(step) for step in (marked if drawn.calls is None else drawn.calls[row])}
    stop = int(stop[row]) if config.stop_min is not None else None
    clean = flow.clean(noise, stop, marked.__contains__, through_input=drawn.calls is None)
    return [clean, *(flow.noised_copy(clean, one) for one in copies[row])], 1.0


@pytest.mark.parametrize("name", VARIANTS)
def test_reward_gradient_on_a_flow(name):
    config, key = method_config(**VARIANTS[name]), jax.random.key(4)
    stop_key, steps_key, noise_key, _, copies_key, _ = jax.random.split(key, 6)
    stop = jnp.full(ROWS, STEPS)
    if config.stop_min is not None:
        stop = draw_stop(stop_key, ROWS, config.stop_min, STEPS - 1)
    drawn = draw_gradient(config, steps_key, stop)
    noise = jax.random.normal(noise_key, (ROWS, *SHAPE))
    copies = np.asarray(jax.random.normal(copies_key, (ROWS * config.noisings, *SHAPE)))
    copies = copies.reshape(ROWS, config.noisings, *SHAPE)
    flows, rewards, weights = [TorchFlow(row, config.sampler) for row in range(ROWS)], [], []
    for row, flow in enumerate(flows):
        images, weight = torch_images(config, flow, row, noise[row], drawn, stop, copies)
        rewards += [flow.reward(image) for image in images]
        weights += [weight] * len(images)

    def loss(rewards):
        losses = config.target - rewards
        return (torch.tensor(weights) * (torch.relu(losses) if config.loss == "hinge" else losses)).mean()

    found = jax_gradient(reward_gradient, config, key)
    check(found, rewards, flows, loss)
    if config.truncation == "leap":
        assert len(set(weights)) > 1
        np.testing.assert_allclose(found[2]["leap_weight"], np.mean(weights), rtol=1e-4)


def test_leaps_and_chosen_calls_leave_the_sampled_image_as_it_is():
    """Values are the rollout's own, bit for bit for leaps; only gradients differ."""
    sampler = make_sampler("euler", SD3, STEPS)
    noise = jax.random.normal(jax.random.key(0), (ROWS, *SHAPE))
    denoise, params = PIPELINE.denoiser_for(BATCH["cond"]), {"toy": jnp.float32(WEIGHT)}
    plain = rollout(denoise, sampler, noise, None, params=params).state.latents
    leaps = rollout(denoise, sampler, noise, None, params=params, gradient=Gradient(leaps=np.tile([1, 4], (ROWS, 1))))
    np.testing.assert_array_equal(leaps.state.latents, plain)
    assert leaps.leap_errors.shape == (ROWS, 2) and (leaps.leap_errors > 0).all()
    calls = Gradient(calls=np.tile([1, 4], (ROWS, 1)), call_scale=np.array([1.0, 2.0, 3.0]))
    found = rollout(denoise, sampler, noise, None, params=params, gradient=calls)
    np.testing.assert_allclose(found.state.latents, plain, rtol=1e-6, atol=1e-6)


def test_a_penalty_to_the_base_model_counts_both_calls_of_a_leap():
    """The mean of the squared differences of the two velocities to those of the base weights; 1e-5 relative."""
    sampler = make_sampler("euler", SD3, STEPS)
    noise = jax.random.normal(jax.random.key(0), (ROWS, *SHAPE))
    denoise = PIPELINE.denoiser_for(BATCH["cond"])
    own, base = {"toy": jnp.float32(WEIGHT)}, {"toy": jnp.float32(0.5)}
    gradient = Gradient(leaps=np.tile([0, 3], (ROWS, 1)))
    found = rollout(denoise, sampler, noise, None, params=own, reference=base, gradient=gradient).deviation
    state, expected = sampler.init(noise), 0.0
    for step in range(4):
        timesteps = jnp.full(ROWS, sampler.timesteps[step])
        output = denoise(own, state.latents, timesteps, step)
        if step in (0, 3):
            difference = output - denoise(base, state.latents, timesteps, step)
            expected += jnp.square(difference).mean((1, 2, 3)) / 2
        state = sampler.step(state, output, step)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


# Draws


def test_different_indices_are_drawn_one_after_another_by_weight():
    """Of 5 indices 2, weights (i + 1)^2, 20,000 draws: each pair's share within 4 standard deviations."""
    weights = (np.arange(5) + 1.0) ** 2
    share = weights / weights.sum()
    drawn = np.sort(np.asarray(draw_different(jax.random.key(0), 20000, jnp.asarray(weights), 2)), 1)
    assert (drawn[:, 0] < drawn[:, 1]).all()
    for one, other in itertools.combinations(range(5), 2):
        expected = share[one] * share[other] * (1 / (1 - share[one]) + 1 / (1 - share[other]))
        found = ((drawn == [one, other]).all(1)).mean()
        assert abs(found - expected) < 4 * np.sqrt(expected * (1 - expected) / 20000)


def test_leaps_are_pairs_of_all_steps_alike():
    """Of 4 steps: 6 rising pairs, each a sixth of 20,000 draws within 4 standard deviations."""
    config = method_config(truncation="leap", num_steps=4)
    leaps = np.asarray(draw_gradient(config, jax.random.key(0), jnp.full(20000, 4)).leaps)
    pairs, counts = np.unique(leaps, axis=0, return_counts=True)
    assert pairs.tolist() == [list(pair) for pair in itertools.combinations(range(4), 2)]
    assert (np.abs(counts / 20000 - 1 / 6) < 4 * np.sqrt(1 / 6 * 5 / 6 / 20000)).all()


def test_rescaling_by_hand():
    """Sigmas 1, 0.75, 0.25, 0: steps 0 and 2 take half of the way, so 1, 1.5 and 2 for rescale 0, 0.5 and 1."""
    sampler = types.SimpleNamespace(sigma=jnp.array([1.0, 0.75, 0.25]))
    scales = [float(call_scale(sampler, jnp.array([[0, 2]]), rescale)[0]) for rescale in (0.0, 0.5, 1.0)]
    np.testing.assert_allclose(scales, [1.0, 1.5, 2.0], rtol=1e-6)


# Refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": "heun"}, r"sampler='heun': LeapAlign .truncation='leap'. follows Euler's steps; pass 'euler'"),
        ({"num_steps": 1}, "num_steps=1: LeapAlign .* two steps at least"),
        ({"stop_min": 2}, "stop_min=2: LeapAlign .* the sampled image alone; leave it at None"),
        ({"noisings": 1}, "noisings=1: LeapAlign .* leave it at 0"),
        ({"gradient_steps": 2}, "gradient_steps=2: expected at most 1"),
        ({"truncation": "weighted", "noisings": 1}, "noisings=1: FlowBP-Sparse"),
        ({"truncation": "weighted", "gradient_steps": 8}, "gradient_steps=8: expected at most 7"),
    ],
)
def test_settings_that_the_methods_of_flows_do_not_have(changes, message, monkeypatch):
    monkeypatch.setattr(reward_gradient.RewardTuningConfig, "check", lambda *_: None)
    with pytest.raises(ConfigError, match=message):
        method_config(**{"truncation": "leap", **changes}).check(None)


@pytest.mark.parametrize(("truncation", "name"), [("weighted", "FlowBP-Sparse"), ("leap", "LeapAlign")])
def test_methods_of_flows_are_refused_on_schedules_of_betas(truncation, name):
    parts = types.SimpleNamespace(pipeline=ToyFlow({"_class_name": "DDIMScheduler"}))
    message = rf"truncation='{truncation}' \({name}\) follows a flow, and the model's scheduler is DDIMScheduler"
    with pytest.raises(ConfigError, match=message):
        reward_gradient.make(method_config(truncation=truncation), parts)


def test_leaps_of_a_sampler_that_is_no_flow_are_refused():
    sampler = make_sampler("ddim", {"_class_name": "DDIMScheduler"}, STEPS)
    gradient = Gradient(leaps=np.array([[0, 1]]))
    with pytest.raises(ValueError, match="steps along a flow; this sampler's network predicts epsilon"):
        rollout(
            PIPELINE.denoiser_for(BATCH["cond"]), sampler, jnp.zeros((1, *SHAPE)), None, params={}, gradient=gradient
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient": Gradient(leaps=np.arange(2))}, r"leaps has shape \(2,\): expected \[B, 2\]"),
        ({"gradient": Gradient(leaps=np.zeros((1, 3), int))}, r"leaps has shape \(1, 3\)"),
        ({"gradient": Gradient(leaps=np.array([[0, 1]]), last=1)}, r"leaps go to the end: leave out stop, .*last"),
        ({"gradient": Gradient(leaps=np.array([[0, 1]])), "stop": jnp.array([2])}, "leaps go to the end"),
    ],
)
def test_leaps_that_cannot_be_are_refused(options, message):
    sampler = make_sampler("euler", SD3, STEPS)
    with pytest.raises(ValueError, match=message):
        rollout(PIPELINE.denoiser_for(BATCH["cond"]), sampler, jnp.zeros((1, *SHAPE)), None, params={}, **options)


def test_ddim_is_refused_for_policy_gradients_of_flows():
    parts = types.SimpleNamespace(pipeline=PIPELINE)
    with pytest.raises(ConfigError, match=r"'ddim' does not fit .*FlowMatchEulerDiscreteScheduler.*take flow_sde"):
        ddpo.make(ddpo.Config(), parts)
