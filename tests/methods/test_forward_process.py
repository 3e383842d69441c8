"""DiffusionNFT and AWM against the formulas of the originals in PyTorch, and how their copies of the weights follow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_sd1
from toy_flow import SD3, ToyFlow
from toy_groups import WEIGHT, run, settings

from imagereward_jax.config import ConfigError
from imagereward_jax.diffusion.samplers import make_sampler
from imagereward_jax.methods import awm, nft
from imagereward_jax.methods.base import STEPS, Models
from imagereward_jax.methods.forward_process import make_choose, noised
from imagereward_jax.recipes import default_config, validate
from imagereward_jax.training.mesh import make_mesh

torch = pytest.importorskip("torch", reason="the reference is PyTorch")

PIPELINE, ROWS, KEY = ToyFlow(), 3, jax.random.key(5)
CONDITIONS = np.array([0.1, -0.4, 0.7], np.float32)
ADVANTAGES = np.array([1.5, -0.5, -6.0], np.float32)
BASE, OLD, AVERAGE = 0.6, 0.75, 0.72  # weights of the reference and the copies
CLEAN = np.random.default_rng(0).standard_normal((ROWS, 8, 8, 4)).astype(np.float32)
STEP = np.array([0, 3, 4], np.int32)


def one_device():
    return make_mesh(1, 1, jax.devices()[:1])


def found(module, config, copies, name="dpmpp_2m"):
    """(loss, gradient by the weight, metrics) of one noise level of each sample."""
    sampler, loss = make_sampler(name, SD3, 6), module.make_loss(config, PIPELINE)
    batch = {"cond": {"x": CONDITIONS}, "clean": CLEAN, "step": STEP, "update": np.zeros(ROWS, np.int32)}
    batch["advantage"] = np.clip(ADVANTAGES, -config.advantage_clip, config.advantage_clip)

    @jax.jit
    def value(weight):
        others = {key: {"toy": jnp.float32(copy)} for key, copy in copies.items()}
        base = {"toy": jnp.float32(BASE)}
        return loss(Models({"toy": weight}, base, others, sampler), batch, KEY)

    (loss_value, metrics), slope = jax.value_and_grad(value, has_aux=True)(WEIGHT)
    return float(loss_value), float(slope), metrics


class Torch:
    """Samples noised as the loss noises them, and the network's velocities, in float64."""

    def __init__(self, name="dpmpp_2m"):
        sampler = make_sampler(name, SD3, 6)
        self.weight = torch.tensor(WEIGHT, dtype=torch.float64, requires_grad=True)
        self.t = torch.tensor(sampler.sigma[STEP]).double().reshape(-1, 1, 1, 1)
        self.timesteps = torch.tensor(sampler.timesteps[STEP]).double().reshape(-1, 1, 1, 1)
        self.x0, self.noise = torch.tensor(CLEAN).double(), torch.tensor(np.array(jax.random.normal(KEY, CLEAN.shape)))
        self.xt = (1 - self.t) * self.x0 + self.t * self.noise
        self.x = torch.tensor(CONDITIONS).double().reshape(-1, 1, 1, 1)

    def velocity(self, weight):
        return PIPELINE.network(weight, self.xt, self.timesteps, torch.sin, self.x)


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_nft_is_the_originals(beta):
    """DiffusionNFT's training loss, float64, at weights that are neither old nor base: 1e-5; gradient 1e-3."""
    loss, slope, _ = found(nft, settings("nft", beta=beta, base_penalty=0.01), {"old": OLD})
    made = Torch()
    forward, old, base = made.velocity(made.weight), made.velocity(OLD), made.velocity(BASE)
    r = (torch.tensor(ADVANTAGES).clamp(-5, 5).double() / 5) / 2.0 + 0.5

    def branch(prediction):
        x0_prediction = made.xt - made.t * prediction
        with torch.no_grad():
            weight_factor = (x0_prediction - made.x0).abs().mean(dim=(1, 2, 3), keepdim=True).clip(min=0.00001)
        return ((x0_prediction - made.x0) ** 2 / weight_factor).mean(dim=(1, 2, 3))

    positive, negative = branch(beta * forward + (1 - beta) * old), branch((1 + beta) * old - beta * forward)
    expected = 5 * (r * positive / beta + (1 - r) * negative / beta).mean()
    expected = expected + 0.01 * ((forward - base) ** 2).mean(dim=(1, 2, 3)).mean()
    expected.backward()
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-5)
    np.testing.assert_allclose(slope, made.weight.grad, rtol=1e-3)


def torch_surrogate(kind, loss, t):
    if kind == "ghuber":
        return -t / 0.25 * ((loss + 1e-10) ** 0.25 - 1e-10**0.25)
    if kind == "sqrt":
        return -t * (torch.sqrt(loss + 1e-10) - 1e-5)
    return -loss * {"plain": 1.0, "t": t, "t2": t**2}[kind]


