"""The rollout: its steps, its gradient and its record, against steps written out by hand, PyTorch and scipy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import tiny_sd1

from imagereward_jax.diffusion.rollout import Gradient, Record, rollout
from imagereward_jax.diffusion.sampler import Transition, log_prob
from imagereward_jax.diffusion.samplers import make_sampler, samplers_of

STEPS = 5
SHAPE = (2, 2, 2, 4)
WEIGHT = 0.7


def smooth(weight, x, t, sin):
    """A smooth stand-in for the network, the same in jax and torch, in any layout of equal sides."""
    return weight * sin(1.3 * x + 0.002 * t) + 0.2 * weight * x


def denoise(weight, latents, timesteps, step):
    return smooth(weight, latents, timesteps[:, None, None, None], jnp.sin)


def start(shape=SHAPE):
    return jax.random.normal(jax.random.key(0), shape), jax.random.split(jax.random.key(1), shape[0])


def fresh_noise(key, step, shape=SHAPE):
    return jax.random.normal(jax.random.fold_in(key, step), (1, *shape[1:]))


def by_hand(weight, sampler, noise, keys, stops, *, carries, predict=False):
    """Sum of the last latents (or of the predicted clean latents), sample by sample, step by step.

    carries: (row, step) -> "state" (the state there is a constant), "output" (the model output is), "input" (the
    denoiser's input is) or "all".
    """
    total = 0.0
    for row, stop in enumerate(stops):
        state = sampler.init(noise[row : row + 1])
        for step in range(stop + predict):
            model_input = sampler.model_input(state, step)
            kind = carries(row, step)
            model_input = jax.lax.stop_gradient(model_input) if kind == "input" else model_input
            output = denoise(weight, model_input, sampler.timesteps[step, None], step)
            output = output if kind in ("all", "input") else jax.lax.stop_gradient(output)
            if predict and step == stop:
                total += sampler.pred_original(state, output, step).sum()
                break
            state = sampler.step(state, output, step, fresh_noise(keys[row], step))
            state = jax.lax.stop_gradient(state) if kind == "state" else state
        total += 0.0 if predict else state.latents.sum()
    return total


# name: (stops, Gradient, what of each (row, step) carries gradient)
MARKED = np.array([False, True, False, True, True])
CALLS = np.array([[0, 2, 3], [1, 3, 4]])
VARIANTS = {
    "last": ([3, 5], Gradient(last=2), lambda row, step: "all" if step >= [1, 3][row] else "state"),
    "last_past_the_start": ([1, 4], Gradient(last=3), lambda row, step: "all" if step >= [0, 1][row] else "state"),
    "steps": ([4, 5], Gradient(last=5, steps=MARKED), lambda row, step: "all" if MARKED[step] else "output"),
    "steps_of_the_last": (
        [5, 5],
        Gradient(last=3, steps=MARKED),
        lambda row, step: "state" if step < 2 else "all" if MARKED[step] else "output",
    ),
    "predict": ([2, 4], Gradient(predict=True), lambda row, step: "all" if step == [2, 4][row] else "state"),
    "calls": ([3, 5], Gradient(calls=CALLS), lambda row, step: "input" if step in CALLS[row] else "output"),
    "calls_and_predict": (
        [3, 3],
        Gradient(calls=CALLS, predict=True),
        lambda row, step: "input" if step in CALLS[row] else "output",
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_gradient_is_that_of_the_steps_written_out(name):
    """Value and gradient within 1e-5 relative, with noise (DDIM, eta 0.5) and a stop for each sample."""
    stops, gradient, carries = VARIANTS[name]
    sampler = make_sampler("ddim", tiny_sd1.SCHEDULER, STEPS, eta=0.5)
    noise, keys = start()

    def rolled(weight):
        found = rollout(denoise, sampler, noise, keys, params=weight, stop=jnp.array(stops), gradient=gradient)
        return (found.predicted if gradient.predict else found.state.latents).sum()

    def expected(weight):
        return by_hand(weight, sampler, noise, keys, stops, carries=carries, predict=gradient.predict)

    value, slope = jax.value_and_grad(rolled)(WEIGHT)
    expected_value, expected_slope = jax.value_and_grad(expected)(WEIGHT)
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    np.testing.assert_allclose(slope, expected_slope, rtol=1e-5)
    everything = jax.grad(lambda weight: by_hand(weight, sampler, noise, keys, stops, carries=lambda *_: "all"))(WEIGHT)
    assert abs(everything - slope) > 1e-3 * abs(everything), "the variant should differ from the whole gradient"


@pytest.mark.parametrize(
    ("gradient", "marked"),
    [
        (Gradient(last=1), [False] * 4 + [True]),
        (Gradient(last=5, steps=MARKED), MARKED),
        (Gradient(calls=np.tile(np.flatnonzero(MARKED), (2, 1))), MARKED),
    ],
    ids=["last_1", "draw_per_step", "drtune"],
)
def test_gradient_is_that_of_pytorch_with_diffusers_scheduler(gradient, marked):
    """DDIM without noise, d(mean of squares)/d(weight) by autograd, as AlignProp's code detaches; 1e-5 relative.

    In float64: at the last step two terms of the gradient nearly cancel, which costs diffusers' float32 tables digits.
    """
    torch = pytest.importorskip("torch", reason="the reference is PyTorch diffusers")
    diffusers = pytest.importorskip("diffusers", reason="the reference is PyTorch diffusers")
    noise, _ = start()
    scheduler = diffusers.DDIMScheduler.from_config(tiny_sd1.SCHEDULER)
    scheduler.set_timesteps(STEPS)
    scheduler.alphas_cumprod = torch.cumprod(1 - scheduler.betas.double(), 0)
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    weight, latents = torch.tensor(WEIGHT, requires_grad=True).double(), torch.tensor(np.asarray(noise)).double()
    weight.retain_grad()
    for carries, t in zip(marked, scheduler.timesteps, strict=True):
        model_input = latents if gradient.calls is None else latents.detach()
        output = smooth(weight, model_input, float(t), torch.sin)
        latents = scheduler.step(output if carries else output.detach(), t, latents).prev_sample
    latents.square().mean().backward()

    sampler = make_sampler("ddim", tiny_sd1.SCHEDULER, STEPS)

    def rolled(weight):
        state = rollout(denoise, sampler, noise, None, params=weight, gradient=gradient).state
        return jnp.square(state.latents).mean()

    np.testing.assert_allclose(jax.grad(rolled)(WEIGHT), weight.grad.item(), rtol=1e-5)


def test_one_program_serves_every_sampler_and_every_stop():
    """All samplers of 11 steps: each sample ends where its own steps lead; float32 rounding. One compilation, and one
    of UniPC, whose state holds more."""
    noise, keys = start((3, 2, 2, 4))

    @jax.jit
    def run(sampler, stop):
        return rollout(denoise, sampler, noise, keys, params=WEIGHT, stop=stop).state.latents

    for name in samplers_of(tiny_sd1.SCHEDULER):
        sampler = make_sampler(name, tiny_sd1.SCHEDULER, 11, eta=0.5 if name in ("ddim", "tcd") else 0.0)
        stops = [0, 3, 11] if name == "ddpm" else [5, 5, 1]
        got = run(sampler, jnp.array(stops))
        for row, stop in enumerate(stops):
            state = sampler.init(noise[row : row + 1])
            for step in range(stop):
                output = denoise(WEIGHT, sampler.model_input(state, step), sampler.timesteps[step, None], step)
                state = sampler.step(state, output, step, fresh_noise(keys[row], step, noise.shape))
            np.testing.assert_allclose(got[row], state.latents[0], rtol=2e-5, atol=1e-5, err_msg=name)
    assert run._cache_size() == 2


def test_steps_without_gradient_use_the_frozen_weights_and_no_dropout():
    """The last step alone calls `denoise_with_gradient` with `params`; it is told its index; no gradient elsewhere."""
    sampler = make_sampler("ddim", tiny_sd1.SCHEDULER, STEPS)
    noise, _ = start()

    def without(params, latents, timesteps, step):
        return params * (1.0 + step[:, None, None, None]) * latents

    def with_gradient(params, latents, timesteps, step):
        return 10.0 + without(params, latents, timesteps, step)

    def rolled(params, frozen):
        options = {"params": params, "frozen": frozen, "denoise_with_gradient": with_gradient}
        return rollout(without, sampler, noise, None, gradient=Gradient(last=1), **options).state.latents.sum()

    state = sampler.init(noise)
    for step in range(STEPS - 1):
        state = sampler.step(state, 0.1 * (1.0 + step) * state.latents, step)
    output = 10.0 + 0.05 * STEPS * state.latents
    expected = sampler.step(state, output, STEPS - 1).latents.sum()
    np.testing.assert_allclose(rolled(0.05, 0.1), expected, rtol=1e-5)
    slopes = jax.grad(rolled, argnums=(0, 1))(0.05, 0.1)
    # x_0 = (x - sigma output) / alpha, then weights of x_0 and of the noise: d latents / d output of the last step.
    weights = sampler.weights
    per_output = weights.noise[-1] - weights.original[-1] * sampler.sigma[-1] / sampler.alpha[-1]
    np.testing.assert_allclose(slopes[0], per_output * (STEPS * state.latents).sum(), rtol=1e-4)
    assert slopes[1] == 0


@pytest.mark.parametrize("gradient", [Gradient(last=3), Gradient(last=5, steps=MARKED), Gradient(calls=CALLS)])
def test_deviation_is_the_mean_over_calls_with_gradient(gradient):
    """Of squared differences to the reference's outputs at the same latents, per sample, and its slope; 1e-5."""
    sampler = make_sampler("ddim", tiny_sd1.SCHEDULER, STEPS)
    noise, _ = start()

    def rolled(weight):
        options = {"params": weight, "reference": 0.5, "gradient": gradient}
        return rollout(denoise, sampler, noise, None, **options).deviation

    def expected(weight):
        state, found = sampler.init(noise), []
        for step in range(STEPS):
            model_input, t = sampler.model_input(state, step), sampler.timesteps[step, None]
            chosen = CALLS if gradient.calls is not None else np.arange(2, 5) if gradient.steps is None else [1, 3, 4]
            rows = (np.broadcast_to(chosen, (2, 3)) == step).any(1)[:, None, None, None]
            held = model_input if gradient.calls is None else jax.lax.stop_gradient(model_input)
            output = denoise(weight, jnp.where(rows, held, model_input), t, step)
            base = denoise(0.5, jax.lax.stop_gradient(model_input), t, step)
            found.append(jnp.where(rows, jnp.square(output - base), 0.0).mean((1, 2, 3)))
            state = sampler.step(state, jnp.where(rows, output, jax.lax.stop_gradient(output)), step)
            state = jax.lax.stop_gradient(state) if gradient.last == 3 and step < 2 else state
        return sum(found) / 3

    np.testing.assert_allclose(rolled(WEIGHT), expected(WEIGHT), rtol=1e-5)
    slopes = [jax.jacobian(function)(WEIGHT) for function in (rolled, expected)]
    np.testing.assert_allclose(*slopes, rtol=1e-5)


def test_gradient_is_zero_without_steps_that_carry_it():
    sampler = make_sampler("ddim", tiny_sd1.SCHEDULER, STEPS)
    noise, _ = start()
    for gradient in (Gradient(), Gradient(last=STEPS, steps=np.zeros(STEPS, bool))):
        slope = jax.grad(
            lambda weight: rollout(
                denoise,
                sampler,
                noise,
                None,
                params=weight,
                stop=jnp.array([2, 4]),
                gradient=gradient,  # noqa: B023
            ).state.latents.sum()
        )(WEIGHT)
        assert slope == 0


@pytest.mark.parametrize("reference", [None, 0.5])
@pytest.mark.parametrize("steps", [None, np.ones(STEPS, bool)])
def test_a_call_without_gradient_is_made_once(steps, reference):
    """Calls with gradient are made again in the backward pass; those in steps without it and of the reference not."""
    sampler, (noise, _) = make_sampler("ddim", tiny_sd1.SCHEDULER, STEPS), start()

    def loss(weight):
        options = {"params": weight, "reference": reference, "gradient": Gradient(last=STEPS, steps=steps)}
        rolled = rollout(denoise, sampler, noise, None, **options)
        return rolled.state.latents.sum() + (0.0 if reference is None else rolled.deviation.sum())

    def calls(jaxpr):
        inner = [getattr(part, "jaxpr", part) for equation in jaxpr.eqns for part in jax.tree.leaves(equation.params)]
        here = sum(equation.primitive.name == "sin" for equation in jaxpr.eqns)
        return here + sum(calls(part) for part in inner if hasattr(part, "eqns"))

    forward = 1 + (steps is not None) + (reference is not None)
    assert calls(jax.make_jaxpr(jax.grad(loss))(WEIGHT).jaxpr) == forward + 1


def test_memory_grows_by_the_latents_of_a_step():
    """What is kept for the backward pass of 8 steps more: 8 states of latents, none of the denoiser's 64 times wider
    activations (a tenth of them allowed)."""
    noise, keys = start((2, 8, 8, 4))

    def wide(weight, latents, timesteps, step):
        return jnp.sin(latents @ weight) @ weight.T

    def temporary(num_steps):
        sampler = make_sampler("ddim", tiny_sd1.SCHEDULER, num_steps)
        gradient = Gradient(last=num_steps)
        loss = lambda weight: rollout(wide, sampler, noise, keys, params=weight, gradient=gradient).state.latents.sum()  # noqa: E731
        return jax.jit(jax.grad(loss)).lower(jnp.ones((4, 256))).compile().memory_analysis().temp_size_in_bytes

    activations = 2 * 8 * 8 * 256 * 4
    assert temporary(12) - temporary(4) < 0.1 * 8 * activations


# log_prob


def test_log_prob_is_the_mean_of_the_normal_density():
    """scipy.stats.norm, a standard deviation for each sample; 1e-5. A std of 0: 0, and gradients that are 0."""
    rng = np.random.default_rng(0)
    mean, latents = (rng.standard_normal((3, 2, 2, 4)).astype(np.float32) for _ in range(2))
    std = np.array([0.5, 2.0, 0.0], np.float32)[:, None, None, None]
    got = log_prob(Transition(mean, std, mean), latents)
    expected = scipy.stats.norm(mean[:2], std[:2]).logpdf(latents[:2]).mean((1, 2, 3))
    np.testing.assert_allclose(got[:2], expected, rtol=1e-5)
    assert got[2] == 0 and got.dtype == jnp.float32

    def total(mean, std, latents):
        return log_prob(Transition(mean, std, mean), latents).sum()

    slopes = jax.grad(total, argnums=(0, 1, 2))(mean, std, latents)
    assert all(np.isfinite(slope).all() and not np.any(slope[2]) for slope in slopes)
    np.testing.assert_allclose(slopes[0][0], (latents - mean)[0] / 0.25 / 16, rtol=1e-5)


def test_transition_is_that_of_ddim_step_with_logprob():
    """ddpo-pytorch's ddim_step_with_logprob written out in torch over diffusers' alphas, eta 1, every step: 1e-5."""
    torch = pytest.importorskip("torch", reason="the reference is PyTorch diffusers")
    diffusers = pytest.importorskip("diffusers", reason="the reference is PyTorch diffusers")
    scheduler = diffusers.DDIMScheduler.from_config(tiny_sd1.SCHEDULER)
    scheduler.set_timesteps(10)
    sampler = make_sampler("ddim", tiny_sd1.SCHEDULER, 10, eta=1.0)
    rng = np.random.default_rng(0)
    sample, output, noise = (rng.standard_normal(SHAPE).astype(np.float32) for _ in range(3))
    state = sampler.init(jnp.asarray(sample))
    for step, t in enumerate(scheduler.timesteps.tolist()):
        before = t - 100
        alpha_before = scheduler.alphas_cumprod[before] if before >= 0 else scheduler.final_alpha_cumprod
        std = scheduler._get_variance(t, before) ** 0.5
        alpha = scheduler.alphas_cumprod[t]
        original = (torch.tensor(sample) - (1 - alpha) ** 0.5 * torch.tensor(output)) / alpha**0.5
        direction = (1 - alpha_before - std**2) ** 0.5 * torch.tensor(output)
        mean = alpha_before**0.5 * original + direction
        following = mean + std * torch.tensor(noise)
        density = -((following - mean) ** 2) / (2 * std**2) - torch.log(std) - math.log(math.sqrt(2 * math.pi))
        expected = density.mean(dim=(1, 2, 3)).numpy()

        found = sampler.transition(state, jnp.asarray(output), step)
        np.testing.assert_allclose(found.mean, mean.numpy(), rtol=1e-5, atol=1e-5 * np.abs(mean.numpy()).max())
        np.testing.assert_allclose(found.std, std.item(), rtol=1e-4)  # diffusers computes it in float32
        np.testing.assert_allclose(found.original, original.numpy(), rtol=1e-5, atol=1e-5 * original.abs().max().item())
        np.testing.assert_allclose(log_prob(found, found.mean + found.std * noise), expected, rtol=1e-5, atol=1e-4)


def test_noise_scale_multiplies_the_standard_deviation():
    sampler = make_sampler("ddim", tiny_sd1.SCHEDULER, STEPS, eta=1.0)
    state = sampler.init(start()[0])
    plain = sampler.transition(state, state.latents, jnp.array([0, 2]))
    scaled = sampler.transition(state, state.latents, jnp.array([0, 2]), jnp.array([0.0, 3.0]))
    np.testing.assert_allclose(scaled.std, plain.std * np.array([0.0, 3.0])[:, None, None, None], rtol=1e-6)
    np.testing.assert_array_equal(scaled.mean, plain.mean)
    halved = sampler.transition(state, state.latents, 1, 0.5).std
    np.testing.assert_allclose(halved, 0.5 * sampler.weights.random[1], rtol=1e-6)


# Record


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recorded_steps_are_scored_as_stored(dtype):
    """Log-probabilities recomputed from stored states, in another program, give ratios within 1e-6 of 1. The states
    are those of the rollout: each follows from the one before it, and the last is the result."""
    sampler = make_sampler("ddim", tiny_sd1.SCHEDULER, STEPS, eta=1.0)
    noise, keys = start((2, 8, 8, 4))
    record = Record(steps=(4, 1, 2), dtype=jnp.dtype(dtype))
    state, predicted, trajectory, *_ = jax.jit(
        lambda sampler: rollout(denoise, sampler, noise, keys, params=WEIGHT, record=record)
    )(sampler)
    assert predicted is None and trajectory.log_probs.shape == (3, 2)
    assert trajectory.latents.dtype == trajectory.following.dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(trajectory.following[1], trajectory.latents[2])
    np.testing.assert_array_equal(trajectory.following[0].astype(jnp.float32), state.latents)

    @jax.jit
    def rescored(latents, following, step):
        step = jnp.full((2,), step)
        before = sampler.init(latents)._replace(latents=latents.astype(jnp.float32))
        output = denoise(WEIGHT, sampler.model_input(before, step), sampler.timestep(step), step)
        transition = sampler.transition(before, output, step)
        random = jnp.concatenate([fresh_noise(keys[row], step[row], noise.shape) for row in range(2)])
        return log_prob(transition, following), transition.mean + transition.std * random

    for row, step in enumerate(record.steps):
        log_probs, following = rescored(trajectory.latents[row], trajectory.following[row], step)
        assert np.abs(np.exp(log_probs - trajectory.log_probs[row]) - 1).max() < 1e-6
        rounding = 2.0**-8 if dtype == "bfloat16" else 1e-6
        stored = trajectory.following[row].astype(jnp.float32)
        np.testing.assert_allclose(stored, following, rtol=rounding, atol=1e-6)


def test_a_record_in_float32_changes_nothing():
    sampler = make_sampler("ddpm", tiny_sd1.SCHEDULER, STEPS)
    noise, keys = start()
    plain = rollout(denoise, sampler, noise, keys, params=WEIGHT).state.latents
    recorded = rollout(denoise, sampler, noise, keys, params=WEIGHT, record=Record(steps=(0,)))
    np.testing.assert_allclose(recorded.state.latents, plain, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(recorded.trajectory.latents[0], noise)


# Refusals


@pytest.mark.parametrize(
    ("eta", "keys", "options", "message"),
    [
        (1.0, False, {}, "pass keys"),
        (0.0, False, {"gradient": Gradient(last=6)}, "Gradient.last=6"),
        (0.0, False, {"gradient": Gradient(steps=np.ones(5, bool))}, "set last=5"),
        (0.0, False, {"gradient": Gradient(calls=np.arange(2))}, r"\[B, K\] step indices"),
        (1.0, True, {"gradient": Gradient(calls=CALLS), "record": Record((1,))}, "calls, leaps and predict"),
        (0.0, False, {"gradient": Gradient(last=5, steps=np.ones(4, bool))}, r"5 steps need \(5,\)"),
        (0.0, False, {"gradient": Gradient(predict=True)}, "predict needs stop"),
        (1.0, True, {"gradient": Gradient(last=1), "record": Record((1,))}, "without gradient"),
        (1.0, True, {"stop": jnp.array([1, 2]), "record": Record((1,))}, "leave out stop"),
        (1.0, True, {"record": Record((1, 5))}, "from 0 to 4"),
        (1.0, True, {"record": Record((1, 1))}, "distinct"),
        (1.0, True, {"record": Record((1,), jnp.dtype("int8"))}, "Record.dtype"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(eta, keys, options, message):
    sampler = make_sampler("ddim", tiny_sd1.SCHEDULER, STEPS, eta=eta)
    noise, all_keys = start()
    with pytest.raises(ValueError, match=message):
        rollout(denoise, sampler, noise, all_keys if keys else None, params=WEIGHT, **options)


def test_a_traced_sampler_without_keys_is_refused():
    """Inside a program nobody knows whether it is stochastic."""
    sampler, (noise, _) = make_sampler("ddim", tiny_sd1.SCHEDULER, STEPS), start()
    with pytest.raises(ValueError, match="pass keys"):
        jax.jit(lambda sampler: rollout(denoise, sampler, noise, None, params=WEIGHT))(sampler)
