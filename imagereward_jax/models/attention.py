"""Scaled dot-product attention; the implementation depends on the device and the shapes.

- "cudnn": the fused kernel of NVIDIA GPUs, half precision.
- "pallas": the flash kernel for TPUs that ships with jax.
- "blocks": plain XLA, one block of queries (backward: of keys) after the other. The softmax statistics are kept for the
  backward pass, so the [T, S] matrix of a whole image is never stored (FlashAttention, arXiv 2205.14135). On the CPU
  it is fast because a block fits the caches.
- "plain": everything at once; used for short sequences, masks and biases.

All compute the softmax in float32 and agree within the rounding of the dtype.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from imagereward_jax.models.hardware import current_platform, precision
from imagereward_jax.models.sharding import batch_mesh, shard_batch, splitting_mesh

PATHS = ("plain", "blocks", "pallas", "cudnn")
LONG = 256 * 256  # query-key pairs; from here on the whole matrix of logits is not stored
CPU_BLOCK, BLOCK = 256, 1024  # queries at once
PALLAS_BLOCK = 512
PROMPT = 128  # keys of cross-attention to a prompt: its logits are no larger than the activations around it
SMALLEST_BLOCK = 64


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array | None = None,
    drop: Callable[[jax.Array], jax.Array] | None = None,
    bias: jax.Array | None = None,
    scale: float | None = None,
    path: str | None = None,
) -> jax.Array:
    """Scaled dot-product attention with a float32 softmax.

    Args:
        query: [B, T, heads, head_dim]; key, value: [B, S, heads, head_dim].
        mask: boolean, broadcastable to [B, heads, T, S]; True is attended to.
        drop: applied to the weights [B, heads, T, S] before they are used, e.g. dropout; None for nothing.
        bias: added to the scaled logits, broadcastable to [B, heads, T, S]; None for nothing.
        scale: factor on the logits; 1 / sqrt(head_dim) if None.
        path: one of `PATHS`; by default `choose_path` decides.

    Returns:
        [B, T, heads, head_dim] in the dtype of `query`.

    Raises:
        ValueError: the path is unknown, or supports no mask, dropout, bias or scale.
    """
    query, key, value = (shard_batch(x) for x in (query, key, value))
    whole = any(option is not None for option in (mask, drop, bias, scale))
    path = path or choose_path(current_platform(), query.shape, key.shape, query.dtype, masked=whole)
    if path not in PATHS:
        raise ValueError(f"attention path {path!r}: expected one of {', '.join(PATHS)}")
    if path == "plain":
        return _plain(query, key, value, mask, drop, bias, scale)
    if whole:
        raise ValueError(f"attention path {path!r} supports no mask, dropout, bias or scale; use 'plain'")
    if path == "cudnn":
        return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
    return _on_each_device(_pallas if path == "pallas" else _blocks, query, key, value)


def choose_path(
    platform: str, query_shape: Sequence[int], key_shape: Sequence[int], dtype: DTypeLike, *, masked: bool = False
) -> str:
    """Chooses the path for arrays of these shapes on "cpu", "gpu", "cuda" or "tpu"."""
    (batch, queries, _, head_dim), keys = query_shape, key_shape[1]
    half = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    if masked:
        return "plain"
    even = queries % 2 == 0 and keys % 2 == 0  # jax (0.10) rejects cuDNN's gradient for odd lengths, such as 77 tokens
    if platform in ("gpu", "cuda") and half and even and head_dim % 8 == 0 and head_dim <= 128:
        return "cudnn"
    if queries * keys < LONG or (keys <= PROMPT and platform != "cpu"):
        return "plain"
    if platform == "tpu" and queries % PALLAS_BLOCK == 0 and keys % PALLAS_BLOCK == 0 and _can_split(batch):
        return "pallas"
    return "blocks"


def _can_split(batch):
    """Whether each device gets whole rows of the batch; on several devices this needs a known mesh."""
    mesh = batch_mesh()
    return jax.device_count() == 1 if mesh is None else batch % mesh.size == 0


def _plain(query, key, value, mask=None, drop=None, bias=None, scale=None):
    high = precision(query.dtype)
    logits = jnp.einsum("bthd,bshd->bhts", query, key, precision=high, preferred_element_type=jnp.float32)
    logits = logits / math.sqrt(query.shape[-1]) if scale is None else logits * scale
    if bias is not None:
        logits = logits + bias
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(query.dtype)
    weights = weights if drop is None else drop(weights)
    return jnp.einsum("bhts,bshd->bthd", weights, value, precision=high)


def _pallas(query, key, value):
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    block = PALLAS_BLOCK
    sizes = flash.BlockSizes(
        block_q=block, block_k_major=block, block_k=block, block_b=1,
        block_q_major_dkv=block, block_k_major_dkv=block, block_k_dkv=block, block_q_dkv=block,
        block_k_major_dq=block, block_k_dq=block, block_q_dq=block,
    )  # fmt: skip
    heads_first = (x.swapaxes(1, 2) for x in (query, key, value))
    scale = 1 / math.sqrt(query.shape[-1])
    return flash.flash_attention(*heads_first, sm_scale=scale, block_sizes=sizes).swapaxes(1, 2)


def _on_each_device(function, *arrays):
    """Applies `function` to arrays [B, ...] with the rows sharded, which the compiler does not do by itself."""
    mesh = splitting_mesh(arrays[0].shape[0])
    if mesh is not None:
        rows = PartitionSpec(mesh.axis_names)
        function = jax.shard_map(function, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    return function(*arrays)


def _block_size(length):
    """Largest divisor of `length` within the platform's block size; `length` itself if that is tiny."""
    limit = CPU_BLOCK if current_platform() == "cpu" else BLOCK
    size = next(size for size in range(min(limit, length), 0, -1) if length % size == 0)
    return size if size >= SMALLEST_BLOCK else length


