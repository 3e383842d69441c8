"""What the tests of the networks share: random PyTorch weights, their way into a network, measures of error."""

import jax
import numpy as np
from flax import nnx

from imagereward_jax.weights import mapping


def randomise(torch_module, seed=0):
    """Gives norms and biases random values too: PyTorch starts them at 1 and 0, where mistakes would not show."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in torch_module.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return torch_module.eval()


def tensors_of(torch_module):
    """The state dict as numpy arrays."""
    return {key: value.detach().numpy() for key, value in torch_module.state_dict().items()}


def functional(module, tensors):
    """(graphdef, params) with the PyTorch tensors in the place of the module's parameters."""
    graphdef, _ = nnx.split(module)
    return graphdef, mapping.from_torch(module, tensors)


def to_torch_image(array):
    """Channels last (numpy) to channels first (torch)."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 1)))


def from_torch_image(tensor):
    """Channels first (torch) to channels last (numpy)."""
    return np.moveaxis(tensor.detach().numpy(), 1, -1)


def relative_error(array, reference):
    """Largest difference over the largest reference value."""
    array, reference = np.asarray(array, np.float64), np.asarray(reference, np.float64)
    assert array.shape == reference.shape
    return np.abs(array - reference).max() / np.abs(reference).max()


def worst_gradient_error(gradients, reference):
    """The largest relative error of any tensor's gradient.

    Gradients that are zero but for rounding (a key's bias cannot change a softmax) are measured against a
    thousandth of the largest gradient of all.
    """
    assert gradients.keys() == reference.keys()
    floor = 1e-3 * max(np.abs(value).max() for value in reference.values())
    return max(
        np.abs(gradients[key] - value).max() / max(np.abs(value).max(), floor) for key, value in reference.items()
    )


def count_checkpoints(function, *args):
    """How many calls of jax.checkpoint are in `function`, nested ones and those inside other calls included."""

    def count(jaxpr):
        total = 0
        for equation in jaxpr.eqns:
            inner = [value for value in equation.params.values() if hasattr(value, "eqns")]
            total += ("prevent_cse" in equation.params) + sum(count(value) for value in inner)
        return total

    return count(jax.make_jaxpr(function)(*args).jaxpr)


def assert_same_layout(module, torch_module, rename=lambda key: key):
    """The keys and shapes of `module` are those of the PyTorch module, one to one. Returns the parameter count."""
    ours = {key: leaf.torch_shape for key, leaf in mapping.torch_layout(module).items()}
    theirs = {rename(key): tuple(value.shape) for key, value in torch_module.state_dict().items()}
    assert ours == theirs
    return sum(int(np.prod(shape)) for shape in ours.values())
