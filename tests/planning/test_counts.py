"""FLOPs of traced programs and collectives of compiled ones, against counts by hand."""

import child
import jax
import jax.numpy as jnp
import pytest

from imagereward_jax.models.attention import attention
from imagereward_jax.planning import counts


def flops_of(function, *shapes, **options):
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return counts.flops(jax.jit(function).trace(*shapes).jaxpr, **options)


def test_flops_of_products_and_loops():
    def repeated(x, w):
        return jax.lax.scan(lambda carry, _: (carry @ w, None), x, None, length=5)[0]

    product = 2 * 3 * 8 * 8
    assert flops_of(jnp.matmul, (3, 8), (8, 8)) == product
    assert flops_of(repeated, (3, 8), (8, 8)) == 5 * product
    # the gradient takes two products more for each one; rematerialised, three
    assert flops_of(jax.grad(lambda x, w: repeated(x, w).sum(), (0, 1)), (3, 8), (8, 8)) == 15 * product
    again = jax.checkpoint(lambda x, w: jnp.tanh(jnp.tanh(x @ w) @ w).sum())
    assert flops_of(jax.grad(again, (0, 1)), (3, 8), (8, 8)) == 8 * product

    def dynamic(x, w, stop):
        return jax.lax.while_loop(lambda c: c[0] < stop.sum(), lambda c: (c[0] + 1, c[1] @ w), (0.0, x))[1]

    assert flops_of(dynamic, (3, 8), (8, 8), (1,), while_trips=7) == 7 * product


def test_flops_by_dtype_count_integers_like_others():
    def both(x, w):
        narrow = jax.lax.dot(x.astype(jnp.int8), w.astype(jnp.int8), preferred_element_type=jnp.int32)
        return jax.lax.scan(lambda carry, _: (carry @ w, None), x, None, length=5)[0] + narrow

    product = 2 * 3 * 8 * 8
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((3, 8), (8, 8))]
    jaxpr = jax.jit(both).trace(*shapes).jaxpr
    assert counts.flops_by_dtype(jaxpr) == {"float32": 5 * product, "int8": product}
    assert counts.flops(jaxpr) == 6 * product


