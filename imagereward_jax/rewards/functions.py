"""A user's own rewards: Python functions of finished images, and jax functions that can be differentiated."""

import dataclasses
import functools
import importlib
import inspect
import os
import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from imagereward_jax.data.errors import describe
from imagereward_jax.rewards.errors import RewardError
from imagereward_jax.rewards.rules import RuleReward
from imagereward_jax.storage.contact_sheet import to_uint8

JAX_PREFIX = "jax:"
PROMPT_BYTES = 1024  # of a prompt that a jax function sees; CLIP's 77 tokens are some 350
_NAME = re.compile(r"(jax:)?[A-Za-z_][\w.]*:[A-Za-z_]\w*")
SCORE_NAME = re.compile(r"\w[\w-]*")


class PythonReward(RuleReward):
    """A Python function of images on the host; it has no gradient.

    The function is `f(images, prompts)` or `f(images, prompts, metadata)`: images uint8 [B, H, W, 3], NumPy; prompts a
    list of B texts; metadata a list of B dicts, the other columns of the prompts' rows. It returns B numbers, NaN for
    an image that it has no verdict on; or {name: B numbers}, whose sum is the reward; or a pair of either and a dict
    that is not read, as the reward functions of ddpo-pytorch and TRL do.

    Args:
        name: how errors call it; by default "module:function".

    Raises:
        ValueError: it is a class, or takes other arguments.
    """

    def __init__(self, function: Callable[..., Any], name: str | None = None) -> None:
        self.function = _instance(function)
        self.name = name or name_of_object(function)
        self._where = f"reward {self.name!r}"
        self._arguments = _count_arguments(function, ("images", "prompts", "metadata"), at_least=2, name=self.name)

    def score_arrays(
        self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> np.ndarray:
        """See `RuleReward.score_arrays`; without metadata the function is given empty dicts.

        Raises:
            RewardError: the function raised an error, or did not return a number per image.
        """
        return self.named_scores(images, prompts, metadata)[""]

    def named_scores(
        self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> dict[str, np.ndarray]:
        """See `RuleReward.named_scores`."""
        metadata = [{} for _ in prompts] if metadata is None else list(metadata)
        arguments = (to_uint8(images), list(prompts), metadata)[: self._arguments]
        try:
            returned = self.function(*arguments)
        except Exception as error:
            raise RewardError(self._where, f"the reward failed: {describe(error, self.function)}") from error
        return _read_scores(returned, prompts, self._where)


class JaxReward(RuleReward):
    """A jax function of images, scored and differentiated inside compiled programs as networks are.

    One of, where images are float32 [B, H, W, 3] in [0, 1] and the result floating point [B]:

    - `f(images)`;
    - `f(images, prompts)`: prompts is a `Prompts`, for there are no texts in a compiled program;
    - an object with `tokenize(prompts)`, from a list of B texts to an array or (nested) dict of arrays [B, ...] of
      fixed shape, called on the host, and `__call__(images, tokens)`;
    - an object with `params` (a nested dict of arrays), `tokenize` and `apply(params, images, tokens)`: a network,
      whose weights are arguments of compiled programs. Arrays that a function closes over are compiled into them.

    Args:
        name: how errors call it; by default "jax:module:function".

    Raises:
        ValueError: it is a class, or takes other arguments.
    """

    differentiable = True

    def __init__(self, function: Any, name: str | None = None) -> None:
        self.function = _instance(function)
        self.name = name or JAX_PREFIX + name_of_object(function)
        self._where = f"reward {self.name!r}"
        self.params, self._takes_prompts = {}, True
        self._tokenize = getattr(function, "tokenize", None)
        if self._tokenize is not None and hasattr(function, "params") and hasattr(function, "apply"):
            self.params, self._call = _arrays(function.params, self.name), function.apply
            return
        if not callable(function):
            lacks = [name for name in ("params", "tokenize", "apply") if not hasattr(function, name)]
            raise ValueError(f"reward {self.name!r} cannot be called, and has no {' and no '.join(lacks)}")
        self._call = lambda params, *arguments: function(*arguments)
        if self._tokenize is not None:
            _count_arguments(function, ("images", "tokens"), at_least=2, name=self.name)
        else:
            self._takes_prompts = _count_arguments(function, ("images", "prompts"), at_least=1, name=self.name) == 2

    def __call__(self, *arguments: Any) -> Any:
        """Calls the function itself."""
        return self.function(*arguments)

    def tokenize(self, prompts: str | Sequence[str]) -> Any:
        """See `Reward.tokenize`; {} if the function reads no prompts.

        Raises:
            RewardError: the function's `tokenize` raised an error, or did not return arrays [B, ...].
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not self._takes_prompts:
            return {}
        if self._tokenize is None:
            return _utf8(prompts)
        try:
            tokens = jax.tree.map(np.asarray, self._tokenize(prompts), is_leaf=lambda part: not isinstance(part, dict))
        except Exception as error:
            told = describe(error, getattr(self._tokenize, "__func__", self._tokenize))
            raise RewardError(self._where, f"tokenize failed: {told}") from error
        leaves = jax.tree.leaves(tokens)
        if not all(leaf.dtype.kind in "buif" and leaf.shape[:1] == (len(prompts),) for leaf in leaves):
            said = jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", tokens)
            expected = f"an array of numbers [{len(prompts)}, ...], or a dict of such"
            reason = f"tokenize returned {said} for {len(prompts)} prompts; expected {expected}"
            raise RewardError(self._where, reason)
        return tokens

    def apply(self, params: Any, images: jax.Array, tokens: Any) -> jax.Array:
        """See `Reward.apply`.

        Raises:
            RewardError: the function cannot be traced, or did not return floating-point numbers [B].
        """
        seen = () if not self._takes_prompts else (Prompts(tokens),) if self._tokenize is None else (tokens,)
        try:
            scores = self._call(params, images.astype(jnp.float32), *seen)
        except Exception as error:
            hint = "; it runs inside a compiled program: use jax.numpy" if isinstance(error, _TRACING_ERRORS) else ""
            told = describe(error, getattr(self._call, "__func__", self.function))
            raise RewardError(self._where, f"the reward failed: {told}{hint}") from error
        shape, dtype = getattr(scores, "shape", None), getattr(scores, "dtype", None)
        if shape != images.shape[:1] or not jnp.issubdtype(dtype, jnp.floating):
            said = f"a {type(scores).__name__}" if shape is None else f"an array of shape {shape} and type {dtype}"
            reason = f"the reward returned {said} for {len(images)} images; expected a floating-point number per image"
            raise RewardError(self._where, reason)
        return scores.astype(jnp.float32)

    def check_traced(self, height: int, width: int) -> None:
        """Traces it over images of a size, without compiling anything: errors as of `tokenize` and `apply`."""
        images = jax.ShapeDtypeStruct((2, height, width, 3), jnp.float32)
        jax.eval_shape(self.apply, self.params, images, self.tokenize([""] * len(images)))

    def score_arrays(
        self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> np.ndarray:
        """See `RuleReward.score_arrays`."""
        images = np.asarray(images)
        images = images.astype(np.float32) / 255 if images.dtype == np.uint8 else images
        return np.asarray(self._jitted(self.params, images, self.tokenize(prompts)))

    def score_grad(self, prompts: str | Sequence[str], images: jax.Array) -> jax.Array:
        """See `Reward.score_grad`."""
        prompts = [prompts] * len(images) if isinstance(prompts, str) else prompts
        return self._jitted(self.params, jnp.asarray(images), self.tokenize(prompts))

    @functools.cached_property
    def _jitted(self):
        return jax.jit(self.apply)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts inside a compiled program.

    Attributes:
        utf8: uint8 [B, 1024], their UTF-8 bytes, 0 after the end; longer prompts are cut.
    """

    utf8: jax.Array

    def __len__(self) -> int:
        return self.utf8.shape[0]

    def contains(self, text: str) -> jax.Array:
        """Finds a text, case and all: [B] bool, whether each prompt contains it."""
        wanted, last = text.encode(), PROMPT_BYTES - len(text.encode()) + 1
        if last < 1:
            return jnp.zeros(len(self), bool)
        at = [self.utf8[:, offset : offset + last] == byte for offset, byte in enumerate(wanted)]
        return functools.reduce(jnp.logical_and, at, jnp.ones((len(self), last), bool)).any(1)

    def _no_texts(self, *_):
        raise TypeError(
            "there are no texts inside a compiled program: use prompts.contains('red') or the bytes prompts.utf8, or "
            "make the reward an object with tokenize(prompts) and __call__(images, tokens)"
        )

    __iter__ = __getitem__ = __contains__ = _no_texts


_TRACING_ERRORS = (jax.errors.JAXTypeError, jax.errors.JAXIndexError)


def jax_reward(function: Any) -> JaxReward:
    """Makes a differentiable reward of a jax function, as a decorator too; see `JaxReward`."""
    return function if isinstance(function, JaxReward) else JaxReward(function)


def is_function_name(name: str) -> bool:
    """Whether `name` is "module:function" or "jax:module:function"."""
    return _NAME.fullmatch(str(name)) is not None


def open_function(name: str) -> Any:
    """Imports "module:function", a Python function, or "jax:module:function"; a reward object is returned as it is.

    Raises:
        ValueError: the module or function does not exist, the module cannot be imported, or the function cannot be
            called or takes other arguments.
    """
    differentiable = name.count(":") == 2
    expected = f"{JAX_PREFIX if differentiable else ''}module:function"
    module, _, attribute = name.removeprefix(JAX_PREFIX if differentiable else "").partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:
        absent = isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")
        if absent or (isinstance(error, AttributeError) and error.name == attribute):
            raise ValueError(f"reward {name!r}: {error}; expected {expected} that Python can import") from error
        raise ValueError(f"reward {name!r}: importing {module} failed: {_describe_import(error)}") from error
    if isinstance(found, JaxReward):
        return JaxReward(found.function, name)
    if hasattr(found, "differentiable"):
        return found
    if not (callable(found) or (differentiable and hasattr(found, "apply"))):
        raise ValueError(f"reward {name!r}: {attribute} is not a function but {type(found).__name__}")
    return JaxReward(found, name) if differentiable else PythonReward(found, name)


def as_reward(reward: Any) -> Any:
    """The reward that an object is: itself if it has `differentiable`, else a `PythonReward` of a callable.

    Raises:
        ValueError: it is neither.
    """
    if hasattr(reward, "differentiable"):
        return reward
    if not callable(reward):
        raise ValueError(
            f"expected a function or an opened reward (imagereward_jax.open_reward(name)), not {type(reward).__name__}"
        )
    return PythonReward(reward)


def _instance(function):
    if inspect.isclass(function):
        raise ValueError(f"reward {name_of_object(function)!r} is a class; give an instance of it")
    return function


def _arrays(params, name):
    """The parameters of a user's network, which must be arrays."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            where = "params" + jax.tree_util.keystr(path)
            raise ValueError(f"reward {name!r}: {where} is a {type(leaf).__name__}; expected an array")
    return params


def _describe_import(error):
    """Describes an error of a module that is imported: its type, first line, and last place that is a file."""
    text = str(error).strip().splitlines()[:1]
    told = ": ".join([type(error).__name__, *text])
    frames = [one for one in traceback.extract_tb(error.__traceback__) if not one.filename.startswith("<")]
    last = frames[-1]
    return told if isinstance(error, SyntaxError) else f"{told} ({os.path.basename(last.filename)}, line {last.lineno})"


def name_of_object(value: Any) -> str:
    """The "module:name" of a function, of what a functools.partial calls, or of an object's class."""
    value = getattr(value, "func", value)  # of a functools.partial
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}:{named.__qualname__}"


def _count_arguments(function, expected, *, at_least, name):
    """How many of the `expected` arguments a function is given: `at_least` so many, more that it has no default for
    or that have the expected name.

    Raises:
        ValueError: it takes fewer, or needs more.
    """
    called = function if inspect.isroutine(function) else type(function).__call__
    if inspect.iscoroutinefunction(called) or inspect.isgeneratorfunction(called):
        raise ValueError(f"reward {name!r} is a coroutine or generator; expected a function that returns its scores")
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # built-in functions may have none
        return at_least
    positional = [one for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    open_ended = any(one.kind is one.VAR_POSITIONAL for one in parameters)
    needed = sum(one.default is one.empty for one in positional)
    keywords = [one.name for one in parameters if one.kind is one.KEYWORD_ONLY and one.default is one.empty]
    if (len(positional) < at_least and not open_ended) or needed > len(expected) or keywords:
        forms = [f"({', '.join(expected[:count])})" for count in range(at_least, len(expected) + 1)]
        raise ValueError(f"reward {name!r} takes {inspect.signature(function)}; expected {' or '.join(forms)}")
    count = at_least
    for argument in expected[at_least : len(positional)]:
        count += positional[count].default is inspect.Parameter.empty or positional[count].name == argument
    return count


def _utf8(prompts):
    """uint8 [B, PROMPT_BYTES]"""
    rows = [prompt.encode()[:PROMPT_BYTES].ljust(PROMPT_BYTES, b"\0") for prompt in prompts]
    return np.frombuffer(b"".join(rows), np.uint8).reshape(len(prompts), PROMPT_BYTES)


def _read_scores(returned, prompts, where):
    """{"": the reward float32 [B], and by name the scores that it is the sum of}; see `PythonReward`."""
    if isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], dict):
        returned = returned[0]
    if not isinstance(returned, dict):
        return {"": _read_array(returned, prompts, where, "scores")}
    if not returned or not all(isinstance(name, str) and SCORE_NAME.fullmatch(name) for name in returned):
        names = ", ".join(map(repr, returned)) or "no names"
        reason = f"the reward returned a dict with {names}; expected names of letters, digits, _ and -"
        raise RewardError(where, reason)
    scores = {name: _read_array(values, prompts, where, f"scores {name!r}") for name, values in returned.items()}
    return {"": sum(scores.values()), **scores}


def _read_array(values, prompts, where, what):
    try:
        array = np.asarray(values)
    except Exception as error:  # lists of unequal lengths, tensors on another device
        raise RewardError(where, f"the reward returned {what} that NumPy cannot read: {error}") from error
    count = len(prompts)
    if array.shape != (count,) or array.dtype.kind not in "buif":
        said = f"{what} of shape {array.shape} and type {array.dtype} for {count} images"
        raise RewardError(where, f"the reward returned {said}; expected one number per image, NaN for no verdict")
    with np.errstate(over="ignore"):  # is found below
        array = array.astype(np.float32)
    if np.isinf(array).any():
        index = int(np.isinf(array).argmax())
        said = f"{array[index]} for image {index} of {count}, of the prompt {prompts[index]!r}"
        raise RewardError(where, f"the reward returned {said}; expected a finite number, or NaN for no verdict")
    return array
