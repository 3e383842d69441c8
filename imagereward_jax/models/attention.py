"""Scaled dot-product attention; the implementation depends on the device and the shapes.

- "cudnn": the fused kernel of NVIDIA GPUs, half precision. Odd lengths are padded, with the true lengths beside them.
- "pallas": the flash kernel for TPUs that ships with jax. Lengths are padded to its blocks, with segment ids.
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
PALLAS_BLOCKS = (512, 256)
PADDING = 0.15  # share of a length by which it may be padded to the blocks of "pallas"; a bound, not a measurement
PADDED_PAIRS = 1024 * 1024  # query-key pairs from which odd lengths are padded for "cudnn"
PROMPT = 128  # keys of cross-attention to a prompt: its logits are no larger than the activations around it
BLOCK_MULTIPLE = 8  # of a block whose length is padded


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
        return _cudnn(query, key, value)
    return _on_each_device(_pallas if path == "pallas" else _blocks, query, key, value)


def choose_path(
    platform: str, query_shape: Sequence[int], key_shape: Sequence[int], dtype: DTypeLike, *, masked: bool = False
) -> str:
    """Chooses the path for arrays of these shapes on "cpu", "gpu", "cuda" or "tpu"."""
    (batch, queries, _, head_dim), keys = query_shape, key_shape[1]
    half = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    if masked:
        return "plain"
    fits = _is_even(queries, keys) or queries * keys >= PADDED_PAIRS
    if platform in ("gpu", "cuda") and half and fits and head_dim % 8 == 0 and head_dim <= 128:
        return "cudnn"
    if queries * keys < LONG or (keys <= PROMPT and platform != "cpu"):
        return "plain"
    if platform == "tpu" and _pallas_block(queries) and _pallas_block(keys) and _can_split(batch):
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


def _is_even(*lengths):
    """Whether cuDNN takes these lengths as they are: jax (0.10) rejects its gradient for odd ones (77 tokens)."""
    return not any(length % 2 for length in lengths)


def _cudnn(query, key, value):
    (batch, queries), keys = query.shape[:2], key.shape[1]
    lengths = {}
    if not _is_even(queries, keys):
        lengths = {
            "query_seq_lengths": jnp.full((batch,), queries, jnp.int32),
            "key_value_seq_lengths": jnp.full((batch,), keys, jnp.int32),
        }
    arrays = (_pad(x, 2) for x in (query, key, value))
    return jax.nn.dot_product_attention(*arrays, implementation="cudnn", **lengths)[:, :queries]


def _pad(x, multiple):
    """Appends zeros to axis 1 of [B, T, ...] up to a multiple of `multiple`."""
    missing = -x.shape[1] % multiple
    return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)) if missing else x


def _pallas_block(length):
    """Largest block of the TPU kernel that pads `length` by no more than `PADDING`, or None."""
    return next((block for block in PALLAS_BLOCKS if -length % block <= PADDING * length), None)


def _pallas(query, key, value):
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    (batch, queries), keys = query.shape[:2], key.shape[1]
    rows, columns = (_pallas_block(length) or PALLAS_BLOCKS[0] for length in (queries, keys))
    sizes = flash.BlockSizes(
        block_q=rows, block_k_major=columns, block_k=columns, block_b=1,
        block_q_major_dkv=rows, block_k_major_dkv=columns, block_k_dkv=columns, block_q_dkv=rows,
        block_k_major_dq=columns, block_k_dq=columns, block_q_dq=rows,
    )  # fmt: skip
    heads_first = [_pad(x, block).swapaxes(1, 2) for x, block in ((query, rows), (key, columns), (value, columns))]
    segments = None
    if queries % rows or keys % columns:  # zeros, of which the padding consists, are a segment of their own
        ones = (jnp.ones((batch, length), jnp.int32) for length in (queries, keys))
        segments = flash.SegmentIds(*(_pad(x, block) for x, block in zip(ones, (rows, columns))))
    scale = 1 / math.sqrt(query.shape[-1])
    mixed = flash.flash_attention(*heads_first, segment_ids=segments, sm_scale=scale, block_sizes=sizes)
    return mixed.swapaxes(1, 2)[:, :queries]


def _on_each_device(function, *arrays):
    """Applies `function` to arrays [B, ...] with the rows sharded, which the compiler does not do by itself."""
    mesh = splitting_mesh(arrays[0].shape[0])
    if mesh is not None:
        rows = PartitionSpec(mesh.axis_names)
        function = jax.shard_map(function, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    return function(*arrays)


def _block_size(length):
    """Largest divisor of `length` within the platform's block size; if that is small, a block that needs padding."""
    limit = CPU_BLOCK if current_platform() == "cpu" else BLOCK
    size = next(size for size in range(min(limit, length), 0, -1) if length % size == 0)
    if 2 * size >= min(limit, length):
        return size
    return math.ceil(length / math.ceil(length / limit) / BLOCK_MULTIPLE) * BLOCK_MULTIPLE


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

    join = functools.partial(_join, length=query.shape[1])
    return jax.tree.map(join, jax.lax.map(step, _split(query, block)))


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
        # No weight exceeds 1, but keys of padding would, if all logits are small; times zero, infinity is NaN.
        weights = jnp.exp(jnp.minimum(product("nsd,ntd->nst", key, query) - statistics, 0))
        d_logits = weights * (product("nsd,ntd->nst", value, gradient) - shift)
        weights, d_logits = weights.astype(query.dtype), d_logits.astype(query.dtype)
        d_key, d_value = product("nst,ntd->nsd", d_logits, query), product("nst,ntd->nsd", weights, gradient)
        return d_query + product("nst,nsd->ntd", d_logits, key), (d_key, d_value)

    zeros = jnp.zeros(query.shape, jnp.float32)
    d_query, (d_key, d_value) = jax.lax.scan(step, zeros, (_split(key, block), _split(value, block)))
    return d_query, _join(d_key, key.shape[1]), _join(d_value, key.shape[1])


_blocks.defvjp(_blocks_forward, _blocks_backward)


def _split(x, block):
    """[N, T, D] -> [blocks, N, block, D], with zeros after the last row if `block` does not divide T."""
    x = _pad(x, block)
    return x.reshape(x.shape[0], -1, block, x.shape[-1]).swapaxes(0, 1)


def _join(x, length):
    """[blocks, N, block, D] -> [N, length, D], without what `_split` appended."""
    return x.swapaxes(0, 1).reshape(x.shape[1], -1, x.shape[-1])[:, :length]


def _over_heads(function, *arrays):
    """Applies `function` to arrays [B, T, heads, D] as [N, T, D]: on the CPU head by head, elsewhere all at once."""
    batch = arrays[0].shape[0]
    arrays = tuple(x.swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[-1]) for x in arrays)
    if current_platform() == "cpu":
        results = jax.lax.map(lambda rows: tuple(y[0] for y in function(*(x[None] for x in rows))), arrays)
    else:
        results = function(*arrays)
    return tuple(y.reshape(batch, -1, *y.shape[1:]).swapaxes(1, 2) for y in results)
