"""Flow-GRPO for Stable Diffusion 3.5 medium at 512 px with LoRA, by the paper's settings (arXiv 2505.05470).

    python -m imagereward_jax.train --config configs/grpo_sd35_lora.py \\
        --config.model.path=/models/stable-diffusion-3.5-medium --config.reward.path=/models/PickScore_v1 \\
        --config.data.prompts=prompts.txt --config.eval.prompts=held_out.txt --config.data.cache=/data/encoded

The reward may be any score, a mixture or a function, module:function. Each step samples 48 groups of 24 images with 10
stochastic steps and guidance 4.5, and makes two updates; evaluation takes 40 steps of the flow's ODE. Other papers are
other fields, see docs/groups.md: the window of Flow-GRPO-Fast, for example, is --config.method.window_size=2
--config.method.window_high=5 --config.method.window_move=random --config.method.clip_range=1e-5.

Hardware: images at a time are config.method.round_size (24) in sampling and batch_size / accumulation (8) in training,
over all devices. With more devices take a larger round_size and fewer rounds. config.data.cache keeps the encoded
prompts, so that no step runs T5. Result to expect: not measured yet.
"""

from imagereward_jax.recipes import default_config


def get_config():
    """The recipe."""
    config = default_config("flow_grpo")
    config.steps = 1000
    config.batch_size = 576
    config.accumulation = 72
    config.dtype = "bfloat16"
    config.ema_decay = 0.9
    config.model.path = "stabilityai/stable-diffusion-3.5-medium"
    config.reward.path = "PickScore"
    config.lora.rank = 32
    config.lora.alpha = 64.0
    config.lora.targets = r"attn\.(?:to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
    config.method.rounds = 48
    config.method.round_size = 24
    config.method.penalty_weight = 0.01  # 0.04 for GenEval and OCR
    config.data.prompts = "prompts.txt"
    config.optimizer.learning_rate = 3e-4
    config.optimizer.weight_decay = 1e-4
    config.eval.prompts = "held_out.txt"
    config.eval.num_prompts = 32  # two images each
    config.eval.num_steps = 40
    config.eval.guidance_scale = 4.5
    config.eval.every = 50
    config.checkpoint.every = 10
    config.log_every = 1
    return config
