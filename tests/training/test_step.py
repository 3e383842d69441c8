"""The training step by hand: averages, skipped updates, accumulation, several updates, randomness by step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from imagereward_jax.methods.base import STEPS, Mean, Models, Peak, Phase
from imagereward_jax.training.state import from_checkpoint, init_state, to_checkpoint
from imagereward_jax.training.step import Fixed, make_train_step, over_updates


class Given:
    """A source whose batches the test gives."""

    images = 1

    def __init__(self, updates=1):
        self.updates = updates

    def prepare(self, models, batch):
        return batch


def quadratic(models, batch, key):
    """(w - 3)^2 / 2, times the batch's scale."""
    loss = 0.5 * (models.policy["w"] - 3.0) ** 2 * batch["scale"][0]
    return loss, {"draw": jax.random.uniform(key)}


def run(steps, *, decay=0.0, scales=None, phases=1, copies=None, updates=1):
    """States and metrics of plain gradient descent on `quadratic` with rate 0.5, from w = 0."""
    optimizer, copies = optax.sgd(0.5), copies or {}
    state = init_state({"w": jnp.float32(0)}, optimizer, seed=0, ema=decay > 0, copies=tuple(copies))
    all_phases = tuple(Phase(f"p{index}", quadratic, Given(updates)) for index in range(phases))
    step = jax.jit(make_train_step(all_phases, optimizer, ema_decay=decay, copies=copies))
    states, metrics = [], []
    for scale in scales or [1.0] * steps:
        batch = {"scale": jnp.full((1,), scale)}
        found = []
        for update in range(updates):
            state, of_update = step(state, Fixed({}), {phase.name: batch for phase in all_phases}, update)
            found.append(of_update)
        states.append(state)
        metrics.append(over_updates(found))
    return states, metrics


def averages(weights, decay):
    """The average after each update u, whose decay is min(decay, (1 + u) / (10 + u))."""
    average, found = 0.0, []
    for update, weight in enumerate(weights):
        now = min(decay, (1 + update) / (10 + update))
        average = now * average + (1 - now) * weight
        found.append(average)
    return found


def test_weights_and_their_average_by_hand():
    """w = 1.5, 2.25, 2.625, and the average's decays 0.1, 2/11, 3/12."""
    states, _ = run(3, decay=0.9)
    np.testing.assert_allclose([state.params["w"] for state in states], [1.5, 2.25, 2.625])
    np.testing.assert_allclose([state.ema["w"] for state in states], averages((1.5, 2.25, 2.625), 0.9), rtol=1e-6)
    assert states[-1].averaged is states[-1].ema


def test_an_average_counts_updates_also_where_a_step_makes_two():
    """Two phases: the average follows w = 1.5, 2.25, 2.625, ... by the decay of each update, not of each step twice."""
    states, _ = run(3, decay=0.9, phases=2)
    weights = [3 * (1 - 0.5**update) for update in range(1, 7)]
    np.testing.assert_allclose([state.ema["w"] for state in states], averages(weights, 0.9)[1::2], rtol=1e-6)


def test_copies_follow_by_the_decay_that_the_method_gives():
    """Decay u / 4 at update u: at update 0 the copy is the new weights."""
    states, _ = run(3, copies={"old": lambda update: update / 4})
    expected, copy = [], 0.0
    for update, weight in enumerate((1.5, 2.25, 2.625)):
        copy = update / 4 * copy + (1 - update / 4) * weight
        expected.append(copy)
    np.testing.assert_allclose([state.copies["old"]["w"] for state in states], expected, rtol=1e-6)


def test_a_source_with_three_updates_makes_them_in_one_step():
    """One step of three updates is three steps of one; each update draws its own numbers."""
    states, metrics = run(2, decay=0.9, updates=3)
    assert [int(state.step) for state in states] == [1, 2] and metrics[0]["p0/draw"] != metrics[1]["p0/draw"]
    weights = [3 * (1 - 0.5**update) for update in range(1, 7)]
    np.testing.assert_allclose([state.params["w"] for state in states], weights[2::3], rtol=1e-6)
    np.testing.assert_allclose([state.ema["w"] for state in states], averages(weights, 0.9)[2::3], rtol=1e-6)


def test_non_finite_losses_leave_everything_as_it_was():
    states, _ = run(3, decay=0.9, scales=[1.0, np.nan, np.inf, 1.0])
    assert [int(state.skipped) for state in states] == [0, 1, 2, 2]
    assert [int(state.skipped_in_row) for state in states] == [0, 1, 2, 0]
    assert states[2].params["w"] == states[0].params["w"] and states[2].ema["w"] == states[0].ema["w"]
    assert int(states[-1].step) == 4


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(np.nan),
        optax.sgd(np.inf),
        optax.adamw(0.1, b1=np.nan),
        optax.adamw(0.1, b2=1.0),
        optax.adamw(0.1, eps=np.nan),
        optax.adamw(0.1, weight_decay=np.inf),
        optax.chain(optax.clip_by_global_norm(np.nan), optax.sgd(0.1)),
        optax.GradientTransformation(lambda params: np.float32(0), lambda grads, *_: (grads, np.float32(np.nan))),
    ],
)
def test_an_update_whose_result_is_not_finite_leaves_everything_as_it_was(optimizer):
    """Loss and gradient are finite (3 w^2 and 6 w at w = 2): weights or moments are not."""
    state = init_state({"w": jnp.float32(2.0)}, optimizer, seed=0, ema=True, copies=("old",))
    step = make_train_step(
        (Phase("p", lambda models, batch, key: (3 * models.policy["w"] ** 2, {}), Given()),),
        optimizer,
        ema_decay=0.9,
        copies={"old": lambda update: 0.5},
    )
    after, metrics = jax.jit(step)(state, Fixed({}), {"p": {"x": jnp.ones(2)}})
    assert (metrics["p/loss"], metrics["p/grad_norm"]) == (12, 12)
    kept = ("params", "opt_state", "ema", "copies")
    for before, now in zip(*(jax.tree.leaves([getattr(one, name) for name in kept]) for one in (state, after))):
        np.testing.assert_array_equal(now, before)
    assert (int(after.skipped), int(after.skipped_in_row), int(after.step)) == (1, 1, 1)


