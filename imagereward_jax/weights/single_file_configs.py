"""The settings of networks in files without config.json, read off the shapes of their tensors.

Some settings leave no trace in the shapes; there the published models decide: heads of 64 features (8 heads in UNets of
Stable Diffusion 1.x, whose attention projects by convolutions), norms of 32 groups, a VAE's scale by its family.

`shapes` maps the keys of one network, in the names of Stability's code without prefix, to their shapes.
"""

import re
from collections.abc import Mapping
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]


def unet(shapes: Shapes) -> dict[str, Any]:
    """config.json of a `UNet2DConditionModel`, without its `sample_size`.

    Raises:
        KeyError, ValueError: it has another structure than the UNets of Stable Diffusion.
    """
    levels = _levels(shapes)
    depths = [depths[0] for _, depths in levels]
    if any(len(set(level)) > 1 or len(level) != len(levels[0][1]) for _, level in levels):
        raise ValueError("its levels are not of equal layers")
    attention = [bool(depth) for depth in depths]
    middle = _depth(shapes, "middle_block.1")
    if not middle or (depths[-1] or middle) != middle:
        raise ValueError("its middle block is not that of Stable Diffusion")
    depths = [depth or 1 for depth in depths[:-1]] + [middle]
    channels = [width for width, _ in levels]
    linear = len(shapes["middle_block.1.proj_in.weight"]) == 2
    config = {
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "block_out_channels": channels,
        "layers_per_block": len(levels[0][1]),
        "down_block_types": ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attention],
        "up_block_types": ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention)],
        "transformer_layers_per_block": 1 if set(depths) == {1} else depths,
        "attention_head_dim": [max(1, width // 64) for width in channels] if linear else 8,
        "use_linear_projection": linear,
        "cross_attention_dim": shapes["middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1],
    }
    if "label_emb.0.0.weight" in shapes:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": shapes["label_emb.0.0.weight"][1],
        }
    return config


def _levels(shapes):
    """[(channels, [transformer layers after each residual block])] of the way down."""
    levels, place = [(0, [])], 1
    while f"input_blocks.{place}.0.in_layers.2.weight" in shapes or f"input_blocks.{place}.0.op.weight" in shapes:
        if f"input_blocks.{place}.0.op.weight" in shapes:
            levels.append((0, []))
        else:
            width = shapes[f"input_blocks.{place}.0.in_layers.2.weight"][0]
            levels[-1] = (width, [*levels[-1][1], _depth(shapes, f"input_blocks.{place}.1")])
        place += 1
    if not all(depths for _, depths in levels):
        raise ValueError("it has a level without layers")
    return levels


def _depth(shapes, prefix):
    return _count(shapes, rf"{re.escape(prefix)}\.transformer_blocks\.(\d+)\.")


def _count(shapes, pattern):
    """Number of different values of the group in keys that begin with `pattern`."""
    found = (re.match(pattern, key) for key in shapes)
    return len({match[1] for match in found if match})


def mmdit(shapes: Shapes) -> dict[str, Any]:
    """config.json of an `SD3Transformer2DModel`.

    Raises:
        KeyError: it has another structure.
    """
    width, channels, patch, _ = shapes["x_embedder.proj.weight"]
    found = (re.match(r"joint_blocks\.(\d+)\.x_block\.attn2\.", key) for key in shapes)
    dual = {int(match[1]) for match in found if match}
    return {
        "in_channels": channels,
        "out_channels": shapes["final_layer.linear.weight"][0] // patch**2,
        "patch_size": patch,
        "num_layers": _count(shapes, r"joint_blocks\.(\d+)\."),
        "attention_head_dim": 64,
        "num_attention_heads": max(1, width // 64),
        "caption_projection_dim": width,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "pooled_projection_dim": shapes["y_embedder.mlp.0.weight"][1],
        "pos_embed_max_size": round(shapes["pos_embed"][1] ** 0.5),
        "dual_attention_layers": sorted(dual),
        "qk_norm": "rms_norm" if "joint_blocks.0.x_block.attn.ln_k.weight" in shapes else None,
    }


def vae(shapes: Shapes) -> dict[str, Any]:
    """config.json of an `AutoencoderKL`, without scale and shift; `shapes` in Stability's or in diffusers' names.

    Raises:
        KeyError, ValueError: it has another structure.
    """
    pattern = re.compile(r"encoder\.down(?:_blocks)?\.(\d+)\.(?:block|resnets)\.(\d+)\.conv1\.weight")
    blocks = {(int(found[1]), int(found[2])): shapes[key][0] for key in shapes if (found := pattern.match(key))}
    levels = len({level for level, _ in blocks})
    if "decoder.conv_in.weight" not in shapes or not blocks:
        raise ValueError("it has no encoder or no decoder of AutoencoderKL")
    return {
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "block_out_channels": [blocks[level, 0] for level in range(levels)],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": len(blocks) // levels,
        "norm_num_groups": 32,
        "sample_size": 1024,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


def open_clip(shapes: Shapes) -> dict[str, Any]:
    """config.json of the CLIP text encoder in OpenCLIP's text tower (GELU), without its class."""
    layers = _count(shapes, r"transformer\.resblocks\.(\d+)\.")
    prefix = "transformer.resblocks.0.mlp.c_fc.weight"
    config = _clip(shapes["token_embedding.weight"], shapes["positional_embedding"], shapes[prefix], layers)
    return config | {"hidden_act": "gelu", "projection_dim": shapes.get("text_projection", (0, 512))[1]}


def clip(shapes: Shapes) -> dict[str, Any]:
    """config.json of the CLIP text encoder in transformers' names, without its class.

    OpenAI's, CLIP-L, are told from OpenCLIP's by their width: only theirs has 768 features or less.
    """
    embeddings = (f"text_model.embeddings.{name}_embedding.weight" for name in ("token", "position"))
    fc1 = shapes["text_model.encoder.layers.0.mlp.fc1.weight"]
    config = _clip(*(shapes[key] for key in embeddings), fc1, _count(shapes, r"text_model\.encoder\.layers\.(\d+)\."))
    width = config["hidden_size"]
    activation = "quick_gelu" if width <= 768 else "gelu"
    return config | {"hidden_act": activation, "projection_dim": shapes.get("text_projection.weight", (width,))[0]}


def _clip(tokens, positions, fc1, layers):
    vocabulary, width = tokens
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": fc1[0],
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": positions[0],
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
    }


def t5(shapes: Shapes) -> dict[str, Any]:
    """config.json of a `T5EncoderModel` of version 1.1, without its class."""
    prefix = "encoder.block.0.layer"
    heads = shapes[f"{prefix}.0.SelfAttention.relative_attention_bias.weight"][1]
    vocabulary, width = shapes["shared.weight" if "shared.weight" in shapes else "encoder.embed_tokens.weight"]
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": shapes[f"{prefix}.0.SelfAttention.q.weight"][0] // heads,
        "d_ff": shapes[f"{prefix}.1.DenseReluDense.wi_0.weight"][0],
        "num_layers": _count(shapes, r"encoder\.block\.(\d+)\."),
        "num_heads": heads,
        "feed_forward_proj": "gated-gelu",
    }
