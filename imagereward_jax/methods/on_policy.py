"""Shared by the methods that train on samples of their own weights: fields of their rounds, groups and advantages."""

from typing import Any

import jax
import jax.numpy as jnp

from imagereward_jax.config import MAX_SIDE, MAX_STEPS, ConfigError, field
from imagereward_jax.methods.advantages import GroupAdvantages
from imagereward_jax.methods.base import Batch, Key, MethodConfig, require_sampling

CONDITIONS = ("cond", "negative_cond")


class OnPolicyConfig(MethodConfig):
    """config.method of every such method. A step samples `rounds` times; updates have config.batch_size samples."""

    uses = ("prompts", "cache", "reward", "lora", "samples")
    defaults = {"eval.best": "eval/reward_mean"}
    needs_gradient = False

    num_steps: int = field(
        50, at_least=1, at_most=MAX_STEPS
    )  # sampler steps of a generation in training; config.eval has its own
    guidance_scale: float = 5.0  # in sampling and in training; at most 1: no guidance, half the work
    negative_prompt: str = ""  # what guidance leads away from
    negative_gradient: bool = True  # False: none through the negative prompt's branch, half the backward pass
    height: int = field(512, at_least=1, at_most=MAX_SIDE)  # of the images that train, in pixels
    width: int = field(512, at_least=1, at_most=MAX_SIDE)  # in pixels
    rounds: int = field(1, at_least=1)  # of sampling per step; functions score one round while the next is sampled
    round_size: int | None = field(None, at_least=1)  # samples of a round, over all devices; None: config.batch_size
    epochs: int = field(1, at_least=1)  # times that a step trains on its samples
    advantage_clip: float = field(5.0, above=0.0)  # advantages count within +- this

    def check(self, config):
        """What is read must be given, and sizes must fit."""
        require_sampling(config)
        if self.trained(config) % config.batch_size:
            raise ConfigError(
                f"config.method: rounds={self.rounds} of round_size={self.round_size} give {self.trained(config)} "
                f"{self.unit} per step, which do not divide into updates of config.batch_size={config.batch_size}"
            )
        if config.lora.dropout:
            raise ConfigError(
                f"config.lora.dropout={config.lora.dropout}: samples are made and scored without dropout; pass "
                "--config.lora.dropout=0"
            )

    unit = "samples"

    def sampled(self, config: Any) -> int:
        """Samples of a step, over all processes; config: the whole one."""
        return self.rounds * (self.round_size or config.batch_size)

    def trained(self, config: Any) -> int:
        """Rows of a step that train, of which an update takes config.batch_size."""
        return self.sampled(config)

    @property
    def rounds_options(self) -> dict[str, Any]:
        """Options of `Parts.explore`."""
        negative = self.negative_prompt if self.guidance_scale > 1.0 else None
        return {
            "negative_prompt": negative,
            "round_size": self.round_size,
            "rounds": self.rounds,
            "epochs": self.epochs,
        }


class GroupConfig(OnPolicyConfig):
    """config.method of the methods that compare images of one prompt."""

    group_size: int = field(24, at_least=2)  # images of a prompt that are compared; rounds x round_size has whole ones
    same_noise: bool = False  # the images of a group begin at the same noise (DanceGRPO); it then lies in one round
    advantage_std: str = field("step", choices=("step", "group"))  # whose standard deviation divides the advantages
    sample_std: bool = False  # that of a sample (n - 1; DanceGRPO) instead of the population's
    advantage_epsilon: float = field(1e-4, at_least=0.0)  # is added to it; DanceGRPO: 1e-8
    # several rewards: "rewards" adds them, "advantages" compares each in its group and adds what comes out (MixGRPO),
    # "gdpo" then brings the sum to mean 0 and standard deviation 1 over the step (GDPO)
    combine: str = field("rewards", choices=("rewards", "advantages", "gdpo"))

    def check(self, config):
        """A step has whole groups."""
        samples, size = self.sampled(config), self.round_size or config.batch_size
        if samples % self.group_size:
            raise ConfigError(
                f"config.method.group_size={self.group_size} does not divide the {samples} samples of a step "
                f"(rounds={self.rounds} x round_size={size}): take a multiple of it"
            )
        if self.same_noise and size % self.group_size:
            raise ConfigError(
                f"config.method.same_noise needs whole groups in a round: round_size={size} is no multiple of "
                f"group_size={self.group_size}"
            )
        if self.combine != "rewards" and self.advantage_std != "group":
            raise ConfigError(
                f"config.method.combine={self.combine!r} divides by the standard deviation of each group: pass "
                "--config.method.advantage_std=group"
            )
        if self.combine != "rewards" and len(config.reward.terms) < 2:
            raise ConfigError(
                f"config.method.combine={self.combine!r} is for several rewards: name them in config.reward.terms, or "
                "leave it at 'rewards'"
            )
        super().check(config)

    @property
    def group_options(self) -> dict[str, Any]:
        """Options of `Parts.explore`, those of the rounds included."""
        assign = GroupAdvantages(
            clip=self.advantage_clip,
            std=self.advantage_std,
            sample=self.sample_std,
            epsilon=self.advantage_epsilon,
            combine=self.combine,
        )
        return {**self.rounds_options, "assign": assign, "group": self.group_size}


def conditions_of(batch: Batch) -> dict[str, Any]:
    """The conditions of a batch that it has."""
    return {name: batch[name] for name in CONDITIONS if name in batch}


def bind_denoiser(config: OnPolicyConfig, pipeline: Any, batch: Batch) -> Any:
    """The denoiser with a batch's conditions and the method's guidance, as `rollout` calls it."""
    conditions = (batch.get(name) for name in CONDITIONS)
    return pipeline.denoiser_for(*conditions, config.guidance_scale, negative_gradient=config.negative_gradient)


def draw_noise(config: OnPolicyConfig, key: Key, batch: Batch, shape: tuple[int, ...], rows: int) -> jax.Array:
    """Initial noise [B, h, w, c], by `same_noise` one for each number in batch["group"] [B]."""
    if not getattr(config, "same_noise", False):
        return jax.random.normal(key, (rows, *shape))
    return jax.vmap(lambda group: jax.random.normal(jax.random.fold_in(key, group), shape))(jnp.asarray(batch["group"]))


def snapshot(updates: int) -> Any:
    """The decay of a copy of the weights that is taken anew after every `updates` updates; see `Method.copies`."""
    return lambda update: jnp.where((update + 1) % updates == 0, 0.0, 1.0)
