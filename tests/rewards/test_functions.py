"""A user's own rewards: Python functions and jax functions, by name and as objects."""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import imagereward_jax
from imagereward_jax import score
from imagereward_jax.rewards.errors import RewardError
from imagereward_jax.rewards.functions import PROMPT_BYTES, JaxReward, Prompts, is_function_name, jax_reward
from imagereward_jax.rewards.mixed import MixedReward, Term, Terms
from imagereward_jax.rewards.registry import open_reward

MODULE = """
import jax.numpy as jnp
from imagereward_jax import jax_reward

def brightness(images, prompts):
    assert images.dtype == "uint8"
    return images.mean((1, 2, 3)) + [len(prompt) for prompt in prompts]

def rated(images, prompts, metadata):
    return [row.get("rating", -1) for row in metadata]

def too_few(images, prompts):
    return [1.0]

def alone(images):
    return images

def warmth(images):
    return images[..., 0].mean((1, 2)) - images[..., 2].mean((1, 2))

@jax_reward
def decorated(images):
    return warmth(images)

class Target:
    def tokenize(self, prompts):
        return {"red": [float("red" in prompt) for prompt in prompts]}

    def __call__(self, images, tokens):
        return -jnp.square(images[..., 0].mean((1, 2)) - tokens["red"])

target = Target()
constant = 3

class NoTokens:
    params = {}

    def apply(self, params, images):
        return images.mean((1, 2, 3))

class Texts(NoTokens):
    params = {"layer": {"w": "text"}}

    def tokenize(self, prompts):
        return [0.0 for prompt in prompts]

no_tokens, texts = NoTokens(), Texts()

async def later(images, prompts):
    return [0.0]
"""


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3)).astype(np.uint8)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of the user's, importable as `own_functions`."""
    (tmp_path / "own_functions.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("own_functions", None)


def warmth_of(images):
    images = images / np.float32(255)
    return images[..., 0].mean((1, 2)) - images[..., 2].mean((1, 2))


def test_a_python_function_scores(images, module):
    reward = open_reward("own_functions:brightness")
    expected = images.mean((1, 2, 3)) + np.array([3, 5])
    np.testing.assert_allclose(reward.score(["abc", "abcde"], list(images)), expected, rtol=1e-6)
    assert reward.score("abc", Image.fromarray(images[0])) == pytest.approx(expected[0])
    np.testing.assert_allclose(reward.score_arrays(images / np.float32(255), ["abc", "abcde"]), expected, rtol=1e-6)
    assert not reward.differentiable


def test_a_function_is_given_metadata_if_it_takes_them(images, module):
    """Empty dicts where there are none; a third argument with a default and another name is left alone."""
    reward = open_reward("own_functions:rated")
    np.testing.assert_array_equal(reward.score_arrays(images, ["a", "b"], [{"rating": 2}, {"rating": 7}]), [2, 7])
    np.testing.assert_array_equal(reward.score(["a", "b"], list(images)), [-1, -1])

    def scaled(images, prompts, scale=2.0):
        return np.full(len(images), scale)

    def optional(images, prompts, metadata=None):
        return [row["rating"] for row in metadata]

    rows = [{"rating": 2}, {"rating": 7}]
    np.testing.assert_array_equal(open_reward(scaled).score_arrays(images, ["a", "b"], rows), [2, 2])
    np.testing.assert_array_equal(open_reward(optional).score_arrays(images, ["a", "b"], rows), [2, 7])
    bound = functools.partial(scaled, scale=3.0)
    np.testing.assert_array_equal(open_reward(bound).score_arrays(images, ["a", "b"], rows), [3, 3])


def test_what_a_python_function_may_return(images):
    """Numbers with NaN for no verdict, named ones whose sum counts, and either beside a dict as in ddpo-pytorch."""
    both = {"x": np.array([1.0, np.nan]), "y": [2, 3]}
    for returned in (both, (both, {"answers": ["yes", "no"]})):
        named = open_reward(lambda images, prompts, returned=returned: returned).named_scores(images, ["a", "b"])
        assert list(named) == ["", "x", "y"] and all(values.dtype == np.float32 for values in named.values())
        np.testing.assert_array_equal(named[""], [3, np.nan])
    ranks, scores = open_reward(lambda images, prompts: [np.nan if prompts[0] == "a" else 1.0]).inference_rank(
        "a", list(images)
    )
    assert ranks == [1, 2] and np.isnan(scores).all()


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], r"shape \(1,\) and type float64 for 2 images; expected one number per image"),
        (np.zeros((2, 1)), r"shape \(2, 1\)"),
        (None, "type object"),
        ([1.0, None], "type object .*NaN for no verdict"),
        ([1j, 2j], "type complex128"),
        ([[1], [1, 2]], "that NumPy cannot read"),
        ([1.0, 1e300], "the reward returned inf for image 1 of 2, of the prompt 'second'"),
        ({}, "a dict with no names"),
        ({"a b": [1, 2]}, "a dict with 'a b'; expected names of letters"),
        ({"a": [1, 2], "b": [1]}, r"scores 'b' of shape \(1,\)"),
    ],
)
def test_bad_returns_of_a_python_function_are_named(returned, message, images):
    reward = open_reward(lambda images, prompts: returned)
    with pytest.raises(RewardError, match=f"^reward '.*test_functions:.*lambda.*: .*{message}"):
        reward.score_arrays(images, ["first", "second"])


