"""A Stable Diffusion 3.5 of some 100,000 random numbers, saved by PyTorch diffusers: images of 16 x 16, latents of
8 x 8 x 16, 16 tokens of CLIP. Of three layers the first has a second attention; queries and keys are normalised."""

from pathlib import Path

import tiny_sd1
import tiny_sdxl

WIDTH = 72  # of T5, and of the prompts that the transformer reads
SCHEDULER = {"shift": 3.0}
TRANSFORMER = {
    "sample_size": 8,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": WIDTH,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 24 + 20,
    "pos_embed_max_size": 6,
    "dual_attention_layers": (0,),
    "qk_norm": "rms_norm",
}
VAE = tiny_sd1.VAE | {
    "latent_channels": 16,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
T5 = {
    "d_model": WIDTH,
    "d_kv": 6,
    "d_ff": 40,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 110,
    "feed_forward_proj": "gated-gelu",
}


def make(folder, *, with_t5=True, transformer=TRANSFORMER, vae=VAE, projections=(24, 20)):
    """PyTorch diffusers' pipeline of random networks. The tokenizers' files are written into `folder`."""
    import diffusers
    import torch
    import transformers

    first, second = tiny_sdxl.text_encoders(tiny_sdxl.write_tokenizers(folder))
    torch.manual_seed(0)
    clips = [
        transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**(config | {"projection_dim": size})))
        for config, size in zip((first, second), projections)
    ]
    folder = Path(folder)
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(**transformer).eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=diffusers.AutoencoderKL(**vae).eval(),
        text_encoder=clips[0].eval(),
        text_encoder_2=clips[1].eval(),
        text_encoder_3=transformers.T5EncoderModel(transformers.T5Config(**T5)).eval() if with_t5 else None,
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        tokenizer_2=transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
        tokenizer_3=t5_tokenizer() if with_t5 else None,
    )
    for network in (pipe.transformer, pipe.vae):
        randomise(network)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def t5_tokenizer():
    """A tokenizer of T5's kind with a handful of pieces."""
    import transformers

    letters = [(piece, -2.0 - index) for index, piece in enumerate("▁aeioulrd")]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return transformers.T5Tokenizer(vocab=special + letters, extra_ids=0)


def randomise(network):
    """Gives a network random weights of unit gain, norms and biases included, so that no layer passes unnoticed."""
    import torch

    with torch.no_grad():
        for name, weight in network.named_parameters():
            noise = torch.randn(weight.shape)
            if weight.ndim == 1:
                weight.copy_(0.1 * noise if name.endswith("bias") else 1 + 0.2 * noise)
            else:
                weight.copy_(noise * weight[0].numel() ** -0.5)


def save_small(folder, *, with_t5=True):
    """Saves the pipeline of a model that compiles in a fraction of the time, of images of 8 x 8: the VAE has one level
    and halves nothing, the transformer two layers; returns the model's folder."""
    vae = {"block_out_channels": [8], "down_block_types": ["DownEncoderBlock2D"], "layers_per_block": 1}
    vae = VAE | vae | {"up_block_types": ["UpDecoderBlock2D"]}
    pipe = make(Path(folder) / "tokenizers", with_t5=with_t5, transformer=TRANSFORMER | {"num_layers": 2}, vae=vae)
    pipe.save_pretrained(Path(folder) / "model")
    return Path(folder) / "model"
