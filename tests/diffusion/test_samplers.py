"""Samplers and noise schedules against diffusers' schedulers, over whole trajectories with a deterministic denoiser."""

import contextlib
import dataclasses
import itertools
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagereward_jax.diffusion.flow import FIELDS, read_schedule
from imagereward_jax.diffusion.samplers import DEFAULTS, make_sampler, samplers_of
from imagereward_jax.diffusion.schedule import NoiseSchedule
from imagereward_jax.diffusion.sigmas import SPACINGS

torch = pytest.importorskip("torch", reason="the reference is PyTorch diffusers")
diffusers = pytest.importorskip("diffusers", reason="the reference is PyTorch diffusers")

SD1 = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
SAMPLERS = samplers_of(SD1)
CLASSES = {
    "ddpm": diffusers.DDPMScheduler,
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
    "lcm": diffusers.LCMScheduler,
    "tcd": diffusers.TCDScheduler,
}
STEPS = (1, 10, 25, 40, 50)
SHAPE = (2, 4, 4, 4)


def denoise(x, t, sin):
    """A smooth stand-in for the network, the same in jax and torch, in any layout of equal sides."""
    return 0.7 * sin(1.3 * x + 0.002 * t) + 0.2 * x


def random_noise(steps):
    return np.random.default_rng(0).standard_normal((steps + 1, *SHAPE)).astype(np.float32)


def calls_of(name, num_steps):
    """Heun's method calls the network twice per step but the last."""
    return 2 * num_steps - 1 if name == "heun" else num_steps


def reference(name, config, num_steps, noise, monkeypatch, eta=0.0):
    """diffusers' latents after every call and its predictions of the clean latents (where it returns them).

    In double precision, as far as diffusers lets: its own float32 products of a thousand alphas are off by 1e-5.
    """
    scheduler = CLASSES[name].from_config(config)
    if not config.get("rescale_betas_zero_snr"):
        scheduler.alphas_cumprod = torch.cumprod(1 - scheduler.betas.double(), 0)
        if config.get("set_alpha_to_one") is False:
            scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(num_steps)
    if name not in ("ddpm", "ddim"):
        scheduler.set_begin_index(0)  # as some timesteps occur twice
    fresh = iter(torch.tensor(noise[1:], dtype=torch.float64))
    module = CLASSES[name].__module__
    monkeypatch.setattr(f"{module}.randn_tensor", lambda *_, **__: next(fresh), raising=False)
    latents = torch.tensor(noise[0], dtype=torch.float64) * scheduler.init_noise_sigma
    trajectory, originals, kwargs = [], [], {"eta": eta} if name in ("ddim", "tcd") else {}
    for t in scheduler.timesteps:
        output = denoise(scheduler.scale_model_input(latents, t), float(t), torch.sin)
        result = scheduler.step(output, t, latents, **kwargs)
        latents = result.prev_sample
        trajectory.append(latents.numpy())
        originals.append(getattr(result, "pred_original_sample", None))
    return scheduler, trajectory, originals


@jax.jit
def advance(sampler, state, step, noise):
    """(the next state, the predicted clean latents)"""
    output = denoise(sampler.model_input(state, step), sampler.timestep(step), jnp.sin)
    return sampler.step(state, output, step, noise), sampler.pred_original(state, output, step)


def ours(sampler, noise):
    state = sampler.init(jnp.asarray(noise[0]))
    trajectory, originals = [], []
    for step in range(sampler.num_steps):
        state, original = advance(sampler, state, step, noise[step + 1])
        originals.append(np.asarray(original))
        trajectory.append(np.asarray(state.latents))
    return trajectory, originals


def relative(actual, expected):
    expected = np.asarray(expected)
    return np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max()


