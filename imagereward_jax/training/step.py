"""One training step: a pure, jitted, sharded function (state, fixed, batches) -> (state, metrics)."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from imagereward_jax.methods.base import STEPS, Mean, Models, Peak, Phase
from imagereward_jax.models.param_tree import join
from imagereward_jax.models.sharding import batch_over
from imagereward_jax.sections.run import OPTIMIZATION_LEVELS
from imagereward_jax.training.state import TrainState


class Fixed(NamedTuple):
    """Inputs of a step that it does not change.

    Attributes:
        frozen: the components and parts of components that do not train, in the compute dtype.
        reference: what training started from, of what trains; None if no loss reads it.
        tables: the phases' `Phase.tables`, by name.
    """

    frozen: Any
    reference: Any = None
    tables: Mapping[str, Any] = {}


def compile_options(optimization_level: str | None, *, on_policy: bool = False) -> dict[str, Any]:
    """Options of `Lowered.compile` for `config.optimization_level`.

    Args:
        on_policy: for the program that samples and the one that updates. Each then rounds to bfloat16 wherever it says
            so. By itself the compiler leaves out roundings, other ones in either, and ratios of equal weights are off
            1 by a hundred times DDPO's clip range (docs/benchmarks.md).
    """
    options = {"optimization_level": OPTIMIZATION_LEVELS[optimization_level]} if optimization_level else {}
    return {**options, "xla_allow_excess_precision": False} if on_policy else options


def join_models(fixed: Fixed, params: Any, copies: Mapping[str, Any], convert: Callable[[Any], Any]) -> Models:
    """The components that losses read; convert: brings the weights that train to the compute dtype."""
    return Models(
        policy=join(fixed.frozen, convert(params)),
        reference=None if fixed.reference is None else join(fixed.frozen, fixed.reference),
        copies={name: join(fixed.frozen, convert(tree)) for name, tree in copies.items()},
    )


def cast(tree: Any, dtype: Any) -> Any:
    """Floating-point arrays of `tree` in `dtype`."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def all_finite(tree: Any) -> jax.Array:
    """Whether no floating-point array of `tree` holds NaN or Inf: a bool on the device."""
    arrays = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.stack([jnp.isfinite(x).all() for x in arrays]).all()


def _smallest(result):
    """The smallest arrays of an update's result, in which settings and optimizers that make NaN show.

    Of all arrays it would cost memory for a second copy of the state, or, computed twice, minutes of compiling. Those
    are looked at by a program of their own, before the state is evaluated or saved (`finite.require_finite`).
    """
    size = min(x.size for x in jax.tree.leaves(result[0]))
    return [x for x in jax.tree.leaves(result) if x.size <= size]


def make_train_step(
    phases: tuple[Phase, ...],
    optimizer: optax.GradientTransformation,
    *,
    dtype: Any = jnp.float32,
    accumulation: int = 1,
    ema_decay: float = 0.0,
    copies: Mapping[str, Callable[[jax.Array], jax.Array]] | None = None,
    mesh: Mesh | None = None,
) -> Callable[..., tuple[TrainState, dict[str, Any]]]:
    """Builds (state, fixed, batches, update=0) -> (state, metrics): an update of each phase, in order.

    Randomness is `fold_in(fold_in(key, step), phase)`, and if a step makes several updates of each phase also by
    `update`, the number of this one in the step: a run that resumes draws the same numbers. The last one ends the step.
    An update whose loss, gradient or result is not finite leaves weights, moments and averages as they were and is
    counted.

    Args:
        phases: batches are given by their names.
        copies: averages of the weights to keep, {name: update -> decay}.
    """
    return _Step(phases, optimizer, dtype, accumulation, ema_decay, dict(copies or {}), mesh)


