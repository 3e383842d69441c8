"""Diffusion-DPO against its formulas in PyTorch, offline and online."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_sd1
from toy_flow import SD3, ToyFlow
from toy_groups import WEIGHT, run, settings

from imagereward_jax.config import ConfigError
from imagereward_jax.methods import dpo, dpo_online
from imagereward_jax.methods.base import Models
from imagereward_jax.methods.denoising import USUAL, draw_share, draw_timesteps, flow_timesteps
from imagereward_jax.methods.dpo import preference_losses
from imagereward_jax.recipes import default_config, validate
from imagereward_jax.training.mesh import make_mesh

torch = pytest.importorskip("torch", reason="the reference is PyTorch")
functional = pytest.importorskip("torch.nn.functional", reason="the reference is PyTorch")

PAIRS, KEY, BASE = 4, jax.random.key(2), 0.6
CONDITIONS = np.array([0.1, -0.4, 0.7, 0.0], np.float32)
CLEAN = np.random.default_rng(0).standard_normal((PAIRS, 2, 8, 8, 4)).astype(np.float32)
SCHEDULERS = {"flow": SD3, "epsilon": tiny_sd1.SCHEDULER, "v": tiny_sd1.SCHEDULER | {"prediction_type": "v_prediction"}}
KINDS = [("dpo", 2000.0), ("dpo", 5000.0), ("dpo", 100.0), ("ipo", 50.0), ("kto", 1000.0)]


def found(schedule, kind, beta, weight, **more):
    """(loss, gradient by the weight, metrics) of pairs."""
    loss = dpo.make_loss(dpo.Config(loss=kind, beta=beta), ToyFlow(SCHEDULERS[schedule]))
    batch = {"cond": {"x": CONDITIONS}, "clean": CLEAN, **more}

    def value(weight):
        mean, metrics = loss(Models({"toy": weight}, {"toy": jnp.float32(BASE)}), batch, KEY)
        return mean.value, metrics

    (value, metrics), slope = jax.jit(jax.value_and_grad(value, has_aux=True))(jnp.float32(weight))
    return float(value), float(slope), {name: float(mean.value) for name, mean in metrics.items()}


def torch_errors(schedule, weight):
    """Mean squared errors [2B], the preferred images first, as DiffusionDPO's train.py stacks them."""
    model = ToyFlow(SCHEDULERS[schedule])
    _, noise_key, time_key = jax.random.split(KEY, 3)
    noise = torch.tensor(np.array(jax.random.normal(noise_key, (PAIRS, 8, 8, 4)))).repeat(2, 1, 1, 1)
    rows = (-1, 1, 1, 1)
    if schedule == "flow":
        timesteps = flow_timesteps(model.schedule, draw_share(time_key, PAIRS, USUAL), "schedule", 16)
        sigma = torch.tensor(np.array(timesteps)).repeat(2).reshape(rows) / 1000
        alpha = 1 - sigma
    else:
        timesteps = draw_timesteps(time_key, PAIRS, 1000)
        cumulative = torch.tensor(model.schedule.alphas_cumprod)[torch.tensor(np.array(timesteps))].repeat(2).float()
        alpha, sigma = cumulative.sqrt().reshape(rows), (1 - cumulative).sqrt().reshape(rows)
    clean = torch.tensor(np.concatenate([CLEAN[:, 0], CLEAN[:, 1]]))
    noisy = alpha * clean + sigma * noise
    target = {"flow": noise - clean, "epsilon": noise, "v": alpha * noise - sigma * clean}[schedule]
    timesteps = torch.tensor(np.array(timesteps)).repeat(2).reshape(rows)
    output = model.network(weight, noisy, timesteps, torch.sin, torch.tensor(CONDITIONS).repeat(2).reshape(rows))
    return (output - target).pow(2).mean(dim=[1, 2, 3])


def torch_loss(kind, beta, errors, before):
    """DiffusionDPO's loss, diffusers' IPO times (beta / 2)^2, Diffusion-KTO's."""
    if kind == "kto":
        g = before - errors
        level = g.mean().detach().clamp(min=0)
        signs = torch.tensor([1.0, -1.0]).repeat_interleave(PAIRS)
        return (1 - torch.sigmoid(signs * beta * (g - level))).mean()
    (w, loser), (ref_w, ref_l) = errors.chunk(2), before.chunk(2)
    model_diff, ref_diff = w - loser, ref_w - ref_l
    if kind == "ipo":
        beta_dpo = beta / 2
        return (beta_dpo**2 * ((ref_diff - model_diff) - 1 / (2 * beta_dpo)) ** 2).mean()
    return -functional.logsigmoid(-0.5 * beta * (model_diff - ref_diff)).mean()