@jax.custom_vjp
def _blocks(query, key, value):
    return _blocks_forward(query, key, value)[0]


def _blocks_forward(query, key, value):
    """Returns (output, residuals); backward recomputes the weights from the statistics log(sum(exp(logits)))."""
    scaled = query * jnp.asarray(1 / math.sqrt(query.shape[-1]), query.dtype)
    block = _block_size(query.shape[1])
    output, statistics = _over_heads(functools.partial(_forward_head, block=block), scaled, key, value)
    return output, (scaled, key, value, output, statistics)


def _forward_head(query, key, value, *, block):
    """query [N, T, D], key, value [N, S, D] -> output [N, T, D], statistics [N, T, 1]."""
    high = precision(query.dtype)

    def step(part):
        logits = jnp.einsum("ntd,nsd->nts", part, key, precision=high, preferred_element_type=jnp.float32)
        largest = logits.max(-1, keepdims=True)
        weights = jnp.exp(logits - largest)
        total = weights.sum(-1, keepdims=True)
        mixed = jnp.einsum(
            "nts,nsd->ntd", weights.astype(value.dtype), value, precision=high, preferred_element_type=jnp.float32
        )
        return (mixed / total).astype(part.dtype), largest + jnp.log(total)

    return jax.tree.map(_join, jax.lax.map(step, _split(query, block)))


def _blocks_backward(residuals, gradient):
    scaled, key, value, output, statistics = residuals
    # sum(weights * d_weights) per query; the softmax's gradient subtracts it
    shift = (output.astype(jnp.float32) * gradient.astype(jnp.float32)).sum(-1, keepdims=True)
    backward = functools.partial(_backward_head, block=_block_size(key.shape[1]))
    d_query, d_key, d_value = _over_heads(backward, scaled, key, value, gradient, statistics, shift)
    d_query = d_query * (1 / math.sqrt(scaled.shape[-1]))
    return tuple(d.astype(x.dtype) for d, x in zip((d_query, d_key, d_value), (scaled, key, value)))


def _backward_head(query, key, value, gradient, statistics, shift, *, block):
    """Iterates over blocks of keys, with keys as rows: only one of the five products transposes a large matrix.

    All [N, T or S, D], statistics and shift [N, T, 1] -> float32 gradients by query, key and value.
    """
    product = functools.partial(jnp.einsum, precision=precision(query.dtype), preferred_element_type=jnp.float32)
    statistics, shift = statistics.swapaxes(1, 2), shift.swapaxes(1, 2)

    def step(d_query, part):
        key, value = part
        weights = jnp.exp(product("nsd,ntd->nst", key, query) - statistics)
        d_logits = weights * (product("nsd,ntd->nst", value, gradient) - shift)
        weights, d_logits = weights.astype(query.dtype), d_logits.astype(query.dtype)
        d_key, d_value = product("nst,ntd->nsd", d_logits, query), product("nst,ntd->nsd", weights, gradient)
        return d_query + product("nst,nsd->ntd", d_logits, key), (d_key, d_value)

    zeros = jnp.zeros(query.shape, jnp.float32)
    d_query, (d_key, d_value) = jax.lax.scan(step, zeros, (_split(key, block), _split(value, block)))
    return d_query, _join(d_key), _join(d_value)


_blocks.defvjp(_blocks_forward, _blocks_backward)


def _split(x, block):
    """[N, T, D] -> [T / block, N, block, D]."""
    return x.reshape(x.shape[0], -1, block, x.shape[-1]).swapaxes(0, 1)


def _join(x):
    """[blocks, N, block, D] -> [N, T, D]."""
    return x.swapaxes(0, 1).reshape(x.shape[1], -1, x.shape[-1])


def _over_heads(function, *arrays):
    """Applies `function` to arrays [B, T, heads, D] as [N, T, D]: on the CPU head by head, elsewhere all at once."""
    batch = arrays[0].shape[0]
    arrays = tuple(x.swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[-1]) for x in arrays)
    if current_platform() == "cpu":
        results = jax.lax.map(lambda rows: tuple(y[0] for y in function(*(x[None] for x in rows))), arrays)
    else:
        results = function(*arrays)
    return tuple(y.reshape(batch, -1, *y.shape[1:]).swapaxes(1, 2) for y in results)
