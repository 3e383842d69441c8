"""The on-policy source: rounds, rewards, advantages, minibatches; and runs of the loop that are interrupted in them."""

import functools
import json
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("grain")

import child
from toy import train
from toy_policy import PROMPTS, Brightness, assemble_policy, make_explore, one_term, policy_config

from imagereward_jax.methods.base import Models
from imagereward_jax.rewards.errors import RewardError
from imagereward_jax.rewards.functions import PythonReward, jax_reward
from imagereward_jax.rewards.mixed import Term, Terms
from imagereward_jax.training.interruptions import Interrupted
from imagereward_jax.training.mesh import make_mesh
from imagereward_jax.training.metric_writers import read_rows


def one_device():
    return make_mesh(1, 1, jax.devices()[:1])


def models():
    return Models({"net": {"w": np.array([0.3, -0.2], np.float32)}})


def a_step(source, seed=0):
    return [batch for batch in source.batches(models(), jax.random.key(seed)) if batch is not None]


# the source


def test_a_step_goes_through_all_samples_in_every_epoch():
    """Two rounds of 4, three epochs in minibatches of 2: 12 updates. Each epoch has every sample once, in an order of
    its own; what a sample is trained with is what it was drawn and scored with; shapes are those of the spec."""
    source = make_explore(one_device(), one_term(Brightness()), batch_size=2, epochs=3)
    batches = a_step(source)
    assert len(batches) == source.updates == 12 and [batch["update"][0] for batch in batches] == list(range(12))
    epochs = [np.concatenate([batch["x"] for batch in batches[start : start + 4]]) for start in (0, 4, 8)]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch, axis=0), np.sort(epochs[0], axis=0))
    assert len({epoch.tobytes() for epoch in epochs}) == 3
    rows = {name: np.concatenate([batch[name] for batch in batches[:4]]) for name in ("x", "length", "advantage")}
    rewards = np.round(255 / (1 + np.exp(-rows["x"].sum(-1)))) / 255 - 0.1 * rows["length"]
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    for length in (1, 2, 3):
        own = rows["length"] == length
        if own.sum() >= 3:
            advantages[own] = (rewards[own] - rewards[own].mean()) / (rewards[own].std() + 1e-6)
    np.testing.assert_allclose(rows["advantage"], np.clip(advantages, -2, 2), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(source.metrics["reward"], rewards.mean(), rtol=1e-5)
    np.testing.assert_allclose(source.metrics["reward_std"], rewards.std(), rtol=1e-5)
    spec = {name: (shape.shape, shape.dtype) for name, shape in source.spec().items()}
    assert spec == {name: (array.shape, array.dtype) for name, array in batches[0].items()}


def test_a_step_follows_from_its_key_and_state_alone():
    """Another key draws other samples; a source that resumes from the state after one step repeats the second."""
    first, second = (make_explore(one_device(), one_term(Brightness())) for _ in range(2))
    a_step(first)
    state = json.loads(json.dumps(first.get_state()))
    assert set(state) == {"prompts", "advantages", "explored"} and set(state["advantages"]) == set(PROMPTS)
    expected = a_step(first, seed=1)
    second.set_state(state)
    jax.tree.map(np.testing.assert_array_equal, a_step(second, seed=1), expected)
    second.set_state(state)
    assert not np.array_equal(a_step(second, seed=2)[0]["x"], expected[0]["x"])


def test_networks_and_functions_score_together():
    """A mixture of a network inside the program and a function on the host: weights, and each term's own mean."""

    class Network:
        params, differentiable = {"gain": np.float32(3.0)}, True

        def apply(self, params, images, tokens):
            return params["gain"] * images.mean((1, 2, 3)) + tokens

    terms = Terms({"network": Term(Network(), weight=0.5), "function": Term(Brightness(), weight=2.0)}, {})
    source, seen = make_explore(one_device(), terms, rounds=1, epochs=1), []
    asked = source.prompts.batches

    def with_tokens(models, key):
        for batch in asked(models, key):
            seen.append(batch["length"])
            yield {**batch, "reward": {"network": batch["length"]}}

    source.prompts.batches = with_tokens
    with_weights = models()._replace(policy={**models().policy, "reward": {"network": Network.params}})
    batches = [batch for batch in source.batches(with_weights, jax.random.key(0)) if batch is not None]
    bright = 1 / (1 + np.exp(-batches[0]["x"].sum(-1)))
    network = (3 * bright + batches[0]["length"]).mean()
    function = (np.round(255 * bright) / 255 - 0.1 * batches[0]["length"]).mean()
    assert len(seen) == 1 and len(batches) == 1
    expected = {"reward": 0.5 * network + 2 * function, "reward_network": network, "reward_function": function}
    for name, value in expected.items():
        np.testing.assert_allclose(source.metrics[name], value, rtol=1e-5, err_msg=name)


def test_functions_score_a_round_while_the_next_is_sampled():
    """The function waits, in its thread, until the next round's prompts are taken: the two overlap, or it times out."""
    taken = [threading.Event() for _ in range(3)]
    scored = iter(range(3))

    def patient(images, prompts):
        number = next(scored)
        assert number == 2 or taken[number + 1].wait(20), "the next round began only after this one was scored"
        return np.arange(len(images))

    source = make_explore(one_device(), one_term(PythonReward(patient)), rounds=3)
    asked = source.prompts.batches

    def watched(models, key):
        for number, batch in enumerate(asked(models, key)):
            taken[number].set()
            yield batch

    source.prompts.batches = watched
    assert len(a_step(source)) == source.updates


def fails(images, prompts):
    raise KeyError("no such prompt")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (fails, r"the reward failed: KeyError: 'no such prompt' \(test_explore.py, line \d+\)$"),
        (lambda images, prompts: [1.0], r"the reward returned scores of shape \(1,\) and .* for 4 images"),
        (
            lambda images, prompts: ["good"] * 4,
            "the reward returned scores .* type <U4 .*expected one number per image",
        ),
        (lambda images, prompts: None, "the reward returned scores .* type object"),
        (lambda images, prompts: {"sharp": [1.0]}, r"the reward returned scores 'sharp' of shape \(1,\)"),
        (lambda images, prompts: [0, 1, 2, np.inf], "the reward returned inf for image 3 of 4, of the prompt '[abc]+'"),
        (lambda images, prompts: np.full(4, np.nan), "none of 8 scores is a finite number"),
    ],
)
def test_a_reward_that_gives_no_scores_ends_the_run_with_its_name(function, message):
    terms = Terms(
        {"good": Term(Brightness()), "mine": Term(PythonReward(function))}, {"mine": "config.reward.path='m:f'"}
    )
    with pytest.raises(RewardError, match="config.reward.path='m:f': " + message):
        a_step(make_explore(one_device(), terms))


