"""The sampling service: any number of images from one compiled program, each by its own seed."""

import jax
import numpy as np
import pytest
import tiny_sd1
from jax.sharding import Mesh

from imagereward_jax.diffusion.samplers import make_sampler
from imagereward_jax.pipelines.sample import ImageSampler

PROMPTS = ["a red circle", "a big blue square", "a green cross"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny_sd1.make_one_level(tmp_path_factory.mktemp("tokenizer"))


def image_sampler(pipeline, name="ddpm", **options):
    sampler = make_sampler(name, pipeline.scheduler_config, 2)
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    return ImageSampler(pipeline, sampler, mesh, 2, height=8, width=8, **options)


def test_images_by_keys_whatever_the_batch(made):
    """One program for 3, 1 and 2 images; the same images (1e-5) as `sample` gives from the noise of the keys."""
    pipeline, params = made
    sample = image_sampler(pipeline, guidance_scale=3.0)
    keys = jax.random.split(jax.random.key(4), 3)
    images = sample(params, PROMPTS, keys=keys)
    assert images.shape == (3, 8, 8, 3) and np.abs(images[0] - images[1]).mean() > 0.01
    np.testing.assert_allclose(sample(params, PROMPTS[2:], keys=keys[2:]), images[2:], atol=1e-6)
    np.testing.assert_allclose(sample(params, PROMPTS[:2], keys=keys[:2]), images[:2], atol=1e-6)
    assert sample._sample._cache_size() == 1
    noise = jax.vmap(lambda key: jax.random.normal(key, pipeline.latent_shape(8, 8)))(keys[:2])
    ids, negative = pipeline.tokenize(PROMPTS[:2]), pipeline.tokenize([""] * 2)
    expected = jax.jit(
        lambda params: pipeline.sample(
            params, ids, negative, noise, sampler=sample.sampler, guidance_scale=3.0, key=keys[:2]
        )
    )(params)
    np.testing.assert_allclose(images[:2], expected, atol=1e-5)


def test_negative_prompts_noise_and_step_keys_matter(made):
    pipeline, params = made
    sample = image_sampler(pipeline, guidance_scale=3.0)
    keys, others = jax.random.split(jax.random.key(4), 2), jax.random.split(jax.random.key(5), 2)
    first = sample(params, PROMPTS[:2], keys=keys)
    for options in ({"negative_prompts": ["green"] * 2}, {"step_keys": others}, {"keys": others, "step_keys": keys}):
        assert np.abs(sample(params, PROMPTS[:2], **{"keys": keys} | options) - first).max() > 1e-3
    with pytest.raises(ValueError, match="pass keys= to draw"):
        sample(params, PROMPTS[:2])
    with pytest.raises(ValueError, match="adds noise at its steps"):
        sample(params, PROMPTS[:2], noise=np.zeros((2, 8, 8, 4)))
    with pytest.raises(ValueError, match="height=0"):
        ImageSampler(pipeline, sample.sampler, sample.mesh, 2, height=0, width=8)


def test_conditions_or_ids(made):
    """`sample` takes either and computes the same."""
    pipeline, params = made
    sampler = make_sampler("ddim", pipeline.scheduler_config, 2)
    noise = np.random.default_rng(0).standard_normal((1, 8, 8, 4)).astype(np.float32)
    ids = pipeline.tokenize(PROMPTS[:1])
    cond = jax.jit(pipeline.encode_prompts)(params, ids)
    assert pipeline.rows(cond) == 1
    sample = jax.jit(lambda given: pipeline.sample(params, given, None, noise, sampler=sampler))
    np.testing.assert_allclose(sample(cond), sample(ids), atol=1e-5)
