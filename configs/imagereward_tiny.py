"""The training of ImageReward in small, on groups that differ in their words, validated and tested as the original.

    python -m imagereward_jax.train --config configs/imagereward_tiny.py
    python -m imagereward_jax.evaluate --model runs/imagereward_tiny/export --model tiny-shapes --model random \\
        --data shapes:held_out --no-spoilt --limit 200

The network is that of configs/shapes_reward.py. The five images of a group show 4, 3, 2, 1 and 0 of the caption's
words (size, colour, shape, place), with the world's jitter, blur and noise; none is spoilt, for of two spoilt images
the ranking often cannot be seen. Captions of validation and test are never trained on. The best evaluation's weights
are exported and then tested on groups that no evaluation has seen.

Hardware: one CPU core, some three minutes. Result to expect: test/accuracy 0.99 over the pairs of 512 groups. The
second command's results, with intervals: docs/benchmarks.md, "Training a scorer".
"""

from imagereward_jax.recipes import recipe_beside


def get_config():
    """The recipe."""
    config = recipe_beside(__file__, "shapes_reward")
    config.steps = 1000
    config.reward.architecture.max_prompt_tokens = 10  # as many as the longest caption has
    config.reward.head_scale = 8.0
    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_steps = 100
    config.data.spoilt = False
    config.data.test_groups = "shapes:held_out"
    config.eval.best = "-eval/loss"
    config.checkpoint.export = "best"
    config.eval.every = 250
    config.checkpoint.every = 250
    return config