def test_names_of_functions_that_cannot_be_used_are_refused(module):
    for name, message in (
        ("own_functions:nothing", "own_functions:nothing.*expected module:function"),
        ("jax:own_functions:nothing", "jax:own_functions:nothing.*expected jax:module:function"),
        ("not_there:f", "not_there:f"),
        ("own_functions:constant", "constant is not a function"),
        ("jax:own_functions:constant", "constant is not a function"),
        ("own_functions:Target", "is a class; give an instance"),
        ("jax:own_functions:Target", "is a class; give an instance"),
        ("own_functions:alone", r"takes \(images\); expected \(images, prompts\) or \(images, prompts, metadata\)"),
        ("jax:own_functions:rated", r"takes \(images, prompts, metadata\); expected \(images\) or \(images, prompts\)"),
    ):
        with pytest.raises(ValueError, match=message):
            open_reward(name)
    with pytest.raises(ValueError, match=r"a function or an opened reward .*, not int"):
        open_reward(3)
    assert is_function_name("package.module:function") and is_function_name("jax:package.module:function")
    assert not any(map(is_function_name, ("ImageReward-v1.0", "tiny-shapes", "./a:b/c", "jax:a:b:c")))


def test_a_jax_function_scores_and_has_a_gradient(images, module):
    """By name, decorated and as an object; in every method of a network's reward."""
    expected, floats = warmth_of(images), jnp.asarray(images / np.float32(255))
    gradient = np.zeros(images.shape, np.float32)
    gradient[..., 0], gradient[..., 2] = 1 / (16 * 24), -1 / (16 * 24)
    sys_module = __import__("own_functions")
    decorated = ("jax:own_functions:decorated", "own_functions:decorated", sys_module.decorated)
    for given in ("jax:own_functions:warmth", *decorated, imagereward_jax.jax_reward(sys_module.warmth)):
        reward = imagereward_jax.open_reward(given)
        assert isinstance(reward, JaxReward) and reward.differentiable
        np.testing.assert_allclose(reward.score(["a", "b"], list(images)), expected, atol=1e-6)
        np.testing.assert_allclose(reward.score_grad("a", floats), expected, atol=1e-6)
        ranks, _ = reward.inference_rank("a", list(images))
        assert ranks == (1 + np.argsort(np.argsort(-expected))).tolist()
        found = jax.grad(lambda x, reward=reward: reward.apply(reward.params, x, reward.tokenize("ab")).sum())(floats)
        np.testing.assert_allclose(found, gradient, atol=1e-9)
    np.testing.assert_allclose(sys_module.decorated(floats), expected, atol=1e-6)  # still a function
    seen = []
    half = jax_reward(lambda images: seen.append(images.dtype) or images.mean((1, 2, 3)).astype(jnp.bfloat16))
    assert half.apply({}, floats.astype(jnp.bfloat16), {}).dtype == jnp.float32 and seen == [jnp.float32]


