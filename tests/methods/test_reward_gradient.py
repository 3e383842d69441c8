"""Reward gradients against the same computation written in PyTorch, the probabilities of their draws, and refusals."""

import copy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.sharding import AbstractMesh
from refl_reference import (
    PROMPTS,
    TinyReward,
    TorchSampler,
    draw_step_noise,
    refl_batch,
    refl_function,
    saved_pair,
    torch,
    torch_embeds,
    torch_reward,
    unet_gradients,
)

pytest.importorskip("ml_collections")

from imagereward_jax.assembly.run import assemble
from imagereward_jax.config import ConfigError
from imagereward_jax.methods.reward_gradient import Config, draw_gradient, draw_spaced, image_loss, make_loss
from imagereward_jax.methods.reward_tuning import draw_stop
from imagereward_jax.planning.report import bytes_per_device
from imagereward_jax.recipes import recipe_beside, validate
from imagereward_jax.training.program import TrainingProgram
from imagereward_jax.weights import mapping

CONFIGS = Path(__file__).parents[2] / "configs"

STEPS, ROWS = 5, 2
VARIANTS = {
    "draft_1": {"gradient_steps": 1},
    "draft_3": {"gradient_steps": 3},
    "draft_3_plus": {
        **{"gradient_steps": 3, "loss": "distance", "target": 10.0, "scale": 0.1},
        **{"base_penalty": 0.7, "negative_gradient": False},
    },
    "full": {"gradient_steps": STEPS, "loss": "hinge", "target": 8.0},
    "draw_per_step": {"truncation": "per_step", "eta": 1.0},
    "drtune": {
        **{"truncation": "spaced", "gradient_steps": 2, "stop_min": 3},
        **{"negative_gradient": False, "unit_gradient": True},
    },
    "draft_lv": {"noisings": 2},
}
CHOSEN = {("draft_1", 1.0), ("draft_3_plus", 3.0), ("full", 1.0), ("draw_per_step", 3.0), ("drtune", 3.0)}
CHOSEN |= {("draft_lv", 1.0)}  # each variant and both kinds of guidance are covered; the others take long to compile
PAIRS = [(name, guidance) for name in VARIANTS for guidance in (1.0, 3.0) if (name, guidance) != ("draft_3_plus", 1.0)]


