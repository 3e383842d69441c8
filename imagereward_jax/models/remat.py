"""Rematerialisation policies: which activations the backward pass recomputes, and where the others are kept."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

_KEPT = "kept for the backward pass"
REMAT_POLICIES = ("none", "blocks", "attention", "full", "offload")


@jax.tree_util.register_static
class _Static(tuple):
    """Static data among residuals."""


def check_remat(policy: str) -> str:
    """Returns `policy`; raises ValueError with the choices if it is unknown.

    "none" keeps everything; "attention" recomputes the attention weights; "blocks" recomputes each residual,
    transformer and resampling block and the last layers; "full" recomputes each down, middle and up block as a whole,
    and in that again each of its blocks; "offload" recomputes like "blocks" and keeps the inputs of each block
    in the host's pinned memory until the backward pass.
    """
    if policy not in REMAT_POLICIES:
        raise ValueError(f"remat={policy!r} is not a policy; choose one of {', '.join(REMAT_POLICIES)}")
    return policy


def remat_mode(policy: str, unit: str) -> str:
    """Chooses "keep", "recompute" or "offload" for a `unit` ("attention", "blocks" or "full") under `policy`."""
    if policy == unit or (policy, unit) == ("full", "blocks"):
        return "recompute"
    return "offload" if (policy, unit) == ("offload", "blocks") else "keep"


def call_with_remat(function: Callable[..., Any], x: Any, *args: Any, mode: str, in_scan: bool = False) -> Any:
    """Calls `function(x, *args)`; by `mode` its activations are kept for the backward pass or recomputed there.

    Args:
        x: array or tree of arrays; "offload" keeps it in the host's memory.
        args: arrays or trees of arrays (or None) that many blocks share; they stay on the device.
        mode: see `remat_mode`.
        in_scan: whether the caller is the body of a scan, which stacks the kept arrays.
    """
    if mode == "keep":
        return function(x, *args)
    if mode == "offload":
        return (_offloaded_in_scan if in_scan else _offloaded)(function, x, *args)
    # A new function object each time: jax caches traces by function, and `function` may hold traced parameters.
    return jax.checkpoint(lambda *inner: function(*inner))(x, *args)


def _offloaded_in_scan(function, x, *args):
    """Offloads by jax.checkpoint's policy; unlike `_offloaded`, it keeps the stack of all iterations on the host."""
    policy = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[_KEPT],
        offload_src="device",
        offload_dst="pinned_host",
    )
    named = jax.checkpoint(lambda x, *args: function(checkpoint_name(x, _KEPT), *args), policy=policy)
    return named(x, *args)


def _offloaded(function, x, *args):
    """Offloads with an explicit schedule, which XLA does not find by itself outside of loops.

    `x` is copied to the host before anything uses the result. Otherwise XLA may copy it at the last moment, and `x`
    stays on the device until the backward pass. In the backward pass all gradients of a block are finished before
    the next block begins. Otherwise XLA may postpone those of weights, and their inputs stay on the device.
    """
    program, shapes = jax.make_jaxpr(function, return_shape=True)(x, *args)

    def evaluate(x, rest):
        consts, args = rest
        return tuple(jaxpr_as_fun(ClosedJaxpr(program.jaxpr, consts))(*jax.tree.leaves((x, *args))))

    def forward(x, rest):
        wanted = tuple(leaf.perturbed for leaf in jax.tree.leaves((x, rest)))
        x, rest = jax.tree.map(lambda leaf: leaf.value, (x, rest))
        copied = jax.device_put(x, jax.memory.Space.Host)
        results, copied = jax.lax.optimization_barrier((evaluate(x, rest), copied))
        return results, (copied, rest, _Static(wanted))

    def backward(residuals, gradients):
        copied, rest, wanted = residuals
        gradients = tuple(jnp.zeros(g.shape, g.dtype) if isinstance(g, SymbolicZero) else g for g in gradients)
        copied, gradients = jax.lax.optimization_barrier((copied, gradients))  # not fetched before it is needed
        leaves, tree = jax.tree.flatten((jax.device_put(copied, jax.memory.Space.Device), rest))

        def of_wanted(*chosen):
            chosen = iter(chosen)
            return evaluate(*tree.unflatten(next(chosen) if want else x for want, x in zip(wanted, leaves)))

        pullback = jax.vjp(of_wanted, *(x for want, x in zip(wanted, leaves) if want))[1]
        found = iter(jax.lax.optimization_barrier(pullback(gradients)))
        return tree.unflatten(next(found) if want else None for want in wanted)

    run = jax.custom_vjp(evaluate)
    run.defvjp(forward, backward, symbolic_zeros=True)
    return jax.tree.unflatten(jax.tree.structure(shapes), run(x, (program.consts, args)))
