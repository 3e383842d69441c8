"""What a run holds frozen, and in which dtype."""

import jax
import jax.numpy as jnp
import numpy as np

from imagereward_jax.assembly import trainable
from imagereward_jax.assembly.parts import Parts
from imagereward_jax.methods.base import Method
from imagereward_jax.recipes import default_config
from imagereward_jax.training.mesh import make_mesh


def test_bfloat16_leaves_the_rewards_head_and_norms_and_the_vae_in_float32():
    config = default_config("refl")
    config.dtype, config.reward.path, config.model.path = "bfloat16", "tiny-shapes", "tiny-shapes"
    config.model.vae_dtype = "float32"
    for abstract in (False, True):
        parts = Parts(config, make_mesh(1, 1, jax.devices()[:1]), abstract=abstract)
        assert parts.reward is not None
        weights = trainable.load(parts, Method((), trains=(parts.pipeline.denoiser,)))
        frozen = weights.frozen
        assert weights.trainable["unet"]["conv_in"]["kernel"].dtype == np.float32 and "unet" not in frozen
        assert frozen["vae"]["decoder"]["conv_in"]["kernel"].dtype == np.float32
        assert {leaf.dtype for leaf in jax.tree.leaves(frozen["text_encoder"])} == {jnp.dtype(jnp.bfloat16)}
        block = frozen["reward"]["blip"]["visual_encoder"]["blocks"][0]
        assert block["norm1"]["scale"].dtype == np.float32
        assert block["attn"]["qkv"]["kernel"].dtype == jnp.bfloat16
        assert frozen["reward"]["mlp"]["layers"][0]["kernel"].dtype == np.float32
