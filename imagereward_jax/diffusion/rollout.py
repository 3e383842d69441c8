"""The rollout that every method shares: run a sampler from noise, with gradient or a record where it is asked for."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from imagereward_jax.diffusion.sampler import Sampler, SamplerState, log_prob

Params = dict[str, Any]
# (params, latents [B, h, w, c], timesteps [B], step [B]) -> model output [B, h, w, c].
Denoise = Callable[[Params, jax.Array, jax.Array, jax.Array], jax.Array]


class Gradient(NamedTuple):
    """Which steps carry gradient. In one that does not, the model output is a constant; the latents never are.

    So gradient of earlier steps flows on through a later step's linear terms (AlignProp, DRTune).

    Attributes:
        last: static; only the last so many steps before each sample's stop may carry gradient (DRaFT-K). The state
            that they start from carries none.
        first: [B], may be traced; of these, steps with an index from here on (AlignProp's random truncation).
        steps: [S] bool, may be traced; of these, the steps marked (AlignProp's draw per step, DRTune).
        through_input: False stops gradient at the denoiser's input (DRTune).
        predict: one more call, at the stop and with gradient, predicts the clean latents (ReFL).
    """

    last: int = 0
    first: jax.Array | None = None
    steps: jax.Array | None = None
    through_input: bool = True
    predict: bool = False


NO_GRADIENT = Gradient()


class Record(NamedTuple):
    """Which steps to record, by index, and the dtype that states are rounded to before they are scored."""

    steps: tuple[int, ...]
    dtype: Any = jnp.float32


class Trajectory(NamedTuple):
    """Recorded steps, in the order of `Record.steps`.

    Attributes:
        latents: before each step, [K, B, h, w, c] of the record's dtype.
        following: the latents after it, alike.
        log_probs: of `following` given `latents`, float32 [K, B].
    """

    latents: jax.Array
    following: jax.Array
    log_probs: jax.Array


class Rolled(NamedTuple):
    """The result of a rollout.

    Attributes:
        state: after each sample's `stop` steps; its latents are the input of step `stop`.
        predicted: the clean latents predicted at the stop (`Gradient.predict`), or None.
        trajectory: the recorded steps, or None.
    """

    state: SamplerState
    predicted: jax.Array | None
    trajectory: Trajectory | None


def rollout(
    denoise: Denoise,
    sampler: Sampler,
    noise: jax.Array,
    keys: jax.Array | None,
    *,
    params: Params,
    frozen: Params | None = None,
    stop: jax.Array | None = None,
    gradient: Gradient = NO_GRADIENT,
    record: Record | None = None,
    denoise_with_gradient: Denoise | None = None,
) -> Rolled:
    """Runs `sampler` from `noise` up to each sample's own stop index.

    Steps that may carry gradient are rematerialised: each costs the memory of its latents. All earlier ones store
    nothing. How many steps run is a traced value, the largest stop index: it never recompiles.

    Args:
        noise: standard normal, [B, h, w, c].
        keys: [B] keys, or None for a sampler known to be deterministic. The noise of step i comes from
            `fold_in(keys[b], i)`, so it depends neither on the batch nor on where samples stop.
        params: weights of the calls with gradient.
        frozen: weights of the calls without; None for `params`. No gradient flows through them.
        stop: [B] int32 in [0, num_steps], the steps that each sample takes; None for all. Below num_steps if
            `gradient.predict`.
        gradient: which steps carry gradient; by default none. A step that carries gradient for one sample of the
            batch is computed with `params` for all of them.
        record: which steps to record; for rollouts to the end and without gradient.
        denoise_with_gradient: called instead of `denoise` with gradient, e.g. with dropout.

    Raises:
        ValueError: if arguments do not fit together, or the sampler is stochastic and `keys` is None.
    """
    _check(sampler, keys, stop, gradient, record)
    steps = _Steps(
        sampler=sampler,
        keys=keys,
        denoise=denoise,
        denoise_with_gradient=denoise_with_gradient or denoise,
        params=params,
        frozen=jax.lax.stop_gradient(params if frozen is None else frozen),
        through_input=gradient.through_input,
    )
    state = sampler.init(jax.lax.stop_gradient(noise))
    if record is not None:
        return _recorded(steps, state, record)
    stop = jnp.full((noise.shape[0],), sampler.num_steps, jnp.int32) if stop is None else stop
    state = _without_gradient(steps, state, stop - gradient.last)
    if gradient.last:
        state = _with_gradient(steps, state, stop, gradient)
    if not gradient.predict:
        return Rolled(state, None, None)
    return Rolled(state, sampler.pred_original(state, steps.output_with_gradient(state, stop), stop), None)


@dataclasses.dataclass(frozen=True)
class _Steps:
    """The calls that steps are made of; `step` is an index [B] in [0, num_steps)."""

    sampler: Sampler
    keys: jax.Array | None
    denoise: Denoise
    denoise_with_gradient: Denoise
    params: Params
    frozen: Params
    through_input: bool

    def clip(self, step):
        return jnp.clip(step, 0, self.sampler.num_steps - 1)

    def output(self, state, step):
        """The model output without gradient, float32."""
        model_input = jax.lax.stop_gradient(self.sampler.model_input(state, step))
        output = self.denoise(self.frozen, model_input, self.sampler.timestep(step), step)
        return jax.lax.stop_gradient(output.astype(jnp.float32))

    def output_with_gradient(self, state, step):
        """The model output with gradient, float32."""
        model_input = self.sampler.model_input(state, step)
        model_input = model_input if self.through_input else jax.lax.stop_gradient(model_input)
        output = self.denoise_with_gradient(self.params, model_input, self.sampler.timestep(step), step)
        return output.astype(jnp.float32)

    def output_where(self, carries, state, step):
        """The model output, with gradient for samples where `carries` [B]; one that no sample needs costs none."""

        def with_gradient(state):
            output = self.output_with_gradient(state, step)
            return jnp.where(_per_sample(carries, output), output, jax.lax.stop_gradient(output))

        return jax.lax.cond(carries.any(), with_gradient, lambda state: self.output(state, step), state)

    def random(self, step, shape):
        """Standard normal noise [B, ...], one stream per sample and step; None without keys."""
        if self.keys is None:
            return None
        draw = jax.vmap(lambda key, step: jax.random.normal(jax.random.fold_in(key, step), shape[1:]))
        # Looked up in the whole table: with sharded samples, these steps alone would have to be gathered first.
        stochastic = jnp.any(jnp.asarray(self.sampler.weights.random) != 0)
        return jax.lax.cond(stochastic, draw, lambda *_: jnp.zeros(shape), self.keys, step)

    def advance(self, state, output, step, active):
        """The state after `step` of samples that are `active` [B]; others keep theirs."""
        new = self.sampler.step(state, output, step, self.random(step, state.latents.shape))
        return jax.tree.map(lambda n, o: jnp.where(_per_sample(active, n), n, o), new, state)


def _without_gradient(steps, state, stop):
    """Steps up to each sample's `stop` [B], which may be negative."""

    def body(step, state):
        active = step < stop
        index = steps.clip(jnp.where(active, step, stop))
        return steps.advance(state, steps.output(state, index), index, active)

    return jax.lax.stop_gradient(jax.lax.fori_loop(0, stop.max(), body, state))


def _with_gradient(steps, state, stop, gradient):
    """The last `gradient.last` steps before each sample's `stop` [B]."""
    everything = gradient.first is None and gradient.steps is None

    @jax.checkpoint
    def body(state, offset):
        step = stop - gradient.last + offset
        active, index = (step >= 0) & (step < stop), steps.clip(step)
        if everything:
            output = steps.output_with_gradient(state, index)
        else:
            carries = active if gradient.first is None else active & (index >= gradient.first)
            carries = carries if gradient.steps is None else carries & jnp.asarray(gradient.steps)[index]
            output = steps.output_where(carries, state, index)
        return steps.advance(state, output, index, active), None

    return jax.lax.scan(body, state, jnp.arange(gradient.last))[0]


def _recorded(steps, state, record):
    """A rollout to the end whose states are rounded to the record's dtype, all of them, before they are used."""
    sampler, shape, count = steps.sampler, state.latents.shape, len(record.steps)
    slots = np.full(sampler.num_steps, count)  # a slot past the end is dropped
    slots[list(record.steps)] = np.arange(count)
    precision = jnp.finfo(record.dtype)

    def rounded(latents):
        # Not two casts, which a compiler may take for nothing.
        return jax.lax.reduce_precision(latents, precision.nexp, precision.nmant)

    def body(step, carry):
        state, trajectory = carry
        index = jnp.full(shape[:1], step, jnp.int32)
        transition = sampler.transition(state, steps.output(state, index), index)
        random = steps.random(index, shape)
        following = rounded(transition.mean if random is None else transition.mean + transition.std * random)
        found = Trajectory(state.latents, following, log_prob(transition, following))
        slot = jnp.asarray(slots)[step]
        trajectory = jax.tree.map(
            lambda kept, new: kept.at[slot].set(new.astype(kept.dtype), mode="drop"), trajectory, found
        )
        return SamplerState(following, transition.original), trajectory

    empty = jnp.zeros((count, *shape), record.dtype)
    trajectory = Trajectory(empty, empty, jnp.zeros((count, shape[0]), jnp.float32))
    state = state._replace(latents=rounded(state.latents))
    state, trajectory = jax.lax.stop_gradient(jax.lax.fori_loop(0, sampler.num_steps, body, (state, trajectory)))
    return Rolled(state, None, trajectory)


def _check(sampler, keys, stop, gradient, record):
    """Raises ValueError for arguments of `rollout` that do not fit together."""
    total = sampler.num_steps
    if keys is None and sampler.stochastic:
        raise ValueError("this sampler is stochastic: pass keys, one per sample")
    if not 0 <= gradient.last <= total:
        raise ValueError(f"Gradient.last={gradient.last} should be from 0 to {total}, the number of steps")
    if not gradient.last and not (gradient.first is None and gradient.steps is None):
        raise ValueError(
            f"Gradient.first and Gradient.steps choose among the last steps, of which Gradient.last=0 leaves none; "
            f"set last={total} to choose among all"
        )
    if gradient.steps is not None and np.shape(gradient.steps) != (total,):
        raise ValueError(f"Gradient.steps has shape {np.shape(gradient.steps)}, {total} steps need ({total},)")
    if gradient.predict and stop is None:
        raise ValueError("Gradient.predict needs stop, below num_steps: after the last step nothing is left to predict")
    if record is None:
        return
    if gradient.last or gradient.predict or stop is not None:
        raise ValueError(
            "record is for rollouts to the end without gradient: leave out stop, Gradient.last and predict"
        )
    chosen = record.steps
    if not chosen or len(set(chosen)) < len(chosen) or not all(0 <= step < total for step in chosen):
        raise ValueError(f"Record.steps={chosen} should be distinct indices from 0 to {total - 1}, at least one")
    if not jnp.issubdtype(record.dtype, jnp.floating) or jnp.finfo(record.dtype).bits > 32:
        raise ValueError(f"Record.dtype={record.dtype} should be a floating dtype of at most 32 bits")


def _per_sample(flags, like):
    """[B] flags shaped to broadcast against `like` [B, ...]."""
    return flags.reshape(flags.shape + (1,) * (like.ndim - flags.ndim))
