"""Adapters in the names of the programs that write them; each function renames {key: array}, most from PEFT's names."""

import json
import re

import jax
import numpy as np

from imagereward_jax.models import lora
from imagereward_jax.weights import adapters, mapping
from imagereward_jax.weights.adapter_names import layer_aliases
from imagereward_jax.weights.files import read_tensors, write_safetensors

# Layers of tiny_sdxl in Stability's names. Two levels of blocks with one layer each: input_blocks 0 to 3, output_blocks
# 0 to 3.
SDXL_LAYERS = (
    "input_blocks_3_1_transformer_blocks_1_attn1_to_q",
    "input_blocks_3_1_proj_in",
    "middle_block_1_transformer_blocks_0_attn2_to_k",
    "output_blocks_0_1_transformer_blocks_0_ff_net_0_proj",
    "output_blocks_1_1_transformer_blocks_1_attn1_to_out_0",
)
# Of each layer of CLIP; diffusers 0.27 reads no file that leaves out some of them.
TEXT_LAYERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")


def random(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32) * 0.3


def exported(folder, pipeline, targets, *, rank, alpha):
    """Writes random low-rank parameters of the layers `targets` {network: regular expression}, as a run exports them;
    returns the tensors of the file."""
    rng, own = np.random.default_rng(0), {}
    for network, pattern in targets.items():
        pipeline = pipeline.with_lora(network, pattern, rank=rank, alpha=alpha)
        shapes = mapping.params_of(pipeline.networks[network], lora.LoRAParam)
        own[network] = jax.tree.map(lambda leaf: random(rng, *leaf.shape), shapes)
    folder.mkdir(parents=True, exist_ok=True)
    adapters.write_adapter(folder, pipeline.networks, own, rank=rank, alpha=alpha)
    return read_tensors(folder / adapters.FILE)


def of_2024(tensors):
    """diffusers' names before 2024."""
    return {key.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up."): a for key, a in tensors.items()}


def of_2023(tensors):
    """Attention processors of diffusers in 2023; `tensors` are of attention alone, in the names of `of_2024`."""
    old = {}
    for key, array in tensors.items():
        key = re.sub(r"\.to_(q|k|v|out)(\.0)?\.lora\.", r".processor.to_\1_lora.", key)
        old[re.sub(r"\.self_attn\.(q|k|v|out)_proj\.lora\.", r".self_attn.to_\1_lora.", key)] = array
    return old


def kohya(tensors, scale=1.0):
    """kohya's sd-scripts; with an alpha of `scale` times the rank, or None for a file without."""
    prefixes = {"unet": "lora_unet", "text_encoder": "lora_te"}
    found = {}
    for key, array in tensors.items():
        network, name = key.split(".", 1)
        layer, half = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name).groups()
        stem = f"{prefixes[network]}_{layer.replace('.', '_')}"
        if half == "A":
            found[f"{stem}.lora_down.weight"] = array
        else:
            found[f"{stem}.lora_up.weight"] = array / np.float32(scale or 1)
            if scale is not None:
                found[f"{stem}.alpha"] = np.float32(scale * array.shape[1])
    return found


def text_layers(encoder, count=2):
    """Names of the adapted layers of a text encoder of so many layers."""
    return [f"{encoder}.text_model.encoder.layers.{layer}.{name}" for layer in range(count) for name in TEXT_LAYERS]


def random_text_layers():
    """Random low-rank pairs of tiny_sd1's text encoder, in PEFT's names."""
    rng, tensors = np.random.default_rng(7), {}
    shapes = {"mlp.fc1": (48, 24), "mlp.fc2": (24, 48)}
    for name in text_layers("text_encoder"):
        out, features = next((shape for end, shape in shapes.items() if name.endswith(end)), (24, 24))
        tensors[f"{name}.lora_A.weight"] = random(rng, 2, features)
        tensors[f"{name}.lora_B.weight"] = random(rng, out, 2)
    return tensors


def kohya_of_sdxl(pipeline):
    """Random pairs of `SDXL_LAYERS` and of both text encoders of tiny_sdxl, alpha 1 of rank 2."""
    rng, tensors = np.random.default_rng(3), {}
    stems = {
        "unet": [f"lora_unet_{name}" for name in SDXL_LAYERS],
        "text_encoder": [name.replace(".", "_") for name in text_layers("lora_te1")],
        "text_encoder_2": [name.replace(".", "_") for name in text_layers("lora_te2", 3)],
    }
    aliases = layer_aliases(pipeline.networks)
    for network, names in stems.items():
        for stem in names:
            shape = mapping.torch_layout(pipeline.networks[network])[f"{aliases[stem][0].layer}.weight"].torch_shape
            tensors[f"{stem}.lora_down.weight"] = random(rng, 2, shape[1])
            tensors[f"{stem}.lora_up.weight"] = random(rng, shape[0], 2)
            tensors[f"{stem}.alpha"] = np.float32(1)
    return tensors


