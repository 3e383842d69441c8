"""The training step by hand: EMA, skipped updates, accumulation, randomness by step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from imagereward_jax.training.step import Phase, init_state, make_train_step


def run(steps, *, decay=0.0, losses=None):
    """States of plain gradient descent on (w - 3)^2 / 2 with rate 0.5, from w = 0."""

    def loss(trainable, frozen, batches, key):
        return 0.5 * (trainable["w"] - 3.0) ** 2 * batches["scale"][0], {"draw": jax.random.uniform(key)}

    optimizer = optax.sgd(0.5)
    state = init_state({"w": jnp.float32(0)}, optimizer, seed=0, ema=decay > 0)
    step = jax.jit(make_train_step((Phase("p", loss),), optimizer, ema_decay=decay))
    scales, states, draws = losses or [1.0] * steps, [], []
    for scale in scales:
        state, metrics = step(state, {}, {"scale": jnp.array([scale])})
        states.append(state)
        draws.append(float(metrics["p/draw"]))
    return states, draws


def test_weights_and_their_average_by_hand():
    """w = 1.5, 2.25, 2.625; the average's decay is min(0.9, (1 + t) / (10 + t)): 0.1, 2/11, 3/12."""
    states, _ = run(3, decay=0.9)
    np.testing.assert_allclose([state.params["w"] for state in states], [1.5, 2.25, 2.625])
    average, expected = 0.0, []
    for step, weight in enumerate((1.5, 2.25, 2.625)):
        decay = min(0.9, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * weight
        expected.append(average)
    np.testing.assert_allclose([state.ema["w"] for state in states], expected, rtol=1e-6)
    assert states[-1].averaged is states[-1].ema


def test_non_finite_losses_leave_everything_as_it_was():
    states, _ = run(3, decay=0.9, losses=[1.0, np.nan, np.inf, 1.0])
    assert [int(state.skipped) for state in states] == [0, 1, 2, 2]
    assert [int(state.skipped_in_row) for state in states] == [0, 1, 2, 0]
    assert states[2].params["w"] == states[0].params["w"] and states[2].ema["w"] == states[0].ema["w"]
    assert int(states[-1].step) == 4


def test_every_step_draws_its_own_numbers_and_a_run_repeats_them():
    first, second = run(4)[1], run(4)[1]
    assert len(set(first)) == 4 and first == second
