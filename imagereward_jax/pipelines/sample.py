"""Samples images for prompts, for the commands, evaluation and on-policy methods alike: padding, mesh and seeds."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from imagereward_jax.diffusion.sampler import Sampler
from imagereward_jax.models.sharding import batch_over
from imagereward_jax.pipelines.base import Batch, Params, TextToImage
from imagereward_jax.pipelines.blend import Blend


class ImageSampler:
    """Makes images of one size with one sampler, batch by batch over a mesh; compiles once for any number of images.

    Args:
        pipeline: the model. sampler: a `diffusion.sampler.Sampler`.
        mesh: batches are sharded over all its axes; every process of it has to make the same calls.
        batch_size: images at a time over the whole mesh; rounded up to a multiple of its devices.
        height, width: pixels.
        guidance_scale: 1 or less switches guidance off, which halves the work.
        blend: how a tuned model shares the steps with its base model (`pipelines.blend`); None for one model.
        encode: prompts -> their conditions, if the text encoders are not among the params; None: they are.

    Raises:
        ValueError: the size is not one that the model can make, or `blend` is for another number of steps.
    """

    def __init__(
        self,
        pipeline: TextToImage,
        sampler: Sampler,
        mesh: Mesh,
        batch_size: int,
        *,
        height: int,
        width: int,
        guidance_scale: float = 1.0,
        blend: Blend | None = None,
        encode: Callable[[Sequence[str]], Batch] | None = None,
    ):
        if blend is not None and len(blend.positive) != sampler.num_steps:
            raise ValueError(f"blend is made for {len(blend.positive)} steps, the sampler has {sampler.num_steps}")
        self.pipeline, self.sampler, self.mesh, self.blend = pipeline, sampler, mesh, blend
        self.batch_size = -(-batch_size // mesh.size) * mesh.size
        self.guidance_scale, self._encode = guidance_scale, encode or pipeline.tokenize
        self.latent_shape = pipeline.latent_shape(height, width)
        self._rows = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._sample = jax.jit(self._sample_batch, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __call__(
        self,
        params: Params,
        prompts: Sequence[str],
        *,
        negative_prompts: Sequence[str] | None = None,
        keys: jax.Array | None = None,
        noise: np.ndarray | None = None,
        step_keys: jax.Array | None = None,
        guidance_scale: float | None = None,
        base: Params | None = None,
        progress: Callable[[int], Any] | None = None,
    ) -> np.ndarray:
        """Makes images float32 [N, H, W, 3] in [0, 1] for N prompts; an image does not depend on the others.

        Args:
            params: on the mesh (arrays of the host would be sent there for each batch).
            negative_prompts: one per image; empty prompts by default. Read only with guidance.
            keys: [N] jax keys to draw the initial noise from, if `noise` is None.
            noise: initial noise, standard normal [N, h, w, c].
            step_keys: [N] jax keys for the noise of stochastic samplers; `keys` by default.
            guidance_scale: of these images; None for the sampler's own. All scales above 1 share one program.
            base: of a sampler with `blend`, the base model's components that differ from `params`, on the mesh.
            progress: called with the number of images of each batch when they are there.

        Raises:
            ValueError: neither keys nor noise are given, a stochastic sampler has no keys, or one of `blend` and `base`
                is given without the other.
        """
        if (base is None) != (self.blend is None):
            raise ValueError("blend= of ImageSampler and base= of its calls need each other: pass both or neither")
        if keys is None and noise is None:
            raise ValueError("pass keys= to draw the initial noise from, or noise=")
        step_keys = keys if step_keys is None else step_keys
        if step_keys is None and self.sampler.stochastic:
            raise ValueError("this sampler adds noise at its steps: pass keys= or step_keys=")
        if step_keys is None:  # no step reads them, but the program, which serves every sampler, has a place for them
            step_keys = jax.random.split(jax.random.key(0), len(prompts))
        guidance_scale = self.guidance_scale if guidance_scale is None else guidance_scale
        guided = guidance_scale > 1.0
        negative = list(negative_prompts or [""] * len(prompts)) if guided else None
        inputs = {
            "cond": self._encode(list(prompts)),
            "negative_cond": self._encode(negative) if guided else None,
            "keys": _key_data(keys) if noise is None else None,
            "noise": None if noise is None else np.asarray(noise, np.float32),
            "step_keys": _key_data(step_keys),
        }
        images, scale = [], np.float32(guidance_scale)
        for start in range(0, len(prompts), self.batch_size):
            rows = jax.tree.map(self._put, _rows_of(inputs, start, self.batch_size))
            images.append(np.asarray(self._sample(params, base, self.sampler, scale, rows)))
            if progress is not None:
                progress(min(self.batch_size, len(prompts) - start))
        return np.concatenate(images)[: len(prompts)]

    def _put(self, rows):
        """Shards one batch's array, the same on every process, over the mesh."""
        return jax.make_array_from_callback(rows.shape, self._rows, lambda index: rows[index])

    def _sample_batch(self, params, base, sampler, guidance_scale, inputs):
        noise, step_keys = inputs["noise"], inputs["step_keys"]
        if noise is None:
            keys = jax.random.wrap_key_data(inputs["keys"])
            noise = jax.vmap(lambda key: jax.random.normal(key, self.latent_shape))(keys)
        with batch_over(self.mesh):
            return self.pipeline.sample(
                params,
                inputs["cond"],
                inputs["negative_cond"],
                noise,
                sampler=sampler,
                guidance_scale=guidance_scale,
                key=None if step_keys is None else jax.random.wrap_key_data(step_keys),
                blend=self.blend,
                base=base,
            )


def _key_data(keys):
    return None if keys is None else np.asarray(jax.random.key_data(jnp.asarray(keys)))


def _rows_of(inputs, start, count):
    """Takes `count` rows from `start` on; repeats the last row past the end, so that all batches have one shape."""

    def take(array):
        return array[np.minimum(np.arange(start, start + count), len(array) - 1)]

    return jax.tree.map(take, inputs)