def forms_of_sd3(peft_tensors):
    """An adapter of SD 3's attention, of diffusers' form, in those of other programs."""
    kohya, comfy, onetrainer, split = {}, {}, {}, {}
    layers = sorted({key.rsplit(".lora_", 1)[0] for key in peft_tensors})
    for layer in layers:
        down, up = (peft_tensors[f"{layer}.lora_{half}.weight"] for half in "AB")
        flat = layer.removeprefix("transformer.").replace(".", "_")
        onetrainer[f"lora_transformer_{flat}.lora_down.weight"] = down
        onetrainer[f"lora_transformer_{flat}.lora_up.weight"] = up * np.float32(2)
        onetrainer[f"lora_transformer_{flat}.alpha"] = np.float32(len(down) / 2)
    blocks = sorted({layer.rsplit(".attn.", 1)[0] for layer in layers})
    for block in blocks:
        number = block.rsplit(".", 1)[1]
        for side, names, out in (("x", "to_{}", "to_out.0"), ("context", "add_{}_proj", "to_add_out")):
            thirds = [f"{block}.attn.{names.format(letter)}" for letter in "qkv"]
            downs, ups = ([peft_tensors[f"{name}.lora_{half}.weight"] for name in thirds] for half in "AB")
            rank, rows = downs[0].shape[0], ups[0].shape[0]
            up = np.zeros((3 * rows, 3 * rank), np.float32)
            for third in range(3):
                up[third * rows : (third + 1) * rows, third * rank : (third + 1) * rank] = ups[third]
            parts = {"qkv": (np.concatenate(downs), up)}
            if f"{block}.attn.{out}.lora_A.weight" in peft_tensors:
                parts["proj"] = tuple(peft_tensors[f"{block}.attn.{out}.lora_{half}.weight"] for half in "AB")
            for part, (down, above) in parts.items():
                dotted = f"joint_blocks.{number}.{side}_block.attn.{part}"
                flat = f"lora_unet_{dotted.replace('.', '_')}"
                comfy[f"diffusion_model.{dotted}.lora_A.weight"], comfy[f"diffusion_model.{dotted}.lora_B.weight"] = (
                    down,
                    above,
                )
                for file, alpha in ((kohya, len(down)), (split, rank)):
                    file[f"{flat}.lora_down.weight"], file[f"{flat}.lora_up.weight"] = down, above
                    file[f"{flat}.alpha"] = np.float32(alpha)
    return {"kohya": kohya, "ComfyUI": comfy, "OneTrainer": onetrainer, "kohya, split_qkv": split}


def randomised(model):
    """Fills an adapter of PEFT with random numbers, and returns its state without gradients."""
    import peft
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.requires_grad:
                draw = 1 + 0.3 * torch.rand(value.shape) if "magnitude" in name else 0.3 * torch.randn(value.shape)
                value.copy_(draw)
    return {key: value.detach().numpy().copy() for key, value in peft.get_peft_model_state_dict(model).items()}


def lycoris(tensors, alpha):
    """LyCORIS's names of a UNet's adapter in those of PEFT's folders."""
    renamed, layers = {}, set()
    for key, array in tensors.items():
        layer, name = re.fullmatch(r"base_model\.model\.(.+?)\.((?:lora_|hada_|lokr_).+)", key).groups()
        stem = f"lora_unet_{layer.replace('.', '_')}"
        layers.add(stem)
        if name.startswith("lora_magnitude"):
            name, array = "dora_scale", array.reshape(-1, *[1] * (tensors[key_of_down(layer)].ndim - 1))
        renamed[f"{stem}.{name.replace('lora_A', 'lora_down').replace('lora_B', 'lora_up')}"] = array
    return renamed | {f"{stem}.alpha": np.float32(alpha) for stem in layers}


def key_of_down(layer):
    """The key of a layer's down weight in a folder of PEFT's."""
    return f"base_model.model.{layer}.lora_A.weight"


def peft_folder(folder, tensors, **settings):
    """Writes PEFT's folder of a UNet's adapter: `tensors` in its names, its settings beside them."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    return folder
