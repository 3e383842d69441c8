"""GRPO against the formulas of the originals in PyTorch: steps, log-probabilities, advantages, losses, gradients."""

import json
import math
import socket
import subprocess
import sys
from pathlib import Path

import child
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_flow import SD3, ToyFlow
from toy_groups import WEIGHT, brightness, run, settings

from imagereward_jax.config import ConfigError
from imagereward_jax.diffusion.sampler import SamplerState, log_prob, negative_distance
from imagereward_jax.diffusion.samplers import make_sampler
from imagereward_jax.methods.advantages import GroupAdvantages, Scored, keep_extremes
from imagereward_jax.methods.base import STEPS, Models
from imagereward_jax.methods.flow_grpo import guarded, make_penalty
from imagereward_jax.methods.policy_gradient import (
    Window,
    make_choose,
    make_loss,
    make_sample,
    make_tables,
)
from imagereward_jax.recipes import default_config, reward_term, validate
from imagereward_jax.rewards.mixed import Term, Terms
from imagereward_jax.training.mesh import make_mesh

torch = pytest.importorskip("torch", reason="the reference is PyTorch")
diffusers = pytest.importorskip("diffusers", reason="the reference is PyTorch diffusers")

PIPELINE, ROWS = ToyFlow(), 3
CONDITIONS = np.array([0.1, -0.4, 0.7], np.float32)
ADVANTAGES = np.array([1.5, -0.5, -1.0], np.float32)
SAMPLERS = {"flow_sde": 0.7, "dance_sde": 0.3, "cps": 0.8}  # with the noise levels of their papers


def one_device():
    return make_mesh(1, 1, jax.devices()[:1])


# the originals' steps


def torch_step(name, level, sigmas, step, x, v):
    """(mean, std) as flow_grpo's sde_step_with_logprob, DanceGRPO's flux_step and CPS's have them."""
    sigma, following = sigmas[step], sigmas[step + 1]
    dt = following - sigma
    if name == "flow_sde":
        std_dev_t = torch.sqrt(sigma / (1 - torch.where(sigma == 1, sigmas[1], sigma))) * level
        mean = x * (1 + std_dev_t**2 / (2 * sigma) * dt) + v * (1 + std_dev_t**2 * (1 - sigma) / (2 * sigma)) * dt
        return mean, std_dev_t * torch.sqrt(-dt)
    if name == "dance_sde":
        original = x - sigma * v
        score = -(x - original * (1 - sigma)) / sigma**2
        return x + dt * v + -0.5 * level**2 * score * dt, level * torch.sqrt(-dt)
    std = following * math.sin(level * math.pi / 2)
    original, noise = x - sigma * v, x + v * (1 - sigma)
    return original * (1 - following) + noise * torch.sqrt(following**2 - std**2), std


def torch_log_prob(name, following, mean, std):
    squares = (following.detach() - mean) ** 2
    if name != "cps":
        squares = squares / (2 * std**2) + torch.log(std) + math.log(math.sqrt(2 * math.pi))
    return -squares.mean(dim=tuple(range(1, squares.ndim)))


def torch_sigmas(num_steps):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(SD3)
    scheduler.set_timesteps(num_steps)
    return scheduler.sigmas


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("num_steps", [2, 10])
def test_steps_and_log_probabilities_are_the_originals(name, num_steps):
    """Mean and standard deviation of every step, the log-probability of all that add noise: 1e-5."""
    sampler, sigmas = make_sampler(name, SD3, num_steps, SAMPLERS[name]), torch_sigmas(num_steps)
    rng = np.random.default_rng(0)
    x, v, z = rng.standard_normal((3, ROWS, 8, 8, 4)).astype(np.float32)
    for step in range(num_steps):
        found = sampler.transition(SamplerState(x, 0 * x), jnp.asarray(v), np.int32(step))
        mean, std = torch_step(name, SAMPLERS[name], sigmas, step, torch.tensor(x), torch.tensor(v))
        np.testing.assert_allclose(found.mean, mean, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found.std, std, rtol=1e-5, atol=1e-7)
        if step < num_steps - 1:
            following = mean + std * torch.tensor(z)
            density = negative_distance if name == "cps" else log_prob
            expected = torch_log_prob(name, following, mean, std)
            np.testing.assert_allclose(density(found, following.numpy()), expected, rtol=1e-5, atol=1e-5)


