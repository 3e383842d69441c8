"""The optimizer that a config describes."""

from typing import Any

import optax


def make_schedule(config: Any, steps: int, batch_size: int = 1) -> optax.Schedule:
    """Learning rate by update: linear warm-up, then constant, linear or cosine to 0 at `steps`.

    With `config.scale_by_batch` the learning rate is that of one sample, and is multiplied by `batch_size`.
    """
    peak = config.learning_rate * (batch_size if config.scale_by_batch else 1)
    warmup = config.warmup_steps
    rest = max(1, steps - warmup)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
    }[config.schedule]
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def make_optimizer(config: Any, updates: int, batch_size: int = 1) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm, as PyTorch's: decay on every weight, bias correction.

    Args:
        config: `config.optimizer`.
        updates: how many updates the run makes, for the schedule.
        batch_size: samples an update, over all devices and accumulation rounds.
    """
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    adamw = optax.adamw(
        make_schedule(config, updates, batch_size),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    return optax.chain(clip, adamw)