def test_samples_are_kept_if_asked_for():
    """All of the step's, as the function saw them, with the rewards that it gave and what came with their prompts."""
    seen = []

    def score(images, prompts, metadata):
        seen.append((images, prompts, metadata))
        return Brightness().score_arrays(images, prompts)

    source = make_explore(one_device(), one_term(score), keep_samples=True)
    a_step(source)
    images, prompts, metadata, rewards, held_out = source.samples
    np.testing.assert_allclose(images, np.concatenate([call[0] for call in seen]) / 255, rtol=1e-6)
    assert prompts == [prompt for call in seen for prompt in call[1]] and not held_out
    assert metadata == [{"length": len(prompt)} for prompt in prompts]
    np.testing.assert_allclose(rewards, np.concatenate([score(*call) for call in list(seen)]), rtol=1e-6)
    other = make_explore(one_device(), one_term(Brightness()))
    a_step(other)
    assert other.samples is None


def test_a_score_that_is_missing_is_no_verdict():
    """Of a few NaNs the advantage is 0, and the others are compared among themselves."""

    def some(images, prompts):
        return np.array([np.nan, 1.0, 2.0, 3.0])

    source = make_explore(one_device(), one_term(PythonReward(some)), rounds=1, epochs=1)
    advantages = np.sort(a_step(source)[0]["advantage"])
    np.testing.assert_allclose(advantages, [-1.224743, 0, 0, 1.224743], atol=1e-5)
    assert source.metrics["reward"] == 2.0 and source.metrics["reward_no_verdict"] == 1.0


