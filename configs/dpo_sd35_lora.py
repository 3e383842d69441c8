"""Diffusion-DPO in its flow form for Stable Diffusion 3.5 medium at 512 px with LoRA.

    python -m imagereward_jax.train --config configs/dpo_sd35_lora.py \\
        --config.model.path=/models/stable-diffusion-3.5-medium --config.data.preferences=/data/pickapic_v2.parquet \\
        --config.eval.prompts=held_out.txt --config.data.cache=/data/encoded

As dpo_sd15.py, with the errors of velocities, logit-normal noise levels, and the beta and adapter of Flow-GRPO's code
for DPO (Flow-Factory takes 2000). Hardware: pairs at a time are batch_size / accumulation (4), over all devices;
config.data.cache keeps latents and encoded prompts, so that no step runs the encoders. Result to expect: not measured
yet.
"""

from imagereward_jax.recipes import recipe_beside


def get_config():
    """The recipe."""
    config = recipe_beside(__file__, "dpo_sd15")
    config.batch_size = 32
    config.accumulation = 8
    config.model.path = "stabilityai/stable-diffusion-3.5-medium"
    config.method.beta = 100.0
    config.lora.rank = 32
    config.lora.alpha = 64.0
    config.lora.targets = r"attn\.(?:to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
    config.optimizer.learning_rate = 3e-4
    config.optimizer.warmup_steps = 0
    return config
