"""Named rematerialisation policies: what is computed again in the backward pass instead of being kept, and where what
is kept lies meanwhile."""

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
    """What is no array, among residuals."""


def check_remat(policy: str) -> str:
    """Returns `policy`; raises ValueError listing the choices when there is no such one.

    "none" keeps everything; "attention" recomputes the attention weights; "blocks" recomputes each residual,
    transformer and resampling block and the last layers; "full" recomputes each down, middle and up block as a whole,
    and in that again each of its blocks; "offload" recomputes as "blocks" does, and what each block begins with waits
    in the host's memory (pinned) for the backward pass.
    """
    if policy not in REMAT_POLICIES:
        raise ValueError(f"remat={policy!r} is no policy; choose one of {', '.join(REMAT_POLICIES)}")
    return policy


def remat_mode(policy: str, unit: str) -> str:
    """Chooses "keep", "recompute" or "offload" for a `unit` ("attention", "blocks" or "full") under `policy`."""
    if policy == unit or (policy, unit) == ("full", "blocks"):
        return "recompute"
    return "offload" if (policy, unit) == ("offload", "blocks") else "keep"


def call_with_remat(function: Callable[..., Any], x: Any, *args: Any, mode: str, in_scan: bool = False) -> Any:
    """`function(x, *args)`; by `mode` its inside is kept for the backward pass, or computed again there.

    Args:
        x: array or tree of arrays: with "offload", what waits in the host's memory.
        args: arrays or trees of arrays (or None) that many blocks share; they stay where they are.
        mode: see `remat_mode`.
        in_scan: whether this is called by the body of a scan, which stacks what is kept.
    """
    if mode == "keep":
        return function(x, *args)
    if mode == "offload":
        return (_offloaded_in_scan if in_scan else _offloaded)(function, x, *args)
    # A new function object each time: jax caches traces by function, and `function` may hold traced parameters.
    return jax.checkpoint(lambda *inner: function(*inner))(x, *args)


def _offloaded_in_scan(function, x, *args):
    """By jax.checkpoint's own policy: the stack of all iterations is the host's then, which `_offloaded` hinders."""
    policy = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[_KEPT],
        offload_src="device",
        offload_dst="pinned_host",
    )
    named = jax.checkpoint(lambda x, *args: function(checkpoint_name(x, _KEPT), *args), policy=policy)
    return named(x, *args)


def _offloaded(function, x, *args):
    """As `_offloaded_in_scan`, and says when, which XLA does not find by itself outside of loops.

    `x` is copied to the host before anything uses the result; otherwise that may happen at the last moment, for
    nothing: `x` stays on the device until the backward pass. There, all gradients of a block are done before the next
    block begins; otherwise those of weights may be put off, and what they are computed from stays on the device.
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