def test_prompts_reach_a_jax_function_as_bytes_or_as_its_own_tokens(images, module):
    prompts, floats = ["a red ball", "a blue ball"], jnp.asarray(images / np.float32(255))
    target = open_reward("jax:own_functions:target")
    expected = -np.square(floats[..., 0].mean((1, 2)) - np.array([1.0, 0.0]))
    np.testing.assert_allclose(target.score_arrays(images, prompts), expected, atol=1e-6)

    def by_bytes(images, prompts):
        assert len(prompts) == 2 and images.shape == (2, 16, 24, 3)
        return -jnp.square(images[..., 0].mean((1, 2)) - prompts.contains("red"))

    reward, calls = jax_reward(by_bytes), []
    np.testing.assert_allclose(reward.score_arrays(images, prompts), expected, atol=1e-6)
    traced = jax.jit(lambda tokens: calls.append(1) or reward.apply({}, floats, tokens))
    for batch in (prompts, prompts[::-1]):  # other prompts are other arrays of the same program
        wanted = -np.square(floats[..., 0].mean((1, 2)) - np.array(["red" in prompt for prompt in batch]))
        np.testing.assert_allclose(traced(reward.tokenize(batch)), wanted, atol=1e-6)
    assert len(calls) == 1
    with pytest.raises(RewardError, match=r"no texts inside a compiled program: use prompts\.contains"):
        jax_reward(lambda images, prompts: [len(prompt) for prompt in prompts]).score_arrays(images, prompts)
    with pytest.raises(RewardError, match="no texts inside a compiled program"):
        jax_reward(lambda images, prompts: images.mean((1, 2, 3)) * ("red" in prompts)).score_arrays(images, prompts)


def test_contains_agrees_with_python():
    prompts = [
        "a red circle",
        "RED",
        "",
        "coloured",
        "é red",
        "x" * PROMPT_BYTES + "red",
        "y" * (PROMPT_BYTES - 3) + "red",
    ]
    tokens = jax_reward(lambda images, prompts: prompts).tokenize(prompts)
    assert tokens.shape == (len(prompts), PROMPT_BYTES) and tokens.dtype == np.uint8
    for text in ("red", "", "é", "circle", "z" * 2000):
        cut = [prompt.encode()[:PROMPT_BYTES] for prompt in prompts]
        found = Prompts(jnp.asarray(tokens)).contains(text)
        np.testing.assert_array_equal(found, [text.encode() in prompt for prompt in cut], err_msg=text)


def test_a_network_of_ones_own_has_its_weights_as_arguments(images):
    """Changed weights change the scores of the compiled program."""

    class Network:
        params = {"head": {"w": np.array([1.0, 2.0, 3.0], np.float32)}}

        def tokenize(self, prompts):
            return np.array([len(prompt) for prompt in prompts], np.float32)

        def apply(self, params, images, tokens):
            return images.mean((1, 2)) @ params["head"]["w"] + tokens

    reward, means = jax_reward(Network()), images.mean((1, 2)) / 255
    np.testing.assert_allclose(reward.score(["a", "bbb"], list(images)), means @ [1, 2, 3] + [1, 3], rtol=1e-5)
    other = jax.tree.map(lambda w: 2 * w, reward.params)
    scores = jax.jit(reward.apply)(other, images / np.float32(255), reward.tokenize(["a", "bbb"]))
    np.testing.assert_allclose(scores, means @ [2, 4, 6] + [1, 3], rtol=1e-5)


def needs_numbers(images):
    return images.mean((1, 2, 3)) if float(images.mean()) > 0 else images.sum((1, 2, 3))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            needs_numbers,
            r"the reward failed: ConcretizationTypeError: .*\(test_functions.py, line \d+\); it runs inside",
        ),
        (lambda images: 1 / 0, r"the reward failed: ZeroDivisionError: .*\(test_functions.py, line"),
        (lambda images: images.mean(), r"returned an array of shape \(\) and type float32 for 2 images"),
        (lambda images: images[:1].mean((1, 2, 3)), r"shape \(1,\) and type float32 for 2 images"),
        (lambda images: images.argmax(-1).max((1, 2)), "type int32 .*expected a floating-point number"),
        (lambda images: {"x": images.mean((1, 2, 3))}, "returned a dict for 2 images"),
    ],
)
def test_a_jax_function_that_gives_no_scores_is_named(function, message, images):
    reward = jax_reward(function)
    with pytest.raises(RewardError, match=f"^reward 'jax:.*test_functions:.*': .*{message}"):
        reward.apply({}, jnp.asarray(images / np.float32(255)), {}) if "Concret" not in message else jax.jit(
            reward.apply
        )({}, images / np.float32(255), {})


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["a", "b"], "tokenize returned .* for 2 prompts; expected an array of numbers"),
        (np.zeros((1, 3)), r"tokenize returned float64\[1, 3\] for 2 prompts"),
        ({"x": np.array(["a", "b"])}, "tokenize returned .*<U1"),
    ],
)
def test_bad_tokens_are_named(tokens, message):
    class Reward:
        def tokenize(self, prompts):
            return tokens

        def __call__(self, images, tokens):
            return images.mean((1, 2, 3))

    with pytest.raises(RewardError, match=message):
        jax_reward(Reward()).tokenize(["a", "b"])