def test_the_noise_levels_of_flow_grpo_are_those_of_its_code():
    """Level 0.7 and 10 steps of diffusers' schedule, to the printed digits; the last step's std is 0.006."""
    sampler = make_sampler("flow_sde", SD3, 10, 0.7)
    ways = sampler.sigma - np.append(sampler.sigma[1:], 0)
    expected = [3.51, 3.44, 2.27, 1.72, 1.36, 1.09, 0.861, 0.652, 0.434, 0.066]
    np.testing.assert_allclose(sampler.weights.random / np.sqrt(ways), expected, rtol=1e-2)
    np.testing.assert_allclose(sampler.weights.random[-1], 0.006, atol=3e-4)


@pytest.mark.parametrize("name", SAMPLERS)
def test_without_noise_every_sampler_is_eulers(name):
    euler, other = make_sampler("euler", SD3, 7), make_sampler(name, SD3, 7, 0.0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), euler.weights, other.weights)


@pytest.mark.parametrize(
    ("name", "eta", "said"), [("cps", 1.2, r"in \[0, 1\] for cps"), ("dance_sde", -0.1, "least 0")]
)
def test_noise_that_cannot_be_is_refused(name, eta, said):
    with pytest.raises(ValueError, match=said):
        make_sampler(name, SD3, 4, eta)


# the loss


def sampled(config, means=False):
    """(tables, rows that the compiled program samples)."""
    tables, batch = make_tables(config, PIPELINE), {"cond": {"x": CONDITIONS}, "training_step": np.zeros(ROWS, int)}
    sample = jax.jit(make_sample(config, PIPELINE, means=means))
    _, rows = sample(Models({"toy": jnp.float32(WEIGHT)}, tables=tables), batch, jax.random.key(3))
    return tables, jax.device_get(rows)


