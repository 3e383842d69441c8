"""Every scheduler class of the installed diffusers: its schedule is read as it is, or refused for what it is."""

import inspect
import json
import re
from pathlib import Path

import numpy as np
import pytest

from imagereward_jax.diffusion.flow import CLASSES as FLOWS
from imagereward_jax.diffusion.flow import FlowSchedule, read_schedule
from imagereward_jax.diffusion.samplers import make_sampler, samplers_of
from imagereward_jax.diffusion.scheduler_fields import HARMFUL, HARMLESS, REFUSED_CLASSES, WITH_BETAS
from imagereward_jax.models.config import EMA_FIELDS

diffusers = pytest.importorskip("diffusers", reason="the reference is PyTorch diffusers")

PAGE = Path(__file__).parents[2] / "docs" / "samplers.md"
ARGUMENTS = {"VQDiffusionScheduler": {"num_vec_classes": 10}}
# Their constructors take nine seconds for 1,000 steps.
ARGUMENTS |= {f"KDPM2{kind}Scheduler": {"num_train_timesteps": 100} for kind in ("Discrete", "AncestralDiscrete")}


def scheduler_classes():
    """Classes whose optional packages are installed, by name."""
    named = {name: getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Scheduler")}
    return {
        name: value
        for name, value in named.items()
        if inspect.isclass(value) and issubclass(value, diffusers.SchedulerMixin) and "dummy" not in value.__module__
    }


CLASSES = scheduler_classes()
# RFD4Proteina's samples a protein's coordinates, and is made with that model's settings alone.
TRAINED = [name for name, value in CLASSES.items() if "num_train_timesteps" in inspect.signature(value).parameters]


def made(name):
    """(the scheduler with its default settings, what diffusers writes of it to scheduler_config.json)."""
    scheduler = CLASSES[name](**ARGUMENTS.get(name, {}))
    return scheduler, json.loads(scheduler.to_json_string())


def test_all_of_them_are_walked():
    assert len(TRAINED) >= 39
    assert {"DDIMScheduler", "FlowMatchLCMScheduler", "EDMEulerScheduler", "UniPCMultistepScheduler"} < set(TRAINED)


@pytest.mark.parametrize("name", TRAINED)
def test_a_class_runs_or_is_refused_for_what_it_is(name):
    """Signal variances within 1e-5 of the class's own, or a flow's sigmas, and every sampler is made of them. Of a
    refused class the page and the error, whatever sampler, give the same reason."""
    scheduler, config = made(name)
    kind, told = re.search(rf"^\| `{name}` \| (\w+)[^|]*\| (.*?) \|$", PAGE.read_text(), re.MULTILINE).groups()
    if name in REFUSED_CLASSES:
        assert (kind, told) == ("refused", REFUSED_CLASSES[name])
        for read in (read_schedule, lambda config: make_sampler("euler", config, 10)):
            # Whatever betas another class left behind.
            for stated in (config, {"beta_start": 0.1, "beta_schedule": "linear"} | config):
                with pytest.raises(ValueError, match=re.escape(f"{name!r}: {told}")):
                    read(stated)
        return
    schedule = read_schedule(config)
    assert isinstance(schedule, FlowSchedule) == (name in FLOWS) == (kind == "flow")
    samplers = {sampler: make_sampler(sampler, config, 9) for sampler in samplers_of(config)}
    if name in FLOWS:
        np.testing.assert_array_equal(schedule.train_sigmas(), scheduler.sigmas.numpy()[: scheduler.sigmas.size(0)])
        for sampler in samplers.values():
            np.testing.assert_allclose(sampler.timesteps, 1000 * sampler.sigma, atol=1)
        return
    theirs = scheduler.alphas_cumprod.numpy()
    np.testing.assert_allclose(schedule.alphas_cumprod, theirs, rtol=1e-4, atol=1e-6)
    for sampler in samplers.values():
        variances = np.interp(sampler.timesteps, np.arange(len(theirs)), theirs)
        np.testing.assert_allclose(np.square(sampler.alpha), variances, rtol=0.02, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in CLASSES if name not in TRAINED])
def test_a_class_without_training_steps_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}.*open a model that was trained with one"):
        read_schedule({"_class_name": name})


