"""DDPO for Stable Diffusion 3.5 medium at 512 px with LoRA and the aesthetic score.

    python -m imagereward_jax.train --config configs/ddpo_sd35_lora.py \\
        --config.model.path=/models/stable-diffusion-3.5-medium --config.reward.path=/models/PickScore_v1 \\
        --config.data.prompts=prompts.txt --config.eval.prompts=held_out.txt --config.data.cache=/data/encoded

As grpo_sd35_lora.py but for the advantages, which compare a reward with the newest 32 of its prompt: few prompts that
come often suit them, as the 45 animals of DDPO's paper (arXiv 2305.13301). Samples are those of Flow-GRPO's stochastic
steps. All of the transformer trains with --config.lora.rank=0 --config.optimizer.learning_rate=1e-5. The aesthetic
score needs its weights (--config.reward.weights) if the hub is out of reach.

Hardware: images at a time are config.method.round_size (32) in sampling and batch_size / accumulation (8) in training,
over all devices. With more devices take a larger round_size and fewer rounds. config.data.cache keeps the encoded
prompts, so that no step runs T5. Result to expect: not measured yet.
"""

from imagereward_jax.recipes import default_config


def get_config():
    """The recipe."""
    config = default_config("ddpo")
    config.steps = 200
    config.batch_size = 128
    config.accumulation = 16
    config.dtype = "bfloat16"
    config.ema_decay = 0.9
    config.model.path = "stabilityai/stable-diffusion-3.5-medium"
    config.reward.path = "Aesthetic"
    config.lora.rank = 32
    config.lora.alpha = 64.0
    config.lora.targets = r"attn\.(?:to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
    config.method.sampler = "flow_sde"
    config.method.eta = 0.7
    config.method.num_steps = 10
    config.method.guidance_scale = 4.5
    config.method.rounds = 8
    config.method.round_size = 32
    config.method.prompt_buffer = 32
    config.data.prompts = "prompts.txt"
    config.optimizer.learning_rate = 3e-4
    config.optimizer.weight_decay = 1e-4
    config.eval.prompts = "held_out.txt"
    config.eval.num_prompts = 32  # two images each
    config.eval.num_steps = 40
    config.eval.guidance_scale = 4.5
    config.eval.every = 20
    config.checkpoint.every = 10
    config.log_every = 1
    return config
