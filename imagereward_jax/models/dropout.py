"""Dropout and drop path, on only where a training loss says so.

A network calls `drop` wherever it could drop something; outside of `noise` that does nothing, so that scoring needs no
key and no switch. Each call draws from a key of its own, in the order of the calls.
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
    """Switches dropping on for what is traced inside.

    Args:
        key: a `jax.random` key.
        **rates: by kind, what `drop` looks up: a share in [0, 1), or a tuple of them.
    """
    token = _active.set(_Noise(key, rates))
    try:
        yield
    finally:
        _active.reset(token)


@contextlib.contextmanager
def layer_noise(index: int | jax.Array) -> Iterator[None]:
    """Gives layer `index` (which may be traced) of a scan keys of its own; does nothing outside of `noise`."""
    active = _active.get()
    if active is None:
        yield
        return
    with noise(jax.random.fold_in(active.next_key(), index), **active.rates):
        yield


def drops(kind: str) -> bool:
    """Whether `drop` of this kind changes anything here."""
    active = _active.get()
    return active is not None and bool(active.rates.get(kind))


def keep_mask(key: jax.Array, rate: float, shape: Sequence[int]) -> jax.Array:
    """True with probability `1 - rate`."""
    return jax.random.bernoulli(key, 1.0 - rate, shape)


def drop(
    x: jax.Array, kind: str, *, index: int | None = None, scale: float = 1.0, per_sample: bool = False
) -> jax.Array:
    """`x` with a share of its numbers set to 0 and the others enlarged, so that the expectation stays.

    Args:
        x: [B, ...].
        kind: which of the rates of `noise`; index: which of its tuple; scale: times the rate.
        per_sample: drops all of a sample or nothing (drop path, arXiv 1603.09382).
    """
    active = _active.get()
    rate = 0.0 if active is None else active.rates.get(kind, 0.0)
    rate = scale * (rate if index is None or not rate else rate[index])
    if not rate:
        return x
    shape = (x.shape[0], *[1] * (x.ndim - 1)) if per_sample else x.shape
    kept = keep_mask(active.next_key(), rate, shape)
    return jnp.where(kept, x / (1.0 - rate), 0.0).astype(x.dtype)