def method_config(**changes):
    """config.method for small images."""
    return Config(**{"num_steps": STEPS, "guidance_scale": 1.0, "height": 16, "width": 16, "target": 2.0, **changes})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(pipeline, params, a base UNet's params, diffusers' pipeline and base UNet with the same weights)."""
    pipeline, params, reference = saved_pair(tmp_path_factory.mktemp("model"))
    base = copy.deepcopy(reference.unet).requires_grad_(False)
    for weight in base.parameters():
        weight *= 0.9
    return pipeline, params, jax.tree.map(lambda x: np.float32(0.9) * x, params["unet"]), reference, base


def key_for(config):
    """A key of which a draw per step marks steps with a gap, so that it is not a truncation at one step."""
    for seed in range(3, 100):
        key = jax.random.key(seed)
        steps = draw_gradient(config, jax.random.split(key, 6)[1], jnp.full(ROWS, STEPS)).steps
        if steps is None or (1 < steps.sum() < STEPS and not np.all(np.diff(np.flatnonzero(steps)) == 1)):
            return key


def torch_gradient(made, reward, config, batch, key):
    """(loss, {key: gradient}), sample by sample and step by step."""
    pipeline, _, _, reference, base = made
    stop_key, steps_key, noise_key, sampler_key, copies_key, _ = jax.random.split(key, 6)
    shape = pipeline.latent_shape(config.height, config.width)
    early, stop = config.stop_min is not None, jnp.full(ROWS, STEPS)
    stop = draw_stop(stop_key, ROWS, config.stop_min, STEPS - 1) if early else stop
    gradient = draw_gradient(config, steps_key, stop)
    noise = np.asarray(jax.random.normal(noise_key, (ROWS, *shape)))
    copies = np.asarray(jax.random.normal(copies_key, (ROWS * config.noisings, *shape)))
    copies = copies.reshape(ROWS, config.noisings, *shape)
    step_noise = draw_step_noise(sampler_key, ROWS, STEPS, shape)
    rewards, deviations = [], []
    for row, embeds in enumerate(torch_embeds(reference, pipeline.tokenize, PROMPTS[:ROWS])):
        marked = range(STEPS - gradient.last, STEPS) if gradient.steps is None else np.flatnonzero(gradient.steps)
        marked = {int(step) for step in (marked if gradient.calls is None else gradient.calls[row])}
        sampler = TorchSampler(reference, "ddim", config, embeds, base=base if config.base_penalty else None)
        through_input = gradient.calls is None
        clean = sampler.clean(noise[row], step_noise[row], stop[row], marked.__contains__, through_input=through_input)
        every = [clean, *(sampler.noised_copy(clean, one) for one in copies[row])]
        rewards += [torch_reward(reference, reward, latents, batch, row) for latents in every]
        deviations += [torch.stack(sampler.deviations).mean()] if config.base_penalty else []
    difference = config.target - torch.cat(rewards)
    kinds = {"linear": difference, "distance": difference.abs(), "hinge": torch.relu(difference)}
    loss = kinds[config.loss].mean() * config.scale
    loss = loss + config.base_penalty * torch.stack(deviations).mean() if deviations else loss
    loss.backward()
    return loss.item(), unet_gradients(reference)


@pytest.mark.parametrize(
    ("name", "guidance"), [pytest.param(*pair, marks=() if pair in CHOSEN else pytest.mark.slow) for pair in PAIRS]
)
def test_loss_and_every_unet_gradient_agree_with_pytorch(made, name, guidance):
    """The loss and the whole gradient within 1e-5 relative, each tensor's within 1e-4 of its largest entry."""
    pipeline, params, base, _, _ = made
    config, reward = method_config(**VARIANTS[name], guidance_scale=guidance), TinyReward()
    batch, key = refl_batch(pipeline, params, reward, PROMPTS[:ROWS], guided=guidance > 1), key_for(config)
    compared = {"unet": base} if config.base_penalty else None
    loss = refl_function(pipeline, reward, config, "ddim", make_loss, compared)
    frozen = {"vae": params["vae"], "text_encoder": params["text_encoder"], "reward": reward.params}
    (value, metrics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        {"unet": params["unet"]}, frozen, batch, key
    )
    expected, theirs = torch_gradient(made, reward, config, batch, key)

    ours = mapping.to_torch(pipeline.networks["unet"], gradient["unet"])
    assert ours.keys() == theirs.keys()
    assert ("stop" in metrics) == (config.stop_min is not None)
    assert ("base_deviation" in metrics) == (config.base_penalty > 0)
    size = np.sqrt(sum(np.sum(np.square(one)) for one in theirs.values()))
    error = np.sqrt(sum(np.sum(np.square(ours[key] - one)) for key, one in theirs.items()))
    largest = max(np.abs(one).max() for one in theirs.values())  # some are zero but for rounding, as to_k's biases
    worst = max(np.abs(ours[key] - one).max() / (np.abs(one).max() + 1e-3 * largest) for key, one in theirs.items())
    print(f"loss {expected:.6g}, relative error {abs(value / expected - 1):.1e}")
    print(f"gradient {size:.3g}, relative error {error / size:.1e}, the worst tensor's {worst:.1e}")
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert size > 0 and error < 1e-5 * size
    assert worst < 1e-4


# Draws

KEYS = jax.random.split(jax.random.key(0), 4000)


def drawn(**changes):
    """[keys, steps] whether each step carries gradient, of 50 steps."""
    config = Config(**changes)
    return np.asarray(jax.vmap(lambda key: draw_gradient(config, key, jnp.full(2, 50)).steps)(KEYS))


def test_a_draw_per_step_marks_step_i_with_probability_i_plus_1_of_51():
    """Of 4,000 draws: each step's share within 4 standard deviations of TRL's, 25 of 50 expected, and independent."""
    steps = drawn(truncation="per_step")
    share = np.arange(1, 51) / 51
    assert (np.abs(steps.mean(0) - share) < 4 * np.sqrt(share * (1 - share) / len(KEYS))).all()
    np.testing.assert_allclose(steps.sum(1).mean(), 25, rtol=0.01)
    np.testing.assert_allclose(steps.sum(1).var(), (share * (1 - share)).sum(), rtol=0.1)
    narrow = drawn(truncation="per_step", truncate_min=10, truncate_max=19)
    assert not narrow[:, :10].any() and narrow[:, 19:].all()
    np.testing.assert_allclose(narrow[:, 10:19].mean(0), np.arange(1, 10) / 10, atol=0.04)


@pytest.mark.parametrize("truncation", ["uniform", "normal"])
def test_one_draw_truncates_at_one_step(truncation):
    """T in [1, 49], uniform, or as the whole part of N(42, 5) is, redrawn outside: within 4 standard deviations."""
    steps = drawn(truncation=truncation)
    assert (np.diff(steps.astype(int), axis=1) >= 0).all(), "all steps from T on"
    first = np.arange(1, 50)
    normal = np.diff(scipy.stats.norm(42, 5).cdf([*first, 50]))
    share = normal / normal.sum() if truncation == "normal" else np.full(49, 1 / 49)
    counts = np.bincount(50 - steps.sum(1), minlength=51)
    assert counts[0] == counts[50] == 0
    assert (np.abs(counts[1:50] / len(KEYS) - share) <= 4 * np.sqrt(share / len(KEYS)) + 1 / len(KEYS)).all()


