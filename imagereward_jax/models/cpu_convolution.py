"""Convolution whose gradients are as fast inside loops as outside on CPUs.

XLA rearranges the axes of convolutions for its fast CPU kernel in a program's outermost computation alone. Inside a
loop (`jax.lax.scan`: accumulation, denoising steps) only those already in its order [B, H, W, C] by [k, k, C_in, C_out]
reach that kernel; gradients, which JAX writes in other orders, take one that is up to seventy times slower
(`benchmarks/convolutions.py`). Here gradients are written in the fast order, with transposes of their own.
"""

import functools

import jax

Padding = tuple[tuple[int, int], tuple[int, int]]  # ((top, bottom), (left, right))
_LAYOUT = ("NHWC", "HWIO", "NHWC")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def conv(
    x: jax.Array, kernel: jax.Array, stride: int, padding: Padding, precision: jax.lax.Precision | None = None
) -> jax.Array:
    """2-D convolution, [B, H, W, C_in] by [k, k, C_in, C_out] to [B, h, w, C_out]; to be differentiated in reverse.

    Args:
        stride: along both axes. padding: with zeros.
    """
    return _apply(x, kernel, padding, precision, window_strides=(stride, stride))


def _apply(x, kernel, padding, precision, window_strides=(1, 1), **dilations):
    return jax.lax.conv_general_dilated(
        x, kernel, window_strides, padding, dimension_numbers=_LAYOUT, precision=precision, **dilations
    )


def _forward(x, kernel, stride, padding, precision):
    return conv(x, kernel, stride, padding, precision), (x, kernel)


def _backward(stride, padding, precision, saved, gradient):
    """Both gradients are convolutions again: of the output's gradient by the turned kernel, and of the input by it."""
    x, kernel = saved
    around_gradient, around_x = [], []
    for axis, (before, _) in enumerate(padding):
        size, taps = x.shape[1 + axis], kernel.shape[axis]
        spread = (gradient.shape[1 + axis] - 1) * stride + 1  # of the gradient with the pixels that the stride left out
        around_gradient.append((taps - 1 - before, size + before - spread))
        around_x.append((before, spread + taps - 1 - before - size))
    dilation = (stride, stride)
    turned = kernel[::-1, ::-1].swapaxes(2, 3)
    to_x = _apply(gradient, turned, around_gradient, precision, lhs_dilation=dilation)
    # channels stand for the batch, and the batch for the channels that are summed
    by_channel, window = x.transpose(3, 1, 2, 0), gradient.transpose(1, 2, 0, 3)
    to_kernel = _apply(by_channel, window, around_x, precision, rhs_dilation=dilation)
    return to_x, to_kernel.transpose(1, 2, 0, 3)


conv.defvjp(_forward, _backward)