@dataclasses.dataclass(frozen=True, eq=False)
class _Step:
    """See `make_train_step`; `index` is the number of an update in the run."""

    phases: tuple[Phase, ...]
    optimizer: optax.GradientTransformation
    dtype: Any
    accumulation: int
    ema_decay: float
    copies: dict[str, Callable]
    mesh: Mesh | None

    __name__ = "train_step"  # of the compiled program, in profiles

    def __call__(self, state, fixed, batches, update=0):
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        updates, logged = self.phases[0].source.updates, {}
        for number, phase in enumerate(self.phases):
            phase_key = jax.random.fold_in(key, number)
            phase_key = jax.random.fold_in(phase_key, update) if updates > 1 else phase_key
            loss, grads, metrics = self.gradient(phase, state, fixed, batches[phase.name], phase_key)
            state, norm = self.update(state, grads, loss, (state.step * updates + update) * len(self.phases) + number)
            metrics = {"loss": loss, **metrics, "grad_norm": norm}
            logged |= {f"{phase.name}/{name}": value for name, value in metrics.items()}
        state = state.replace(step=state.step + (update == updates - 1))
        return state, {**logged, "skipped": state.skipped, "skipped_in_row": state.skipped_in_row}

    def gradient(self, phase, state, fixed, batch, key):
        """(mean loss, gradients, metrics) of one batch, in rounds if there are several."""
        rounds, part_of = self.rounds(batch)

        def loss(params, part, key):
            mean, metrics = self.loss(phase, state, fixed, params, part, key)
            # in rounds the sum is differentiated, and divided when all are added
            return (mean.value if rounds == 1 else mean.total), (mean, metrics)

        value_and_grad = jax.value_and_grad(loss, has_aux=True)
        if rounds == 1:
            (value, (_, metrics)), grads = value_and_grad(state.params, part_of(0), key)
            return value, grads, {name: _value(metric) for name, metric in metrics.items()}

        def body(total, index):
            (_, (mean, metrics)), grads = value_and_grad(state.params, part_of(index), jax.random.fold_in(key, index))
            return jax.tree.map(jnp.add, total, grads), (mean, metrics)

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        total, (losses, metrics) = jax.lax.scan(body, zeros, jnp.arange(rounds))
        count = jnp.maximum(losses.count.sum(), 1)
        grads = jax.tree.map(lambda x: x / count, total)
        return losses.total.sum() / count, grads, {name: _over_rounds(metric) for name, metric in metrics.items()}

    def loss(self, phase, state, fixed, params, batch, key):
        """(the loss as a `Mean`, metrics)."""
        models = join_models(fixed, params, state.copies, lambda tree: cast(tree, self.dtype))
        models = models._replace(tables=fixed.tables.get(phase.name))
        with batch_over(self.mesh):
            value, metrics = phase.loss(models, phase.source.prepare(models, batch), key)
        return value if isinstance(value, Mean) else Mean(value, jnp.ones((), jnp.float32)), metrics

    def rounds(self, batch):
        """(how many rounds a batch takes, index -> the part that this round takes)."""
        rows, steps = {name: part for name, part in batch.items() if name != STEPS}, batch.get(STEPS, {})
        count = jax.tree.leaves(steps)[0].shape[1] if steps else 1
        if self.accumulation == 1 and not steps:
            return 1, lambda index: batch
        rows, steps = jax.tree.map(self.split, (rows, steps))

        def part_of(index):
            first, step = index // count, index % count
            part = jax.tree.map(lambda x: x[first], rows)
            return {**part, **jax.tree.map(lambda x: x[first, :, step], steps)}

        return self.accumulation * count, part_of

    def split(self, rows):
        """Rows [B, ...] as [rounds, B / rounds, ...], each round sharded over the mesh."""
        rows = rows.reshape(self.accumulation, -1, *rows.shape[1:])
        if self.mesh is None:
            return rows
        return jax.lax.with_sharding_constraint(rows, NamedSharding(self.mesh, PartitionSpec(None, ("data", "fsdp"))))

    def update(self, state, grads, loss, index):
        """(the state after one update, the gradient's norm)."""
        norm = optax.tree.norm(grads)
        old = (state.params, state.opt_state, state.ema, state.copies)
        result = self.result(old, grads, index)
        finite = jnp.isfinite(norm) & jnp.isfinite(loss) & all_finite(_smallest(result))
        params, opt_state, ema, copies = jax.tree.map(lambda new, old: jnp.where(finite, new, old), result, old)
        state = state.replace(
            params=params,
            opt_state=opt_state,
            ema=ema,
            copies=copies,
            skipped=state.skipped + ~finite,
            skipped_in_row=jnp.where(finite, 0, state.skipped_in_row + 1),
        )
        return state, norm

    def result(self, old, grads, index):
        """(params, opt_state, ema, copies) after one update."""
        params, opt_state, ema, copies = old
        updates, opt_state = self.optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)

        def average(tree, decay):
            return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, tree, params) if tree else {}

        decay = jnp.minimum(self.ema_decay, (1 + index) / (10 + index))  # the start weights fade out quickly
        averages = {name: average(tree, self.copies[name](index)) for name, tree in copies.items()}
        return params, opt_state, average(ema, decay), averages


def over_updates(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The metrics of a step, from those of its updates: means, of a `Peak` the largest, of counters the last."""

    def over(name):
        values = [metrics[name] for metrics in found]
        if isinstance(values[0], Peak):
            return max(peak.value for peak in values)
        return values[-1] if name in ("skipped", "skipped_in_row") else np.mean(values)

    return {name: over(name) for name in found[0]}


def _value(metric):
    return metric.value if isinstance(metric, Mean) else metric


def _over_rounds(metric):
    """The metric of a whole batch from those of its rounds [rounds]."""
    if isinstance(metric, Mean):
        return Mean(metric.total.sum(), metric.count.sum()).value
    return Peak(metric.value.max(0)) if isinstance(metric, Peak) else metric.mean(0)
