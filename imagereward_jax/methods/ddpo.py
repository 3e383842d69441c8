"""DDPO, denoising diffusion policy optimization (arXiv 2305.13301), for any reward, also one without a gradient.

The policy gradient of `policy_gradient`; rewards are compared with the newest of the same prompt, or with those of the
step. Models of betas are sampled by DDIM; flows by the stochastic steps of Flow-GRPO, DanceGRPO or CPS.
"""

from typing import Any

from imagereward_jax.config import ConfigError, field
from imagereward_jax.methods.advantages import PromptAdvantages
from imagereward_jax.methods.base import Method
from imagereward_jax.methods.policy_gradient import PolicyConfig, policy_method


class Config(PolicyConfig):
    """config.method of DDPO."""

    prompt_buffer: int = field(16, at_least=0)  # newest rewards per prompt that one is compared with; 0: the step's
    prompt_min_count: int = field(16, at_least=1)  # with fewer rewards of a prompt, all of the step's are compared with
    # whose standard deviation divides a reward's distance from its prompt's mean. "step" (Flow-GRPO's global_std): the
    # more the images of a prompt differ, the more they count
    advantage_std: str = field("prompt", choices=("prompt", "step"))

    def check(self, config):
        """Statistics of a prompt must be reachable."""
        super().check(config)
        if 0 < self.prompt_buffer < self.prompt_min_count:
            raise ConfigError(
                f"config.method.prompt_min_count={self.prompt_min_count} is never reached with "
                f"prompt_buffer={self.prompt_buffer}: lower it, or pass prompt_buffer=0 for statistics of whole steps"
            )


def make(config: Config, parts: Any) -> Method:
    """One phase, whose batches the present weights make.

    Raises:
        ConfigError: see `policy_gradient.make_tables`.
    """
    assign = PromptAdvantages(
        buffer=config.prompt_buffer,
        min_count=config.prompt_min_count,
        clip=config.advantage_clip,
        std=config.advantage_std,
    )
    return policy_method("ddpo", config, parts, {**config.rounds_options, "assign": assign})