def test_an_image_without_a_verdict_of_one_reward_has_none_of_the_mixture():
    def some(images, prompts):
        return np.array([np.nan, 1.0, 2.0, 3.0])

    terms = Terms({"a": Term(some), "b": Term(lambda images, prompts: np.array([50.0, 3.0, 2.0, 1.0]), weight=2)}, {})
    source = make_explore(one_device(), terms, rounds=1, epochs=1)
    advantages = np.sort(a_step(source)[0]["advantage"])
    np.testing.assert_allclose(advantages, [-1.224743, 0, 0, 1.224743], atol=1e-5)
    expected = {"reward": 6.0, "reward_a": 2.0, "reward_b": 14.0, "reward_no_verdict": 1.0}
    assert {name: source.metrics[name] for name in expected} == expected


def test_named_scores_of_a_function_are_summed_and_each_is_a_metric():
    """Of a reward alone by their names, of a term as TERM.NAME; the names are the same at every call."""

    def named(images, prompts):
        return {"bright": images.mean((1, 2, 3)) / 255, "short": [-float(len(prompt)) for prompt in prompts]}

    for terms, prefix in ((one_term(PythonReward(named)), ""), (Terms({"mine": Term(named)}, {}), "mine.")):
        source = make_explore(one_device(), terms, epochs=1)
        rows = [np.concatenate([batch[name] for batch in a_step(source)]) for name in ("x", "length")]
        bright, short = (np.round(255 / (1 + np.exp(-rows[0].sum(-1)))) / 255).mean(), -rows[1].mean()
        expected = {"reward": bright + short, f"reward_{prefix}bright": bright, f"reward_{prefix}short": short}
        for name, value in expected.items():
            np.testing.assert_allclose(source.metrics[name], value, rtol=1e-5, err_msg=name)
    names = iter([{"a": 1}, {"b": 1}])
    odd = one_term(PythonReward(lambda images, prompts: {next(iter(next(names))): np.arange(4.0)}))
    with pytest.raises(RewardError, match="the scores a, b were returned for one batch and not for another"):
        a_step(make_explore(one_device(), odd))
    std = one_term(PythonReward(lambda images, prompts: {"std": np.arange(4.0)}))
    with pytest.raises(RewardError, match="scores named std would be logged as the reward's"):
        a_step(make_explore(one_device(), std))


def test_a_function_is_given_the_metadata_of_its_prompts():
    """Each prompt's own, in the order of the images; with a function that takes none beside it."""

    def weighed(images, prompts, metadata):
        assert [row["of"] for row in metadata] == prompts
        return [float(row["weight"]) for row in metadata]

    terms = Terms({"weighed": Term(weighed), "plain": Term(lambda images, prompts: np.zeros(len(images)))}, {})
    source = make_explore(one_device(), terms, epochs=1)
    asked = source.prompts.batches

    def with_metadata(models, key):
        for batch in asked(models, key):
            prompts = batch["host"]["prompt"]
            rows = [{"of": prompt, "weight": 10 * len(prompt)} for prompt in prompts]
            yield {**batch, "host": {"prompt": prompts, "metadata": rows}}

    source.prompts.batches = with_metadata
    lengths = np.concatenate([batch["length"] for batch in a_step(source)])
    np.testing.assert_allclose(source.metrics["reward_weighed"], 10 * lengths.mean(), rtol=1e-6)


