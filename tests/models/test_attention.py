"""Every path of attention that runs here agrees with the plain one, forward and gradient; that one with PyTorch."""

import child
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagereward_jax.models.attention import attention, choose_path
from imagereward_jax.models.hardware import target_platform

# (queries, keys, heads, head_dim): SD 1.x at 512 px has 40, 80 and 160 a head, SDXL and ViT-L 64, the VAE one head of
# 512; 77 are a prompt's tokens, 577 = 1 + 24 * 24 and 257 those of vision transformers, 1357 = 32 * 32 + 77 + 256 those
# of an image of 512 px and its prompt in Stable Diffusion 3
SHAPES = [
    (256, 256, 2, 40),
    (1024, 77, 2, 40),
    (320, 320, 1, 80),
    (64, 77, 2, 160),
    (384, 384, 2, 64),
    (577, 577, 1, 64),
]
SHAPES += [(257, 257, 2, 80), (256, 256, 1, 512), (1357, 1357, 1, 16)]


def arrays(queries, keys, heads, head_dim, dtype="float32"):
    rng = np.random.default_rng(0)
    query, result = (rng.normal(size=(2, queries, heads, head_dim)) for _ in range(2))
    key, value = (rng.normal(size=(2, keys, heads, head_dim)) for _ in range(2))
    return [jnp.asarray(x, dtype) for x in (query, key, value, result)]


def output_and_gradients(path, query, key, value, gradient):
    output, pull = jax.vjp(lambda *x: attention(*x, path=path), query, key, value)
    return (output, *pull(gradient))


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocks_agree_with_plain_in_float32(shape, platform):
    """Within 1e-5 of the largest entry; `platform` decides the blocks' size and whether heads are looped over."""
    inputs = arrays(*shape)
    with target_platform(platform):
        blocks = jax.jit(lambda *x: output_and_gradients("blocks", *x))(*inputs)
    for ours, plain in zip(blocks, output_and_gradients("plain", *inputs), strict=True):
        assert ours.shape == plain.shape and ours.dtype == plain.dtype
        assert jnp.abs(ours - plain).max() < 1e-5 * jnp.abs(plain).max()


def test_blocks_agree_with_plain_in_bfloat16():
    """Within three roundings of the largest entry, of the float32 result."""
    exact = output_and_gradients("plain", *arrays(512, 512, 2, 64))
    blocks = output_and_gradients("blocks", *arrays(512, 512, 2, 64, "bfloat16"))
    for ours, wanted in zip(blocks, exact, strict=True):
        assert ours.dtype == jnp.bfloat16
        assert jnp.abs(ours.astype(jnp.float32) - wanted).max() < 3 * 2**-8 * jnp.abs(wanted).max()


FAR = """
import json, os
os.environ["XLA_FLAGS"] = ""  # as users compile: with the quick settings of tests, exp(393) is finite
import jax, jax.numpy as jnp
from imagereward_jax.models.attention import attention

value, gradient = jax.random.normal(jax.random.key(0), (2, 1, 590, 1, 16))
query, key = jnp.full_like(value, 20), jnp.full_like(value, -5)

def results(path):
    return jax.vjp(lambda *x: attention(*x, path=path), query, key, value)[1](gradient)

pairs = zip(results("blocks"), results("plain"))
print(json.dumps([float(jnp.abs(ours - plain).max()) for ours, plain in pairs]))
"""


def test_padding_of_keys_has_no_part_in_the_gradient_whatever_the_logits():
    """590 keys are padded to 600. All logits are -400; those of keys of zeros would be 0."""
    assert max(child.run(FAR)) < 1e-4


@pytest.mark.parametrize("lengths", [(500, 500), (512, 230)], ids=str)
def test_the_tpu_kernel_with_padding_agrees_with_plain(lengths):
    """Interpreted on the CPU: forward and gradient within 1e-5 of the largest entry."""
    from jax.experimental.pallas import tpu as pltpu

    inputs = arrays(*lengths, 1, 128)
    with pltpu.force_tpu_interpret_mode():
        padded = jax.jit(lambda *x: output_and_gradients("pallas", *x))(*inputs)
    for ours, plain in zip(padded, output_and_gradients("plain", *inputs), strict=True):
        assert ours.shape == plain.shape
        assert jnp.abs(ours - plain).max() < 1e-5 * jnp.abs(plain).max()


