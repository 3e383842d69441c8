"""Base of network rewards: scores of images for prompts, ranks and gradients, in batches on all devices."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from imagereward_jax.models.layers import unit
from imagereward_jax.rewards import preprocess
from imagereward_jax.rewards.preprocess import Statistics
from imagereward_jax.weights import mapping

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class Reward:
    """A network that scores images. Higher is better.

    A subclass defines its network (`abstract`) and its preprocessing (`preprocess`).

    Args:
        config: sizes of the network; has `vision.image_size`.
        params: nested dict of arrays. Matrices are stored in `dtype`, vectors and the head in float32.
        tokenizer: prompts -> dict of arrays [B, ...], keyword arguments of the network's `score_prompts`.
        dtype: "float32" (equal to the original) or "bfloat16" (half the memory, about two significant digits).
        device: where `score` computes: None for every local device, a platform ("cpu", "gpu", "cuda", "tpu"), one
            device of it ("cuda:1"), or a `jax.Device`.
        batch_size: images per batch, over all devices together.
        statistics: mean and deviation of the network's pixels, if not those of its class's `preprocess`.
        image_rule: how `score` reads images that are not plain RGB: "shown" or "original", see `data.images`.

    Raises:
        ValueError: an argument is not valid.
    """

    preprocess = preprocess.CROP
    differentiable = True

    def __init__(
        self,
        config: Any,
        params: dict[str, Any],
        tokenizer: Callable[[Sequence[str]], dict[str, np.ndarray]],
        *,
        dtype: DTypeLike = "float32",
        device: str | jax.Device | None = None,
        batch_size: int = 16,
        statistics: Statistics | None = None,
        image_rule: str = "shown",
    ) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be a positive whole number, not {batch_size!r}")
        self.config = config
        self.image_rule = image_rule
        self.tokenizer = tokenizer
        self.dtype = named_dtype(dtype)
        self.batch_size = batch_size
        if statistics is not None:
            self.preprocess = self.preprocess.normalised_by(statistics)
        self.params = cast_params(params, self.dtype)
        self._module = self.abstract(config, self.dtype)
        self._graphdef = nnx.graphdef(self._module)
        self._mesh = Mesh(np.array(local_devices(device)), ("data",))
        self._placed = False
        self._encode = jax.jit(lambda params, pixels: self._network(params).encode_images(pixels))
        self._score = jax.jit(lambda params, embeds, tokens: self._network(params).score_prompts(embeds, **tokens))
        self._apply = jax.jit(self.apply)

    @staticmethod
    def abstract(config: Any, dtype: DTypeLike) -> nnx.Module:
        """Builds the network without arrays; it has `encode_images(pixels)` and `score_prompts(embeds, **tokens)`."""
        raise NotImplementedError

    @property
    def image_size(self) -> int:
        """Side in pixels of the network's input images."""
        return self.config.vision.image_size

    def tokenize(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """Tokenizes B prompts: a dict of arrays [B, ...] for the network."""
        return self.tokenizer(prompts)

    def apply(self, params: dict[str, Any], images: jax.Array, tokens: dict[str, Any]) -> jax.Array:
        """Computes scores, as a pure and differentiable function.

        Args:
            params: nested dict, as `self.params`.
            images: [B, H, W, 3] floating point in [0, 1].
            tokens: from `tokenize`, for B prompts.

        Returns:
            [B] float32.
        """
        network = self._network(params)
        return network.score_prompts(network.encode_images(self.preprocess.device(images, self.image_size)), **tokens)

    def embed(self, params: dict[str, Any], images: jax.Array) -> jax.Array:
        """Embeds images without their prompts, as a pure function: the class token of networks that give tokens.

        Args:
            params, images: as for `apply`.

        Returns:
            [B, D] float32, unit vectors.
        """
        embeds = self._network(params).encode_images(self.preprocess.device(images, self.image_size))
        return unit(embeds if embeds.ndim == 2 else embeds[:, 0])

    def score(self, prompt: str | Sequence[str], image: Any) -> float | list[float]:
        """Scores each image for its prompt.

        Args:
            prompt: one prompt, or a list with a prompt for each image (or several for the one image).
            image: a PIL image, a path, or an array (uint8, uint16, or floating point in [0, 1]), [H, W] or [H, W, 3];
                or a list of those, or an array [B, H, W, 3].

        Returns:
            A float for one prompt and one image that is not in a list; else a list of floats.

        Raises:
            ValueError: lists have different lengths, or an image cannot be used (`preprocess.ImageError`).
            FileNotFoundError: an image does not exist.
        """
        images, single_image = preprocess.as_image_list(image)
        prompts = pair_prompts(prompt, images)
        rewards = self._rewards(prompts, images)
        return rewards[0] if single_image and isinstance(prompt, str) else rewards

    def inference_rank(self, prompt: str, images: Any) -> tuple[list[int], list[float]]:
        """Ranks images for a prompt.

        Args:
            prompt, images: as for `score`; one image counts as a list of one.

        Returns:
            (ranks, rewards): lists in the order of `images`; rank 1 is the highest reward; of equal rewards the
            first in the list ranks better.
        """
        images, _ = preprocess.as_image_list(images)
        prompts = pair_prompts(prompt, images)
        if len(prompts) != len(images):
            raise ValueError(f"{len(prompts)} prompts for {len(images)} images; pass one prompt, or one for each image")
        rewards = self._rewards(prompts, images)
        return ranks_of(rewards), rewards

    def prepare(self, image: Any, name: str = "") -> np.ndarray:
        """Preprocesses one image for `score_prepared`; thread-safe.

        Args:
            image: as for `score`, one image.
            name: name of the image in errors, before its path if it has one.

        Returns:
            float32 [S, S, 3].

        Raises:
            preprocess.ImageError: the image cannot be used.
        """
        return self.preprocess.host(image, self.image_size, name, self.image_rule)

    def score_prepared(self, prompts: Sequence[str], pixels: Sequence[np.ndarray]) -> jax.Array:
        """Starts to score at most `batch_size` pairs, without waiting for the result.

        Args:
            prompts: list of B texts.
            pixels: list of B arrays from `prepare`.

        Returns:
            [B] float32, a JAX array.
        """
        tokens = self.tokenize(prompts)
        self._place_params()
        rows = self._chunk_size(len(prompts))
        embeds = self._encode(self.params, self._on_devices(np.stack(pixels), rows))
        inputs = {name: self._on_devices(array, rows) for name, array in tokens.items()}
        return self._score(self.params, embeds, inputs)[: len(prompts)]

    def score_grad(self, prompts: str | Sequence[str], images: jax.Array | np.ndarray) -> jax.Array:
        """Scores that are differentiable in `images`, e.g. `jax.grad(lambda x: reward.score_grad(p, x).sum())`.

        Args:
            prompts: a list of B prompts, or one for all images.
            images: [B, H, W, 3] floating point in [0, 1].

        Returns:
            [B] float32 array.
        """
        images = jnp.asarray(images)
        if images.ndim != 4:
            raise preprocess.ImageError(f"expected images [B, H, W, 3], not {list(images.shape)}")
        prompts = [prompts] * len(images) if isinstance(prompts, str) else list(prompts)
        if len(prompts) != len(images):
            raise ValueError(f"{len(prompts)} prompts for {len(images)} images; pass one prompt, or one for each image")
        self._place_params()
        spec = PartitionSpec("data") if len(images) % self._mesh.size == 0 else PartitionSpec()
        images = jax.device_put(images, NamedSharding(self._mesh, spec))
        return self._apply(self.params, images, self.tokenize(prompts))

    def _network(self, params):
        return nnx.merge(self._graphdef, params)

    def _place_params(self):
        """Replicates the parameters on all devices at the first use."""
        if not self._placed:
            self.params = jax.device_put(self.params, NamedSharding(self._mesh, PartitionSpec()))
            self._placed = True

    def _chunk_size(self, count):
        """Rows per batch: the batch size, or a smaller `count` rounded up by less than a quarter.

        So few programs are compiled: 1 to 8, 10, 12, 14, 16, 20, 24, ...
        """
        step = 1 << max(0, (count - 1).bit_length() - 3)
        rows = min(self.batch_size, -(-count // step) * step)
        return -(-rows // self._mesh.size) * self._mesh.size

    def _on_devices(self, array, rows):
        """Pads `array` to `rows` by repeating its last row, then shards it over the devices."""
        padding = [(0, rows - len(array))] + [(0, 0)] * (array.ndim - 1)
        return jax.device_put(np.pad(array, padding, mode="edge"), NamedSharding(self._mesh, PartitionSpec("data")))

    def _rewards(self, prompts, images):
        """Scores pairs, as a list of floats; a single image is encoded once for all its prompts."""
        tokens = self.tokenize(prompts)
        self._place_params()
        rows = self._chunk_size(len(prompts))
        shared = self._shared_embeds(images[0], rows) if len(images) == 1 else None
        rewards, pending = [], None
        for start in range(0, len(prompts), rows):
            stop = min(start + rows, len(prompts))
            embeds = self._embeds(images[start:stop], start, rows) if shared is None else shared
            inputs = {name: self._on_devices(array[start:stop], rows) for name, array in tokens.items()}
            scores = self._score(self.params, embeds, inputs)[: stop - start]
            # Fetches one chunk late, so that the next images are read while the devices compute.
            rewards += [] if pending is None else pending.tolist()
            pending = scores
        return rewards + pending.tolist()

    def _embeds(self, images, first, rows):
        pixels = [self.prepare(image, f"image {first + i}") for i, image in enumerate(images)]
        return self._encode(self.params, self._on_devices(np.stack(pixels), rows))

    def _shared_embeds(self, image, rows):
        embeds = self._embeds([image], 0, self._mesh.size)[:1]
        return jax.device_put(
            jnp.broadcast_to(embeds, (rows, *embeds.shape[1:])), NamedSharding(self._mesh, PartitionSpec("data"))
        )


def pair_prompts(prompt: str | Sequence[str], images: Sequence[Any]) -> list[str]:
    """Returns a prompt per image, or several prompts for one image; see `Reward.score`.

    Raises:
        ValueError: `prompt` is neither text nor a non-empty list, or its length does not match.
    """
    if isinstance(prompt, str):
        return [prompt] * len(images)
    if not isinstance(prompt, (list, tuple)) or not prompt:
        raise ValueError(f"prompt must be text or a non-empty list of texts, not {prompt!r}")
    if len(prompt) != len(images) and len(images) != 1:
        raise ValueError(f"{len(prompt)} prompts for {len(images)} images; pass one prompt, or one for each image")
    return list(prompt)


def cast_params(params: dict[str, Any], dtype: DTypeLike) -> dict[str, Any]:
    """Casts matrices to `dtype`, vectors (norms, biases) and the head to float32."""

    def cast(path, array):
        narrow = array.ndim >= 2 and path[0].key != "mlp"
        return array.astype(dtype if narrow else jnp.float32)

    return jax.tree_util.tree_map_with_path(cast, params)


def held_params(module: nnx.Module, dtype: DTypeLike) -> dict[str, Any]:
    """Returns the parameters of an abstract network as `jax.ShapeDtypeStruct`, in the dtypes of `cast_params`."""
    return jax.eval_shape(lambda params: cast_params(params, named_dtype(dtype)), mapping.params_of(module))


def named_dtype(dtype: DTypeLike) -> DTypeLike:
    """Returns the supported dtype of this name; also accepts a dtype.

    Raises:
        ValueError: the dtype is not supported.
    """
    name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {name!r}")
    return DTYPES[name]


def local_devices(device: str | jax.Device | None = None) -> list[jax.Device]:
    """Returns the devices of this process that `device` selects (see `Reward`).

    Raises:
        ValueError: there is no such device.
    """
    if device is None:
        return jax.local_devices()
    if isinstance(device, jax.Device):
        return [device]
    platform, _, index = str(device).partition(":")
    found = []
    with contextlib.suppress(RuntimeError):  # jax raises it for a platform that does not exist
        found = jax.local_devices(backend={"cuda": "gpu"}.get(platform, platform))
    if index:
        found = [found[int(index)]] if index.isdigit() and int(index) < len(found) else []
    if not found:
        here = ", ".join(f"{device.platform}:{i}" for i, device in enumerate(jax.local_devices()))
        raise ValueError(f"device {str(device)!r} does not exist; this machine has {here} and cpu")
    return found


def ranks_of(rewards: Sequence[float]) -> list[int]:
    """Ranks rewards, 1 for the highest; of equal rewards the first ranks better."""
    order = np.argsort(-np.asarray(rewards, np.float32), kind="stable")
    ranks = np.empty(len(order), int)
    ranks[order] = np.arange(1, len(order) + 1)
    return ranks.tolist()
