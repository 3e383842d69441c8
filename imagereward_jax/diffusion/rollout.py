"""The rollout that every method shares: run a sampler from noise, with gradient or a record where it is asked for."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from imagereward_jax.diffusion.rollout_checks import check_arguments
from imagereward_jax.diffusion.sampler import Sampler, SamplerState, Transition, log_prob
from imagereward_jax.diffusion.schedule import along_rows, per_sample

Params = dict[str, Any]
# (params, latents [B, h, w, c], timesteps [B], step [B]) -> model output [B, h, w, c].
Denoise = Callable[[Params, jax.Array, jax.Array, jax.Array], jax.Array]


class Gradient(NamedTuple):
    """Which steps carry gradient. In one that does not, the model output is a constant; the latents never are.

    So gradient of earlier steps flows on through a later step's linear terms (AlignProp, DRTune).

    Attributes:
        last: static; only the last so many steps before each sample's stop may carry gradient (DRaFT-K). The state
            that they start from carries none.
        steps: [S] bool, may be traced; of these, the steps marked (AlignProp's random truncation).
        calls: [B, K], may be traced; in place of the above, the steps of each sample, all distinct, that carry
            gradient. Gradient is stopped at their inputs, so that none depends on another (DRTune): they are called
            again after a rollout without gradient, in one batch of B * K rows, K consecutive rows per sample.
        call_scale: [B], multiplies the gradient of each of a sample's `calls`; None for 1 (FlowBP).
        leaps: [B, 2], may be traced, rising; in place of the above, of a flow alone: one step of Euler's leads from the
            latents before the first to those before the second, another one from there to the end. Their values are
            those of a rollout without gradient, their gradient is that of these two steps (LeapAlign).
        leap_share: of the gradient that flows through the input of the second leap's call.
        predict: one more call, at the stop, predicts the clean latents. It carries gradient (ReFL); with `calls`, if
            the stop is among them.
    """

    last: int = 0
    steps: jax.Array | None = None
    calls: jax.Array | None = None
    call_scale: jax.Array | None = None
    leaps: jax.Array | None = None
    leap_share: float = 1.0
    predict: bool = False


NO_GRADIENT = Gradient()
KEPT = "model_output"  # kept for the backward pass, where it would cost a call without gradient to compute again


class Record(NamedTuple):
    """Which steps to record.

    Attributes:
        steps: their indices. dtype: that states are rounded to before they are scored.
        log_prob: (transition, following latents) -> [B].
        means: whether the means of the transitions are recorded too.
    """

    steps: tuple[int, ...]
    dtype: Any = jnp.float32
    log_prob: Callable[[Transition, jax.Array], jax.Array] = log_prob
    means: bool = False


class Trajectory(NamedTuple):
    """Recorded steps, in the order of `Record.steps`.

    Attributes:
        latents: before each step, [K, B, h, w, c] of the record's dtype.
        following: the latents after it, alike.
        log_probs: of `following` given `latents`, float32 [K, B].
        means: of the Gaussians that `following` was drawn from, float32 [K, B, h, w, c], or None.
    """

    latents: jax.Array
    following: jax.Array
    log_probs: jax.Array
    means: jax.Array | None = None


class Rolled(NamedTuple):
    """The result of a rollout.

    Attributes:
        state: after each sample's `stop` steps; its latents are the input of step `stop`.
        predicted: the clean latents predicted at the stop (`Gradient.predict`), or None.
        trajectory: the recorded steps, or None.
        deviation: float32 [B], the mean squared difference of a sample's model outputs with gradient to those of the
            `reference`, or None.
        leap_errors: float32 [B, 2], the mean absolute differences of where `Gradient.leaps` land to the latents of the
            rollout, or None. They carry no gradient.
    """

    state: SamplerState
    predicted: jax.Array | None
    trajectory: Trajectory | None
    deviation: jax.Array | None = None
    leap_errors: jax.Array | None = None


def rollout(
    denoise: Denoise,
    sampler: Sampler,
    noise: jax.Array,
    keys: jax.Array | None,
    *,
    params: Params,
    frozen: Params | None = None,
    reference: Params | None = None,
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
        reference: weights that calls with gradient are compared with, at the same inputs; gives `Rolled.deviation`.
        stop: [B] int32 in [0, num_steps], the steps that each sample takes; None for all. Below num_steps if
            `gradient.predict`.
        gradient: which steps carry gradient; by default none. A step that carries gradient for one sample of the
            batch is computed with `params` for all of them.
        record: which steps to record; for rollouts to the end and without gradient.
        denoise_with_gradient: called instead of `denoise` with gradient, e.g. with dropout.

    Raises:
        ValueError: if arguments do not fit together, or the sampler is stochastic and `keys` is None.
    """
    check_arguments(sampler, keys, stop, gradient, record)
    steps = _Steps(
        sampler=sampler,
        keys=keys,
        denoise=denoise,
        denoise_with_gradient=denoise_with_gradient or denoise,
        params=params,
        frozen=jax.lax.stop_gradient(params if frozen is None else frozen),
        reference=jax.lax.stop_gradient(reference),
    )
    state = sampler.init(jax.lax.stop_gradient(noise))
    if record is not None:
        return _recorded(steps, state, record)
    stop = jnp.full((noise.shape[0],), sampler.num_steps, jnp.int32) if stop is None else stop
    leap_errors = None
    if gradient.leaps is not None:
        state, predicted, compared, leap_errors = _with_leaps(steps, state, gradient)
    elif gradient.calls is not None:
        state, predicted, compared = _with_calls(steps, state, stop, gradient)
    else:
        state, predicted, compared = _in_sequence(steps, state, stop, gradient)
    deviation = None if reference is None else _mean_where(*compared)
    return Rolled(state, predicted, None, deviation, leap_errors)


@dataclasses.dataclass(frozen=True)
class _Steps:
    """The calls that steps are made of; `step` is an index [B] in [0, num_steps)."""

    sampler: Sampler
    keys: jax.Array | None
    denoise: Denoise
    denoise_with_gradient: Denoise
    params: Params
    frozen: Params
    reference: Params | None

    def clip(self, step):
        return jnp.clip(step, 0, self.sampler.num_steps - 1)

    def output(self, state, step):
        """The model output without gradient, float32."""
        model_input = jax.lax.stop_gradient(self.sampler.model_input(state, step))
        output = self.denoise(self.frozen, model_input, self.sampler.timestep(step), step)
        return jax.lax.stop_gradient(output.astype(jnp.float32))

    def output_with_gradient(self, state, step):
        """(the model output with gradient, [B] its mean squared difference to the reference's, or zeros), float32."""
        model_input, timestep = self.sampler.model_input(state, step), self.sampler.timestep(step)
        output = self.denoise_with_gradient(self.params, model_input, timestep, step).astype(jnp.float32)
        if self.reference is None:
            return output, jnp.zeros(output.shape[:1])
        base = self.denoise(self.reference, jax.lax.stop_gradient(model_input), timestep, step)
        base = checkpoint_name(jax.lax.stop_gradient(base.astype(jnp.float32)), KEPT)
        return output, jnp.square(output - base).mean(tuple(range(1, output.ndim)))

    def output_where(self, carries, state, step):
        """As `output_with_gradient`, for samples where `carries` [B]; a step that no sample needs costs none."""

        def with_gradient(state):
            output, difference = self.output_with_gradient(state, step)
            return jnp.where(along_rows(carries, output.ndim), output, jax.lax.stop_gradient(output)), difference

        def without(state):
            return self.output(state, step), jnp.zeros(step.shape)

        output, difference = jax.lax.cond(carries.any(), with_gradient, without, state)
        return checkpoint_name(output, KEPT), difference

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
        return jax.tree.map(lambda n, o: jnp.where(along_rows(active, n.ndim), n, o), new, state)


def _without_gradient(steps, state, stop):
    """Steps up to each sample's `stop` [B], which may be negative."""

    def body(step, state):
        active = step < stop
        index = steps.clip(jnp.where(active, step, stop))
        return steps.advance(state, steps.output(state, index), index, active)

    return jax.lax.stop_gradient(jax.lax.fori_loop(0, stop.max(), body, state))


def _in_sequence(steps, state, stop, gradient):
    """(state, predicted, compared): steps without gradient, the last ones with it, the prediction with it.

    compared: the differences to the reference's outputs and whether the sample carried gradient there, each [K, B].
    """
    if gradient.last < steps.sampler.num_steps:  # else there are no such steps, and their loop would only be compiled
        state = _without_gradient(steps, state, stop - gradient.last)
    predicted, compared = None, (jnp.zeros((0, *stop.shape)), jnp.zeros((0, *stop.shape), bool))
    if gradient.last:
        state, compared = _with_gradient(steps, state, stop, gradient)
    if gradient.predict:
        output, difference = steps.output_with_gradient(state, stop)
        predicted = steps.sampler.pred_original(state, output, stop)
        found = difference[None], jnp.ones((1, *stop.shape), bool)
        compared = jax.tree.map(lambda *parts: jnp.concatenate(parts), compared, found)
    return state, predicted, compared


def _with_gradient(steps, state, stop, gradient):
    """(state, compared) after the last `gradient.last` steps before each sample's `stop` [B]."""

    def body(state, offset):
        step = stop - gradient.last + offset
        active, index = (step >= 0) & (step < stop), steps.clip(step)
        if gradient.steps is None:
            carries, found = active, steps.output_with_gradient(state, index)
        else:
            carries = active & jnp.asarray(gradient.steps)[index]
            found = steps.output_where(carries, state, index)
        output, difference = found
        return steps.advance(state, output, index, active), (difference, carries)

    body = jax.checkpoint(body, policy=jax.checkpoint_policies.save_only_these_names(KEPT))
    return jax.lax.scan(body, state, jnp.arange(gradient.last))


def _with_calls(steps, state, stop, gradient):
    """As `_in_sequence`, for `gradient.calls`.

    A rollout without gradient keeps the latents and the model output of each step. The chosen calls are made again, and
    the steps, which are linear in the outputs, are taken again with the kept values and the gradient of these calls.
    """
    total, calls = steps.sampler.num_steps, gradient.calls
    chosen = jax.vmap(lambda all_steps, index: all_steps[index], in_axes=(1, 0))  # of [S, B, ...], by sample
    add = jax.vmap(lambda all_steps, index, new: all_steps.at[index].add(new), in_axes=(1, 0, 0), out_axes=1)

    def first_pass(step, carry):
        state, kept = carry
        index = steps.clip(jnp.minimum(step, stop))
        output = steps.output(state, index)
        kept = jax.tree.map(lambda all_steps, new: all_steps.at[step].set(new), kept, (state.latents, output))
        return steps.advance(state, output, index, step < stop), kept

    empty = jnp.zeros((total, *state.latents.shape))
    end = stop.max() + gradient.predict
    _, (latents, outputs) = jax.lax.stop_gradient(jax.lax.fori_loop(0, end, first_pass, (state, (empty, empty))))

    latents = chosen(latents, calls).reshape(-1, *state.latents.shape[1:])
    output, difference = steps.output_with_gradient(SamplerState(latents, latents), calls.reshape(-1))
    gradient_alone = _gradient_alone(output).reshape(*calls.shape, *output.shape[1:])
    if gradient.call_scale is not None:
        gradient_alone *= along_rows(gradient.call_scale, gradient_alone.ndim)
    outputs = add(outputs, calls, gradient_alone)

    def second_pass(state, step_and_output):
        step, output = step_and_output
        return steps.advance(state, output, steps.clip(jnp.minimum(step, stop)), step < stop), None

    state = jax.lax.scan(second_pass, state, (jnp.arange(total), outputs))[0]
    compared = difference.reshape(calls.shape).T, (calls < stop[:, None] + gradient.predict).T
    predicted = steps.sampler.pred_original(state, chosen(outputs, stop), stop) if gradient.predict else None
    return state, predicted, compared


def _with_leaps(steps, state, gradient):
    """As `_in_sequence`, for `gradient.leaps`, and the errors of the leaps, [B, 2].

    A rollout without gradient keeps the latents before both steps. What lands beside them is moved onto them by a
    constant.
    """
    sampler, total = steps.sampler, steps.sampler.num_steps
    first, second = jnp.moveaxis(jnp.asarray(gradient.leaps), 1, 0)

    def walk(step, carry):
        state, start, middle = carry
        index = jnp.full(first.shape, step, jnp.int32)
        start = jnp.where(along_rows(first == step, start.ndim), state.latents, start)
        middle = jnp.where(along_rows(second == step, middle.ndim), state.latents, middle)
        return steps.advance(state, steps.output(state, index), index, first >= 0), start, middle

    def leap(latents, model_input, step, sigma):
        output, difference = steps.output_with_gradient(SamplerState(model_input, model_input), step)
        distance = per_sample(sampler.sigma, step, latents.ndim) - along_rows(sigma, latents.ndim)
        return latents - distance * output, difference

    leap = jax.checkpoint(leap, policy=jax.checkpoint_policies.save_only_these_names(KEPT))
    walked = jax.lax.fori_loop(0, total, walk, (state, state.latents, state.latents))
    state, start, middle = jax.lax.stop_gradient(walked)
    reached, difference = leap(start, start, first, jnp.asarray(sampler.sigma)[second])
    pull = _gradient_alone(reached)
    ended, other = leap(middle + pull, middle + gradient.leap_share * pull, second, jnp.zeros(second.shape))
    errors = [
        jnp.abs(landed - latents).mean(tuple(range(1, latents.ndim)))
        for landed, latents in ((reached, middle), (ended, state.latents))
    ]
    state = state._replace(latents=state.latents + _gradient_alone(ended))
    compared = jnp.stack([difference, other]), jnp.ones((2, *second.shape), bool)
    return state, None, compared, jax.lax.stop_gradient(jnp.stack(errors, 1))


def _gradient_alone(x):
    """Zeros with the gradient of `x`."""
    return x - jax.lax.stop_gradient(x)


def _mean_where(values, flags):
    """[B] means over the first axis of `values` [K, B] where `flags` [K, B]; 0 where there are none."""
    return jnp.sum(jnp.where(flags, values, 0.0), 0) / jnp.maximum(flags.sum(0), 1)


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
        means = transition.mean if record.means else None
        found = Trajectory(state.latents, following, record.log_prob(transition, following), means)
        slot = jnp.asarray(slots)[step]
        trajectory = jax.tree.map(
            lambda kept, new: kept.at[slot].set(new.astype(kept.dtype), mode="drop"), trajectory, found
        )
        return state.followed_by(following, transition.original), trajectory

    empty = jnp.zeros((count, *shape), record.dtype)
    means = jnp.zeros(empty.shape, jnp.float32) if record.means else None
    trajectory = Trajectory(empty, empty, jnp.zeros((count, shape[0]), jnp.float32), means)
    state = state._replace(latents=rounded(state.latents))
    state, trajectory = jax.lax.stop_gradient(jax.lax.fori_loop(0, sampler.num_steps, body, (state, trajectory)))
    return Rolled(state, None, trajectory)
