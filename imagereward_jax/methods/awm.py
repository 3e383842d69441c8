"""Advantage weighted matching (arXiv 2509.25050): the policy gradient of a surrogate log-probability.

The surrogate falls with the error e of the network's output on an image that was noised anew, the loss that the model
was pretrained with. So any sampler makes the images, and noise levels need not be those of its steps.
"""

from typing import Any

import jax
import jax.numpy as jnp

from imagereward_jax.config import MAX_STEPS, field
from imagereward_jax.methods.base import Loss, Method, Phase
from imagereward_jax.methods.forward_process import (
    NoisedConfig,
    make_choose,
    make_sample,
    mean_square,
    noised,
    sampler_of,
)
from imagereward_jax.methods.on_policy import bind_denoiser, snapshot
from imagereward_jax.methods.policy_gradient import clipped_loss, ratio_metrics

OLD, AVERAGE = "old", "average"
# (error e [B], share of noise t [B], power p) -> surrogate log-probability [B].
SURROGATES = {
    "plain": lambda e, t, p: -e,
    "t": lambda e, t, p: -t * e,
    "t2": lambda e, t, p: -(t**2) * e,
    "sqrt": lambda e, t, p: -t * (jnp.sqrt(e + 1e-10) - 1e-5),
    "ghuber": lambda e, t, p: -t / p * ((e + 1e-10) ** p - 1e-10**p),
}


class Config(NoisedConfig):
    """config.method of AWM."""

    # sampler steps in training; evaluation takes more (config.eval.num_steps)
    num_steps: int = field(14, at_least=1, at_most=MAX_STEPS)
    noise_levels: int = field(
        6, at_least=1
    )  # steps at which each sample trains, drawn anew, an accumulation round each
    first_step: int = field(1, at_least=0)  # of those drawn from; 1 leaves out the step from noise alone
    surrogate: str = field("ghuber", choices=tuple(SURROGATES))  # of the error e at noise t: -e, -t e, -t^2 e, ...
    surrogate_power: float = field(0.25, above=0.0)  # p of "ghuber", -t/p e^p
    clip_range: float = field(1e-3, above=0.0)  # the ratio counts within 1 +- this; matters if a step has many updates
    # of the mean squared difference to the outputs of the weights that training starts from; no KL, as its code says
    base_penalty: float = field(1e-3, at_least=0.0)
    # the same to an average of the weights, that keeps min(average_rate n, average_most) of itself after update n
    average_penalty: float = field(1.0, at_least=0.0)
    average_rate: float = field(0.001, at_least=0.0)  # see average_penalty
    average_most: float = field(0.3, at_least=0.0, at_most=1.0)  # see average_penalty


def make(config: Config, parts: Any) -> Method:
    """One phase, whose batches the present weights make.

    Raises:
        ConfigError: the sampler does not fit the model's schedule.
    """
    pipeline = parts.pipeline
    sampler = sampler_of(config, pipeline)
    sample, choose = make_sample(config, pipeline), make_choose(config)
    source = parts.explore(sample=sample, choose=choose, tables=sampler, **config.group_options)
    copies = {OLD: snapshot(source.updates)} if source.updates > 1 else {}
    if config.average_penalty:
        copies[AVERAGE] = lambda update: jnp.minimum(config.average_rate * (update + 1), config.average_most)
    return Method(
        (Phase("awm", make_loss(config, pipeline), source, sampler),),
        trains=(pipeline.denoiser,),
        copies=copies,
        reference=config.base_penalty > 0,
        evaluate=parts.samples(config.height, config.width),
        shown="awm/reward",
    )


def make_loss(config: Config, pipeline: Any) -> Loss:
    """The loss of one noise level of each sample.

    batch: `CONDITIONS`, "clean" [B, h, w, c], "advantage", "step", "update" [B]. models.tables: the sampler. Ratios are
    to the weights that sampled, `models.copies`' "old"; without it, in steps of one update, to the present ones.
    """
    surrogate = SURROGATES[config.surrogate]

    def loss(models, batch, key):
        sampler, step, clean = models.tables, batch["step"], batch["clean"]
        noise = jax.random.normal(key, clean.shape)
        state, denoise = noised(sampler, clean, noise, step), bind_denoiser(config, pipeline, batch)
        inputs = sampler.model_input(state, step), sampler.timestep(step), step
        target, share = sampler.target(clean, noise, step), jnp.asarray(sampler.sigma)[step]

        def constant(weights):
            return jax.lax.stop_gradient(denoise(weights, *inputs))

        def log_prob(output):
            return surrogate(mean_square(output - target), share, config.surrogate_power)

        output = denoise(models.policy, *inputs)
        log_probs = log_prob(output)
        old = log_prob(constant(models.copies[OLD])) if OLD in models.copies else jax.lax.stop_gradient(log_probs)
        ratio = jnp.exp(log_probs - old)
        value = clipped_loss(ratio, batch["advantage"] / config.advantage_clip, config.clip_range)
        metrics = {"policy": value, **ratio_metrics(ratio, batch, config.clip_range)}
        for name, weights, weight in (
            ("base_deviation", models.reference, config.base_penalty),
            ("average_deviation", models.copies.get(AVERAGE), config.average_penalty),
        ):
            if weight and weights is not None:
                metrics[name] = mean_square(output - constant(weights)).mean()
                value += weight * metrics[name]
        return value, metrics

    return loss
