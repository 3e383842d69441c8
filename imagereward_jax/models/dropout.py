"""Dropout and drop path, active only inside `noise`.

A network calls `drop` at every place with dropout. Outside of `noise` this does nothing, so scoring needs no key. Each
call uses a key of its own, in the order of the calls.
"""

import contextlib
import contextvars
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp

_active = contextvars.ContextVar("dropout", default=None)


class _Noise:
    def __init__(self, key, rates):
        self.key, self.rates, self.count = key, rates, 0

    def next_key(self):
        self.count += 1
        return jax.random.fold_in(self.key, self.count)


@contextlib.contextmanager
def noise(key: jax.Array, **rates: float | Sequence[float]) -> Iterator[None]:
    """Enables dropout for code traced inside.

    Args:
        key: a `jax.random` key.
        **rates: rate by kind: a number in [0, 1), or a tuple of them.
    """
    token = _active.set(_Noise(key, rates))
    try:
        yield
    finally:
        _active.reset(token)


@contextlib.contextmanager
def layer_noise(index: int | jax.Array) -> Iterator[None]:
    """Gives layer `index` (may be traced) of a scan keys of its own; does nothing outside of `noise`."""
    active = _active.get()
    if active is None:
        yield
        return
    with noise(jax.random.fold_in(active.next_key(), index), **active.rates):
        yield


def drops(kind: str) -> bool:
    """Whether dropout of this kind is active."""
    active = _active.get()
    return active is not None and bool(active.rates.get(kind))


def keep_mask(key: jax.Array, rate: float, shape: Sequence[int]) -> jax.Array:
    """Draws a boolean mask that is True with probability `1 - rate`."""
    return jax.random.bernoulli(key, 1.0 - rate, shape)


def drop(
    x: jax.Array, kind: str, *, index: int | None = None, scale: float = 1.0, per_sample: bool = False
) -> jax.Array:
    """Sets random elements of `x` to 0 and scales up the others, so that the expected value stays the same.

    Args:
        x: [B, ...].
        kind: selects the rate of `noise`. index: selects from a tuple of rates. scale: multiplies the rate.
        per_sample: drops whole samples (drop path, arXiv 1603.09382).
    """
    active = _active.get()
    rate = 0.0 if active is None else active.rates.get(kind, 0.0)
    rate = scale * (rate if index is None or not rate else rate[index])
    if not rate:
        return x
    shape = (x.shape[0], *[1] * (x.ndim - 1)) if per_sample else x.shape
    kept = keep_mask(active.next_key(), rate, shape)
    return jnp.where(kept, x / (1.0 - rate), 0.0).astype(x.dtype)
