"""Flow schedules and their samplers against diffusers' schedulers, and refusals of what is not supported."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_sd1

from imagereward_jax.diffusion.flow import FlowSchedule, read_schedule
from imagereward_jax.diffusion.rollout import Record, rollout
from imagereward_jax.diffusion.samplers import make_sampler
from imagereward_jax.diffusion.schedule import NoiseSchedule
from imagereward_jax.pipelines.base import TextToImage

torch = pytest.importorskip("torch", reason="the reference is PyTorch diffusers")
diffusers = pytest.importorskip("diffusers", reason="the reference is PyTorch diffusers")

SD3 = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
DYNAMIC = SD3 | {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
SANA = {
    "_class_name": "DPMSolverMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
}
SHAPE = (2, 4, 4, 4)


# Sigmas


@pytest.mark.parametrize(
    ("num_steps", "sigmas"),
    [
        (1, [1.0]),
        (4, [1.0, 0.85769, 0.60215, 0.00893]),
        (6, [1.0, 0.92334, 0.81892, 0.66833, 0.43223, 0.00893]),
        (10, [1.0, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089]),
    ],
)
def test_sigmas_of_stable_diffusion_3_are_the_published_ones(num_steps, sigmas):
    """The shift is in the range of the steps and is applied to them again."""
    np.testing.assert_allclose(FlowSchedule.from_config(SD3).sampling_sigmas(num_steps), sigmas, atol=5e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
@pytest.mark.parametrize("train_steps", [1000, 37])
def test_sigmas_equal_those_of_diffusers(shift, train_steps):
    """Those of training, and those and the timesteps of every number of steps to 60: the same float32 numbers."""
    config = SD3 | {"shift": shift, "num_train_timesteps": train_steps}
    schedule = FlowSchedule.from_config(config)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
    np.testing.assert_array_equal(schedule.train_sigmas(), scheduler.sigmas.numpy())
    for num_steps in range(1, min(60, train_steps)):
        scheduler.set_timesteps(num_steps)
        sampler = make_sampler("euler", config, num_steps)
        np.testing.assert_array_equal(sampler.sigma, scheduler.sigmas.numpy()[:-1])
        np.testing.assert_array_equal(sampler.timesteps, scheduler.timesteps.numpy())


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_dynamic_shifting_is_that_of_diffusers(kind):
    """For images of 256, 1,024 and 9,216 tokens, with mu as its pipelines compute it; the same float32 numbers."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    config = DYNAMIC | {"time_shift_type": kind}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
    np.testing.assert_array_equal(FlowSchedule.from_config(config).train_sigmas(), scheduler.sigmas.numpy())
    for tokens in (256, 1024, 9216):
        scheduler.set_timesteps(7, mu=calculate_shift(tokens))
        sampler = make_sampler("euler", config, 7, image_tokens=tokens)
        np.testing.assert_array_equal(sampler.sigma, scheduler.sigmas.numpy()[:-1])
    with pytest.raises(ValueError, match=r"use_dynamic_shifting=True.*pass image_tokens"):
        make_sampler("euler", config, 7)


def test_a_shift_by_resolution_of_ln_3_has_another_end_than_a_shift_of_3():
    """The last sigma is shifted once: it stays below that of the fixed shift, 0.0089."""
    config = DYNAMIC | {"base_shift": np.log(3.0), "max_shift": np.log(3.0)}
    sigmas = FlowSchedule.from_config(config).sampling_sigmas(4, 1024)
    np.testing.assert_allclose(sigmas, [1.0, 0.85733, 0.60072, 0.00299], atol=5e-6)


# Samplers


def random_outputs(count):
    return np.random.default_rng(0).standard_normal((count + 1, *SHAPE)).astype(np.float32)


