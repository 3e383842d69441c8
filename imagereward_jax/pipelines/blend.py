"""Samples with two models at once: a tuned model and the base model that it was tuned from.

At step i of S the prediction is base + w_i * (tuned - base). Annealed guidance gives the early steps to the base model,
which keeps its diversity, and the late ones to the tuned model: w_i = i / S, its powers, or a range of steps (arXiv
2409.06493; NeMo-Aligner's DRaFT+). Combined guidance takes the negative prompt's prediction from the base model alone.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from imagereward_jax.diffusion.rollout import Denoise

if TYPE_CHECKING:
    from imagereward_jax.pipelines.base import TextToImage


class Blend(NamedTuple):
    """Weights of the tuned model at each step; the base model has the rest. 0 and 1 save the other model's call.

    Attributes:
        negative: of the prediction for the negative prompt, float32 [S]; not read without guidance.
        positive: of the prediction for the prompt, float32 [S].
    """

    negative: np.ndarray
    positive: np.ndarray


def make_blend(
    num_steps: int,
    *,
    steps: tuple[float, float] = (0.0, 1.0),
    weight: tuple[float, float] = (1.0, 1.0),
    power: float = 1.0,
    base_negative: bool = False,
) -> Blend:
    """Makes the weights of `num_steps` sampler steps; step i is at position i / num_steps.

    Args:
        steps: (first, last) positions, the last one excluded: steps outside are the base model's alone.
        weight: of the tuned model, from the first of these positions to the last; above 1 it is extrapolated.
        power: 1 for a linear change; p for that of position ** p.
        base_negative: the negative prompt's prediction is the base model's at every step.

    Raises:
        ValueError: the positions are not in order in [0, 1], no step is between them, or a number is not finite.
    """
    first, last = steps
    if not 0.0 <= first < last <= 1.0:
        raise ValueError(f"tuned steps {first:g}:{last:g} should be two positions from 0 to 1, the smaller one first")
    if not np.isfinite([*weight, power]).all() or power <= 0:
        raise ValueError(
            f"tuned weight {weight[0]:g}:{weight[1]:g}:{power:g} should be two finite numbers and a power above 0"
        )
    if max(map(abs, weight)) > np.finfo(np.float32).max:
        raise ValueError(f"tuned weight {weight[0]:g}:{weight[1]:g} is too large for float32: it is usually 0 to 2")
    index = np.arange(num_steps)
    inside = (index >= first * num_steps - 1e-6) & (index < last * num_steps - 1e-6)
    if not inside.any():
        raise ValueError(f"tuned steps {first:g}:{last:g} hold none of {num_steps} steps")
    progress = np.clip((index / num_steps - first) / (last - first), 0.0, 1.0) ** power
    positive = np.where(inside, weight[0] + (weight[1] - weight[0]) * progress, 0.0).astype(np.float32)
    return Blend(np.zeros_like(positive) if base_negative else positive, positive)


def blended_denoiser(
    pipeline: "TextToImage", blend: Blend, conds: Sequence[Sequence[Any]], guidance_scale: ArrayLike = 1.0
) -> Denoise:
    """Binds both models to their conditions, as `TextToImage.denoiser_for` does one, for all samples at the same step.

    A step calls each model for the predictions that have a weight there, in one batch; those of both models cost twice
    an ordinary step, a range of steps or combined guidance no more than one.

    Args:
        conds: of the base model and of the tuned one, each (negative, positive), or (positive,) without guidance.

    Returns:
        (params, latents, timesteps, step) -> output, with params (base's, tuned's).
    """
    tuned = np.stack(blend[-len(conds[0]) :], axis=-1)
    weights = np.stack([1 - tuned, tuned], axis=1)  # [S, model, prediction]
    kinds, kind_of_step = np.unique(weights != 0, axis=0, return_inverse=True)

    def branch(needed):
        def predict(params, latents, timesteps, weight):
            mixed = [0.0] * len(conds[0])
            for model in range(2):
                chosen = np.flatnonzero(needed[model])
                given = [conds[model][i] for i in chosen]
                outputs = pipeline.predict_each(params[model], latents, timesteps, given) if given else ()
                for i, output in zip(chosen, outputs):
                    mixed[i] += weight[model, i] * output.astype(jnp.float32)
            return pipeline.guided(*mixed, guidance_scale) if len(mixed) > 1 else mixed[0]

        return predict

    branches = [branch(needed) for needed in kinds]

    def denoise(params, latents, timesteps, step):
        weight, kind = jnp.asarray(weights)[step[0]], jnp.asarray(kind_of_step.reshape(-1))[step[0]]
        return jax.lax.switch(kind, branches, params, latents, timesteps, weight)

    return denoise