def test_flops_of_a_strided_convolution_and_its_gradient():
    """Output positions x 9 taps x channels in and out; its gradient by the input meets as many numbers, not the zeros
    between them, give or take the border."""

    def conv(x, w):
        return jax.lax.conv_general_dilated(x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    forward = 2 * 2 * 16 * 16 * 9 * 4 * 6
    shapes = (2, 32, 32, 4), (3, 3, 4, 6)
    assert flops_of(conv, *shapes) == forward
    assert flops_of(jax.grad(lambda x, w: conv(x, w).sum(), 1), *shapes) == 2 * forward
    gradient = flops_of(jax.grad(lambda x, w: conv(x, w).sum(), 0), *shapes)
    assert 1.9 * forward < gradient < 2.1 * forward


@pytest.mark.parametrize("path", ["plain", "blocks"])
def test_flops_of_attention(path):
    """Two products of T x S x head size forward and four more backward (by blocks one again) for each head."""
    shape = (2, 256, 3, 16)
    forward = 2 * 2 * 2 * 3 * 256 * 256 * 16
    function = lambda q, k, v: attention(q, k, v, path=path)  # noqa: E731
    assert flops_of(function, shape, shape, shape) == forward
    gradient = flops_of(jax.grad(lambda *x: function(*x).sum(), (0, 1, 2)), shape, shape, shape)
    assert gradient == forward * (3 if path == "plain" else 3.5)


@pytest.mark.parametrize(
    ("path", "expected"), [("plain", {}), ("blocks", {}), ("pallas", {"pallas": 1}), ("cudnn", {"cudnn": 1})]
)
def test_fused_attention_is_counted_where_it_stands(path, expected):
    """In a loop and a branch once each; on one device, of a program that is traced alone."""
    shape = jax.ShapeDtypeStruct((2, 1024, 3, 64), jnp.bfloat16)
    once = lambda x: attention(x, x, x, path=path)  # noqa: E731
    looped = lambda x: jax.lax.fori_loop(0, 3, lambda _, y: once(y), x)  # noqa: E731
    try:
        traced = jax.make_jaxpr(once)(shape)
    except RuntimeError as error:
        pytest.skip(f"cuDNN's call cannot be traced here: {error}")
    assert counts.attention_kernels(traced) == expected
    assert counts.attention_kernels(jax.make_jaxpr(looped)(shape)) == expected


ON_EIGHT_DEVICES = """
import functools, json, sys
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from imagereward_jax.models.attention import attention
from imagereward_jax.models.hardware import target_platform
from imagereward_jax.models.sharding import batch_over
from imagereward_jax.planning import counts
from imagereward_jax.training.mesh import make_mesh, weight_shardings

mesh = make_mesh(2, 4)
found = {}

def shape(size, spec, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(size, dtype, sharding=NamedSharding(mesh, spec))

def moved(function, *shapes, out=None, **options):
    text = jax.jit(function, out_shardings=out).lower(*shapes).compile().as_text()
    return counts.collective_bytes(text, **options)

whole = NamedSharding(mesh, P())
found["gather"] = moved(lambda w: w + 1, shape((64, 256), P("fsdp", None)), out=whole)
found["reduce"] = moved(lambda x: x.sum(0), shape((80, 1000), P(("data", "fsdp"), None)), out=whole)

@functools.partial(jax.shard_map, mesh=mesh, in_specs=P("fsdp"), out_specs=P("fsdp"))
def explicit(x):
    def body(carry, _):
        scattered = jax.lax.psum_scatter(carry, "fsdp", tiled=True)
        return jax.lax.all_gather(scattered, "fsdp", tiled=True) * 0.5, None
    carry = jax.lax.pcast(x, ("data",), to="varying")
    carry = jax.lax.scan(body, carry, None, length=6)[0]
    permuted = jax.lax.ppermute(carry, "fsdp", [(0, 1), (1, 2), (2, 3), (3, 0)])
    return jax.lax.pmean(jax.lax.all_to_all(permuted, "fsdp", 0, 0, tiled=True), "data")

found["explicit"] = moved(explicit, shape((4 * 400,), P("fsdp")))

def dynamic(w, stop):
    return jax.lax.while_loop(lambda c: c[0] < stop, lambda c: (c[0] + 1, c[1] + c[1].sum()), (0, w))[1]

found["dynamic"] = moved(dynamic, shape((64, 256), P("fsdp", None)), shape((), P(), jnp.int32), while_trips=9)

tree = {"a": jnp.zeros((96, 640)), "b": jnp.zeros((7, 5000)), "c": jnp.zeros(64)}
tree["d"] = jnp.zeros((1280, 3, 3, 320), jnp.bfloat16)
shardings = weight_shardings(mesh, tree)
placed = jax.device_put(tree, shardings)
found["placed"] = sum(leaf.addressable_shards[3].data.nbytes for leaf in jax.tree.leaves(placed))
found["counted"] = counts.bytes_on_a_device(tree, shardings)

x = shape((8, 1024, 2, 64), P(("data", "fsdp")), jnp.bfloat16)
with target_platform("tpu"), batch_over(mesh):
    gradient = jax.grad(lambda *x: attention(*x).astype(jnp.float32).sum(), (0, 1, 2))
    text = jax.jit(gradient).trace(x, x, x).lower(lowering_platforms=("tpu",)).as_text()
    found["kernels"] = text.count("tpu_custom_call")

def flops(over):
    with batch_over(over):
        return counts.flops(jax.jit(lambda *x: attention(*x, path="blocks")).trace(x, x, x).jaxpr)

found["attention_flops"] = [flops(mesh), flops(None)]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found():
    return child.run(ON_EIGHT_DEVICES, devices=8)


def test_bytes_of_collectives(found):
    """A gathered matrix; a sum of [1000]; in a loop of 6 a scatter of 400 numbers and their gathering."""
    assert found["gather"] == {"all-gather": 64 * 256 * 4}
    assert found["reduce"] == {"all-reduce": 1000 * 4}
    once = 400 * 4
    assert found["explicit"] == {
        "all-gather": 6 * once,
        "all-reduce": once,
        "reduce-scatter": 6 * once,
        "all-to-all": once,
        "collective-permute": once,
    }


def test_loops_of_traced_length_count_as_told(found):
    assert found["dynamic"] == {"all-reduce": 9 * 4}


def test_counted_bytes_are_those_on_a_device(found):
    """Against arrays that are laid over the devices."""
    assert found["counted"] == found["placed"]


def test_tpu_attention_lowers_for_several_devices(found):
    """Forward, and the backward pass's two kernels; the compiler refuses kernels that it would have to split."""
    assert found["kernels"] >= 3


def test_flops_of_a_program_written_for_one_device_count_on_all(found):
    """Attention by `shard_map` has the operations of the same attention without."""
    over_mesh, alone = found["attention_flops"]
    assert over_mesh == alone == 2 * 2 * 8 * 2 * 1024 * 1024 * 64


def test_a_tuple_of_asynchronous_gathers():
    """As accelerators write it: operands and results in one tuple, nested computations, a loop by its condition."""
    text = """HloModule step, entry_computation_layout={()->f32[]}

%condition (p: (s32[], bf16[8])) -> pred[] {
  %p = (s32[], bf16[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(16)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%body (q: (s32[], bf16[8])) -> (s32[], bf16[8]) {
  %q = (s32[], bf16[8]{0}) parameter(0)
  %x = bf16[8]{0:T(256)(128)(2,1)} get-tuple-element(%q), index=1
  %start = (bf16[8]{0}, bf16[64]{0}) all-gather-start(%x), dimensions={0}
  %done = bf16[64]{0} all-gather-done(%start)
  ROOT %t = (s32[], bf16[8]{0}) tuple(%i2, %x)
}

ENTRY %main (a: bf16[8]) -> bf16[8] {
  %a = bf16[8]{0} parameter(0)
  %start2 = bf16[8]{0} all-reduce-start(%a), to_apply=%add
  %loop = (s32[], bf16[8]{0}) while(%init), condition=%condition, body=%body
  ROOT %r = bf16[8]{0} get-tuple-element(%loop), index=1
}
"""
    assert counts.collective_bytes(text) == {"all-gather": 16 * 64 * 2, "all-reduce": 16}


def test_long_tuples_and_a_tpus_reduce_scatter():
    """libtpu's text: comments that number the items of a tuple; a reduce-scatter as a fusion of an all-reduce."""
    text = """HloModule step

%all-reduce-scatter.1.clone (x: bf16[64], y: bf16[64]) -> (bf16[8], bf16[8]) {
  %x = bf16[64]{0} parameter(0)
  %y = bf16[64]{0} parameter(1)
  %sum = (bf16[64]{0:T(8,128)(2,1)}, bf16[64]{0:T(8,128)(2,1)}) all-reduce(%x, %y), to_apply=%add
  ROOT %t = (bf16[8]{0}, bf16[8]{0}) tuple(%s, %s2)
}

ENTRY %main (a: bf16[64]) -> bf16[8] {
  %a = bf16[64]{0} parameter(0)
  %f = (bf16[8]{0}, bf16[8]{0}) fusion(%a, %a), kind=kCustom, calls=%all-reduce-scatter.1.clone
  %all = (f32[1]{0}, f32[1]{0}, f32[1]{0}, f32[1]{0}, f32[1]{0}, /*index=5*/f32[3]{0}) all-reduce(%b), to_apply=%add
  ROOT %r = bf16[8]{0} get-tuple-element(%f), index=0
}
"""
    assert counts.collective_bytes(text) == {"all-reduce": 8 * 4, "reduce-scatter": 2 * 64 * 2}


def test_a_gather_that_several_fusions_go_on_with_counts_once():
    """As libtpu has it at its default level: each fusion that computes meanwhile holds the gather, of one chain. What
    begins in a loop runs as often as it turns, what goes on during a loop once."""
    text = """HloModule step

%start.1 (x: bf16[8]) -> bf16[64] {
  %x = bf16[8]{0} parameter(0)
  ROOT %gather.1 = bf16[64]{0} all-gather(%x), channel_id=7, dimensions={0}, frontend_attributes={chain_id="27"}
}

%async_collective_fusion.2 (y: bf16[8]) -> bf16[64] {
  %y = bf16[8]{0} parameter(0)
  ROOT %gather.2 = bf16[64]{0} all-gather(%y), channel_id=7, dimensions={0}, frontend_attributes={chain_id="27"}
}

%during.3 (z: bf16[8]) -> bf16[32] {
  %z = bf16[8]{0} parameter(0)
  ROOT %gather.3 = bf16[32]{0} all-gather(%z), channel_id=9, dimensions={0}, frontend_attributes={chain_id="29"}
}

%before.4 (w: bf16[8]) -> bf16[32] {
  %w = bf16[8]{0} parameter(0)
  ROOT %gather.4 = bf16[32]{0} all-gather(%w), channel_id=9, dimensions={0}, frontend_attributes={chain_id="29"}
}

%condition (p: (s32[], bf16[8])) -> pred[] {
  %p = (s32[], bf16[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%body (q: (s32[], bf16[8])) -> (s32[], bf16[8]) {
  %q = (s32[], bf16[8]{0}) parameter(0)
  %f1 = bf16[64]{0} fusion(%q), kind=kCustom, calls=%start.1
  %f2 = bf16[64]{0} fusion(%q), kind=kCustom, calls=%async_collective_fusion.2
  %f3 = bf16[32]{0} fusion(%q), kind=kCustom, calls=%during.3
  %other = bf16[16]{0} all-gather(%q), channel_id=8, dimensions={0}
  ROOT %t = (s32[], bf16[8]{0}) tuple(%i2, %x)
}

ENTRY %main (a: bf16[8]) -> bf16[8] {
  %a = bf16[8]{0} parameter(0)
  %f4 = bf16[32]{0} fusion(%a), kind=kCustom, calls=%before.4
  %loop = (s32[], bf16[8]{0}) while(%init), condition=%condition, body=%body
  ROOT %r = bf16[8]{0} get-tuple-element(%loop), index=1
}
"""
    assert counts.collective_bytes(text) == {"all-gather": 5 * 64 * 2 + 32 * 2 + 5 * 16 * 2}


def test_reads_how_much_was_used_at_an_overflow():
    message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 21.50G of 15.75G hbm. Exceeded by 5.75G"
    assert counts.used_at_overflow(message) == int(21.5 * 2**30)
    assert counts.used_at_overflow("RESOURCE_EXHAUSTED: something else") is None
