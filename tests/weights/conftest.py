"""A tiny Stable Diffusion of random numbers, built and saved by diffusers and transformers themselves."""

import json
import shutil

import pytest

from imagereward_jax.data.shapes.tokenizers import write_clip_tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """The small CLIP tokenizer of the shapes world."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_clip_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def torch_networks(tokenizer_folder):
    """The PyTorch networks by component, every parameter random (norms and biases too)."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    from transformers import CLIPTextConfig, CLIPTextModel

    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=24,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    vocabulary = json.loads((tokenizer_folder / "vocab.json").read_text())
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=vocabulary["<|startoftext|>"],
        eos_token_id=vocabulary["<|endoftext|>"],
    )
    networks = {"unet": unet, "vae": vae, "text_encoder": CLIPTextModel(config)}
    generator = torch.Generator().manual_seed(0)
    for network in networks.values():
        for parameter in network.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return networks


@pytest.fixture(scope="session")
def expected(torch_networks):
    """Each component's tensors as PyTorch holds them, under the names of the checkpoints on the hub."""
    tensors = {
        name: {key: value.numpy() for key, value in network.state_dict().items() if not key.endswith("position_ids")}
        for name, network in torch_networks.items()
    }
    text = tensors["text_encoder"].items()
    tensors["text_encoder"] = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in text}
    return tensors


@pytest.fixture(scope="session")
def pipeline_folder(torch_networks, tokenizer_folder, tmp_path_factory):
    """A diffusers folder with all its parts; tests must not write into it."""
    from diffusers import DDIMScheduler

    folder = tmp_path_factory.mktemp("pipeline")
    for name, network in torch_networks.items():
        network.save_pretrained(folder / name)
    DDIMScheduler(steps_offset=1, clip_sample=False).save_pretrained(folder / "scheduler")
    parts = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"} | parts))
    shutil.copytree(tokenizer_folder, folder / "tokenizer")
    return folder