CASES = {
    "flow_sde": {"eta": 0.7},
    "dance_sde": {"sampler": "dance_sde", "eta": 0.3},
    "cps": {"sampler": "cps", "eta": 0.8},
    "guard": {"eta": 0.7, "guard": True},
    "kl_rate": {"eta": 0.7, "penalty_weight": 0.04},
    "kl": {"eta": 0.7, "penalty": "kl", "penalty_weight": 0.1},
    "fast": {"eta": 0.7, "window_size": 2, "window_high": 4, "window_move": "random"},
}


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_the_originals(case):
    """Of all trained steps of three samples, at weights that have moved: loss 1e-5, gradient 1e-3; ratios are clipped
    on some steps and not on others. At the weights that sampled ratios are 1 within 1e-6."""
    config = settings("flow_grpo", num_steps=6, clip_range=2e-4, **CASES[case])
    tables, rows = sampled(config, means=config.guard)
    batch = make_choose(config.window.size, config.trained_steps)(rows, np.random.default_rng(0))
    extras = {"log_ratio": guarded} if config.guard else {}
    extras |= {"penalty": make_penalty(config)} if config.penalty_weight else {}
    loss = make_loss(config, PIPELINE, **extras)
    common = {"cond": batch["cond"], "advantage": ADVANTAGES, "update": np.zeros(ROWS, np.int32)}

    @jax.jit
    def value(weight, part):
        models = Models({"toy": weight}, {"toy": jnp.float32(WEIGHT)}, tables=tables.noisy)
        return jax.value_and_grad(lambda w: loss(models._replace(policy={"toy": w}), part, None), has_aux=True)(weight)

    moved, clipped, sigmas = WEIGHT + 0.02, [], torch_sigmas(config.num_steps)
    for column in range(config.trained_steps):
        part = {**common, **{name: array[:, column] for name, array in batch[STEPS].items()}}
        _, metrics = value(WEIGHT, part)[0]
        assert metrics["ratio_error"].value < 1e-6
        (found, _), slope = value(moved, part)
        weight = torch.tensor(moved, requires_grad=True)
        expected, ratios = torch_loss(config, sigmas, weight, part)
        expected.backward()
        np.testing.assert_allclose(found, expected.item(), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(slope, weight.grad, rtol=1e-3, atol=1e-5)
        clipped += (np.abs(ratios - 1) > config.clip_range).tolist()
    assert 0 < np.mean(clipped) < 1


def torch_loss(config, sigmas, weight, part):
    """(flow_grpo's loss of one step of each sample, ratios)."""
    losses, ratios = [], []
    for row in range(ROWS):
        step = int(part["step"][row])
        x, following = (torch.tensor(part[name][row])[None] for name in ("latents", "following"))
        timestep, condition = 1000 * float(sigmas[step]), float(CONDITIONS[row])
        x_of = [PIPELINE.network(w, x, timestep, torch.sin, condition) for w in (weight, torch.tensor(WEIGHT))]
        (mean, std), (base, _) = (torch_step(config.sampler, config.eta, sigmas, step, x, v) for v in x_of)
        change = torch_log_prob(config.sampler, following, mean, std) - torch.tensor(part["log_prob"][row])
        length = sigmas[step] - sigmas[step + 1]
        if config.guard:
            change = (change + ((mean - base) ** 2).mean() / (2 * std**2)) * std
        ratio, advantage = torch.exp(change), float(ADVANTAGES[row])
        limits = 1 - config.clip_range, 1 + config.clip_range
        loss = torch.maximum(-advantage * ratio, -advantage * torch.clamp(ratio, *limits))
        loss = loss / length if config.guard else loss
        if config.penalty_weight:
            distance = ((mean - base) ** 2).mean() / (2 * std**2)
            loss = loss + config.penalty_weight * distance * (length if config.penalty == "kl_rate" else 1.0)
        losses.append(loss.mean())
        ratios.append(ratio.item())
    return torch.stack(losses).mean(), np.array(ratios)


# windows


def test_steps_outside_the_window_add_no_noise():
    """A random window of 2 of the first 4 steps: elsewhere the next state is Euler's, inside it is not."""
    config = settings("flow_grpo", num_steps=6, **CASES["fast"])
    _, rows = sampled(config)
    start = int(rows["start"][0])
    assert 0 <= start <= 2 and set(rows["start"]) == {start}
    euler = make_sampler("euler", SD3, 6)
    for step in range(6):
        x, following = rows[STEPS]["latents"][:, step], rows[STEPS]["following"][:, step]
        timestep = euler.timesteps[step]
        v = PIPELINE.denoise({"toy": WEIGHT}, x, np.full(ROWS, timestep), {"x": CONDITIONS})
        plain = euler.step(SamplerState(x, 0 * x), v, np.int32(step)).latents
        error = np.abs(following - plain).max()
        assert (error > 1e-2) == (start <= step < start + 2) and (error > 1e-2 or error < 1e-5)
    order = make_choose(2, 2)(rows, np.random.default_rng(0))[STEPS]["step"]
    assert {tuple(sorted(row)) for row in order.tolist()} == {(start, start + 1)}


def test_windows_slide_from_noisy_to_clean_and_begin_again():
    window = Window(4, 1, 9, "slide", 25)
    starts = [int(window.start(lambda step=step: step, None)) for step in (0, 24, 25, 100, 124, 125)]
    assert starts == [1, 1, 2, 5, 5, 1]
    drawn = {int(Window(2, 1, 5, "random").start(None, jax.random.key(i))) for i in range(40)}
    assert drawn == {1, 2, 3}


# advantages


def reference_advantages(rewards, prompts, global_std):
    """flow_grpo's PerPromptStatTracker."""
    found = np.empty(len(rewards))
    for prompt in set(prompts):
        rows = np.array([other == prompt for other in prompts])
        std = np.std(rewards if global_std else rewards[rows]) + 1e-4
        found[rows] = (rewards[rows] - np.mean(rewards[rows])) / std
    return found


def test_advantages_are_those_of_the_papers():
    """Flow-GRPO's of whole step and of group; DanceGRPO's sample deviation; the bound; NaN counts nowhere. 1e-6."""
    rng = np.random.default_rng(0)
    rewards, groups = rng.normal(size=12).astype(np.float32), np.repeat(np.arange(3), 4)
    scored = Scored(["same"] * 12, rewards, groups)
    exact = rewards.astype(np.float64)
    for std in ("step", "group"):
        expected = reference_advantages(exact, groups.tolist(), std == "step")
        np.testing.assert_allclose(GroupAdvantages(clip=9.0, std=std)(scored), expected, rtol=1e-6, atol=1e-6)
    dance = [(row - row.mean()) / (torch.tensor(row).std().item() + 1e-8) for row in exact.reshape(3, 4)]
    assign = GroupAdvantages(clip=9.0, std="group", sample=True, epsilon=1e-8)
    np.testing.assert_allclose(assign(scored), np.concatenate(dance), rtol=1e-6)
    assert np.abs(GroupAdvantages(clip=0.5)(scored)).max() == 0.5
    broken = np.where(np.arange(12) == 5, np.nan, rewards).astype(np.float32)
    others = np.delete(np.arange(12), 5)
    found = GroupAdvantages(clip=9.0, std="group")(scored._replace(rewards=broken))
    expected = reference_advantages(exact[others], groups[others].tolist(), False)
    assert found[5] == 0
    np.testing.assert_allclose(found[others], expected, rtol=1e-6)
    equal = GroupAdvantages(clip=9.0, std="group")(scored._replace(rewards=np.ones(12)))
    np.testing.assert_allclose(equal, 0, atol=1e-6)


def test_several_rewards_count_alike_whatever_their_scales():
    """MixGRPO: each is compared in its group, weights multiply, a negative one turns it round. GDPO then normalises."""
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 8))
    groups = np.repeat([0, 1], 4)
    terms = {"a": (1.0, first), "b": (-2.0, -2.0 * 1000 * second)}
    scored = Scored(["p"] * 8, first - 2000 * second, groups, terms)
    each = [reference_advantages(values, groups.tolist(), False) for values in (first, second)]
    expected = each[0] - 2 * each[1]
    found = GroupAdvantages(clip=9.0, std="group", combine="advantages")(scored)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)  # the epsilon of 1e-4 is not scaled
    gdpo = GroupAdvantages(clip=9.0, std="group", combine="gdpo")(scored)
    np.testing.assert_allclose(gdpo, (found - found.mean()) / (found.std() + 1e-4), rtol=1e-5, atol=1e-5)
    summed = GroupAdvantages(clip=9.0, std="group")(scored)
    assert np.corrcoef(summed, each[1])[0, 1] < -0.99 < np.corrcoef(found, each[1])[0, 1]


