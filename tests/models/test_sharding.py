"""What moves between devices when weights are split over them: weights, never activations."""

import child
import pytest

CHILD = """
import json, re, sys
import jax, jax.numpy as jnp
from flax import nnx
from imagereward_jax.models.layers import Keys
from imagereward_jax.models.sharding import batch_over
from imagereward_jax.models.resnet import ResnetBlock2D
from imagereward_jax.models.transformer import Transformer2DModel
from imagereward_jax.training.mesh import batch_sharding, make_mesh, weight_shardings

class Both(nnx.Module):
    def __init__(self):
        rngs = Keys(nnx.Rngs(0))
        self.resnet = ResnetBlock2D(96, 64, time_features=256, groups=8, eps=1e-5, remat=remat, rngs=rngs)
        self.transformer = Transformer2DModel(64, 4, 128, depth=3, linear=True, groups=8, remat=remat, rngs=rngs)

    def __call__(self, x, time, context):
        return self.transformer(self.resnet(x, time), context)

mesh = make_mesh(2, 4)
remat = sys.argv[1]
layout, state = nnx.split(nnx.eval_shape(Both))
params = nnx.to_pure_dict(state)

def loss(params, *inputs):
    with batch_over(mesh):
        return jnp.square(nnx.merge(layout, params)(*inputs)).mean()

def put(leaf, sharding):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

shardings = weight_shardings(mesh, params)
inputs = [put(jax.ShapeDtypeStruct((8, *shape), jnp.float32), batch_sharding(mesh))
          for shape in ((20, 20, 96), (256,), (77, 128))]
compiled = jax.jit(jax.grad(loss), out_shardings=shardings).lower(
    jax.tree.map(put, params, shardings), *inputs).compile()
moved = {}
kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
for result, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?\\(", compiled.as_text()):
    shapes = [[int(size) for size in shape.split(",") if size] for shape in re.findall(r"\\[([\\d,]*)\\]", result)]
    moved.setdefault(kind, []).extend(shapes)
weights = [list(leaf.shape) for leaf in jax.tree.leaves(params)]
print(json.dumps({"moved": moved, "weights": weights}))
"""


@pytest.mark.parametrize("remat", ["blocks", "offload"])
def test_weights_are_gathered_and_gradients_summed_and_nothing_else_moves(remat):
    """The gradient of a residual block and a stack of three transformer blocks, attention by blocks among them."""
    found = child.run(CHILD, remat, devices=8)
    weights = {tuple(shape) for shape in found["weights"]}
    layers = {(1, *shape[1:]) for shape in weights} | {shape[1:] for shape in weights} | weights
    assert found["moved"]["all-gather"]
    for shape in found["moved"].pop("all-gather"):
        assert tuple(shape) in layers, shape
    assert set(found["moved"]) <= {"all-reduce", "reduce-scatter"}
    for shapes in found["moved"].values():  # sums of weights' gradients: nothing with an axis of pixels or tokens
        assert not any({20, 77, 400} & set(shape) for shape in shapes), shapes
