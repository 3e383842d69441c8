"""The schedule of flow matching: x_t = (1 - sigma) x_0 + sigma noise, and a network that predicts noise - x_0.

Read from the `scheduler_config.json` of a diffusers checkpoint. Sigmas are computed as diffusers'
`FlowMatchEulerDiscreteScheduler` does, in the same precisions, so they equal its own.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from imagereward_jax.diffusion.schedule import FLOW_PREDICTION, NoiseSchedule, Schedule, along_rows
from imagereward_jax.diffusion.scheduler_fields import check_fields, one_of, stated
from imagereward_jax.diffusion.sigmas import spaced, spacing_of

CLASSES = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
# Schedulers of betas that follow a flow with use_flow_sigmas.
_WITH_FLOW_SIGMAS = frozenset(
    f"{name}Scheduler"
    for name in ("DEISMultistep", "DPMSolverMultistep", "DPMSolverSinglestep", "SASolver", "UniPCMultistep")
)
# The only values implemented, of fields that would change the sigmas or the step.
ALLOWED = {
    "prediction_type": (FLOW_PREDICTION,),
    "use_flow_sigmas": (True,),
    "use_dynamic_shifting": (False, True),
    "time_shift_type": ("exponential", "linear"),
    "invert_sigmas": (False, None),
    "shift_terminal": (None, 0, 0.0),
    "stochastic_sampling": (False, None),
    "use_lu_lambdas": (False, None),
    "final_sigmas_type": ("zero",),
    "scale_factors": (None, []),  # latents that grow from step to step
}


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler_config.json describes a flow: by its class, or as use_flow_sigmas of another class.

    Raises:
        ValueError: a field has a value of another kind (`check_fields`).
    """
    check_fields(config)
    name = config.get("_class_name")
    return name in CLASSES or (name in _WITH_FLOW_SIGMAS and bool(stated(config).get("use_flow_sigmas")))


def read_schedule(config: Mapping[str, Any]) -> "NoiseSchedule | FlowSchedule":
    """The schedule of a scheduler_config.json.

    Raises:
        ValueError: naming the class or field that is not supported.
    """
    return FlowSchedule.from_config(config) if is_flow(config) else NoiseSchedule.from_config(config)


