"""DDPO for Stable Diffusion 1.4 or 1.5 at 512 px with LoRA, by the settings of ddpo-pytorch's runs (arXiv 2305.13301).

    python -m imagereward_jax.train --config configs/ddpo_sd15.py \\
        --config.model.path=/models/stable-diffusion-v1-5 --config.reward.path=/models/ImageReward.pt \\
        --config.data.prompts=animals.txt --config.eval.prompts=animals.txt

The model is a diffusers folder or its name on the hub; prompts are a JSON, JSONL, CSV, text or Parquet file. The
reward may be any score, `jpeg-compressibility`, or module:function, a Python function of yours. Each step samples 256
images with 50 DDIM steps at eta 1 and guidance 5, compares each with the newest 32 of its prompt, and makes two updates
of 128 samples x 50 sampler steps. Few prompts that come often, as the 45 animals of the paper, suit these statistics;
with many pass --config.method.prompt_buffer=0.

Hardware: ddpo-pytorch used 8 GPUs of 80 GB. Images at a time are config.method.round_size (64) in sampling and
batch_size / accumulation (8) in training, over all devices; on one GPU fewer in sampling, e.g.
--config.method.round_size=16 --config.method.rounds=16. All of the UNet trains with --config.lora.rank=0
--config.optimizer.learning_rate=1e-5. Result to expect: not measured yet.
"""

from imagereward_jax.recipes import default_config


def get_config():
    """The recipe."""
    config = default_config("ddpo")
    config.seed = 42
    config.steps = 200
    config.batch_size = 128
    config.accumulation = 16
    config.dtype = "bfloat16"
    config.model.path = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    config.reward.path = "ImageReward-v1.0"
    config.lora.rank = 4
    config.method.rounds = 4
    config.method.round_size = 64
    config.method.prompt_buffer = 32
    config.data.prompts = "prompts.txt"
    config.optimizer.learning_rate = 3e-4
    config.optimizer.weight_decay = 1e-4
    config.eval.prompts = "held_out.txt"
    config.eval.num_prompts = 32  # two images each
    config.eval.sampler = "ddim"
    config.eval.eta = 1.0
    config.eval.num_steps = 50
    config.eval.guidance_scale = 5.0
    config.eval.every = 20
    config.checkpoint.every = 5
    config.log_every = 1
    return config
