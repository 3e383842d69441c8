"""The gradient of convolutions in a loop and outside of one, with the package's gradient and with JAX's own, on a CPU.

    python benchmarks/convolutions.py

Prints seconds per gradient (median of three), and how many times as long two in a loop take as two outside.
"""

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp

from imagereward_jax.models.cpu_convolution import conv

SAME = ((1, 1), (1, 1))


def own(x, kernel):
    """JAX's convolution, with the gradient that JAX derives."""
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), SAME, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def network(convolve, kernels, x):
    """A loss of `x` after every kernel."""
    for kernel in kernels:
        x = jax.nn.silu(convolve(x, kernel))
    return jnp.square(x).mean()


def in_loop(gradient, kernels, xs):
    """The sum of the gradients of all `xs`."""

    def body(total, x):
        return jax.tree.map(jnp.add, total, gradient(kernels, x)), None

    return jax.lax.scan(body, jax.tree.map(jnp.zeros_like, kernels), xs)[0]


def seconds(function, *arguments):
    """Median of three calls, compiled before."""
    compiled = jax.jit(function).lower(*arguments).compile()
    jax.block_until_ready(compiled(*arguments))
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def main():
    """Measures both and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--side", type=int, default=16)
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args()
    key = jax.random.key(0)
    kernels = [0.05 * jax.random.normal(key, (3, 3, options.channels, options.channels))] * options.layers
    xs = jax.random.normal(key, (2, options.batch, options.side, options.side, options.channels))
    ours = functools.partial(conv, stride=1, padding=SAME)
    for name, convolve in {"JAX's gradient": own, "cpu_convolution": ours}.items():
        gradient = jax.grad(functools.partial(network, convolve))
        once, loop = seconds(gradient, kernels, xs[0]), seconds(functools.partial(in_loop, gradient), kernels, xs)
        print(f"{name}: {once:.3f} s; two in a loop {loop:.3f} s, {loop / once / 2:.2f} times as long as outside")


if __name__ == "__main__":
    main()
