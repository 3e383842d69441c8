"""Stable Diffusion 3.5-medium at full size, of random weights: some minutes, 10 GB of disk and 14 GB of memory. Only
the CLIP encoders are small. The weights are bfloat16 numbers, the arithmetic is float32."""

import multiprocessing

import jax
import numpy as np
import pytest
import tiny_sd3

pytest.importorskip("torch", reason="the reference is PyTorch diffusers")
pytest.importorskip("diffusers", reason="the reference is PyTorch diffusers")

from imagereward_jax.models.mmdit_config import SD35_MEDIUM
from imagereward_jax.pipelines import open_pipeline

pytestmark = pytest.mark.slow

# As in its vae/config.json.
VAE = tiny_sd3.VAE | {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
}
PROMPT, SIZE, STEPS, GUIDANCE = "a red circle", 64, 3, 5.0


def write_theirs(folder, noise):
    """Their model in folder/model, and its image of the noise in folder/theirs.npy."""
    import torch

    pipe = tiny_sd3.make(
        folder / "tokenizers", with_t5=False, transformer=SD35_MEDIUM, vae=VAE, projections=(768, 1280)
    )
    pipe.to(torch.bfloat16)
    pipe.to(torch.float32)
    np.save(folder / "theirs.npy", torch_image(pipe, noise))
    pipe.to(torch.bfloat16).save_pretrained(folder / "model")


def open_ours(folder, noise):
    """The image that they make of our export."""
    import diffusers
    import torch

    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(folder / "export", text_encoder_3=None, tokenizer_3=None)
    np.save(folder / "again.npy", torch_image(pipe.to(torch.float32), noise))


def torch_image(pipe, noise):
    import torch

    return pipe(
        PROMPT, height=SIZE, width=SIZE, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
        latents=torch.from_numpy(np.moveaxis(noise, -1, 1).copy()), output_type="np",
    ).images  # fmt: skip


def elsewhere(function, *arguments):
    """Runs it in a process of its own, whose memory is then free."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_an_image_and_an_export_are_those_of_diffusers(tmp_path):
    """Ours is theirs within 1e-3, in float32; of our export they make their own image again, to the bit."""
    noise = np.random.default_rng(0).standard_normal((1, SIZE // 8, SIZE // 8, 16)).astype(np.float32)
    elsewhere(write_theirs, tmp_path, noise)
    expected = np.load(tmp_path / "theirs.npy")
    assert expected.std() > 0.05, "a flat image would say nothing"

    pipeline = open_pipeline(tmp_path / "model")
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # NumPy arrays would be copied by the sampling program

    def load(dtype):
        shapes = pipeline.abstract_params()
        return pipeline.load_params(
            jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=here), shapes)
        )

    params = load(np.float32)
    sampler = pipeline.make_sampler("euler", STEPS, 0.0, SIZE, SIZE)
    ids, negative_ids = pipeline.tokenize([PROMPT]), pipeline.tokenize([""])
    sample = jax.jit(
        lambda params, noise: pipeline.sample(
            params, ids, negative_ids, noise, sampler=sampler, guidance_scale=GUIDANCE
        )
    )
    actual = np.asarray(sample(params, noise))
    print("largest difference", np.abs(actual - expected).max())
    np.testing.assert_allclose(actual, expected, atol=1e-3)

    del params
    pipeline.save(tmp_path / "export", load(jax.numpy.bfloat16))
    elsewhere(open_ours, tmp_path, noise)
    np.testing.assert_array_equal(np.load(tmp_path / "again.npy"), expected)