def test_mixtures_hold_networks_and_functions_of_both_kinds(images, tiny_reward):
    """The weighted sum of each by itself; without the Python function it has a gradient."""
    prompts = ["a large red circle at the top left", "a small blue square at the center"]
    warm, long = jax_reward(lambda images: images[..., 0].mean((1, 2)) - images[..., 2].mean((1, 2))), len
    mixture = MixedReward(
        {
            "network": Term(tiny_reward, weight=0.5),
            "warm": Term(warm, weight=-3.0, std=0.1),
            "long": Term(lambda images, prompts: [long(prompt) for prompt in prompts], weight=0.1),
        }
    )
    expected = (
        0.5 * np.array(tiny_reward.score(prompts, list(images)))
        - 3 * warmth_of(images) / 0.1
        + 0.1 * np.array([len(prompt) for prompt in prompts])
    )
    np.testing.assert_allclose(mixture.score(prompts, list(images)), expected, rtol=1e-5)
    assert not mixture.differentiable
    both = MixedReward({name: mixture.members[name] for name in ("network", "warm")})
    floats = jnp.asarray(images / np.float32(255))
    assert both.differentiable
    gradient = jax.grad(lambda x: both.apply(both.params, x, both.tokenize(prompts)).sum())(floats)
    network = jax.grad(lambda x: tiny_reward.apply(tiny_reward.params, x, tiny_reward.tokenize(prompts)).sum())(floats)
    np.testing.assert_allclose(gradient[..., 0] - 0.5 * network[..., 0], -30 / (16 * 24), rtol=1e-3)


def test_commands_score_by_functions_and_name_the_one_that_fails(images, module, tmp_path, capsys):
    Image.fromarray(images[0]).save(tmp_path / "1.png")
    arguments = ["--prompt", "abc", str(tmp_path / "1.png"), "--json"]
    for name, expected in (("jax:own_functions:warmth", warmth_of(images)[0]), ("own_functions:rated", -1)):
        assert score.main(["--model", name, *arguments]) == 0
        (row,) = json.loads(capsys.readouterr().out)["images"]
        assert row["score"] == pytest.approx(expected, rel=1e-5)
    (tmp_path / "own_functions.py").write_text(
        MODULE + "def fails(images, prompts):\n    raise LookupError('asleep')\n"
    )
    sys.modules.pop("own_functions")
    assert score.main(["--model", "own_functions:fails", *arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    expected = "error: reward 'own_functions:fails': the reward failed: LookupError: asleep (own_functions.py, line"
    assert line.startswith(expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_functions:later", "later' is a coroutine or generator"),
        ("jax:own_functions:no_tokens", "no_tokens' cannot be called, and has no tokenize"),
        ("jax:own_functions:texts", r"texts': params\['layer'\]\['w'\] is a str; expected an array"),
        ("own_functions:Target.tokenize", "a function of yours is named module:function, .* at its module's top"),
    ],
)
def test_what_can_never_score_is_refused_at_once(name, message, module):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_reward(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("raise RuntimeError('boom\\nmore')", r"importing broken failed: RuntimeError: boom \(broken.py, line 1\)$"),
        ("x = (", r"importing broken failed: SyntaxError: .*\(broken.py, line 1\)$"),
        ("import sys\nsys.exit(3)", r"importing broken failed: SystemExit: 3 \(broken.py, line 2\)$"),
        ("import nowhere", r"failed: ModuleNotFoundError: No module named 'nowhere' \(broken.py, line 1\)$"),
    ],
    ids=["raises", "syntax", "exits", "needs"],
)
def test_a_module_that_cannot_be_imported_is_named_with_the_line(text, message, tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("broken:f", "jax:broken:f"):
        with pytest.raises(ValueError, match=message):
            open_reward(name)


def test_a_jax_function_is_traced_before_anything_is_compiled():
    """The images have the size of the run's."""
    shapes = []

    def scores(images):
        shapes.append(images.shape)
        return images.mean()

    Terms({"": Term(jax_reward(lambda images: images.mean((1, 2, 3))))}).check_traced(16, 24)
    terms = Terms({"": Term(jax_reward(scores))}, {"": "config.reward.path='jax:mine:scores'"})
    with pytest.raises(RewardError, match=r"^config.reward.path='jax:mine:scores': the reward returned .*shape \(\)"):
        terms.check_traced(16, 24)
    assert shapes == [(2, 16, 24, 3)]
