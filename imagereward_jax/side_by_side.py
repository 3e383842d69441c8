"""A tuned model beside its base: images from the same noise, and their scores by several rewards. `demo` shows them."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from imagereward_jax.bulk_scoring.scorers import open_scorer
from imagereward_jax.bulk_scoring.stream import check_score
from imagereward_jax.generate import image_key
from imagereward_jax.pipelines import open_pipeline
from imagereward_jax.pipelines.adapted import load_base, load_params
from imagereward_jax.pipelines.sample import ImageSampler
from imagereward_jax.storage.contact_sheet import to_uint8
from imagereward_jax.storage.folders import export_of
from imagereward_jax.weights import adapters
from imagereward_jax.weights.hub import builtin_models

PROMPT_LENGTH = 2000  # characters; every text encoder reads far fewer
# (least, most) of the numbers of a request.
BOUNDS = {
    "steps": (1, 150),
    "guidance_scale": (0.0, 30.0),
    "seed": (0, 2**31 - 1),
    "count": (1, 8),
    "lora_scale": (-2, 3),
}
SAMPLERS = 4  # compiled programs that are kept, one for each number of steps


class Shown(NamedTuple):
    """What is shown: a model, and the tuned one beside it, if any.

    Attributes:
        model: name or folder of the model, of the tuned one if `base` is given.
        base: of the model that it was tuned from, or None.
        adapter: path or name of an adapter on `model`, or None. Then `base` is None: it is `model` without it.
        rewards: that the run was tuned by, if a run's.
    """

    model: str
    base: str | None = None
    adapter: str | None = None
    rewards: tuple[str, ...] = ()


class Request(NamedTuple):
    """Images to make, see `check_request`."""

    prompt: str
    negative_prompt: str
    steps: int
    guidance_scale: float
    seed: int
    count: int
    lora_scale: float


def find_shown(name: str, base: str | None = None) -> Shown:
    """What to show of a name: a run's workdir, an export of one, an adapter, or any model.

    Args:
        name: as the command takes it. base: the model that it was tuned from; by default that of its run.

    Raises:
        FileNotFoundError: a run has no export yet. ValueError: an adapter, of which no base is known.
    """
    path = export_of(Path(os.path.expanduser(name)))
    run = _run_of(path)
    base, rewards = base or run.get("base"), tuple(run.get("rewards", ()))
    if (path / adapters.FILE).is_file():
        if not base:
            raise ValueError(f"{path} is an adapter: pass --base, the model that it was trained on")
        return Shown(base, adapter=str(path), rewards=rewards)
    return Shown(str(path) if path.exists() else name, base=base, rewards=rewards)


def _run_of(export):
    """{"base", "rewards"} of the run that an export is in; {} if it is in none."""
    try:
        config = json.loads((export.parent / "config.json").read_text(encoding="utf-8"))
        model, reward = config["model"], config.get("reward", {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    terms = [term["path"] for term in reward.get("terms", {}).values()] or [reward.get("path")]
    return {"base": None if model.get("from_scratch") else model.get("path"), "rewards": [one for one in terms if one]}


def default_rewards(shown: Shown) -> list[str]:
    """The rewards that score if none is named: the run's; else the built-in model's own, or ImageReward."""
    built_in = {shown.model, shown.base} & set(builtin_models())  # models of the shapes world
    first = list(shown.rewards) or ["tiny-shapes" if built_in else "ImageReward-v1.0"]
    return list(dict.fromkeys([*first, "jpeg-compressibility"]))


def check_prompt(prompt: Any, name: str = "prompt") -> str:
    """Checks a text from a page.

    Raises:
        ValueError: it is empty, too long, or no text that can be encoded.
    """
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"The {name} is empty.")
    if len(prompt) > PROMPT_LENGTH:
        raise ValueError(f"The {name} has {len(prompt):,} characters; at most {PROMPT_LENGTH:,} are read.")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise ValueError(f"The {name} holds half a character.")
    return prompt


def check_request(
    prompt: Any, negative_prompt: Any, steps: Any, guidance_scale: Any, seed: Any, count: Any, lora_scale: Any = 1.0
) -> Request:
    """Checks what a page sends, which need not be what its sliders allow.

    Raises:
        ValueError: naming the field and what is expected.
    """
    given = {"steps": steps, "guidance_scale": guidance_scale, "seed": seed, "count": count, "lora_scale": lora_scale}
    for name, value in given.items():
        low, high = BOUNDS[name]
        whole = name in ("steps", "seed", "count")
        valid = isinstance(value, int | float) and low <= value <= high and (not whole or value == int(value))
        if not valid:
            kind = "a whole number" if whole else "a number"
            raise ValueError(f"{name.replace('_', ' ')}: expected {kind} from {low} to {high:,}, not {value!r:.50}.")
        given[name] = int(value) if whole else float(value)
    negative_prompt = check_prompt(negative_prompt, "negative prompt") if negative_prompt else ""
    return Request(check_prompt(prompt), negative_prompt, **given)


class SideBySide:
    """Opened models and rewards.

    Args:
        shown: see `find_shown`. rewards: names as `score` takes them. dtype: of the models.

    Attributes:
        pipeline: of the model. generation: its usual sampler, steps and guidance. compares: whether there are two.

    Raises:
        FileNotFoundError, ValueError: a model, adapter or reward cannot be opened, or the two do not fit.
    """

    def __init__(self, shown: Shown, rewards: Sequence[str], *, dtype: str = "float32"):
        self.shown, self.dtype = shown, jnp.dtype(dtype)
        self.pipeline = open_pipeline(shown.model, dtype=dtype)
        other = open_pipeline(shown.base, dtype=dtype) if shown.base else None
        self.rewards = {name: open_scorer(name) for name in rewards}
        self._adapter, self._scale, self._samplers = None, None, {}
        self.generation, base = self.pipeline.generation, {}
        if shown.adapter:
            self._adapter = adapters.read_adapter(shown.adapter, self.pipeline.networks)
            self.generation = adapters.read_generation(shown.adapter) or self.generation
        # What an adapter is added to stays float32 on the host: its sum is rounded once.
        self._host, _ = load_params(self.pipeline, [], "float32" if shown.adapter else dtype)
        if other is not None:
            base = load_base(self.pipeline, other, self._host, dtype, f"--base {shown.base}")
        self.mesh = Mesh(np.asarray(jax.local_devices()), ("data",))
        self._tuned = self._put(self._host)
        self._base = {**self._tuned, **self._put(base)}
        self.compares = bool(shown.adapter or shown.base)

    def _put(self, params):
        cast = jax.tree.map(lambda leaf: leaf.astype(self.dtype, copy=False), params)
        return jax.device_put(cast, NamedSharding(self.mesh, PartitionSpec()))

    def _tuned_at(self, scale):
        """The tuned weights, with the adapter at a scale."""
        if self._adapter is not None and scale != self._scale:
            merged = adapters.merge(self.pipeline.networks, self._host, self._adapter, scale)
            self._tuned = {**self._base, **self._put({name: merged[name] for name in self._adapter})}
            self._scale = scale
        return self._tuned

    def _sampler(self, steps):
        if steps not in self._samplers:
            while len(self._samplers) >= SAMPLERS:
                del self._samplers[next(iter(self._samplers))]
            side = self.pipeline.default_size
            sampler = self.pipeline.make_sampler(self.generation.sampler, steps, 0.0, side, side)
            batch = min(4, BOUNDS["count"][1]) if side <= 128 else 1
            self._samplers[steps] = ImageSampler(self.pipeline, sampler, self.mesh, batch, height=side, width=side)
        return self._samplers[steps]

    def draw(
        self, request: Request, tell: Callable[[float, str], Any] = lambda done, what: None
    ) -> dict[str, np.ndarray]:
        """Makes the images of a request: {"base": uint8 [N, H, W, 3], "tuned": ...}, or {"model": ...} of one model.

        Image k is that of `imagereward generate` with the seed + k. Base and tuned start from the same noise.

        Args:
            tell: called with (share of the work that is done, what comes next).

        Raises:
            ValueError: the model takes no such number of steps, or an image has values that are not numbers.
        """
        sampler = self._sampler(request.steps)
        keys = [image_key(request.prompt, request.seed + k) for k in range(request.count)]
        noise = np.stack([jax.random.normal(key, sampler.latent_shape) for key in keys])
        models = (
            {"base": self._base, "tuned": self._tuned_at(request.lora_scale)}
            if self.compares
            else {"model": self._tuned}
        )
        images = {}
        for name, params in models.items():
            tell(len(images) / (len(models) + 1), f"sampling: {name} (the first images of a kind are compiled for)")
            made = sampler(
                params,
                [request.prompt] * request.count,
                negative_prompts=[request.negative_prompt] * request.count,
                noise=noise,
                step_keys=jnp.stack([jax.random.fold_in(key, 1) for key in keys]),
                guidance_scale=request.guidance_scale,
            )
            if not np.isfinite(made).all():
                raise ValueError(f"An image of the {name} model has values that are not numbers: try --dtype float32.")
            images[name] = to_uint8(made)
        tell(len(models) / (len(models) + 1), "scoring")
        return images

    def score(self, prompt: str, images: Sequence[Any]) -> dict[str, list[float]]:
        """{reward: a score for each image} of arrays uint8 [H, W, 3] or paths.

        Raises:
            ImageError: an image cannot be read. ScoringError: a score is not a number.
        """
        found = {}
        for name, reward in self.rewards.items():
            found[name] = [float(value) for value in reward.inference_rank(prompt, list(images))[1]]
            for index, value in enumerate(found[name], 1):
                check_score(f"{name}: image {index}", value)
        return found


def gains(base: dict[str, list[float]], tuned: dict[str, list[float]]) -> list[list[Any]]:
    """Rows [reward, mean of base, mean of tuned, difference], rounded for people."""
    means = [(name, float(np.mean(base[name])), float(np.mean(tuned[name]))) for name in base]
    return [[name, round(one, 3), round(other, 3), f"{other - one:+.3f}"] for name, one, other in means]


def spread(scores: dict[str, list[float]]) -> list[list[Any]]:
    """Rows [reward, mean, least, most], rounded for people."""
    return [[name, *(round(float(of(values)), 3) for of in (np.mean, min, max))] for name, values in scores.items()]


def captions(scores: dict[str, list[float]]) -> list[str]:
    """The scores of each image in a line, in the order of the rewards."""
    return [" · ".join(f"{value:.2f}" for value in values) for values in zip(*scores.values())]