def test_plain_agrees_with_pytorch():
    torch = pytest.importorskip("torch")
    query, key, value, _ = arrays(96, 77, 2, 40)
    theirs = torch.nn.functional.scaled_dot_product_attention(
        *(torch.tensor(np.asarray(x)).transpose(1, 2) for x in (query, key, value))
    )
    np.testing.assert_allclose(attention(query, key, value, path="plain"), theirs.transpose(1, 2), atol=1e-6)


def test_bias_scale_and_mask_agree_with_pytorch():
    """As T5's encoder uses them: scores that are not scaled, and a bias by distance."""
    torch = pytest.importorskip("torch")
    query, key, value, _ = arrays(12, 12, 2, 8)
    rng = np.random.default_rng(1)
    bias, mask = rng.normal(size=(1, 2, 12, 12)).astype(np.float32), rng.random((2, 1, 1, 12)) < 0.7
    theirs = torch.nn.functional.scaled_dot_product_attention(
        *(torch.tensor(np.asarray(x)).transpose(1, 2) for x in (query, key, value)),
        attn_mask=torch.tensor(np.where(mask, bias, np.float32(-1e30))),
        scale=0.7,
    )
    ours = attention(query, key, value, mask=mask, bias=bias, scale=0.7)
    np.testing.assert_allclose(ours, theirs.transpose(1, 2), atol=1e-6)


def test_blocks_store_no_matrix_of_all_pairs():
    query, key, value, gradient = arrays(2048, 2048, 2, 8)

    def temporaries(path):
        compiled = jax.jit(lambda *x: output_and_gradients(path, *x)).lower(query, key, value, gradient).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    matrix = 2 * 2 * 2048 * 2048 * 4
    assert temporaries("blocks") < matrix / 4 < matrix <= temporaries("plain")


@pytest.mark.parametrize(
    ("platform", "queries", "keys", "head_dim", "dtype", "path"),
    [
        ("cpu", 1024, 1024, 8, "float32", "blocks"),
        ("cpu", 1024, 77, 8, "float32", "blocks"),
        ("cpu", 64, 77, 8, "float32", "plain"),
        ("cuda", 4096, 4096, 40, "bfloat16", "cudnn"),
        ("cuda", 64, 77, 160, "bfloat16", "plain"),
        ("cuda", 4096, 77, 40, "bfloat16", "plain"),
        ("cuda", 577, 577, 64, "bfloat16", "blocks"),
        ("cuda", 4096, 4096, 512, "bfloat16", "blocks"),
        ("cuda", 4096, 4096, 64, "float32", "blocks"),
        ("tpu", 4096, 4096, 64, "bfloat16", "pallas"),
        ("tpu", 4096, 77, 64, "bfloat16", "plain"),
        # Stable Diffusion 3 at 1024 and 512 px, prompts of 77 + 256 tokens; ViT-L/14 at 336 px
        ("cpu", 4429, 4429, 64, "bfloat16", "blocks"),
        ("cuda", 4429, 4429, 64, "bfloat16", "cudnn"),
        ("tpu", 4429, 4429, 64, "bfloat16", "pallas"),
        ("tpu", 1357, 1357, 64, "bfloat16", "pallas"),
        ("tpu", 577, 577, 64, "bfloat16", "blocks"),
    ],
)
def test_the_path_follows_device_and_shape(platform, queries, keys, head_dim, dtype, path):
    shapes = ((1, queries, 2, head_dim), (1, keys, 2, head_dim))
    assert choose_path(platform, *shapes, dtype) == path
    assert choose_path(platform, *shapes, dtype, masked=True) == "plain"


def test_unknown_paths_and_masks_that_a_path_cannot_take_are_refused():
    query, key, value, _ = arrays(8, 8, 1, 8)
    with pytest.raises(ValueError, match="expected one of plain, blocks, pallas, cudnn"):
        attention(query, key, value, path="flash")
    for option in ({"mask": jnp.ones((8, 8), bool)}, {"bias": jnp.zeros((8, 8))}, {"scale": 1.0}):
        with pytest.raises(ValueError, match="'blocks' supports no mask, dropout, bias or scale"):
            attention(query, key, value, path="blocks", **option)
