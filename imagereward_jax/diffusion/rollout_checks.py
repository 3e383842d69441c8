"""Arguments of `rollout.rollout` that do not fit together, refused before anything is traced."""

import jax
import jax.numpy as jnp
import numpy as np

from imagereward_jax.diffusion.schedule import FLOW_PREDICTION


def check_arguments(sampler, keys, stop, gradient, record):
    """Raises ValueError for arguments of `rollout` that do not fit together."""
    total = sampler.num_steps
    if keys is None and sampler.stochastic:
        raise ValueError("this sampler is stochastic: pass keys, one per sample")
    if not 0 <= gradient.last <= total:
        raise ValueError(f"Gradient.last={gradient.last} should be from 0 to {total}, the number of steps")
    if not gradient.last and gradient.steps is not None:
        raise ValueError(
            f"Gradient.steps chooses among the last steps, of which Gradient.last=0 leaves none; set last={total} to "
            "choose among all"
        )
    if gradient.calls is not None and (gradient.last or np.ndim(gradient.calls) != 2):
        raise ValueError("Gradient.calls should be [B, K] step indices, in place of Gradient.last and steps")
    if gradient.leaps is not None:
        _check_leaps(sampler, stop, gradient)
    if gradient.steps is not None and np.shape(gradient.steps) != (total,):
        raise ValueError(f"Gradient.steps has shape {np.shape(gradient.steps)}, {total} steps need ({total},)")
    if gradient.predict and stop is None:
        raise ValueError("Gradient.predict needs stop, below num_steps: after the last step nothing is left to predict")
    if record is not None:
        _check_record(sampler, stop, gradient, record)


def _check_leaps(sampler, stop, gradient):
    """Raises ValueError for leaps that cannot be, or that stand beside other gradient."""
    if sampler.prediction_type != FLOW_PREDICTION:
        raise ValueError(
            f"Gradient.leaps are steps along a flow; this sampler's network predicts {sampler.prediction_type}"
        )
    if np.ndim(gradient.leaps) != 2 or np.shape(gradient.leaps)[1] != 2:
        raise ValueError(f"Gradient.leaps has shape {np.shape(gradient.leaps)}: expected [B, 2] step indices")
    if gradient.last or gradient.calls is not None or gradient.predict or stop is not None:
        raise ValueError("Gradient.leaps go to the end: leave out stop, Gradient.last, steps, calls and predict")


def _check_record(sampler, stop, gradient, record):
    """Raises ValueError for a record that cannot be, or that stands beside gradient."""
    total = sampler.num_steps
    options = (gradient.predict, gradient.calls is not None, gradient.leaps is not None, stop is not None)
    if gradient.last or any(options):
        raise ValueError(
            "record is for rollouts to the end without gradient: leave out stop and Gradient's last, calls, leaps and "
            "predict"
        )
    if (
        sampler.prediction_type == FLOW_PREDICTION
        and not isinstance(sampler.weights.random, jax.core.Tracer)
        and not sampler.stochastic
    ):
        raise ValueError("record needs log-probabilities, and the steps of this sampler of a flow add no noise")
    chosen = record.steps
    if not chosen or len(set(chosen)) < len(chosen) or not all(0 <= step < total for step in chosen):
        raise ValueError(f"Record.steps={chosen} should be distinct indices from 0 to {total - 1}, at least one")
    if not jnp.issubdtype(record.dtype, jnp.floating) or jnp.finfo(record.dtype).bits > 32:
        raise ValueError(f"Record.dtype={record.dtype} should be a floating dtype of at most 32 bits")