def test_every_step_draws_its_own_numbers_and_a_run_repeats_them():
    first, second = ([float(found["p0/draw"]) for found in run(4)[1]] for _ in range(2))
    assert len(set(first)) == 4 and first == second


def ragged(models, batch, key):
    """The mean of w x over the rows that count; a metric over them as well."""
    values = jnp.where(batch["counts"], jnp.sin(models.policy["w"] * batch["x"]), 0.0)
    count = batch["counts"].sum()
    return Mean(values.sum(), count), {"mean": Mean(values.sum(), count), "rows": count.astype(jnp.float32)}


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_rows_that_count_differently_have_the_whole_batchs_gradient_in_any_number_of_rounds(accumulation):
    """1, 4, 0 and 2 of 4 x's in four rows; loss, metric and update within 1e-6 of the closed form over all seven."""
    x = np.arange(16, dtype=np.float32).reshape(4, 4) / 7
    counts = np.arange(4) < np.array([1, 4, 0, 2])[:, None]
    optimizer = optax.sgd(1.0)
    step = make_train_step((Phase("p", ragged, Given()),), optimizer, accumulation=accumulation)
    state = init_state({"w": jnp.float32(0.5)}, optimizer, seed=0, ema=False)
    state, metrics = jax.jit(step)(state, Fixed({}), {"p": {"x": x, "counts": counts}})
    chosen = x[counts]
    np.testing.assert_allclose(metrics["p/loss"], np.sin(0.5 * chosen).mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["p/mean"], metrics["p/loss"], rtol=1e-6)
    np.testing.assert_allclose(state.params["w"], 0.5 - (chosen * np.cos(0.5 * chosen)).mean(), rtol=1e-6)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_steps_of_a_batch_are_taken_in_rounds_of_one_gradient(accumulation):
    """Four rows of three steps: loss and update are means over all twelve, by the closed form; a `Peak` is the most."""
    x, scale = np.arange(12, dtype=np.float32).reshape(4, 3) / 5, np.arange(1, 5, dtype=np.float32)

    def loss(models, batch, key):
        values = jnp.sin(models.policy["w"] * batch["x"]) * batch["scale"]
        return values.mean(), {"most": Peak(values.max())}

    optimizer = optax.sgd(1.0)
    step = jax.jit(make_train_step((Phase("p", loss, Given()),), optimizer, accumulation=accumulation))
    state = init_state({"w": jnp.float32(0.5)}, optimizer, seed=0, ema=False)
    state, metrics = step(state, Fixed({}), {"p": {"scale": scale, STEPS: {"x": x}}})
    values = np.sin(0.5 * x) * scale[:, None]
    np.testing.assert_allclose(metrics["p/loss"], values.mean(), rtol=1e-6)
    np.testing.assert_allclose(state.params["w"], 0.5 - (x * np.cos(0.5 * x) * scale[:, None]).mean(), rtol=1e-6)
    np.testing.assert_allclose(over_updates([metrics])["p/most"], values.max(), rtol=1e-6)


def test_the_metrics_of_a_step_are_those_of_its_updates():
    """Means, the largest of a peak, the last of a counter."""
    updates = [{"loss": 1.0, "most": Peak(3.0), "skipped": 1}, {"loss": 2.0, "most": Peak(2.0), "skipped": 2}]
    assert over_updates(updates) == {"loss": 1.5, "most": 3.0, "skipped": 2}


def test_a_sum_of_losses_gives_each_its_own_batch_tables_and_key():
    def part(models, batch, key):
        return models.policy["w"] * batch + models.tables, {f"draw{int(models.tables)}": jax.random.uniform(key)}

    both = Phase.sum("both", {"a": Phase("a", part, Given(), 1), "b": Phase("b", part, Given(), 2)})
    models = Models({"w": 10.0}, tables=both.tables)
    value, metrics = both.loss(models, {"a": 1.0, "b": 2.0}, jax.random.key(0))
    assert value == (10 + 1) + (20 + 2) and (metrics["a_loss"], metrics["b_loss"]) == (11, 22)
    assert metrics["draw1"] != metrics["draw2"]


def test_checkpoints_hold_copies_only_if_there_are_some():
    """So that a run of before, whose checkpoints have none, is restored."""
    plain, with_copies = run(1)[0][0], run(1, copies={"old": lambda update: 0.5})[0][0]
    assert "copies" not in to_checkpoint(plain) and "old" in to_checkpoint(with_copies)["copies"]
    for state in (plain, with_copies):
        again = from_checkpoint(to_checkpoint(state))
        jax.tree.map(np.testing.assert_array_equal, again, state)


def test_profiles_and_dumps_call_the_compiled_program_train_step():
    """Not `<unnamed function>`, as jax calls a callable without a name."""
    optimizer = optax.sgd(0.5)
    step = jax.jit(make_train_step((Phase("p0", quadratic, Given()),), optimizer))
    state = init_state({"w": jnp.float32(0)}, optimizer, seed=0, ema=False)
    assert "module @jit_train_step " in step.lower(state, Fixed({}), {"p0": {"scale": jnp.ones(1)}}).as_text()