@pytest.mark.parametrize("kind", ["plain", "t", "t2", "sqrt", "ghuber"])
@pytest.mark.parametrize("with_old", [False, True])
def test_awm_is_the_originals(kind, with_old):
    """AWM's loss with both penalties, float64; ratios to itself, or to older weights and clipped: 1e-5; 1e-3."""
    config = settings("awm", surrogate=kind, clip_range=0.002, base_penalty=0.01)
    loss, slope, metrics = found(awm, config, {"average": AVERAGE} | ({"old": OLD} if with_old else {}))
    made = Torch()
    velocity, target, t = made.velocity(made.weight), made.noise - made.x0, made.t.reshape(-1)

    def log_prob(velocity):
        return torch_surrogate(kind, ((velocity - target) ** 2).mean(dim=(1, 2, 3)), t)

    new = log_prob(velocity)
    ratio = torch.exp(new - (log_prob(made.velocity(OLD)) if with_old else new.detach()))
    advantage = torch.tensor(ADVANTAGES).clamp(-5, 5) / 5
    expected = torch.maximum(-advantage * ratio, -advantage * torch.clamp(ratio, 0.998, 1.002)).mean()
    expected = expected + 0.01 * ((velocity - made.velocity(BASE)) ** 2).mean()
    expected = expected + 1.0 * ((velocity - made.velocity(AVERAGE)) ** 2).mean()
    expected.backward()
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(slope, made.weight.grad, rtol=1e-3)
    assert (metrics["ratio_error"].value > 0) == with_old and (metrics["clipfrac"] > 0) == with_old


def test_samples_of_models_of_betas_are_noised_as_their_schedule_noises():
    """Euler's latents are scaled otherwise; what the network sees is the same x_t, and its target the noise."""
    schedule = tiny_sd1.SCHEDULER | {"timestep_spacing": "leading"}
    model, step = ToyFlow(schedule), np.array([0, 3, 5])
    noise = np.random.default_rng(1).standard_normal(CLEAN.shape).astype(np.float32)
    for name in ("ddim", "euler"):
        sampler = make_sampler(name, schedule, 6)
        state = noised(sampler, CLEAN, noise, step)
        timesteps = sampler.timesteps[step].astype(int)
        expected = model.schedule.add_noise(jnp.asarray(CLEAN), noise, timesteps)
        np.testing.assert_allclose(sampler.model_input(state, step), expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(sampler.target(CLEAN, noise, step), noise)


def test_every_sample_trains_on_noise_levels_of_its_own():
    """Three different of the steps 1 to 5, drawn for each sample."""
    choose = make_choose(settings("awm", num_steps=6, noise_levels=3))
    steps = choose({"clean": np.zeros((20, 1))}, np.random.default_rng(0))[STEPS]["step"]
    assert steps.shape == (20, 3) and steps.min() == 1 and steps.max() == 5
    assert all(len(set(row)) == 3 for row in steps.tolist()) and len({tuple(row) for row in steps.tolist()}) > 10


def test_the_old_policy_samples_and_follows_by_the_number_of_the_update():
    """Two updates per step: the old policy rests between them; after update n it keeps min(0.1 n, 0.5) of itself."""
    config = settings("nft", old_rate=0.1)
    done = run("nft", config, one_device(), 8, steps=2, rate=0.1)
    decay = done.method.copies["old"]
    assert done.source.updates == 2
    np.testing.assert_allclose([float(decay(n)) for n in range(6)], [1, 0.2, 1, 0.4, 1, 0.5], rtol=1e-6)
    ocr = nft.old_decay(settings("nft", old_rate=0.0075, old_delay=75, old_most=0.999), 1)
    np.testing.assert_allclose([float(ocr(n)) for n in (0, 74, 75, 500)], [0, 0, 0.0075, 0.999], atol=1e-6)
    assert float(done.state.copies["old"]["toy"]) != float(done.state.params["toy"]) != WEIGHT


def test_a_copy_of_awm_is_the_weights_that_sampled():
    """With two updates per step ratios are 1 in the first and not in the second; with one no copy is kept."""
    config = settings("awm", average_penalty=0.0)
    done = run("awm", config, one_device(), 8, steps=2, rate=0.05)
    errors = [float(metrics["ratio_error"].value) for metrics in done.metrics]
    assert set(done.method.copies) == {"old"} and max(errors) < 1e-6
    np.testing.assert_array_equal(done.state.copies["old"]["toy"], done.state.params["toy"])
    assert set(run("awm", config, one_device(), 16).method.copies) == set()


@pytest.mark.parametrize(
    ("method", "changes", "said"),
    [
        ("nft", {"method.noise_levels": 11}, "noise_levels=11: expected at most num_steps=10 less first_step=0"),
        ("awm", {"method.noise_levels": 14}, "noise_levels=14: expected at most num_steps=14 less first_step=1"),
        ("nft", {"method.beta": 0.0}, "config.method.beta=0.0: expected a number above 0"),
        ("awm", {"method.surrogate": "huber"}, "did you mean 'ghuber'"),
        ("nft", {"method.group_size": 7}, "group_size=7 does not divide the 24 samples"),
    ],
)
def test_settings_that_do_not_fit_are_refused(method, changes, said):
    config = default_config(method)
    given = {"model.path": "m", "data.prompts": "p", "eval.prompts": "e", "reward.path": "jpeg-compressibility"}
    config.update_from_flattened_dict({**given, "batch_size": 24})
    validate(config)
    config.update_from_flattened_dict(changes)
    with pytest.raises(ConfigError, match=said):
        validate(config)