def test_the_best_and_the_worst_of_a_group_are_kept():
    advantages = [3, 1, 2, 0, 5, 5, 7, 6]
    assert keep_extremes(advantages, 4, 2).tolist() == [3, 0, 4, 6]
    assert keep_extremes(advantages, 4, 4).tolist() == [3, 1, 2, 0, 4, 5, 7, 6]


# steps of the source


def test_groups_lie_together_and_may_span_rounds():
    """Groups of 8 over two rounds of 4: one prompt each, advantages of mean 0; best-of-4 trains on half of them."""
    config = settings("flow_grpo", group_size=8, round_size=4, rounds=4, keep=4)
    done = run("flow_grpo", config, one_device(), 4)
    samples = done.source.samples
    prompts = np.array(samples.prompts).reshape(2, 8)
    assert all(len(set(row)) == 1 for row in prompts) and len(set(prompts[:, 0])) == 2
    rewards = samples.rewards.reshape(2, 8)
    advantages = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std() + 1e-4)
    kept = np.concatenate([np.sort(row)[[0, 1, 6, 7]] for row in advantages])
    trained = np.concatenate([batch["advantage"] for batch in done.batches[0]])
    assert done.source.updates == 2 and len(done.metrics) == 2
    np.testing.assert_allclose(np.sort(trained), np.sort(kept), rtol=1e-4, atol=1e-5)


def test_a_group_begins_at_the_same_noise_if_asked_for():
    """All images of a group from one noise, other groups from others; by default every image from its own."""
    for same in (False, True):
        done = run("flow_grpo", settings("flow_grpo", same_noise=same, rounds=1), one_device(), 8)
        (batch,) = done.batches[0]
        first = batch[STEPS]["latents"][np.arange(8), batch[STEPS]["step"].argmin(1)]
        assert len({row.tobytes() for row in first}) == (2 if same else 8)


def test_the_reference_is_where_training_began():
    """The penalty is 0 at the start and grows as the weights move away."""
    config = settings("flow_grpo", penalty_weight=0.04, rounds=1)
    done = run("flow_grpo", config, one_device(), 8, steps=3)
    penalties = [float(metrics["penalty"]) for metrics in done.metrics]
    assert done.method.reference and penalties[0] == 0 < penalties[1] < penalties[2]


def test_rewards_of_a_mixture_reach_the_advantages():
    terms = Terms({"a": Term(brightness), "b": Term(lambda images, prompts: images[:, 0, 0, 0] * 100.0, weight=0.5)})
    config = settings("flow_grpo", combine="advantages", advantage_std="group", rounds=1)
    done = run("flow_grpo", config, one_device(), 8, terms=terms)
    (batch,) = done.batches[0]
    assert np.isfinite(batch["advantage"]).all() and np.abs(batch["advantage"]).max() > 0.1