def check(name, config, num_steps, monkeypatch, eta=0.0, tolerance=1e-5):
    noise = random_noise(calls_of(name, num_steps))
    sampler = make_sampler(name, config, calls_of(name, num_steps), eta=eta)
    scheduler, expected, expected_originals = reference(name, config, num_steps, noise, monkeypatch, eta)
    np.testing.assert_allclose(sampler.timesteps, scheduler.timesteps.numpy(), atol=2e-3)
    np.testing.assert_allclose(sampler.init_noise_sigma, float(scheduler.init_noise_sigma), rtol=tolerance)
    actual, originals = ours(sampler, noise)
    worst = max(map(relative, actual, expected))
    assert worst < tolerance, f"latents differ by {worst}"
    if expected_originals[0] is not None:
        worst = max(map(relative, originals, expected_originals))
        assert worst < tolerance, f"predicted clean latents differ by {worst}"


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_trajectory_is_that_of_diffusers(name, prediction_type, monkeypatch):
    """Latents and predicted clean latents, every step of 1, 10, 25, 40 and 50, within 1e-5 of the largest value.

    LCM's steps of predicted noise multiply differences, by up to 15 at the first: 5e-5.
    """
    if name in ("euler_ancestral", "heun") and prediction_type == "sample":
        pytest.skip("diffusers' scheduler has no such prediction")
    tolerance = 5e-5 if (name, prediction_type) == ("lcm", "epsilon") else 1e-5
    for num_steps in STEPS:
        check(name, SD1 | {"prediction_type": prediction_type}, num_steps, monkeypatch, tolerance=tolerance)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in ("lcm", "tcd")])
def test_every_spacing(name, spacing, monkeypatch):
    for num_steps in (*STEPS, 7, 49):
        check(name, SD1 | {"timestep_spacing": spacing}, num_steps, monkeypatch)


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("name", ["ddim", "tcd"])
def test_noise_by_eta(name, eta, monkeypatch):
    """TCD's, like LCM's, multiplies differences: 2e-5."""
    for num_steps in STEPS:
        check(name, SD1, num_steps, monkeypatch, eta=eta, tolerance=2e-5)


def test_tcd_without_eta_is_ddim_on_its_timesteps():
    """50 steps of 1000 begin at 999, where DDIM's with trailing spacing do; only the last leads elsewhere."""
    tcd, ddim = make_sampler("tcd", SD1, 50), make_sampler("ddim", SD1 | {"timestep_spacing": "trailing"}, 50)
    for left, right in zip(jax.tree.leaves(tcd.weights), jax.tree.leaves(ddim.weights), strict=True):
        np.testing.assert_allclose(left[:-1], right[:-1], atol=1e-7)
    np.testing.assert_array_equal(tcd.timesteps, ddim.timesteps)


@pytest.mark.parametrize("field", SPACINGS)
@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "unipc"])
def test_sigmas_spaced_anew(name, field, monkeypatch):
    """Karras, exponential, beta and Lu's, with ends of their own and with a cosine schedule.

    With the cosine, whose first sigma is above 20,000 and is a float32 in diffusers, 5e-4. Not two
    steps of Heun's, which divide differences of float32 numbers by a small sigma.
    """
    if field not in DEFAULTS[name]:
        pytest.skip(f"{CLASSES[name].__name__} has no {field}")
    configs = [SD1 | {field: True}, SD1 | {field: True, "beta_schedule": "squaredcos_cap_v2"}]
    if "sigma_max" in DEFAULTS[name]:
        configs.append(SD1 | {field: True, "sigma_min": 0.05, "sigma_max": 11.0})
    for config in configs:
        tolerance = 5e-4 if config["beta_schedule"] == "squaredcos_cap_v2" else 1e-5
        for num_steps in (1, 10, 40):
            check(name, config, num_steps, monkeypatch, tolerance=tolerance)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("ddpm", {"variance_type": "fixed_large"}),
        ("ddpm", {"variance_type": "fixed_small_log"}),
        ("ddim", {"set_alpha_to_one": True, "steps_offset": 0}),
        ("ddim", {"beta_schedule": "linear"}),
        ("ddim", {"beta_schedule": "squaredcos_cap_v2"}),
        ("ddim", {"trained_betas": np.linspace(1e-4, 0.03, 1000).tolist()}),
        ("euler", {"final_sigmas_type": "sigma_min"}),
        ("euler", {"final_sigmas_type": "sigma_min", "use_beta_sigmas": True}),
        ("dpmpp_2m", {"final_sigmas_type": "sigma_min", "use_karras_sigmas": True}),
        ("dpmpp_2m", {"final_sigmas_type": "sigma_min"}),
        ("dpmpp_2m", {"final_sigmas_type": "sigma_min", "lower_order_final": False}),
        ("dpmpp_2m", {"final_sigmas_type": "sigma_min", "euler_at_final": True}),
        ("dpmpp_2m", {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}),
        ("dpmpp_2m", {"use_karras_sigmas": True, "use_lu_lambdas": True}),  # diffusers takes the former
        ("unipc", {"solver_type": "bh1"}),
        ("unipc", {"solver_type": "midpoint"}),
        ("unipc", {"solver_order": 1}),
        ("unipc", {"disable_corrector": [0, 3, 4]}),
        ("unipc", {"final_sigmas_type": "sigma_min"}),
        ("unipc", {"final_sigmas_type": "sigma_min", "lower_order_final": False, "solver_type": "bh1"}),
        ("lcm", {"original_inference_steps": 40, "timestep_scaling": 3.0, "prediction_type": "v_prediction"}),
        ("lcm", {"clip_sample": False, "set_alpha_to_one": False, "prediction_type": "sample"}),
        ("tcd", {"original_inference_steps": 200}),
    ],
)
def test_fields_of_the_config(name, fields, monkeypatch):
    for num_steps in (10, 25):
        check(name, SD1 | fields, num_steps, monkeypatch)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "heun"])  # diffusers' reads no such field
