"""DDPO against PyTorch: diffusers' networks and DDIMScheduler at eta 1, ddpo-pytorch's loss and statistics."""

import copy
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_sd1

from imagereward_jax.config import ConfigError
from imagereward_jax.diffusion.samplers import make_sampler
from imagereward_jax.methods.advantages import PromptAdvantages, Scored
from imagereward_jax.methods.base import STEPS, Models, Phase
from imagereward_jax.methods.ddpo import Config
from imagereward_jax.methods.policy_gradient import (
    check_noise,
    clipped_loss,
    make_choose,
    make_loss,
    make_sample,
    make_tables,
)
from imagereward_jax.recipes import default_config, validate
from imagereward_jax.training.state import init_state
from imagereward_jax.training.step import Fixed, make_train_step, over_updates
from imagereward_jax.weights import mapping

torch = pytest.importorskip("torch", reason="the reference is PyTorch")
diffusers = pytest.importorskip("diffusers", reason="the reference is PyTorch diffusers")

SAMPLES, CLIP, RATE = 3, 0.02, 0.1
ADVANTAGES = np.array([1.5, -0.5, -1.0], np.float32)


def settings(**changes):
    return Config(**{"num_steps": 4, "guidance_scale": 3.0, "height": 8, "width": 8, "clip_range": CLIP, **changes})


class Source:
    """A source as `make_train_step` reads it."""

    updates = 1

    def prepare(self, models, batch):
        return batch


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(pipeline, params, diffusers' UNet with the same weights, its scheduler)."""
    folder = tmp_path_factory.mktemp("model")
    pipeline, params = tiny_sd1.make_one_level(folder / "tokenizer")
    pipeline.save(folder / "saved", params)
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "saved/unet")
    scheduler = diffusers.DDIMScheduler.from_config(tiny_sd1.SCHEDULER)
    scheduler.set_timesteps(settings().num_steps)
    return pipeline, params, unet, scheduler


def sample_rows(made, config):
    """(rows that the compiled program samples, its noise and step noise)."""
    pipeline, params, *_ = made
    rng = np.random.default_rng(0)
    conds = rng.standard_normal((2, SAMPLES, 16, 24)).astype(np.float32)
    batch = {"cond": {"prompt_embeds": conds[0]}, "negative_cond": {"prompt_embeds": conds[1]}}
    key = jax.random.key(3)
    tables = make_tables(config, pipeline)
    images, rows = jax.jit(make_sample(config, pipeline))(Models(params, tables=tables), batch, key)
    assert images.shape == (SAMPLES, 8, 8, 3)
    noise_key, step_key = jax.random.split(key)
    shape = pipeline.latent_shape(config.height, config.width)

    def of_sample(key):
        return jax.vmap(lambda step: jax.random.normal(jax.random.fold_in(key, step), shape))(jnp.arange(4))

    step_noise = jax.vmap(of_sample)(jax.random.split(step_key, SAMPLES))
    return jax.device_get(rows), np.asarray(jax.random.normal(noise_key, (SAMPLES, *shape))), np.asarray(step_noise)


@pytest.fixture(scope="module")
def sampled(made):
    """`sample_rows` of all steps, which all train."""
    return sample_rows(made, settings())


@pytest.fixture(scope="module", params=[True, False], ids=["both branches", "no negative gradient"])
def trained(made, sampled, request):
    """(the minibatch, after each of two updates of plain gradient descent: the UNet, gradient, metrics; whether the
    negative branch has gradient)."""
    pipeline, params, *_ = made
    config = settings(timestep_fraction=0.5, negative_gradient=request.param)
    optimizer = optax.chain(optax.trace(0.0), optax.sgd(RATE))
    sampler = make_sampler("ddim", pipeline.scheduler_config, config.num_steps, config.eta)
    batch = make_choose(config.num_steps, config.trained_steps)(sampled[0], np.random.default_rng(1))
    phase = Phase("ddpo", make_loss(config, pipeline), Source(), sampler)
    step = jax.jit(make_train_step((phase,), optimizer))
    state, found = init_state({"unet": params["unet"]}, optimizer, seed=0, ema=False), []
    for update in range(2):
        rows = {"advantage": ADVANTAGES, "update": np.full(SAMPLES, update, np.int32)}
        state, metrics = step(state, Fixed({}, tables={"ddpo": sampler}), {"ddpo": {**batch, **rows}})
        found.append((state.params["unet"], state.opt_state[0].trace["unet"], over_updates([metrics])))
    return batch, found, request.param


def in_torch(array):
    """NHWC as NCHW."""
    return torch.from_numpy(np.moveaxis(np.asarray(array, np.float32), -1, -3).copy())