@dataclasses.dataclass(frozen=True)
class FlowSchedule(Schedule):
    """Noising of a flow; `timesteps` are T * sigma, floats in [0, T], as the network is told them.

    Attributes, the fields of scheduler_config.json with the defaults of diffusers' class:
        num_train_timesteps: T, how many sigmas training chooses from.
        shift: factor on sigma / (1 - sigma), the odds of noise; above 1 gives more of the steps to noisy latents.
        use_dynamic_shifting: shift by the size of the image instead, by `dynamic_shift`.
        base_shift, max_shift: mu of images of `base_image_seq_len` and `max_image_seq_len` tokens; linear between.
        time_shift_type: the factor is e^mu ("exponential") or mu ("linear").
        use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas: space the shifted sigmas of samplers anew
            (`sigmas.spaced`).
    """

    num_train_timesteps: int = 1000
    shift: float = 1.0
    use_dynamic_shifting: bool = False
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    time_shift_type: str = "exponential"
    use_karras_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    use_beta_sigmas: bool | None = False

    prediction_type = FLOW_PREDICTION

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "FlowSchedule":
        """From the content of scheduler_config.json; `flow_shift` is the shift of classes with use_flow_sigmas.

        Raises:
            ValueError: naming the field that is not supported, or saying that this is no flow.
        """
        if not is_flow(config):
            raise ValueError(f"scheduler_config.json: _class_name={config.get('_class_name')!r} is not a flow")
        given = stated(config)
        if config.get("_class_name") not in CLASSES:
            # These classes have no velocity by default, and another name for the shift.
            given = {"prediction_type": "epsilon", "shift": given.get("flow_shift", 1.0)} | given
        for field in given.keys() & ALLOWED.keys():
            one_of(field, given[field], ALLOWED[field])
        schedule = cls(**{field: given[field] for field in FIELDS if field in given})
        steps, shift = schedule.num_train_timesteps, schedule.shift
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"scheduler_config.json: num_train_timesteps={steps!r} should be a positive integer")
        if not (isinstance(shift, int | float) and shift > 0):
            raise ValueError(f"scheduler_config.json: shift={shift!r} should be a positive number")
        if schedule.use_dynamic_shifting and not 0 < schedule.base_image_seq_len < schedule.max_image_seq_len:
            raise ValueError(
                f"scheduler_config.json: base_image_seq_len={schedule.base_image_seq_len!r}, max_image_seq_len="
                f"{schedule.max_image_seq_len!r}: expected 0 < base_image_seq_len < max_image_seq_len"
            )
        spacing_of(given)
        return schedule

    def train_sigmas(self) -> np.ndarray:
        """The sigmas that training chooses from, falling, float32 [T]; the fixed shift is in them."""
        sigmas = np.arange(self.num_train_timesteps, 0, -1, dtype=np.float32) / np.float32(self.num_train_timesteps)
        return sigmas if self.use_dynamic_shifting else _shifted(sigmas, np.float32(self.shift))

    @property
    def spacing(self) -> str | None:
        """The field that spaces the sigmas of samplers anew, see `sigmas.spacing_of`."""
        return spacing_of(dataclasses.asdict(self))

    def sampling_sigmas(self, num_steps: int, image_tokens: int | None = None, *, anew: bool = True) -> np.ndarray:
        """The sigmas of Euler's steps, falling, float32 [S].

        They run from the first to the last of training, in which the shift already is, and are shifted again, as in
        diffusers and in Stability AI's own code.

        Args:
            image_tokens: of the image in the network's sequence; needed with `use_dynamic_shifting`.
            anew: whether they are spaced by `spacing`, which diffusers' Heun's method does not know.

        Raises:
            ValueError: if it is needed and not given.
        """
        first, last = self.train_sigmas()[[0, -1]].astype(np.float64)
        total = self.num_train_timesteps
        even = np.linspace(first * total, last * total, num_steps) / total
        sigmas = self.shift_sigmas(even, image_tokens)
        if anew and self.spacing:
            sigmas = spaced(self.spacing, sigmas[0], sigmas[-1], num_steps)
        return sigmas.astype(np.float32)

    def shift_sigmas(self, sigmas: np.ndarray, image_tokens: int | None = None) -> np.ndarray:
        """Sigmas shifted by `shift` or by the size of the image; `image_tokens` as for `sampling_sigmas`."""
        if not self.use_dynamic_shifting:
            return _shifted(sigmas, self.shift)
        if image_tokens is None:
            raise ValueError(
                "scheduler_config.json: use_dynamic_shifting=True, so sigmas follow from the size of the image: pass "
                "image_tokens to make_sampler"
            )
        return self.shift_to_resolution(sigmas, image_tokens)

    def shift_to_resolution(self, sigmas: np.ndarray, image_tokens: int) -> np.ndarray:
        """Sigmas shifted by the size of the image (diffusers' `time_shift`)."""
        factor = self.dynamic_shift(image_tokens)
        # factor s / (1 + (factor - 1) s), written as diffusers computes it.
        return factor / (factor + (1 / sigmas - 1))

    def dynamic_shift(self, image_tokens: int) -> float:
        """The factor on sigma / (1 - sigma) for an image of so many tokens."""
        slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
        mu = image_tokens * slope + (self.base_shift - slope * self.base_image_seq_len)
        return math.exp(mu) if self.time_shift_type == "exponential" else mu

    def sigmas(self, timesteps: jax.Array) -> jax.Array:
        """The share of noise at timesteps, float32 of their shape."""
        return jnp.asarray(timesteps, jnp.float32) / self.num_train_timesteps

    def coefficients(self, timesteps: jax.Array, ndim: int = 4) -> tuple[jax.Array, jax.Array]:
        """See `Schedule`."""
        sigma = along_rows(self.sigmas(timesteps), ndim)
        return 1 - sigma, sigma


FIELDS = tuple(field.name for field in dataclasses.fields(FlowSchedule))


def _shifted(sigmas, shift):
    """Sigmas whose odds sigma / (1 - sigma) are multiplied by `shift`."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)