def on_devices(name, *, processes=1):
    """The script's step, on eight virtual devices."""
    root, script = Path(__file__).parents[2], [sys.executable, str(Path(__file__).with_name("toy_groups.py")), name]
    environment = {**child.environment(8), "PYTHONPATH": str(root)}
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            environment["PORT"] = str(free.getsockname()[1])
        script = [str(root / "launch/local.sh"), str(processes), str(8 // processes), *script]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(next(line for line in done.stdout.splitlines() if "{" in line).removeprefix("[0] "))


@pytest.mark.parametrize("name", ["flow_grpo", "awm"])
def test_eight_devices_make_the_update_of_one(name):
    """Ratios are 1 before the first update, 1e-6, on both; loss and gradient agree within 1e-5."""
    ours, many = run(name, settings(name), one_device(), 16), on_devices(name)
    (metrics,) = ours.metrics
    assert metrics["ratio_error"].value < 1e-6 and many["ratio_error"] < 1e-6
    np.testing.assert_allclose(many["everyone"][0]["rewards"], ours.source.samples.rewards, atol=1e-6)
    for key in ("loss", "grad_norm"):
        np.testing.assert_allclose(many[key], metrics[key], rtol=1e-5, atol=1e-6)


def test_groups_are_whole_in_each_of_two_processes():
    """Each has two groups of one prompt; their advantages are those of all four groups together."""
    everyone = on_devices("flow_grpo", processes=2)["everyone"]
    assert len(everyone) == 2
    rewards = np.array([each["rewards"] for each in everyone]).reshape(4, 4)
    advantages = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std() + 1e-4)
    for index, each in enumerate(everyone):
        prompts = np.array(each["prompts"]).reshape(2, 4)
        assert all(len(set(row)) == 1 for row in prompts)
        np.testing.assert_allclose(
            np.sort(each["advantage"]), np.sort(advantages[2 * index : 2 * index + 2].ravel()), rtol=1e-4, atol=1e-5
        )
    assert len({prompt for each in everyone for prompt in each["prompts"]}) == 4


# settings


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method.group_size": 5}, "group_size=5 does not divide the 48 samples of a step .rounds=2 x round_size=24."),
        ({"method.window_size": 8, "method.window_high": 5}, r"window_size=8 steps does not lie in \[window_low=0, "),
        ({"method.window_high": 10}, "among the 9 steps of flow_sde that can train"),
        ({"method.window_move": "slide"}, "a window of 9 steps cannot move"),
        ({"method.keep": 3}, "keep=3: expected an even number of at most group_size=24"),
        ({"method.guard": True, "method.sampler": "cps"}, "guard is for sampler='flow_sde', not for 'cps'"),
        ({"method.sampler": "ddim", "method.penalty_weight": 0.1}, "penalty='kl_rate' is for flows"),
        ({"method.combine": "gdpo"}, "advantage_std=group"),
        ({"method.combine": "gdpo", "method.advantage_std": "group"}, "is for several rewards"),
        ({"method.same_noise": True, "method.round_size": 12, "method.rounds": 4}, "same_noise needs whole groups"),
        ({"method.num_steps": 1, "method.sampler": "dance_sde"}, "num_steps=1: the last step of dance_sde does not"),
        ({"method.sampler": "flow_sd"}, "did you mean 'flow_sde'"),
        ({"batch_size": 18}, "48 samples per step, which do not divide into updates of config.batch_size=18"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, said):
    config = default_config("flow_grpo")
    given = {"model.path": "m", "data.prompts": "p", "eval.prompts": "e", "reward.path": "jpeg-compressibility"}
    config.update_from_flattened_dict({**given, "batch_size": 24, "method.rounds": 2, "method.round_size": 24})
    validate(config)
    config.update_from_flattened_dict(changes)
    with pytest.raises(ConfigError, match=said):
        validate(config)


def test_several_rewards_need_a_mixture():
    config = default_config("flow_grpo")
    config.update_from_flattened_dict({"model.path": "m", "data.prompts": "p", "eval.prompts": "e", "batch_size": 24})
    config.reward.terms = {name: reward_term("jpeg-compressibility") for name in "ab"}
    config.method.update({"combine": "gdpo", "advantage_std": "group"})
    validate(config)


@pytest.mark.parametrize(("eta", "said"), [(0.0, "eta=0 .*adds no noise.*need eta above 0"), (-1.0, "at least 0")])
def test_a_flow_without_noise_is_refused(eta, said):
    with pytest.raises(ConfigError, match=said):
        make_tables(settings("flow_grpo", eta=eta), PIPELINE)
