"""Named rematerialisation policies: what is computed again in the backward pass instead of being kept."""

import jax

REMAT_POLICIES = ("none", "blocks", "attention", "full")


def check_remat(policy):
    """Returns `policy`; raises ValueError listing the choices when there is no such one.

    "none" keeps everything; "attention" recomputes the attention weights; "blocks" recomputes each residual,
    transformer and resampling block; "full" recomputes each down, middle and up block as a whole.
    """
    if policy not in REMAT_POLICIES:
        raise ValueError(f"remat={policy!r} is no policy; choose one of {', '.join(REMAT_POLICIES)}")
    return policy


def call(function, *args, remat):
    """`function(*args)`, under jax.checkpoint if `remat`. `args` are arrays or trees of arrays (or None)."""
    # A new function object each time: jax caches traces by function, and `function` may hold traced parameters.
    return jax.checkpoint(lambda *inner: function(*inner))(*args) if remat else function(*args)
