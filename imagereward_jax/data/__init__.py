"""Prompts, image-text pairs, preference groups, the built-in shapes world, and the pipeline over them."""
