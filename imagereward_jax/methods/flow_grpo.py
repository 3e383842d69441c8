"""GRPO: the policy gradient on the sampler's steps, with advantages over groups of images of one prompt.

One method, of which papers are settings (docs/groups.md): Flow-GRPO and Flow-GRPO-Fast (arXiv 2505.05470), DanceGRPO
(2505.07818), CPS (2509.05952), MixGRPO (2507.21802) and GRPO-Guard (2510.22319). With DDIM it trains models of betas as
DDPO does, but for the advantages.

Steps outside the window, and of flows the last step, follow the deterministic sampler and do not train. So images of
flows are decoded from the clean latents that the last step predicts, as in DanceGRPO, CPS and MixGRPO; Flow-GRPO's own
adds noise of a standard deviation of 0.006 there.
"""

from typing import Any

import jax
import jax.numpy as jnp

from imagereward_jax.config import MAX_STEPS, ConfigError, field
from imagereward_jax.diffusion.sampler import Sampler, Transition
from imagereward_jax.diffusion.samplers import NOISY_FLOWS
from imagereward_jax.methods.advantages import keep_extremes
from imagereward_jax.methods.base import Batch, Method
from imagereward_jax.methods.on_policy import GroupConfig
from imagereward_jax.methods.policy_gradient import PolicyConfig, policy_method


class Config(GroupConfig, PolicyConfig):
    """config.method of GRPO."""

    num_steps: int = field(
        10, at_least=1, at_most=MAX_STEPS
    )  # sampler steps in training; evaluation takes more (config.eval.num_steps)
    guidance_scale: float = 4.5  # in sampling and in training; at most 1: no guidance, half the work
    sampler: str = field("flow_sde", choices=("ddim", *NOISY_FLOWS))  # ddim for schedules of betas
    eta: float = field(0.7, at_least=0.0)  # noise: flow_sde 0.7 (0.9 for FLUX), dance_sde 0.3, cps 0.8, ddim 1
    keep: int | None = field(None, at_least=2)  # images of a group that train: the best and worst halves (Best-of-N)
    guard: bool = False  # GRPO-Guard's ratio, without bias, and losses divided by the step's length; for flow_sde
    # To the weights that training starts from: "kl" is the step's KL divergence per latent number; "kl_rate" the same
    # times the step's length in sigma, which Flow-GRPO's beta (0.04, 0.01) belongs to; flows alone
    penalty: str = field("kl_rate", choices=("kl", "kl_rate"))
    penalty_weight: float = field(0.0, at_least=0.0)  # of it; 0 needs no second set of weights

    def trained(self, config):
        """Rows of a step that train."""
        return self.sampled(config) * (self.keep or self.group_size) // self.group_size

    def check(self, config):
        """Settings fit the sampler."""
        if self.keep and (self.keep % 2 or self.keep > self.group_size):
            raise ConfigError(
                f"config.method.keep={self.keep}: expected an even number of at most group_size={self.group_size}"
            )
        if self.guard and self.sampler != "flow_sde":
            raise ConfigError(f"config.method.guard is for sampler='flow_sde', not for {self.sampler!r}")
        if self.penalty_weight and self.penalty == "kl_rate" and self.sampler not in NOISY_FLOWS:
            raise ConfigError(
                f"config.method.penalty='kl_rate' is for flows, and the sampler is {self.sampler}: take 'kl'"
            )
        super().check(config)


def make(config: Config, parts: Any) -> Method:
    """One phase, whose batches the present weights make.

    Raises:
        ConfigError: see `policy_gradient.make_tables`.
    """
    options = dict(config.group_options)
    if config.keep:
        options |= {"select": make_select(config.group_size, config.keep), "selected": config.keep}
    extras = {"log_ratio": guarded} if config.guard else {}
    if config.penalty_weight:
        extras["penalty"] = make_penalty(config)
    return policy_method("grpo", config, parts, options, reference=config.penalty_weight > 0, **extras)


def make_select(group: int, keep: int) -> Any:
    """(rows) -> those of the best and worst `keep` / 2 samples of every group."""

    def select(rows: Batch) -> Batch:
        chosen = keep_extremes(rows["advantage"], group, keep)
        return jax.tree.map(lambda array: array[chosen], rows)

    return select


def guarded(transition: Transition, batch: Batch, sampler: Sampler) -> tuple[jax.Array, jax.Array]:
    """GRPO-Guard's log-ratio mean(z (mean - mean_old)), [B], z the noise of the step, and weights 1 / its length.

    Equal to (log p - log p_old + mean((mean - mean_old)^2) / (2 std^2)) std: unlike log p - log p_old it has a mean of
    0 over z, so that ratios reach the upper clip as often as the lower.
    """
    change = transition.mean - batch["mean"]
    noise = (batch["following"].astype(jnp.float32) - batch["mean"]) / transition.std
    return jnp.mean(noise * change, axis=tuple(range(1, change.ndim))), 1 / step_length(sampler, batch["step"])


def make_penalty(config: Config) -> Any:
    """(transition, the reference's, step, sampler) -> [B], see `Config.penalty`."""

    def penalty(transition, reference, step, sampler):
        squares = jnp.square(transition.mean - reference.mean) / (2 * jnp.square(transition.std))
        distance = squares.mean(tuple(range(1, squares.ndim)))
        return config.penalty_weight * distance * (step_length(sampler, step) if config.penalty == "kl_rate" else 1.0)

    return penalty


def step_length(sampler: Sampler, step: jax.Array) -> jax.Array:
    """How far a step of a flow leads in sigma, [B]."""
    sigma = jnp.asarray(sampler.sigma)
    return sigma[step] - jnp.append(sigma[1:], 0.0)[step]
