"""What an experiment holds frozen, and in which dtype."""

import jax.numpy as jnp
import numpy as np
from imagereward_jax.experiments.parts import cast_frozen, open_reward

from imagereward_jax.recipes import default_config


class Pipeline:
    vae_dtype = jnp.float32


def test_bfloat16_leaves_the_rewards_head_and_norms_and_the_vae_in_float32():
    config = default_config("refl")
    config.dtype, config.reward.path = "bfloat16", "tiny-shapes"
    weights = {"conv": np.ones((2, 2), np.float32)}
    frozen = cast_frozen(config, Pipeline, {"vae": weights, "unet": weights, "reward": open_reward(config).params})
    assert frozen["vae"]["conv"].dtype == np.float32
    assert frozen["unet"]["conv"].dtype == jnp.bfloat16
    block = frozen["reward"]["blip"]["visual_encoder"]["blocks"][0]
    assert block["norm1"]["scale"].dtype == np.float32
    assert block["attn"]["qkv"]["kernel"].dtype == jnp.bfloat16
    assert frozen["reward"]["mlp"]["layers"][0]["kernel"].dtype == np.float32
