"""A sampler: the table of weights of its steps, and the Gaussian that every step draws the next latents from.

Each step is linear: the next latents are a weighted sum of the latents, the predicted clean latents, the predicted
noise, the clean latents predicted one step earlier, for UniPC those of two steps earlier, and fresh noise. Stepping
gathers a row of the table for each sample of the batch, so samples may be at different steps of one compiled program.
The tables are leaves of a pytree: passed as an argument, one compiled program serves every sampler of as many steps,
and a second one UniPC.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from imagereward_jax.diffusion.schedule import per_sample, to_noise, to_original, to_target


class SamplerState(NamedTuple):
    """Latents and the clean latents predicted last (zeros at first), float32 [B, h, w, c].

    `earlier`: the clean latents predicted before those; None if the sampler's weights have no such term.
    """

    latents: jax.Array
    original: jax.Array
    earlier: jax.Array | None = None

    def followed_by(self, latents: jax.Array, original: jax.Array) -> "SamplerState":
        """The state one step on: the new latents and the clean latents that the step predicted."""
        return SamplerState(latents, original, None if self.earlier is None else self.original)


class Weights(NamedTuple):
    """Weight of each term in a step, float32 [S]; all zero for a term that the sampler does not use.

    The terms are the latents, the predicted clean latents, the predicted noise, the clean latents predicted one step
    earlier, fresh standard normal noise, and the clean latents predicted two steps earlier. The last is None, and not
    held in the state, for samplers that do not use it.
    """

    latents: np.ndarray
    original: np.ndarray
    noise: np.ndarray
    previous: np.ndarray
    random: np.ndarray
    earlier: np.ndarray | None = None


class Transition(NamedTuple):
    """The Gaussian of one step.

    Attributes:
        mean: of the next latents, float32 [B, h, w, c].
        std: float32, a scalar or [B, 1, 1, 1]; 0 for a deterministic step.
        original: the predicted clean latents, float32 [B, h, w, c].
    """

    mean: jax.Array
    std: jax.Array
    original: jax.Array


def log_prob(transition: Transition, latents: jax.Array) -> jax.Array:
    """Log-density of `latents` [B, ...] under a transition, float32 [B].

    The mean over all axes but the first, as in ddpo-pytorch: the sum's scale would depend on the image size. It is 0
    for a step without noise, with gradients of 0.
    """
    std = jnp.asarray(transition.std)
    safe = jnp.where(std > 0, std, 1.0)
    deviation = (latents.astype(jnp.float32) - transition.mean) / safe
    squares = jnp.square(deviation).mean(tuple(range(1, deviation.ndim)))
    # The constants are added after the mean, whose rounding would grow with them and differ between two programs.
    density = -0.5 * squares - (jnp.log(safe) + 0.5 * math.log(2 * math.pi)).reshape(-1)
    return jnp.where(std.reshape(-1) > 0, density, 0.0)


def negative_distance(transition: Transition, latents: jax.Array) -> jax.Array:
    """-mean((latents - mean)^2), float32 [B]: CPS's log-density, without constants and 1 / (2 std^2)."""
    deviation = latents.astype(jnp.float32) - transition.mean
    return -jnp.square(deviation).mean(tuple(range(1, deviation.ndim)))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["timesteps", "init_noise_sigma", "input_scale", "alpha", "sigma", "weights"],
    meta_fields=["prediction_type"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Sampler:
    """A trajectory of `num_steps` steps; `step` below is an int32 scalar or [B], traced or not, in [0, num_steps).

    All fields but `prediction_type` are leaves of a pytree, float32 NumPy arrays or what is traced of them.

    Attributes:
        timesteps: [S], the network's timesteps, never rising.
        init_noise_sigma: scalar, the standard deviation of the first latents.
        input_scale: [S], the network sees latents * input_scale = alpha * x_0 + sigma * noise.
        alpha, sigma: [S], as above.
        weights: of the terms of each step.
        prediction_type: what the network outputs.
    """

    timesteps: np.ndarray
    init_noise_sigma: np.ndarray
    input_scale: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    weights: Weights
    prediction_type: str

    @property
    def num_steps(self) -> int:
        return self.timesteps.shape[0]

    @property
    def stochastic(self) -> bool:
        """Whether any step needs fresh noise.

        Raises:
            ValueError: if the tables are traced, so that nobody knows.
        """
        if isinstance(self.weights.random, jax.core.Tracer):
            raise ValueError(
                "inside a compiled program a sampler that is its argument may be stochastic: pass keys (or noise)"
            )
        return bool(np.any(self.weights.random))

    def init(self, noise: jax.Array) -> SamplerState:
        """The initial state. noise: standard normal [B, h, w, c]."""
        latents = noise.astype(jnp.float32) * self.init_noise_sigma
        none = jnp.zeros_like(latents)
        return SamplerState(latents, none, None if self.weights.earlier is None else none)

    def timestep(self, step: jax.Array) -> jax.Array:
        """The network's timestep, of the shape of `step`, float32."""
        return jnp.asarray(self.timesteps)[jnp.asarray(step)]

    def model_input(self, state: SamplerState, step: jax.Array) -> jax.Array:
        """The network's input, float32 [B, h, w, c]."""
        return state.latents * per_sample(self.input_scale, step, state.latents.ndim)

    def pred_original(self, state: SamplerState, model_output: jax.Array, step: jax.Array) -> jax.Array:
        """The clean latents that `model_output` at `step` means, float32 [B, h, w, c]."""
        return to_original(*self._prediction(state, model_output, step))

    def target(self, clean: jax.Array, noise: jax.Array, step: jax.Array) -> jax.Array:
        """The output that the network should have at `step` for clean latents and noise [B, h, w, c]."""
        alpha, sigma = (per_sample(table, step, clean.ndim) for table in (self.alpha, self.sigma))
        return to_target(self.prediction_type, clean, noise, alpha, sigma)

    def transition(
        self,
        state: SamplerState,
        model_output: jax.Array,
        step: jax.Array,
        noise_scale: jax.Array | None = None,
    ) -> Transition:
        """The Gaussian that the latents after `step` are drawn from.

        Args:
            state: before the step.
            model_output: [B, h, w, c], the network's output for `model_input(state, step)`.
            noise_scale: scalar or [B], multiplies the standard deviation; None for 1. The mean does not change.
        """
        original = self.pred_original(state, model_output, step)
        terms = {
            "latents": state.latents,
            "original": original,
            "noise": to_noise(*self._prediction(state, model_output, step)),
            "previous": state.original,
        }
        if state.earlier is not None:
            terms["earlier"] = state.earlier
        mean = sum(per_sample(getattr(self.weights, name), step, original.ndim) * term for name, term in terms.items())
        std = per_sample(self.weights.random, step, original.ndim)
        if noise_scale is not None:
            scale = jnp.asarray(noise_scale, jnp.float32)
            std = std * scale.reshape(scale.shape + (1,) * (original.ndim - scale.ndim if scale.ndim else 0))
        return Transition(mean, std, original)

    def step(
        self, state: SamplerState, model_output: jax.Array, step: jax.Array, noise: jax.Array | None = None
    ) -> SamplerState:
        """The state after `step`.

        Args:
            state: before the step.
            model_output: [B, h, w, c], the network's output for `model_input(state, step)`.
            noise: standard normal [B, h, w, c]; needed if the sampler is `stochastic`.

        Raises:
            ValueError: if noise is needed and not given.
        """
        if noise is None and self.stochastic:
            raise ValueError("this sampler is stochastic: pass standard normal noise of the shape of the latents")
        mean, std, original = self.transition(state, model_output, step)
        return state.followed_by(mean if noise is None else mean + std * noise, original)

    def steps_where(self, mask: jax.Array, other: "Sampler") -> "Sampler":
        """The sampler with this one's steps where `mask` [S], may be traced, and elsewhere those of `other`, which has
        the same timesteps."""
        weights = jax.tree.map(lambda own, others: jnp.where(mask, own, others), self.weights, other.weights)
        return dataclasses.replace(self, weights=weights)

    def _prediction(self, state, model_output, step):
        alpha = per_sample(self.alpha, step, model_output.ndim)
        sigma = per_sample(self.sigma, step, model_output.ndim)
        return self.prediction_type, model_output.astype(jnp.float32), self.model_input(state, step), alpha, sigma
