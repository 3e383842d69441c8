"""Rewards: (images in [0, 1], prompts) -> one score an image. One file per reward."""
