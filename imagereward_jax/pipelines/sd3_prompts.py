"""Conditions of Stable Diffusion 3 and 3.5 (arXiv 2403.03206) from the outputs of their three text encoders."""

import jax
import jax.numpy as jnp

from imagereward_jax.models.clip import CLIPTextOutput


def join_text(
    first: CLIPTextOutput, second: CLIPTextOutput, third: jax.Array | None, *, third_length: int, width: int
) -> dict[str, jax.Array]:
    """Joins the outputs of CLIP-L, OpenCLIP-bigG and T5 to what the transformer reads.

    No mask goes with them: the model was trained with all tokens, padding included.

    Args:
        first, second: of the two CLIP encoders with projection, for input_ids [B, T].
        third: of T5, [B, third_length, width]; None if T5 is left out: zeros take its place, as in training.
        third_length: length of T5's prompts: 256 by default in diffusers, 77 in its training scripts.
        width: `joint_attention_dim` of the transformer.

    Returns:
        {"prompt_embeds": [B, T + third_length, width], "pooled_prompt_embeds": [B, P1 + P2]} in the dtype of `first`:
        the hidden states before the last layer of both CLIPs side by side, padded with zeros to `width`, then T5's; and
        the projected end-of-text states side by side.

    Raises:
        ValueError: `third` has another shape, or the hidden states of the CLIPs are wider than `width`.
    """
    clips = jnp.concatenate([first.penultimate_hidden_state, second.penultimate_hidden_state], axis=-1)
    batch, _, features = clips.shape
    if features > width:
        raise ValueError(f"the CLIP encoders give {features} features, more than joint_attention_dim={width}")
    shape = (batch, third_length, width)
    if third is None:
        third = jnp.zeros(shape, clips.dtype)
    elif third.shape != shape:
        raise ValueError(f"T5's output should be {list(shape)}, not {list(third.shape)}")
    clips = jnp.pad(clips, ((0, 0), (0, 0), (0, width - features)))
    return {
        "prompt_embeds": jnp.concatenate([clips, third.astype(clips.dtype)], axis=1),
        "pooled_prompt_embeds": jnp.concatenate([first.pooled, second.pooled], axis=-1),
    }