def reference(name, config, steps, outputs, monkeypatch=None):
    """diffusers' latents after each of the network's calls, whose outputs are given, and what it tells the network.

    The noise of steps that add some is 0.1.
    """
    classes = {
        "euler": diffusers.FlowMatchEulerDiscreteScheduler,
        "heun": diffusers.FlowMatchHeunDiscreteScheduler,
        "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
        "unipc": diffusers.UniPCMultistepScheduler,
        "lcm": diffusers.FlowMatchLCMScheduler,
    }
    scheduler = classes[name].from_config(config)
    scheduler.set_timesteps(steps)
    if monkeypatch:
        fill = f"{classes[name].__module__}.randn_tensor"
        monkeypatch.setattr(fill, lambda shape, **_: torch.full(shape, 0.1), raising=False)
    latents, trajectory = torch.tensor(outputs[0]), []
    for timestep, output in zip(scheduler.timesteps, outputs[1:], strict=True):
        latents = scheduler.step(torch.tensor(output), timestep, latents).prev_sample
        trajectory.append(latents.numpy())
    return scheduler.timesteps.numpy(), trajectory


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(
    ("name", "steps", "calls"), [("euler", 6, 6), ("heun", 6, 11), ("dpmpp_2m", 6, 6), ("unipc", 6, 6), ("lcm", 6, 6)]
)
def test_trajectory_is_that_of_diffusers(name, steps, calls, shift, monkeypatch):
    """Six steps with random outputs of the network: latents after every call within 1e-5, and the same timesteps.

    Heun's velocities are differences of latents over sigma, the last of which is 0.001 without a shift: 3e-5.
    """
    tolerance = 3e-5 if (name, shift) == ("heun", 1.0) else 1e-5
    config = SD3 | {"shift": shift}
    theirs = SANA | {"flow_shift": shift} if name in ("dpmpp_2m", "unipc") else config
    outputs = random_outputs(calls)
    timesteps, expected = reference(name, theirs, steps, outputs, monkeypatch)
    for read in (config, SANA | {"flow_shift": shift}):
        sampler = make_sampler(name, read, calls)
        np.testing.assert_allclose(sampler.timesteps, timesteps, rtol=1e-6)
        assert sampler.stochastic == (name == "lcm")
        state = sampler.init(jnp.asarray(outputs[0]))
        for step in range(calls):
            original = sampler.pred_original(state, jnp.asarray(outputs[step + 1]), step)
            clean = state.latents - sampler.sigma[step] * outputs[step + 1]
            np.testing.assert_allclose(original, clean, rtol=1e-6, atol=1e-6)
            state = sampler.step(state, jnp.asarray(outputs[step + 1]), step, jnp.full(SHAPE, 0.1))
            np.testing.assert_allclose(state.latents, expected[step], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("field", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
def test_sigmas_spaced_anew_are_those_of_diffusers(field):
    """The same float32 numbers within 1e-7, from 1 to 40 steps; diffusers' Heun's method does not know these fields."""
    config = SD3 | {field: True}
    for num_steps in (1, 2, 7, 40):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
        scheduler.set_timesteps(num_steps)
        sampler = make_sampler("euler", config, num_steps)
        np.testing.assert_allclose(sampler.sigma, scheduler.sigmas.numpy()[:-1], rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(make_sampler("heun", config, 7).sigma, make_sampler("heun", SD3, 7).sigma)


@pytest.mark.parametrize("steps", [1, 2, 14, 15, 20])
@pytest.mark.parametrize("name", ["dpmpp_2m", "unipc"])
def test_multistep_solvers_of_other_numbers_of_steps(name, steps):
    """Orders at the ends differ, DPM-Solver's below 15 steps; latents within 1e-5 of the largest."""
    outputs = random_outputs(steps)
    _, expected = reference(name, SANA, steps, outputs)
    sampler = make_sampler(name, SANA, steps)
    state = sampler.init(jnp.asarray(outputs[0]))
    for step in range(steps):
        state = sampler.step(state, jnp.asarray(outputs[step + 1]), step)
        np.testing.assert_allclose(state.latents, expected[step], atol=1e-5 * np.abs(expected[step]).max())


@pytest.mark.parametrize(
    ("name", "calls", "error"), [("euler", 64, 0.06), ("heun", 63, 0.02), ("dpmpp_2m", 64, 0.02), ("unipc", 64, 0.02)]
)
def test_samplers_converge_to_the_solution_of_the_equation(name, calls, error):
    """Data of one normal number N(m, d^2): the velocity in closed form; the flow maps noise z to m + d z."""
    mean, deviation = 0.5, 0.3
    sampler = make_sampler(name, SD3, calls)

    def denoise(_, x, timesteps, step):
        sigma = (timesteps / 1000)[:, None, None, None]
        variance = jnp.square(1 - sigma) * deviation**2 + jnp.square(sigma)
        return ((sigma - (1 - sigma) * deviation**2) * (x - (1 - sigma) * mean)) / variance - mean

    noise = jax.random.normal(jax.random.key(0), SHAPE)
    latents = rollout(denoise, sampler, noise, None, params={}).state.latents
    np.testing.assert_allclose(latents, mean + deviation * noise, atol=error)


def test_a_pipeline_makes_samplers_of_its_flow_for_the_size_of_the_images(tmp_path):
    """Tokens are the latents' positions, or a network's patches; the scheduler is exported as it was."""
    pipeline, _ = tiny_sd1.make(tmp_path / "tokenizer", DYNAMIC)
    assert pipeline.schedule == FlowSchedule.from_config(DYNAMIC)
    assert "clip_sample" not in pipeline.scheduler_config
    sampler = pipeline.make_sampler("euler", 4, 0.0, 32, 16)  # latents of 16 x 8
    np.testing.assert_array_equal(sampler.sigma, make_sampler("euler", DYNAMIC, 4, image_tokens=128).sigma)
    patches = object.__new__(TextToImage)
    patches.denoiser, patches.configs = "net", {"net": types.SimpleNamespace(patch_size=2)}
    assert patches.image_tokens((16, 8, 4)) == 32


# Noising


def test_noising_is_that_of_diffusers_at_its_training_timesteps():
    """Within 1e-6; target, predictions and noise of a perfect network fit together."""
    schedule = read_schedule(SD3)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(SD3)
    rng = np.random.default_rng(2)
    x0, noise = (rng.standard_normal((5, 4, 4, 4)).astype(np.float32) for _ in range(2))
    timesteps = scheduler.timesteps[[0, 1, 400, 998, 999]]
    noisy = schedule.add_noise(jnp.asarray(x0), noise, timesteps.numpy())
    expected = scheduler.scale_noise(torch.tensor(x0), timesteps, torch.tensor(noise))
    np.testing.assert_allclose(noisy, expected, rtol=1e-6, atol=1e-6)
    target = schedule.target(jnp.asarray(x0), noise, timesteps.numpy())
    np.testing.assert_array_equal(target, noise - x0)
    np.testing.assert_allclose(schedule.pred_original(target, noisy, timesteps.numpy()), x0, atol=1e-6)
    np.testing.assert_allclose(schedule.pred_noise(target, noisy, timesteps.numpy()), noise, atol=1e-6)
    np.testing.assert_array_equal(schedule.add_noise(jnp.asarray(x0), noise, 400.0)[2], 0.6 * x0[2] + 0.4 * noise[2])


# Refusals


@pytest.mark.parametrize(
    ("name", "changes", "options", "message"),
    [
        ("ddim", {}, {}, "sampler 'ddim' does not fit .*FlowMatchEuler.* a flow: take euler, heun, dpmpp_2m, unipc"),
        ("euler", {}, {"eta": 0.5}, "eta=0.5 should be 0: euler has no noise"),
        ("heun", {}, {}, "num_steps=10 should be odd for heun.*take 9 or 11"),
        ("euler", {"invert_sigmas": True}, {}, "invert_sigmas=True"),
        ("unipc", {"use_karras_sigmas": True}, {}, "use_karras_sigmas=True is not implemented for unipc on a flow"),
        ("euler", {"scale_factors": [1, 2]}, {}, "scale_factors="),
        ("euler", {"shift_terminal": 0.02}, {}, "shift_terminal=0.02"),
        ("euler", {"stochastic_sampling": True}, {}, "stochastic_sampling=True"),
        ("euler", {"time_shift_type": "cubic"}, {}, "time_shift_type='cubic'"),
        ("euler", {"shift": 0.0}, {}, "shift=0.0"),
        ("euler", {"num_train_timesteps": 0}, {}, "num_train_timesteps=0"),
        ("euler", {"some_new_field": 3}, {}, "'some_new_field' .value 3. is not known here"),
        ("euler", {"num_train_timesteps": 8}, {}, "num_steps=10 should be from 1 to 8"),
    ],
)
def test_what_is_not_supported_is_named(name, changes, options, message):
    with pytest.raises(ValueError, match=message):
        make_sampler(name, SD3 | changes, 10, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prediction_type": "epsilon"}, "prediction_type='epsilon'"),
        ({"final_sigmas_type": "sigma_min"}, "final_sigmas_type='sigma_min'"),
        ({"solver_order": 3}, "solver_order=3"),
    ],
)
def test_fields_of_dpm_solver_with_flow_sigmas_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        make_sampler("dpmpp_2m", SANA | changes, 10)


def test_samplers_fit_the_kind_of_schedule():
    betas = {"_class_name": "DDIMScheduler"}
    assert isinstance(read_schedule(betas), NoiseSchedule) and isinstance(read_schedule(SANA), FlowSchedule)
    with pytest.raises(ValueError, match=r"'cps' does not fit .*DDIMScheduler.* betas: take ddpm, ddim"):
        make_sampler("cps", betas, 9)
    with pytest.raises(ValueError, match=r"DDIMScheduler.* is not a flow"):
        FlowSchedule.from_config(betas)


def test_log_probabilities_of_a_flows_steps_are_refused():
    """They are not random: recording them would train a policy on nothing."""
    sampler = make_sampler("euler", SD3, 3)
    with pytest.raises(ValueError, match="add no noise"):
        rollout(lambda *_: jnp.zeros(SHAPE), sampler, jnp.zeros(SHAPE), None, params={}, record=Record((0,)))
