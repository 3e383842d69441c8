"""The ImageReward score: how much people would like a picture for a prompt (arXiv 2304.05977)."""

import contextlib
import functools
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from imagereward_jax.models.blip import ImageRewardModel
from imagereward_jax.models.blip_config import ImageRewardConfig
from imagereward_jax.rewards import images as pictures
from imagereward_jax.rewards.tokens import PromptTokenizer
from imagereward_jax.weights import files, mapping

CONFIG_FILE, WEIGHTS_FILE, VOCAB_FILE = "config.json", "model.safetensors", "vocab.txt"
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class ImageReward:
    """The scorer. `imagereward_jax.load` makes one; higher scores are better, about N(0, 1) for v1.0.

    Args:
        config: an `ImageRewardConfig`.
        params: nested dict of arrays. Matrices are held in `dtype`, vectors and the head in float32.
        tokenizer: a `PromptTokenizer`.
        dtype: "float32" (equal to the original) or "bfloat16" (half the memory, about two digits).
        device: where `score` computes: None for every local device, a platform ("cpu", "gpu", "cuda", "tpu"), one
            device of it ("cuda:1"), or a `jax.Device`.
        batch_size: pictures at a time, over all devices together.

    Raises:
        ValueError: the tokenizer has another vocabulary size than the network, or an argument is not valid.
    """

    def __init__(self, config, params, tokenizer, *, dtype="float32", device=None, batch_size=16):
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be a positive whole number, not {batch_size!r}")
        check_vocabulary(config, tokenizer)
        self.config = config
        self.tokenizer = tokenizer
        self.dtype = named_dtype(dtype)
        self.batch_size = batch_size
        self.params = cast_params(params, self.dtype)
        self._module = abstract_module(config, self.dtype)
        self._graphdef = nnx.graphdef(self._module)
        self._mesh = Mesh(np.array(local_devices(device)), ("data",))
        self._placed = False
        self._encode = jax.jit(lambda params, pixels: self._network(params).encode_images(pixels))
        self._score = jax.jit(lambda params, *inputs: self._network(params).score_prompts(*inputs))
        self._apply = jax.jit(self.apply)

    @classmethod
    def from_config(cls, config, vocab_file, key, **options):
        """A scorer with random weights, to be trained.

        Args:
            config: an `ImageRewardConfig` or its dict.
            vocab_file: a BERT vocab.txt; two tokens are added to it.
            key: a `jax.random` key.
            **options: those of the class.
        """
        if isinstance(config, dict):
            config = ImageRewardConfig.from_dict(config)
        tokenizer = PromptTokenizer.from_file(vocab_file, config.max_prompt_tokens)
        check_vocabulary(config, tokenizer)
        params = mapping.params_of(ImageRewardModel(config, rngs=nnx.Rngs(params=key)))
        return cls(config, params, tokenizer, **options)

    def tokenize(self, prompts):
        """{"input_ids", "attention_mask"}: np.int32 [B, max_prompt_tokens] for a list of prompts."""
        return self.tokenizer(prompts)

    def apply(self, params, images, tokens):
        """Scores, as a pure and differentiable function.

        Args:
            params: nested dict, as `self.params`.
            images: [B, H, W, 3] floating point in [0, 1].
            tokens: what `tokenize` gives, for B prompts.

        Returns:
            [B] float32.
        """
        pixels = pictures.device_pixels(images, self.config.vision.image_size)
        return self._network(params)(pixels, tokens["input_ids"], tokens["attention_mask"])

    def score(self, prompt, image):
        """How well each picture answers its prompt.

        Args:
            prompt: one prompt, or a list with a prompt for each image (or several for the one image).
            image: a PIL image, a path, or an array (uint8, or floating point in [0, 1]), [H, W] or [H, W, 3]; or a
                list of those, or an array [B, H, W, 3].

        Returns:
            A float for one prompt and one image that is not in a list; else a list of floats.

        Raises:
            ValueError: lists of different lengths, or a picture that cannot be used (`images.ImageError`).
            FileNotFoundError: a picture does not exist.
        """
        images, single_image = pictures.as_image_list(image)
        prompts = self._prompts_for(prompt, images)
        rewards = self._rewards(prompts, images)
        return rewards[0] if single_image and isinstance(prompt, str) else rewards

    def inference_rank(self, prompt, images):
        """Ranks pictures for a prompt.

        Args:
            prompt, images: as for `score`; one image counts as a list of one.

        Returns:
            (ranks, rewards): lists in the order of `images`; rank 1 is the highest reward, and of equal rewards
            the first in the list has the better rank.
        """
        images, _ = pictures.as_image_list(images)
        prompts = self._prompts_for(prompt, images)
        if len(prompts) != len(images):
            raise ValueError(f"{len(prompts)} prompts for {len(images)} images; pass one prompt, or one for each image")
        rewards = self._rewards(prompts, images)
        return ranks_of(rewards), rewards

    def prepare(self, image, name="image"):
        """One picture made ready for `score_prepared`; safe to call in several threads.

        Args:
            image: what `score` takes for one picture.
            name: how an error names anything but a path.

        Returns:
            float32 [S, S, 3].

        Raises:
            images.ImageError: the picture cannot be used.
        """
        return pictures.host_pixels(image, self.config.vision.image_size, name)

    def score_prepared(self, prompts, pixels):
        """Scores of at most `batch_size` pairs, started and not waited for.

        Args:
            prompts: list of B texts.
            pixels: list of B arrays of `prepare`.

        Returns:
            [B] float32, a JAX array.
        """
        tokens = self.tokenize(prompts)
        self._place_params()
        rows = self._chunk_size(len(prompts))
        embeds = self._encode(self.params, self._on_devices(np.stack(pixels), rows))
        inputs = [self._on_devices(tokens[name], rows) for name in ("input_ids", "attention_mask")]
        return self._score(self.params, embeds, *inputs)[: len(prompts)]

    def score_grad(self, prompts, images):
        """Scores that can be differentiated by `images`, e.g. `jax.grad(lambda x: reward.score_grad(p, x).sum())`.

        Args:
            prompts: a list of B prompts, or one for all images.
            images: [B, H, W, 3] floating point in [0, 1].

        Returns:
            [B] float32 array.
        """
        images = jnp.asarray(images)
        if images.ndim != 4:
            raise pictures.ImageError(f"expected images [B, H, W, 3], not {list(images.shape)}")
        prompts = [prompts] * len(images) if isinstance(prompts, str) else list(prompts)
        if len(prompts) != len(images):
            raise ValueError(f"{len(prompts)} prompts for {len(images)} images; pass one prompt, or one for each image")
        self._place_params()
        spec = PartitionSpec("data") if len(images) % self._mesh.size == 0 else PartitionSpec()
        images = jax.device_put(images, NamedSharding(self._mesh, spec))
        return self._apply(self.params, images, self.tokenize(prompts))

    def save(self, folder, params=None, *, overwrite=False):
        """Writes config.json, model.safetensors (PyTorch's key names) and vocab.txt, which `load` reads.

        A new folder appears whole or not at all; in one that exists each file does.

        Args:
            params: saved instead of `self.params`.

        Raises:
            FileExistsError: the folder holds a model and `overwrite` is False.
        """
        folder = Path(folder)
        if (folder / WEIGHTS_FILE).exists() and not overwrite:
            raise FileExistsError(f"{folder} already holds a model; choose another folder or ask to overwrite it")
        partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
        try:
            partial.mkdir(parents=True)
            config = json.dumps(self.config.to_dict(), indent=2) + "\n"
            (partial / CONFIG_FILE).write_text(config, encoding="utf-8")
            (partial / VOCAB_FILE).write_text(self.tokenizer.vocab, encoding="utf-8", newline="")
            params = self.params if params is None else params
            files.write_safetensors(partial / WEIGHTS_FILE, mapping.to_torch(self._module, params))
            folder.mkdir(exist_ok=True)
            for name in (VOCAB_FILE, CONFIG_FILE, WEIGHTS_FILE):
                os.replace(partial / name, folder / name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _network(self, params):
        return nnx.merge(self._graphdef, params)

    def _prompts_for(self, prompt, images):
        if isinstance(prompt, str):
            return [prompt] * len(images)
        if not isinstance(prompt, (list, tuple)) or not prompt:
            raise ValueError(f"prompt must be text or a list of texts that is not empty, not {prompt!r}")
        if len(prompt) != len(images) and len(images) != 1:
            raise ValueError(f"{len(prompt)} prompts for {len(images)} images; pass one prompt, or one for each image")
        return list(prompt)

    def _place_params(self):
        """Copies the parameters to every device once, when they are first needed there."""
        if not self._placed:
            self.params = jax.device_put(self.params, NamedSharding(self._mesh, PartitionSpec()))
            self._placed = True

    def _chunk_size(self, count):
        """Rows computed at a time: the batch size, or for fewer a power of two, so that few programs are compiled."""
        rows = min(self.batch_size, 1 << (count - 1).bit_length())
        return -(-rows // self._mesh.size) * self._mesh.size

    def _on_devices(self, array, rows):
        """`array` padded to `rows` by repeating its last row, split over the devices."""
        padding = [(0, rows - len(array))] + [(0, 0)] * (array.ndim - 1)
        return jax.device_put(np.pad(array, padding, mode="edge"), NamedSharding(self._mesh, PartitionSpec("data")))

    def _rewards(self, prompts, images):
        """Scores of pairs as a list of floats; a single image is encoded once for all its prompts."""
        tokens = self.tokenize(prompts)
        self._place_params()
        rows = self._chunk_size(len(prompts))
        shared = self._shared_embeds(images[0], rows) if len(images) == 1 else None
        rewards, pending = [], None
        for start in range(0, len(prompts), rows):
            stop = min(start + rows, len(prompts))
            embeds = self._embeds(images[start:stop], start, rows) if shared is None else shared
            inputs = [self._on_devices(tokens[name][start:stop], rows) for name in ("input_ids", "attention_mask")]
            scores = self._score(self.params, embeds, *inputs)[: stop - start]
            # One chunk behind, so that the next pictures are read while the devices compute.
            rewards += [] if pending is None else pending.tolist()
            pending = scores
        return rewards + pending.tolist()

    def _embeds(self, images, first, rows):
        size = self.config.vision.image_size
        pixels = [pictures.host_pixels(image, size, f"image {first + i}") for i, image in enumerate(images)]
        return self._encode(self.params, self._on_devices(np.stack(pixels), rows))

    def _shared_embeds(self, image, rows):
        embeds = self._embeds([image], 0, self._mesh.size)[:1]
        return jax.device_put(
            jnp.broadcast_to(embeds, (rows, *embeds.shape[1:])), NamedSharding(self._mesh, PartitionSpec("data"))
        )


@functools.lru_cache(maxsize=8)
def abstract_module(config, dtype=jnp.float32):
    """The network's structure without arrays; only to be read, as it is shared."""
    return mapping.abstract(lambda: ImageRewardModel(config, dtype=dtype, rngs=nnx.Rngs(0)))


def check_vocabulary(config, tokenizer):
    """Raises ValueError unless the tokenizer has exactly the tokens that the network has embeddings for."""
    if tokenizer.vocab_size != config.text.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens (with [DEC] and [ENC]), the network "
            f"{config.text.vocab_size:,}; pass the vocab.txt that the network was trained with (for ImageReward-v1.0 "
            f"that of bert-base-uncased)"
        )


def cast_params(params, dtype):
    """Matrices to `dtype`; vectors (norms, biases) and the head to float32."""

    def cast(path, array):
        narrow = array.ndim >= 2 and path[0].key != "mlp"
        return array.astype(dtype if narrow else jnp.float32)

    return jax.tree_util.tree_map_with_path(cast, params)


def named_dtype(dtype):
    """A dtype by name, or one that is allowed already."""
    name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {name!r}")
    return DTYPES[name]


def local_devices(device=None):
    """The devices of this process that `device` names (see `ImageReward`)."""
    if device is None:
        return jax.local_devices()
    if isinstance(device, jax.Device):
        return [device]
    platform, _, index = str(device).partition(":")
    found = []
    with contextlib.suppress(RuntimeError):  # what jax raises for a platform that is not there
        found = jax.local_devices(backend={"cuda": "gpu"}.get(platform, platform))
    if index:
        found = [found[int(index)]] if index.isdigit() and int(index) < len(found) else []
    if not found:
        here = ", ".join(f"{device.platform}:{i}" for i, device in enumerate(jax.local_devices()))
        raise ValueError(f"there is no device {str(device)!r} here; there are {here} and cpu")
    return found


def ranks_of(rewards):
    """Ranks from 1 for the highest; of equal rewards the first ranks better."""
    order = np.argsort(-np.asarray(rewards, np.float32), kind="stable")
    ranks = np.empty(len(order), int)
    ranks[order] = np.arange(1, len(order) + 1)
    return ranks.tolist()