def test_jax_functions_score_inside_the_program_beside_python_functions():
    """A jax function sees floating-point images that are not rounded, and its prompts; a Python function uint8."""
    seen = []

    def on_the_host(images, prompts):
        seen.append(images.dtype)
        return images[:, 0, 0, 0] / 255

    inside = jax_reward(lambda images, prompts: images.mean((1, 2, 3)) - 0.1 * prompts.contains("b"))
    terms = Terms({"inside": Term(inside), "host": Term(on_the_host)}, {})
    source = make_explore(one_device(), terms, rounds=1, epochs=1)
    asked = source.prompts.batches

    def with_tokens(models, key):
        for batch in asked(models, key):
            yield {**batch, "reward": {"inside": inside.tokenize(batch["host"]["prompt"])}}

    source.prompts.batches = with_tokens
    (batch,) = a_step(source)
    bright = 1 / (1 + np.exp(-batch["x"].sum(-1)))
    expected = (bright - 0.1 * (batch["length"] == 2)).mean()
    np.testing.assert_allclose(source.metrics["reward_inside"], expected, rtol=1e-6)
    np.testing.assert_allclose(source.metrics["reward_host"], (np.round(255 * bright) / 255).mean(), rtol=1e-6)
    assert seen == [np.uint8]


# runs of the loop


def numbers(workdir):
    rows = read_rows(workdir / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in ("time", "images_per_second")} for row in rows]


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("clean") / "run"
    assert train(policy_config(), assemble_policy, workdir)
    return workdir


def assert_same_run(workdir, clean):
    np.testing.assert_array_equal(np.load(workdir / "export/w.npy"), np.load(clean / "export/w.npy"))
    assert numbers(workdir) == numbers(clean)


def test_every_step_samples_with_the_weights_it_begins_with(clean):
    """The reward rises; of four updates per step one is the first."""
    rows = numbers(clean)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert {"policy/reward", "policy/reward_std", "policy/loss", "policy/grad_norm", "skipped"} < set(rows[0])
    assert all(row["policy/first"] == 0.25 for row in rows) and rows[-1]["policy/reward"] > rows[0]["policy/reward"]


@pytest.mark.parametrize(
    ("place", "call", "step"),
    [("prompts", 8, 3), ("reward", 8, 3), ("choose", 14, 2)],
    ids=["in_a_round", "in_the_reward", "between_updates"],
)
def test_sigterm_stops_within_a_step_which_then_begins_anew(clean, tmp_path, place, call, step):
    """In the fourth step. Before its updates the three that are done are saved; after some of them the run goes back to
    the latest checkpoint. Resumed, it ends in the same bits and metrics."""
    assemble = functools.partial(assemble_policy, place=place, call=call)
    with pytest.raises(Interrupted, match=f"SIGTERM at step {step}"):
        train(policy_config(), assemble, tmp_path / "run")
    assert train(policy_config(), assemble_policy, tmp_path / "run")
    assert_same_run(tmp_path / "run", clean)


def test_killed_within_the_reward_and_restarted_equals_never_stopped(clean, tmp_path):
    """kill -9 in a process of its own, in the thread that scores the fourth step; the prompts' buffers are resumed."""
    command = [sys.executable, str(Path(__file__).parent / "toy_policy.py"), str(tmp_path / "run"), "reward", "8"]
    killed = subprocess.run(command, env=child.environment(), capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert train(policy_config(), assemble_policy, tmp_path / "run")
    assert_same_run(tmp_path / "run", clean)


def test_a_metric_above_its_limit_is_warned_of_once(tmp_path, capsys):
    def assemble(config, mesh):
        run = assemble_policy(config, mesh)
        object.__setattr__(run.method, "limits", {"policy/first": (0.1, "so it is said")})
        return run

    config = policy_config()
    config.steps = 2
    train(config, assemble, tmp_path / "run")
    said = re.findall(r"warning: .*", capsys.readouterr().err)
    assert said == ["warning: step 1: policy/first 0.25 is above 0.1: so it is said"]