def test_zero_terminal_snr(name, monkeypatch):
    """From the step that sees noise alone (trailing spacing). The weights of Euler's first steps reach 4096.

    1e-4: diffusers computes the rescaled betas in float32.
    """
    config = SD1 | {
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
    }
    for num_steps in (10, 25):
        check(name, config, num_steps, monkeypatch, tolerance=1e-4)


def test_noted_defaults_give_way_to_those_of_the_sampler():
    """diffusers drops fields listed in `_use_default_values` when a config is handed to another class."""
    config = SD1 | {"timestep_spacing": "leading", "_use_default_values": ["timestep_spacing"]}
    expected = diffusers.EulerDiscreteScheduler.from_config(config)
    expected.set_timesteps(20)
    np.testing.assert_allclose(make_sampler("euler", config, 20).timesteps, expected.timesteps.numpy(), rtol=1e-6)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_step_for_each_sample(name):
    """A vector of steps gives, row by row, what a scalar gives; traced as well."""
    sampler = make_sampler(name, SD1, 13, eta=0.5 if name in ("ddim", "tcd") else 0.0)
    rng = np.random.default_rng(1)
    latents, original, output, noise = (jnp.asarray(rng.standard_normal((5, 4, 4, 4)), jnp.float32) for _ in range(4))
    state = sampler.init(latents)._replace(original=original)
    state = state if state.earlier is None else state._replace(earlier=0.5 * original)
    steps = jnp.array([0, 11, 5, 1, 10])

    @jax.jit
    def all_of(state, output, step, noise):
        clean = sampler.pred_original(state, output, step)
        return sampler.timestep(step), sampler.model_input(state, step), clean, sampler.step(state, output, step, noise)

    together = all_of(state, output, steps, noise)
    for row, step in enumerate(steps):
        rows = jax.tree.map(lambda x: x[row : row + 1], (state, output, noise))  # noqa: B023
        alone = all_of(rows[0], rows[1], step, rows[2])
        assert together[0][row] == alone[0]
        for expected, actual in zip(jax.tree.leaves(alone[1:]), jax.tree.leaves(together[1:])):
            np.testing.assert_allclose(actual[row : row + 1], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fields", [{}, {"clip_sample": True}, {"thresholding": True}], ids=str)
@pytest.mark.parametrize("name", SAMPLERS)
def test_latents_are_never_clipped(name, fields):
    """A perfect network's clean latents, of deviation 1, come back whole within 1e-4, whatever a scheduler of pixels
    would do to them: as the config states, or as diffusers' DDPM and DDIM do where clip_sample is absent (SDXL)."""
    config = {key: value for key, value in SD1.items() if key != "clip_sample"} | fields
    sampler = make_sampler(name, config, 41)
    clean, noise = random_noise(1)
    step = sampler.num_steps - 1
    seen = sampler.alpha[step] * clean + sampler.sigma[step] * noise
    state = sampler.init(jnp.asarray(noise))._replace(latents=jnp.asarray(seen / sampler.input_scale[step]))
    np.testing.assert_allclose(sampler.pred_original(state, jnp.asarray(noise), step), clean, atol=1e-4)
    assert np.abs(clean).max() > 2


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_schedule_is_that_of_diffusers(prediction_type):
    config = SD1 | {"prediction_type": prediction_type}
    schedule, scheduler = NoiseSchedule.from_config(config), diffusers.DDPMScheduler.from_config(config)
    rng = np.random.default_rng(2)
    x0, noise = (rng.standard_normal((6, 4, 4, 4)).astype(np.float32) for _ in range(2))
    timesteps = np.array([0, 1, 20, 500, 998, 999])
    torch_arguments = torch.tensor(x0), torch.tensor(noise), torch.tensor(timesteps)
    noisy = schedule.add_noise(jnp.asarray(x0), noise, timesteps)
    np.testing.assert_allclose(noisy, scheduler.add_noise(*torch_arguments), rtol=1e-5, atol=1e-5)
    velocity = schedule.velocity(jnp.asarray(x0), noise, timesteps)
    np.testing.assert_allclose(velocity, scheduler.get_velocity(*torch_arguments), rtol=1e-5, atol=1e-5)
    target = schedule.target(jnp.asarray(x0), noise, timesteps)
    np.testing.assert_allclose(target, {"epsilon": noise, "v_prediction": velocity, "sample": x0}[prediction_type])
    np.testing.assert_allclose(schedule.pred_original(target, noisy, timesteps), x0, atol=2e-5)
    np.testing.assert_allclose(schedule.pred_noise(target, noisy, timesteps), noise, atol=1e-4)
    at = scheduler.alphas_cumprod.double().numpy()[timesteps]
    np.testing.assert_allclose(schedule.snr(timesteps), at / (1 - at), rtol=2e-4)
    np.testing.assert_allclose(schedule.add_noise(jnp.asarray(x0), noise, 20)[2], noisy[2])


@pytest.mark.parametrize(
    "schedule",
    [
        SD1,
        {"_class_name": "FlowMatchEulerDiscreteScheduler"},
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True},
    ],
    ids=["betas", "flow", "flow of dynamic shifts"],
)
def test_a_wrong_value_of_any_field_is_refused_or_leaves_every_weight_finite(schedule):
    """Of every field that a sampler reads, in every sampler that there is for the schedule."""
    wrong = (None, True, -1, 0, 1e9, float("nan"), "x", [], ["x"], {}, {"a": 1}, 10**30)
    fields = sorted({*FIELDS, *itertools.chain.from_iterable(DEFAULTS.values())})
    for field, value in itertools.product(fields, wrong):
        config, taken = {**schedule, field: value}, ()
        with contextlib.suppress(ValueError):
            read_schedule(config)
            taken = samplers_of(config)
        for name in taken:
            try:
                sampler = make_sampler(name, config, 5, image_tokens=16)
            except ValueError as error:
                assert "imagereward_jax" in traceback.extract_tb(error.__traceback__)[-1].filename, (field, value)
            else:
                tables = [sampler.timesteps, *(table for table in sampler.weights if table is not None)]
                assert all(np.isfinite(table).all() for table in tables), (name, field, value)