@pytest.mark.parametrize("schedule", SCHEDULERS)
@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_losses_and_gradients_are_the_originals(schedule, kind, beta):
    """Near the reference, where sigmoids are not flat: loss within 1e-3 of its size (differences of errors cancel),
    gradient 1e-3 (1e-2 for KTO, whose terms cancel once more)."""
    loss, slope, metrics = found(schedule, kind, beta, BASE + 1e-3)
    weight = torch.tensor(BASE + 1e-3, requires_grad=True)
    errors, before = torch_errors(schedule, weight), torch_errors(schedule, BASE).detach()
    expected = torch_loss(kind, beta, errors, before)
    expected.backward()
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-3)
    np.testing.assert_allclose(slope, weight.grad, rtol=1e-2 if kind == "kto" else 2e-3)
    chosen, rejected = (part.mean().item() for part in errors.chunk(2))
    np.testing.assert_allclose([metrics["chosen_error"], metrics["rejected_error"]], [chosen, rejected], rtol=1e-5)
    gains = (before - errors).detach().chunk(2)
    assert metrics["accuracy"] == float(((gains[0] - gains[1]) > 0).float().mean())


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_losses_of_given_errors_are_the_originals_formulas(kind, beta):
    """Without the networks' rounding, which differences of errors magnify: loss within 1e-5, gradient by each error
    within 1e-5 of the largest."""
    errors, before = 1 + 1e-3 * np.random.default_rng(1).standard_normal((2, PAIRS, 2)).astype(np.float32)

    def stacked(pairs):
        return torch.tensor(np.concatenate([pairs[:, 0], pairs[:, 1]]))

    theirs = stacked(errors).requires_grad_()
    expected = torch_loss(kind, beta, theirs, stacked(before))
    expected.backward()
    mean = jax.jit(lambda errors: preference_losses(kind, beta, errors, before).mean())
    loss, slope = jax.value_and_grad(mean)(errors)
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-5)
    gradient = theirs.grad.numpy()
    np.testing.assert_allclose(np.concatenate([slope[:, 0], slope[:, 1]]), gradient, atol=1e-5 * np.abs(gradient).max())


@pytest.mark.parametrize("beta", [2000.0, 5000.0])
def test_the_loss_begins_at_log_two(beta):
    """At the reference's weights: log 2, an accuracy of one half (ties), and the gradient of beta / 4 times the gap."""
    loss, slope, metrics = found("epsilon", "dpo", beta, BASE)
    weight = torch.tensor(BASE, requires_grad=True)
    chosen, rejected = torch_errors("epsilon", weight).chunk(2)
    (beta / 4 * (chosen - rejected).mean()).backward()
    assert loss == pytest.approx(np.log(2), abs=1e-6) and metrics["accuracy"] == 0.5 and metrics["margin"] == 0
    np.testing.assert_allclose(slope, weight.grad, rtol=1e-3)


def test_pairs_without_a_preference_do_not_count():
    """Groups of equal rewards: the loss is that of the other pairs alone."""
    half = np.array([1, 0, 1, 0], np.float32)
    errors, before = np.random.default_rng(0).uniform(0.9, 1.1, (2, PAIRS, 2))
    every = preference_losses("dpo", 20.0, errors, before)
    loss, _, metrics = found("flow", "dpo", 20.0, WEIGHT, advantage=half)
    _, _, all_metrics = found("flow", "dpo", 20.0, WEIGHT)
    assert np.isfinite(loss) and metrics["chosen_error"] != all_metrics["chosen_error"]
    kto = preference_losses("kto", 20.0, errors, before, half)
    alone = preference_losses("kto", 20.0, errors[::2], before[::2])
    np.testing.assert_allclose(kto[::2], alone, rtol=1e-6)
    assert every.shape == (PAIRS,)


def test_online_pairs_are_the_best_and_the_worst_of_each_group():
    """Four groups of four: the pairs' conditions, advantages and images; a group of equal rewards has advantage 0."""
    rows = {
        "advantage": np.array([0, 3, 1, 2, 5, 5, 5, 5], np.float32),
        "clean": np.arange(8.0).reshape(8, 1, 1, 1),
        "cond": {"x": np.array([0.1] * 4 + [0.2] * 4)},
    }
    pairs = dpo_online.make_select(4)(rows)
    assert pairs["clean"].shape == (2, 2, 1, 1, 1) and pairs["clean"][0].ravel().tolist() == [1, 0]
    assert pairs["advantage"].tolist() == [3, 0] and pairs["cond"]["x"].tolist() == [0.1, 0.2]


@pytest.mark.parametrize("refresh", [0, 2])
def test_online_dpo_learns_from_its_own_images(refresh):
    """Steps of the real source: log 2 first; then the weights differ from the reference, which follows if asked for."""
    config = settings("dpo_online", num_steps=4, group_size=4, round_size=16, refresh_every=refresh)
    done = run("dpo_online", config, make_mesh(1, 1, jax.devices()[:1]), 4, steps=3)
    losses = [float(metrics["loss"]) for metrics in done.metrics]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-5) and abs(losses[1] - np.log(2)) > 1e-3
    assert (abs(losses[2] - np.log(2)) < 1e-5) == bool(refresh)
    assert set(done.method.copies) == ({"reference"} if refresh else set()) and done.method.reference != bool(refresh)


@pytest.mark.parametrize(
    ("method", "changes", "said"),
    [
        ("dpo", {"data.preferences": ""}, "config.data.preferences is empty"),
        ("dpo", {"method.loss": "dpoo"}, "did you mean 'dpo'"),
        ("dpo_online", {"method.rounds": 1}, "give 1 pairs per step, which do not divide .*config.batch_size=2"),
    ],
)
def test_settings_that_do_not_fit_are_refused(method, changes, said):
    config = default_config(method)
    given = {"model.path": "m", "eval.prompts": "e"}
    given |= {"data.preferences": "p"} if method == "dpo" else {"data.prompts": "p", "reward.path": "r"}
    given |= {"batch_size": 2, "method.round_size": 24, "method.rounds": 2} if method == "dpo_online" else {}
    config.update_from_flattened_dict(given)
    validate(config)
    config.update_from_flattened_dict(changes)
    with pytest.raises(ConfigError, match=said):
        validate(config)
