"""Rewards: (images in [0, 1], prompts) -> one score per image. One file per reward."""
