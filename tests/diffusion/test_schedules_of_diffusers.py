"""Every scheduler class of the installed diffusers: its schedule is read as it is, or refused by name."""

import inspect
import json

import numpy as np
import pytest

from imagereward_jax.diffusion.flow import CLASSES as FLOWS
from imagereward_jax.diffusion.flow import FlowSchedule, read_schedule
from imagereward_jax.diffusion.samplers import make_sampler

diffusers = pytest.importorskip("diffusers", reason="the reference is PyTorch diffusers")


def scheduler_classes():
    """Classes whose optional packages are installed and whose arguments all have defaults, by name."""
    found = {}
    for name in dir(diffusers):
        value = getattr(diffusers, name) if name.endswith("Scheduler") else None
        if not (inspect.isclass(value) and issubclass(value, diffusers.SchedulerMixin)):
            continue
        parameters = list(inspect.signature(value.__init__).parameters.values())[1:]
        if all(parameter.default is not parameter.empty for parameter in parameters):
            found[name] = value
    return found


CLASSES = scheduler_classes()


@pytest.mark.parametrize("name", CLASSES)
def test_schedule_is_that_of_the_class_or_is_refused(name):
    """Signal variances within 1e-5 of the class's own, or a flow's sigmas; a class without both is refused by name."""
    scheduler = CLASSES[name]()
    config = json.loads(scheduler.to_json_string())  # what diffusers writes to scheduler_config.json
    try:
        schedule = read_schedule(config)
    except ValueError as error:
        assert name in str(error)
        assert name.startswith("CogVideoX") or not hasattr(scheduler, "alphas_cumprod")
        with pytest.raises(ValueError, match=name):
            make_sampler("euler", config, 10)
        return
    assert isinstance(schedule, FlowSchedule) == (name in FLOWS)
    if name in FLOWS:
        np.testing.assert_array_equal(schedule.train_sigmas(), scheduler.sigmas.numpy())
        return
    np.testing.assert_allclose(schedule.alphas_cumprod, scheduler.alphas_cumprod.numpy(), rtol=1e-4, atol=1e-6)


def test_both_kinds_are_there():
    assert {"FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "EDMEulerScheduler"} < CLASSES.keys()
    assert {"DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"} < CLASSES.keys()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "FlowMatchLCMScheduler", "shift": 3.0}, "FlowMatchLCMScheduler"),
        ({"num_train_timesteps": 1000, "shift": 3.0}, "shift=3.0"),
        ({"base_shift": 0.5, "use_dynamic_shifting": True}, "base_shift=0.5"),
        ({"sigma_data": 0.5, "prediction_type": "epsilon"}, "sigma_data=0.5"),
        (
            {"_class_name": "LMSDiscreteScheduler", "use_flow_sigmas": True},
            "use_flow_sigmas=True",
        ),
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
