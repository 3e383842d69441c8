"""One supervised LoRA step on a Stable Diffusion 3 against the same step in PyTorch with PEFT's layers."""

import jax
import numpy as np
import pytest
import tiny_sd3

torch = pytest.importorskip("torch", reason="the reference is PyTorch diffusers")
diffusers = pytest.importorskip("diffusers", reason="the reference is PyTorch diffusers")
peft = pytest.importorskip("peft", reason="the reference is PyTorch PEFT")

from sd3_reference import clean_predictions

from imagereward_jax.methods.base import Models
from imagereward_jax.methods.denoising import USUAL, draw_share, make_loss
from imagereward_jax.models import lora
from imagereward_jax.models.param_tree import join, split, trainable_mask
from imagereward_jax.pipelines import open_pipeline
from imagereward_jax.weights import mapping

RANK, ALPHA = 3, 6
TARGETS = lora.ATTENTION + r"|ff\.net\.0\.proj|norm1\.linear|proj_out"


def test_loss_and_every_lora_gradient_agree_with_peft(tmp_path):
    """Two images, attention, feed-forward and modulation layers: the loss within 1e-5 relative, each gradient within
    1e-3 of its largest entry; the optimizer would see no other weight."""
    pipeline = open_pipeline(tiny_sd3.save_small(tmp_path)).with_lora("transformer", TARGETS, rank=RANK, alpha=ALPHA)
    network, rng = pipeline.networks["transformer"], np.random.default_rng(4)
    adapter = jax.tree.map(
        lambda leaf: 0.2 * rng.standard_normal(leaf.shape).astype(np.float32),
        mapping.params_of(network, lora.LoRAParam),
    )
    params = join(pipeline.load_params(), {"transformer": adapter})
    prompts = jax.jit(pipeline.encode_prompts)(params, pipeline.tokenize(["a red circle", "a cross"]))
    batch, key = {"image": rng.random((2, 8, 8, 3), np.float32), "cond": prompts}, jax.random.key(4)
    trainable, frozen = split(params, trainable_mask(params, ("transformer",), lora=True))
    loss = make_loss(pipeline)

    @jax.jit
    def function(trainable):
        return jax.value_and_grad(lambda some: loss(Models(join(frozen, some)), batch, key)[0])(trainable)

    value, gradient = function(trainable)
    encode_key, noise_key, time_key = jax.random.split(key, 3)
    latents = jax.jit(pipeline.encode)(params, batch["image"], encode_key)
    noise = jax.random.normal(noise_key, latents.shape)
    share = draw_share(time_key, 2, USUAL)

    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(tmp_path / "model")
    tensors = mapping.to_torch(network, adapter, kind=lora.LoRAParam)
    names = [name.removesuffix(".lora_A.weight") for name in tensors if "lora_A" in name]
    pipe.transformer.requires_grad_(False)
    pipe.transformer.add_adapter(peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names))
    weights = {
        name.replace(".default", ""): weight
        for name, weight in pipe.transformer.named_parameters()
        if weight.requires_grad
    }
    assert weights.keys() == tensors.keys()
    for name, weight in weights.items():
        weight.data = torch.from_numpy(tensors[name].copy())
    embeds = prompts["prompt_embeds"], prompts["pooled_prompt_embeds"]
    prediction, target, _ = clean_predictions(pipe, latents, noise, share, embeds)
    expected = torch.mean(((prediction - target) ** 2).reshape(2, -1), 1).mean()
    expected.backward()

    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    ours = mapping.to_torch(network, gradient["transformer"], kind=lora.LoRAParam)
    assert len(ours) == len(weights) == len(jax.tree.leaves(trainable))
    for name, weight in weights.items():
        theirs = weight.grad.numpy()
        assert np.abs(theirs).max() > 0, name
        np.testing.assert_allclose(ours[name], theirs, rtol=0, atol=1e-3 * np.abs(theirs).max(), err_msg=name)
