"""The optimizer and the schedules against PyTorch's and closed forms."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from imagereward_jax.recipes import default_config
from imagereward_jax.training.optimizer import make_optimizer, make_schedule


def settings(**changes):
    config = default_config("refl").optimizer
    config.update(changes)
    return config


def test_ten_updates_agree_with_pytorchs_clipped_adamw():
    """Within 1e-6 relative, with gradients above and below the clipping norm."""
    torch = pytest.importorskip("torch", reason="the reference is PyTorch's AdamW")
    rng = np.random.default_rng(0)
    start = rng.normal(size=(5, 3)).astype(np.float32)
    optimizer = make_optimizer(settings(learning_rate=1e-2), 10)
    ours, state = {"w": jnp.asarray(start)}, None
    state = optimizer.init(ours)
    theirs = torch.nn.Parameter(torch.from_numpy(start.copy()))
    reference = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=1e-2)
    for step in range(10):
        gradient = rng.normal(size=(5, 3)).astype(np.float32) * (10 if step % 2 else 0.01)
        updates, state = optimizer.update({"w": jnp.asarray(gradient)}, state, ours)
        ours = optax.apply_updates(ours, updates)
        theirs.grad = torch.from_numpy(gradient.copy())
        torch.nn.utils.clip_grad_norm_([theirs], 1.0)
        reference.step()
    np.testing.assert_allclose(ours["w"], theirs.detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.0, 0.5, 1.0, 1.0, 1.0]),
        ("linear", [0.0, 0.5, 1.0, 0.5, 0.0]),
        ("cosine", [0.0, 0.5, 1.0, 0.5 * (1 + np.cos(np.pi / 2)), 0.0]),
    ],
)
def test_schedules_by_hand(schedule, expected):
    """Warm-up over 10 updates, then what the name says up to update 30."""
    rate = make_schedule(settings(learning_rate=1.0, schedule=schedule, warmup_steps=10), 30)
    np.testing.assert_allclose([rate(step) for step in (0, 5, 10, 20, 30)], expected, atol=1e-6)


def test_the_rate_of_one_sample_times_the_batch():
    rates = [make_schedule(settings(learning_rate=1e-3, scale_by_batch=scaled), 30, 128)(5) for scaled in (False, True)]
    np.testing.assert_allclose(rates, [1e-3, 0.128])
