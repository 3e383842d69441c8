"""ReFL on the built-in tiny model with low-rank parameters alone (LoRA).

    python -m imagereward_jax.train --config configs/refl_tiny_lora.py

Of the UNet's 2,205,828 parameters 50,176 train: rank 8 on the projections of its attention. Hardware: 2 CPU cores, some
seven minutes. Result to expect: not measured with guidance drawn from 1 to 5, as refl_tiny.py has it; without, adapters
reached nearly as much as all weights.

WORKDIR/export holds pytorch_lora_weights.safetensors, which `generate --lora` and PyTorch diffusers'
`load_lora_weights` take.
"""

from imagereward_jax.recipes import recipe_beside


def get_config():
    """The recipe."""
    config = recipe_beside(__file__, "refl_tiny")
    config.lora.rank = 8
    config.optimizer.learning_rate = 5e-4
    return config