def torch_denoise(unet, latents, timesteps, rows, indices, negative_gradient=True):
    """Guided outputs for the samples `indices`, in one call of both branches."""
    embeds = [rows[name]["prompt_embeds"][indices] for name in ("negative_cond", "cond")]
    embeds, timesteps = torch.from_numpy(np.concatenate(embeds)), torch.as_tensor(timesteps).repeat(2)
    negative, positive = unet(torch.cat([latents] * 2), timesteps, embeds).sample.chunk(2)
    negative = negative if negative_gradient else negative.detach()
    return negative + settings().guidance_scale * (positive - negative)


def torch_transition(scheduler, output, step, latents, eta=1.0):
    """(mean, std) of diffusers' step: the mean is the step with noise of zero."""
    t, zero = scheduler.timesteps[step], torch.zeros_like(latents)
    mean = scheduler.step(output, t, latents, eta=eta, variance_noise=zero).prev_sample
    return mean, eta * scheduler._get_variance(t, t - 1000 // len(scheduler.timesteps)) ** 0.5


def torch_log_prob(following, mean, std):
    """ddpo-pytorch's ddim_step_with_logprob."""
    density = -((following.detach() - mean) ** 2) / (2 * std**2) - torch.log(std) - math.log(math.sqrt(2 * math.pi))
    return density.mean(dim=tuple(range(1, density.ndim)))


def torch_loss(unet, scheduler, batch, negative_gradient):
    """ddpo-pytorch's loss over all samples and their steps; also the plain -mean(A log p) and the ratios."""
    steps = batch[STEPS]["step"].ravel()
    latents, following = (in_torch(np.concatenate(batch[STEPS][name])) for name in ("latents", "following"))
    rows = np.repeat(np.arange(SAMPLES), len(steps) // SAMPLES)
    output = torch_denoise(unet, latents, scheduler.timesteps[steps], batch, rows, negative_gradient)
    log_probs = torch.cat(
        [
            torch_log_prob(following[i, None], *torch_transition(scheduler, output[i, None], step, latents[i, None]))
            for i, step in enumerate(steps)
        ]
    )
    ratio = torch.exp(log_probs - torch.from_numpy(batch[STEPS]["log_prob"].ravel()))
    advantage = torch.from_numpy(ADVANTAGES[rows])
    clipped = -advantage * torch.clamp(ratio, 1.0 - CLIP, 1.0 + CLIP)
    loss = torch.maximum(-advantage * ratio, clipped).mean()
    return loss, -(advantage * log_probs).mean(), ratio.detach().numpy()


def gradient_of(loss, unet):
    unet.zero_grad()
    loss.backward()
    return {name: weight.grad.numpy().copy() for name, weight in unet.named_parameters()}


def assert_same(pipeline, ours, theirs, relative):
    """All of it within a tenth of `relative`, and each tensor, by its own largest entry, within all of it.

    Some are zero but for rounding, as to_k's biases.
    """
    ours = mapping.to_torch(pipeline.networks["unet"], jax.device_get(ours))
    largest = max(np.abs(array).max() for array in theirs.values())
    assert ours.keys() == theirs.keys()
    whole, difference = (
        np.sqrt(sum(np.square(array).sum() for array in arrays))
        for arrays in (theirs.values(), [ours[name] - theirs[name] for name in theirs])
    )
    assert difference < 0.1 * relative * whole
    for name, expected in theirs.items():
        tolerance = relative * np.abs(expected).max() + 1e-6 * largest
        np.testing.assert_allclose(ours[name], expected, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("window", [(0, 4), (1, 3)], ids=["all steps", "a window"])
def test_states_and_log_probabilities_are_those_of_pytorch(made, sampled, window):
    """The whole chain of each sample from its own noise: states within 2e-5 of their size, log-probabilities 1e-5.

    Steps outside the window are diffusers' at eta 0.
    """
    _, _, unet, scheduler = made
    low, high = window
    everything = window == (0, 4)
    rows, noise, step_noise = sampled if everything else sample_rows(made, settings(window_low=low, window_high=high))
    assert set(rows["start"]) == {low}
    latents = in_torch(noise)
    for step, t in enumerate(scheduler.timesteps):
        with torch.no_grad():
            output = torch_denoise(unet, latents, t.repeat(SAMPLES), rows, np.arange(SAMPLES))
            mean, std = torch_transition(scheduler, output, step, latents, float(low <= step < high))
        following = mean + std * in_torch(step_noise[:, step])
        for name, expected in (("latents", latents), ("following", following)):
            size = float(expected.abs().max())
            np.testing.assert_allclose(in_torch(rows[STEPS][name][:, step]), expected, rtol=0, atol=2e-5 * size)
        if low <= step < high:
            log_probs = torch_log_prob(following, mean, std)
            np.testing.assert_allclose(rows[STEPS]["log_prob"][:, step], log_probs, rtol=0, atol=1e-5)
        latents = following


def test_the_ratio_is_one_before_the_first_update(trained):
    """Sampling and training are two programs; 1e-6 in float32. After an update it is no longer looked at."""
    _, ((_, _, first), (_, _, second)), _ = trained
    assert first["ddpo/ratio_error"] < 1e-6 and first["ddpo/clipfrac"] == 0 and first["ddpo/approx_kl"] < 1e-12
    assert second["ddpo/ratio_error"] == 0 and second["ddpo/approx_kl"] > 1e-6


def test_losses_gradients_and_updates_are_those_of_pytorch(made, trained):
    """Two updates of plain descent. The first, at ratio 1, has the plain policy gradient, -mean(A d log p); in the
    second ratios are clipped on both sides. Loss 1e-5; gradient 1e-4 in all, 1e-3 per tensor; weights 1e-6, 1e-5."""
    pipeline, _, unet, scheduler = made
    batch, found, negative_gradient = trained
    unet = copy.deepcopy(unet)
    for update, (weights, gradient, metrics) in enumerate(found):
        loss, plain, ratios = torch_loss(unet, scheduler, batch, negative_gradient)
        np.testing.assert_allclose(metrics["ddpo/loss"], loss.item(), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(metrics["ddpo/clipfrac"], (np.abs(ratios - 1) > CLIP).mean(), atol=1e-6)
        np.testing.assert_allclose(
            metrics["ddpo/approx_kl"], 0.5 * np.square(np.log(ratios)).mean(), rtol=1e-3, atol=1e-9
        )
        assert update == 0 or ratios.min() < 1 - CLIP < ratios[np.abs(ratios - 1).argmin()] < 1 + CLIP < ratios.max()
        theirs = gradient_of(plain if update == 0 else loss, unet)
        assert_same(pipeline, gradient, theirs, 1e-3)
        with torch.no_grad():
            for name, weight in unet.named_parameters():
                weight -= RATE * torch.from_numpy(theirs[name])
        assert_same(
            pipeline, weights, {name: weight.detach().numpy() for name, weight in unet.named_parameters()}, 1e-5
        )


# by hand


def test_the_clipped_loss_by_hand():
    """A > 0 gains nothing above 1 + c, A < 0 nothing below 1 - c; the other sides stay; gradients -A r or 0."""
    ratio = jnp.array([1.2, 0.8, 1.2, 0.8, 1.05])
    advantage = jnp.array([2.0, 2.0, -2.0, -2.0, 1.0])
    expected = [-2 * 1.1, -2 * 0.8, 2 * 1.2, 2 * 0.9, -1.05]
    np.testing.assert_allclose(clipped_loss(ratio, advantage, 0.1), np.mean(expected), rtol=1e-6)
    slopes = 5 * jax.grad(clipped_loss)(ratio, advantage, 0.1)
    np.testing.assert_allclose(slopes, [0, -2, 2, 0, -1], rtol=1e-6)


def reference_advantages(buffers, prompts, rewards, size, least, global_std=False):
    """ddpo-pytorch's PerPromptStatTracker.update; global_std as in flow_grpo's."""
    found = np.empty(len(rewards))
    for prompt in set(prompts):
        rows = [index for index, other in enumerate(prompts) if other == prompt]
        buffers[prompt] = (buffers.get(prompt, []) + [rewards[row] for row in rows])[-size:]
        basis = rewards if len(buffers[prompt]) < least else buffers[prompt]
        for row in rows:
            found[row] = (rewards[row] - np.mean(basis)) / (np.std(rewards if global_std else basis) + 1e-6)
    return found


@pytest.mark.parametrize("std", ["prompt", "step"])
def test_advantages_are_those_of_ddpo_pytorchs_tracker(std):
    """Five steps of 12 samples, one prompt of which has too few until the last; resumed through JSON. 1e-6."""
    rng, buffers = np.random.default_rng(0), {}
    assign = PromptAdvantages(buffer=6, min_count=5, clip=100.0, std=std)
    for _ in range(5):
        prompts = rng.permutation(list("aaaaaabbbbbc")).tolist()
        rewards = rng.normal(size=12).astype(np.float32)
        again = PromptAdvantages(buffer=6, min_count=5, clip=100.0, std=std)
        again.set_state(json.loads(json.dumps(assign.get_state())))
        found = assign(Scored(prompts, rewards))
        np.testing.assert_array_equal(again(Scored(prompts, rewards)), found)
        expected = reference_advantages(buffers, prompts, rewards.astype(np.float64), 6, 5, std == "step")
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    assert {prompt: len(buffer) for prompt, buffer in buffers.items()} == {"a": 6, "b": 6, "c": 5}


def test_advantages_without_buffers_and_both_clips():
    """(r - mean) / (population std + 1e-8) over the step, cut at +-1; rewards that are all equal are no advantage."""
    assign = PromptAdvantages(buffer=0, min_count=1, clip=1.0)
    rewards = np.array([0.0, 1.0, 2.0, 7.0], np.float32)
    expected = np.clip((rewards - 2.5) / (np.std(rewards) + 1e-8), -1, 1)
    np.testing.assert_allclose(assign(Scored(list("aabb"), rewards)), expected, rtol=1e-6)
    assert expected.max() == 1 and assign.get_state() == {}
    assert PromptAdvantages(buffer=0, min_count=1, clip=1.0)(Scored(list("aa"), np.full(2, 3.0))).tolist() == [0, 0]


def test_every_sample_trains_on_steps_of_its_own():
    """Half of 10 steps: distinct, drawn for each sample, and what was recorded at them."""
    steps = {"log_prob": np.arange(60.0).reshape(6, 10), "latents": np.arange(60).reshape(6, 10, 1, 1, 1)}
    rows = {"advantage": np.arange(6), "start": np.zeros(6, np.int32), STEPS: steps}
    batch = make_choose(10, 5)(rows, np.random.default_rng(0))
    order = batch[STEPS]["step"]
    assert order.shape == (6, 5) and len({tuple(row) for row in order.tolist()}) == 6
    assert all(len(set(row)) == 5 for row in order.tolist())
    np.testing.assert_array_equal(batch[STEPS]["log_prob"], np.arange(6)[:, None] * 10 + order)
    np.testing.assert_array_equal(batch[STEPS]["latents"][..., 0, 0, 0], batch[STEPS]["log_prob"])


@pytest.mark.parametrize(
    ("changes", "eta", "said"),
    [
        ({"steps_offset": 0}, 1.0, r"step 50 of 50 \(timestep 0\) of ddim with eta=1 .*PNDMScheduler', steps_offset=0"),
        ({"set_alpha_to_one": True}, 1.0, r"step 50 of 50 \(timestep 1\).*set_alpha_to_one=True"),
        ({}, 0.0, r"step 50 of 50 \(timestep 1\) of ddim with eta=0 .*need eta above 0"),
    ],
)
def test_schedules_with_a_step_without_noise_are_refused(changes, eta, said):
    config, schedule = Config(eta=eta), tiny_sd1.SCHEDULER | changes
    with pytest.raises(ConfigError, match=said):
        check_noise(make_sampler("ddim", schedule, 50, eta), config, schedule)
    check_noise(make_sampler("ddim", tiny_sd1.SCHEDULER, 50, 1.0), config, tiny_sd1.SCHEDULER)


def test_a_window_without_the_silent_step_trains():
    """The message's other way out: the last of 50 steps adds no noise, and does not train."""
    schedule = tiny_sd1.SCHEDULER | {"steps_offset": 0}
    sampler = make_sampler("ddim", schedule, 50, 1.0)
    with pytest.raises(ConfigError, match="or window_high=49, which leaves it out"):
        check_noise(sampler, Config(), schedule)
    check_noise(sampler, Config(window_high=49), schedule)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"method.rounds": 3, "method.round_size": 4},
            "rounds=3 of round_size=4 give 12 samples .* config.batch_size=8",
        ),
        ({"method.timestep_fraction": 0.01}, "timestep_fraction=0.01 leaves none of 50 steps"),
        ({"method.window_low": 50}, r"window_size=0 steps does not lie in \[window_low=50, window_high=50\)"),
        ({"method.prompt_min_count": 17}, "prompt_min_count=17 is never reached with prompt_buffer=16"),
        ({"lora.dropout": 0.1}, "pass --config.lora.dropout=0"),
        ({"reward.path": ""}, "config.reward.path is empty"),
        ({"method.clip_range": 0.0}, "config.method.clip_range=0.0: expected a number above 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, said):
    config = default_config("ddpo")
    given = {"model.path": "m", "data.prompts": "p", "eval.prompts": "e", "reward.path": "jpeg-compressibility"}
    config.update_from_flattened_dict(given)
    validate(config)
    config.update_from_flattened_dict(changes)
    with pytest.raises(ConfigError, match=said):
        validate(config)