@pytest.mark.parametrize(
    ("name", "fields", "num_steps", "message"),
    [
        ("dimm", {}, 10, "did you mean 'ddim'"),
        ("ddim", {"steps_offset": 900}, 5, "begins at timestep 1700"),
        ("ddim", {}, 0, "num_steps=0"),
        ("ddim", {}, 1001, "num_steps=1001"),
        ("ddim", {}, 1000, "steps_offset=1"),
        ("ddim", {"prediction_type": "flow"}, 10, "prediction_type='flow'"),
        ("ddim", {"timestep_spacing": "even"}, 10, "timestep_spacing='even'"),
        ("ddim", {"beta_schedule": "sigmoid"}, 10, "beta_schedule='sigmoid'"),
        ("ddim", {"trained_betas": [0.1, 0.2]}, 10, "trained_betas"),
        ("ddim", {"rescale_betas_zero_snr": True}, 10, "rescale_betas_zero_snr"),
        ("ddim", {"some_new_field": 3}, 10, "'some_new_field' (value 3) is not known here"),
        ("ddpm", {"variance_type": "learned_range"}, 10, "variance_type='learned_range'"),
        ("euler", {"interpolation_type": "log_linear"}, 10, "interpolation_type='log_linear'"),
        ("unipc", {"use_beta_sigmas": True, "sigma_min": 20.0}, 10, "expected sigma_max above sigma_min"),
        ("heun", {}, 10, "num_steps=10 should be odd for heun"),
        ("euler", {"use_beta_sigmas": True, "use_karras_sigmas": True}, 10, "use_karras_sigmas and use_beta_sigmas"),
        ("dpmpp_2m", {"solver_order": 3}, 10, "solver_order=3"),
        ("dpmpp_2m", {"algorithm_type": "sde-dpmsolver++"}, 10, "algorithm_type='sde-dpmsolver"),
        ("dpmpp_2m", {}, 1000, "num_steps=1000"),
        ("unipc", {"solver_order": 3}, 10, "solver_order=3"),
        ("unipc", {"predict_x0": False}, 10, "predict_x0=False"),
        ("unipc", {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}, 10, "state final_sigmas_type='zero'"),
        ("lcm", {}, 51, "original_inference_steps=50"),
        ("tcd", {"original_inference_steps": 2000}, 10, "num_train_timesteps=1000"),
    ],
)
def test_what_is_not_supported_is_named(name, fields, num_steps, message):
    with pytest.raises(ValueError) as caught:
        make_sampler(name, SD1 | fields, num_steps)
    assert message in str(caught.value)


