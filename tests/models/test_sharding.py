"""What moves between devices when weights are split over them: weights, never activations."""

import child
import pytest
from collectives import CODE

CHILD = (
    CODE
    + """
from imagereward_jax.models.layers import Keys
from imagereward_jax.models.resnet import ResnetBlock2D
from imagereward_jax.models.transformer import Transformer2DModel

class Both(nnx.Module):
    def __init__(self):
        rngs, remat = Keys(nnx.Rngs(0)), sys.argv[1]
        self.resnet = ResnetBlock2D(96, 64, time_features=256, groups=8, eps=1e-5, remat=remat, rngs=rngs)
        self.transformer = Transformer2DModel(64, 4, 128, depth=3, linear=True, groups=8, remat=remat, rngs=rngs)

    def __call__(self, x, time, context):
        return self.transformer(self.resnet(x, time), context)

print(json.dumps(moved_by(Both, (20, 20, 96), (256,), (77, 128))[0]))
"""
)


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
