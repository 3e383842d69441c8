"""What the devices of a program exchange, read off its compiled text; code for a child process of 8 devices."""

CODE = """
import json, re, sys
import jax, jax.numpy as jnp
from flax import nnx
from imagereward_jax.models.sharding import batch_over
from imagereward_jax.training.mesh import batch_sharding, make_mesh, weight_shardings

def moved_by(make, *shapes):
    '''({"moved": {collective: shapes}, "weights": shapes}, shardings of the weights) of the gradient of a network that
    make() gives, for inputs of 8 rows of these shapes, over data 2 x fsdp 4.'''
    mesh = make_mesh(2, 4)
    layout, state = nnx.split(nnx.eval_shape(make))
    params = nnx.to_pure_dict(state)

    def loss(params, *inputs):
        with batch_over(mesh):
            return jnp.square(nnx.merge(layout, params)(*inputs)).mean()

    def put(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    shardings = weight_shardings(mesh, params)
    inputs = [put(jax.ShapeDtypeStruct((8, *shape), jnp.float32), batch_sharding(mesh)) for shape in shapes]
    compiled = jax.jit(jax.grad(loss), out_shardings=shardings).lower(
        jax.tree.map(put, params, shardings), *inputs).compile()
    moved = {}
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    for result, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?\\(", compiled.as_text()):
        found = [[int(size) for size in shape.split(",") if size] for shape in re.findall(r"\\[([\\d,]*)\\]", result)]
        moved.setdefault(kind, []).extend(found)
    return {"moved": moved, "weights": [list(leaf.shape) for leaf in jax.tree.leaves(params)]}, shardings
"""