def test_one_program_serves_every_sampler_of_as_many_steps():
    """Samplers are arguments: all of one tree, with the same dtypes, but UniPC, whose state holds more."""
    step = jax.jit(lambda sampler, state, noise: sampler.step(state, state.latents, jnp.array([3, 9]), noise))
    state = make_sampler("ddim", SD1, 10).init(jnp.ones(SHAPE))
    for name in (name for name in SAMPLERS if name not in ("unipc", "heun")):
        sampler = make_sampler(name, SD1, 10)
        noise = jnp.full(SHAPE, 2.0)
        got, expected = step(sampler, state, noise), sampler.step(state, state.latents, jnp.array([3, 9]), noise)
        np.testing.assert_allclose(got.latents, expected.latents, rtol=1e-5, atol=1e-5)
    assert step._cache_size() == 1


def test_a_term_of_weight_zero_lets_no_nan_in():
    """The predicted noise divides by sigma: at a sigma of 0, and weighed by 0, it leaves step and gradient finite."""
    sampler = make_sampler("euler", SD1 | {"prediction_type": "sample"}, 10)
    sampler = dataclasses.replace(sampler, sigma=np.zeros(10, np.float32))
    state = sampler.init(jnp.ones(SHAPE))
    value, slope = jax.value_and_grad(lambda output: sampler.step(state, output, 9).latents.sum())(jnp.ones(SHAPE))
    assert np.isfinite(value) and np.isfinite(slope).all() and np.any(slope)


def test_noise_is_asked_for():
    sampler = make_sampler("ddim", SD1, 10, eta=1.0)
    state = sampler.init(jnp.zeros(SHAPE))
    with pytest.raises(ValueError, match="pass standard normal noise"):
        sampler.step(state, state.latents, 0)
    assert sampler.stochastic and not make_sampler("ddim", SD1, 10).stochastic
    with pytest.raises(ValueError, match="eta="):
        make_sampler("euler", SD1, 10, eta=0.5)
