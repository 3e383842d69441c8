"""Online DPO: pairs of the best and the worst image of a group, which the present weights make and a reward ranks.

Flow-GRPO's code has it (yifan123/flow_grpo, "Flow-DPO"); the loss is that of `dpo`.
"""

from typing import Any

import jax
import numpy as np

from imagereward_jax.config import field
from imagereward_jax.methods.advantages import keep_extremes
from imagereward_jax.methods.base import Batch, Method, Phase
from imagereward_jax.methods.dpo import PreferenceConfig, make_loss
from imagereward_jax.methods.forward_process import SampledConfig, make_sample, sampler_of
from imagereward_jax.methods.on_policy import snapshot

REFERENCE = "reference"


class Config(SampledConfig, PreferenceConfig):
    """config.method of online DPO. An update has config.batch_size pairs."""

    refresh_every: int = field(0, at_least=0)  # updates after which the reference becomes the present weights; 0: never

    unit = "pairs"

    def trained(self, config):
        """Pairs of a step."""
        return self.sampled(config) // self.group_size


def make(config: Config, parts: Any) -> Method:
    """One phase, whose pairs the present weights make.

    Raises:
        ConfigError: the sampler does not fit the model's schedule.
    """
    pipeline = parts.pipeline
    sampler, copy = sampler_of(config, pipeline), REFERENCE if config.refresh_every else None
    source = parts.explore(
        sample=make_sample(config, pipeline),
        choose=lambda rows, rng: rows,
        select=make_select(config.group_size),
        selected=1,
        tables=sampler,
        **config.group_options,
    )
    return Method(
        (Phase("dpo_online", make_loss(config, pipeline, copy), source),),
        trains=(pipeline.denoiser,),
        copies={copy: snapshot(config.refresh_every)} if copy else {},
        reference=copy is None,
        evaluate=parts.samples(config.height, config.width),
        shown="dpo_online/reward",
    )


def make_select(group: int) -> Any:
    """(rows of whole groups) -> a pair of each: "clean" [B, 2, ...], the best image first, "advantage" [B], by how much
    it is better, and the conditions. A group of equal rewards gives a pair of advantage 0, which does not count."""

    def select(rows: Batch) -> Batch:
        worst, best = keep_extremes(rows["advantage"], group, 2).reshape(-1, 2).T
        pair = np.stack([best, worst], 1)
        advantage, clean = rows["advantage"], rows["clean"]
        others = {name: part for name, part in rows.items() if name not in ("advantage", "clean")}
        gap = advantage[best] - advantage[worst]
        return {**jax.tree.map(lambda array: array[best], others), "clean": clean[pair], "advantage": gap}

    return select
