"""Convolution on CPUs: PyTorch's gradients within 1e-5, in a layout that XLA's fast kernel takes inside loops too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from imagereward_jax.models.cpu_convolution import conv

CASES = {  # (side, kernel, stride, padding)
    "same": (8, 3, 1, ((1, 1), (1, 1))),
    "pointwise": (8, 1, 1, ((0, 0), (0, 0))),
    "halved": (9, 3, 2, ((1, 1), (1, 1))),
    "halved, padded at the end": (8, 3, 2, ((0, 1), (0, 1))),
    "patches": (8, 4, 4, ((0, 0), (0, 0))),
    "pixels that no window reaches": (9, 2, 3, ((0, 0), (0, 0))),
    "uneven": (8, 3, 1, ((2, 0), (0, 1))),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_pytorchs(case):
    side, taps, stride, padding = CASES[case]
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, side, side, 3)).astype(np.float32)
    kernel = rng.standard_normal((taps, taps, 3, 5)).astype(np.float32)
    y, pullback = jax.vjp(lambda x, kernel: conv(x, kernel, stride, padding), x, kernel)
    gradient = rng.standard_normal(y.shape).astype(np.float32)

    there = torch.from_numpy(x).permute(0, 3, 1, 2).requires_grad_()
    weight = torch.from_numpy(kernel).permute(3, 2, 0, 1).requires_grad_()
    padded = torch.nn.functional.pad(there, (*padding[1], *padding[0]))
    output = torch.nn.functional.conv2d(padded, weight, stride=stride)
    output.backward(torch.from_numpy(gradient).permute(0, 3, 1, 2))

    to_x, to_kernel = pullback(jnp.asarray(gradient))
    np.testing.assert_allclose(y, output.detach().permute(0, 2, 3, 1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(to_x, there.grad.permute(0, 2, 3, 1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(to_kernel, weight.grad.permute(2, 3, 1, 0), rtol=1e-5, atol=1e-5)


def test_every_convolution_of_a_compiled_loop_has_the_fast_layout():
    """Seen in the compiled program: with JAX's own gradient two of the three would have another."""

    def summed(kernel, xs):
        def body(total, x):
            return total + jax.grad(lambda k: (conv(conv(x, k, 1, same), k, 1, same) ** 2).sum())(kernel), None

        return jax.lax.scan(body, jnp.zeros_like(kernel), xs)[0]

    same = ((1, 1), (1, 1))
    program = jax.jit(summed).lower(jnp.ones((3, 3, 4, 4)), jnp.ones((3, 2, 8, 8, 4))).compile().as_text()
    layouts = [line.split("dim_labels=")[1].split(",")[0] for line in program.splitlines() if "convolution(" in line]
    assert len(layouts) >= 4
    assert set(layouts) == {"b01f_01io->b01f"}