@pytest.mark.parametrize("name", sorted(WITH_BETAS & set(CLASSES)))
def test_betas_that_a_config_leaves_out_are_those_of_its_class(name):
    """LCM's and TCD's are those of Stable Diffusion, for every sampler; a file may name the class alone."""
    config = {"_class_name": name} | ARGUMENTS.get(name, {})
    theirs = made(name)[0].alphas_cumprod.numpy()
    np.testing.assert_allclose(read_schedule(config).alphas_cumprod, theirs, rtol=1e-4, atol=1e-6)
    sampler = make_sampler("ddim", config, 10)
    np.testing.assert_allclose(np.square(sampler.alpha), theirs[sampler.timesteps.astype(int)], rtol=1e-4)


# Fields

SD1 = {"_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
WRONG = {
    "snr_shift_scale": 3.0,
    "timestep_type": "continuous",
    "use_flow_sigmas": True,
    "variance_type": "learned_range",
}


def test_harmless_fields_change_nothing():
    """Fields of other schedulers and numbers of an average, at values other than their defaults; every sampler."""
    texts = {"time_shift_type": "linear"}
    extra = {field: texts.get(field, 0.3) for field in (*HARMLESS, *EMA_FIELDS)} | {"use_dynamic_shifting": True}
    read_schedule(SD1 | extra)
    for name in samplers_of(SD1):
        own = {"solver_p": None} if name == "unipc" else {}  # the one that reads it
        for left, right in zip(tables(name, SD1 | extra | own), tables(name, SD1), strict=True):
            np.testing.assert_array_equal(left, right)


def tables(name, config):
    sampler = make_sampler(name, config, 9)
    return [sampler.timesteps, sampler.alpha, *(table for table in sampler.weights if table is not None)]


@pytest.mark.parametrize("field", HARMFUL)
def test_harmful_fields_refuse_the_model_for_every_sampler(field):
    """With the reason; at an implemented value they pass."""
    config = SD1 | {"prediction_type": "v_prediction", field: WRONG[field]}
    for read in (read_schedule, *(lambda c, n=name: make_sampler(n, c, 9) for name in samplers_of(SD1))):
        with pytest.raises(ValueError, match=rf"{field}=.* is not implemented, only .*{re.escape(HARMFUL[field].why)}"):
            read(config)
        read(config | {field: HARMFUL[field].values[0]})


def test_a_continuous_timestep_is_harmful_with_v_prediction_alone():
    """Of other predictions diffusers passes over it."""
    read_schedule(SD1 | {"timestep_type": "continuous"})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_train_timesteps": 1000, "shift": 3.0}, "shift=3.0"),
        ({"base_shift": 0.5, "use_dynamic_shifting": True}, "base_shift=0.5"),
        ({"sigma_data": 0.5, "prediction_type": "epsilon"}, "sigma_data=0.5"),
        ({"_class_name": "SomeNewScheduler", "num_train_timesteps": 1000}, "SomeNewScheduler"),
    ],
)
def test_a_schedule_without_betas_is_named_with_the_way_out(config, message):
    for read in (read_schedule, lambda config: make_sampler("ddim", config, 10)):
        with pytest.raises(ValueError) as caught:
            read(config)
        assert message in str(caught.value) and "open a model that was trained with one" in str(caught.value)


def test_betas_that_are_stated_make_an_unknown_class_readable():
    """What counts is the schedule, not how the class samples."""
    schedule = read_schedule({"_class_name": "SomeNewScheduler", "beta_start": 0.001})
    assert schedule.num_train_timesteps == 1000


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("original_inference_steps", 0, "a whole number"),
        ("timestep_scaling", "ten", "a number"),
        ("timestep_scaling", 0, "a number above 0"),
        ("steps_offset", -1, "a whole number from 0"),
        ("steps_offset", "one", "a whole number"),
        ("solver_order", True, "a whole number"),
        ("set_alpha_to_one", "x", "true or false"),
        ("euler_at_final", 1, "true or false"),
        ("beta_end", 1e9, "a number, at most 1,000,000"),
        ("beta_end", 0.0001, "0 < beta_start <= beta_end < 1"),
        ("beta_start", 0, "0 < beta_start <= beta_end < 1"),
        ("lambda_min_clipped", float("inf"), "a finite number"),
        ("eta", -float("inf"), "a finite number"),
        ("sigma_min", -0.1, "a number above 0"),
        ("use_karras_sigmas", "yes", "true or false"),
        ("disable_corrector", ["first"], "a list of steps"),
        ("disable_corrector", 3, "a list of steps"),
    ],
)
def test_values_of_another_kind_are_refused_when_the_model_is_opened(field, value, expected):
    with pytest.raises(ValueError, match=f"{field}=.*expected {expected}"):
        read_schedule(SD1 | {field: value})