def test_spaced_steps_start_anywhere_and_stay_below_the_stop():
    """Of 50 steps three are 16 apart and start at 0 to 17, of 31 they are 10 apart and start at 0 to 10; evenly."""
    total = jnp.array([50, 31, 3])
    calls = np.asarray(jax.vmap(lambda key: draw_spaced(key, total, 3))(KEYS))
    assert (np.diff(calls, axis=2) == np.array([16, 10, 1])[None, :, None]).all()
    for row, starts in enumerate((18, 11, 1)):
        counts = np.bincount(calls[:, row, 0])
        assert (
            len(counts) == starts and (np.abs(counts / len(KEYS) - 1 / starts) < 4 * np.sqrt(1 / starts / 4000)).all()
        )
    assert (calls < np.asarray(total)[None, :, None]).all()


def test_k_chooses_the_last_steps_and_an_early_stop_predicts():
    gradient = draw_gradient(Config(gradient_steps=3), KEYS[0], jnp.full(2, 50))
    assert (gradient.last, gradient.steps, gradient.calls, gradient.predict) == (3, None, None, False)
    gradient = draw_gradient(Config(truncation="spaced", gradient_steps=3, stop_min=30), KEYS[0], jnp.array([30, 49]))
    assert gradient.last == 0 and gradient.predict and gradient.calls.shape == (2, 3)
    assert gradient.calls[0].max() <= 30, "the stop itself may carry gradient, no later step"
    per_step = draw_gradient(Config(truncation="per_step", truncate_min=10), KEYS[0], jnp.full(2, 50))
    assert per_step.last == 40, "steps that never carry gradient store nothing"


def test_losses_by_hand():
    """Rewards 3 and -1 with target 2, twice: -1 and 3 linearly, 1 and 3 as distances, 0 and 3 as hinges."""
    rewards = jnp.array([3.0, -1.0])
    found = [image_loss(rewards, kind, target=2.0, scale=2.0) for kind in ("linear", "distance", "hinge")]
    np.testing.assert_allclose(found, [2.0, 4.0, 3.0], rtol=1e-6)


# Configs


def recipe(name="draft_tiny", **changes):
    config = recipe_beside(CONFIGS / f"{name}.py", name)
    config.update_from_flattened_dict({f"method.{field}": value for field, value in changes.items()})
    return config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gradient_steps": 11}, r"method\.gradient_steps=11: expected at most 10"),
        ({"gradient_steps": 0}, r"method\.gradient_steps=0: expected at least 1"),
        ({"gradient_steps": 2, "truncation": "uniform"}, "gradient_steps=2: expected at most 1 .truncation='uniform'"),
        ({"gradient_steps": 8, "truncation": "spaced", "stop_min": 6}, "gradient_steps=8: expected at most 7"),
        ({"stop_min": 10}, "stop_min=10: expected less than num_steps=10"),
        ({"truncate_min": 3}, "no effect with truncation='last'"),
        ({"truncation": "per_step", "truncate_max": 11}, r"truncate_max=11 must satisfy .* <= 10 "),
        ({"truncation": "uniform", "truncate_max": 10}, r"truncate_max=10 must satisfy .* <= 9 "),
        ({"truncation": "per_step", "truncate_min": 10}, "truncate_min=10.*truncate_min <= 9"),
        ({"truncation": "uniform", "truncate_min": 5, "truncate_max": 4}, "truncate_min=5, truncate_max=4"),
        ({"truncation": "normal"}, "truncate_mean=42.0: expected a step from truncate_min=1 to truncate_max=9"),
        ({"truncation": "first"}, "expected one of last, spaced, per_step, uniform, normal"),
        ({"pretrain": "add"}, "config.data.pairs is empty"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_compiles(changes, message):
    with pytest.raises(ConfigError, match=message):
        validate(recipe(**changes))


def test_a_plan_has_the_loops_steps_and_the_base_model():
    """Over shapes: steps without gradient are the loop's trips, and a penalty holds the UNet once more."""
    runs, held, mesh = {}, {}, AbstractMesh((1, 1), ("data", "fsdp"))
    for name, changes in {
        "last": {"gradient_steps": 3},
        "penalty": {"truncation": "per_step", "truncate_min": 2, "base_penalty": 0.5, "pretrain": "alternate"},
    }.items():
        config = recipe(**changes)
        config.data.pairs = "shapes:train"
        runs[name] = assemble(config, mesh, abstract=True)
        held[name] = bytes_per_device(runs[name], TrainingProgram(config, runs[name], mesh))
    phases = {name: [phase.name for phase in run.method.phases] for name, run in runs.items()}
    assert phases == {"last": ["reward_gradient"], "penalty": ["reward_gradient", "denoising"]}
    assert {name: run.method.loop_trips for name, run in runs.items()} == {"last": 7, "penalty": 2}
    assert held["penalty"]["frozen"] - held["last"]["frozen"] == held["last"]["parameters"]
