"""Scores and image gradients of the original ImageReward (PyPI image-reward 1.5) at full size, with random weights.

Runs in an environment of its own (PyTorch, torchvision, timm 0.6.13, fairscale 0.4.13, transformers 4.36,
image-reward 1.5), never in this project's:

    python imagereward_reference.py OUT --tokenizer FOLDER

FOLDER holds `bert-base-uncased/vocab.txt`. OUT receives ImageReward.pt, med_config.json, the pictures, and
reference.npz / reference.json with what the original says about them.
"""

import argparse
import importlib.util
import json
import os
import sys
import types
from pathlib import Path

import numpy as np
import torch
from PIL import Image

PROMPTS = [
    "a painting of an ocean with clouds and birds, day time, low depth field effect",
    "",
    "naïve Ångström café, 日本の猫, Σίσυφος 😀 — İstanbul [ENC] x",
    "an overlong prompt about very many things, " * 20,
    "a red cube",
]
MED_CONFIG = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": 30524,
    "encoder_width": 768,
    "add_cross_attention": True,
}


def original_class():
    """The ImageReward class, without the package's trainers and OpenAI's CLIP, which its __init__ would import."""
    package = types.ModuleType("ImageReward")
    package.__path__ = list(importlib.util.find_spec("ImageReward").submodule_search_locations)
    sys.modules["ImageReward"] = package
    sys.modules["clip"] = types.ModuleType("clip")
    from ImageReward.ImageReward import ImageReward

    return ImageReward


def random_weights(model):
    """Weights that keep activations near unit size, so that scores differ from picture to picture by about one."""
    rng = np.random.default_rng(0)
    state = model.state_dict()
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            continue
        noise = torch.from_numpy(rng.standard_normal(tuple(tensor.shape), np.float32))
        if "norm" in name.lower() and name.endswith("weight"):
            noise = 1 + 0.1 * noise
        elif "embeddings" in name or name.endswith(("cls_token", "pos_embed")):
            noise = 0.5 * noise
        elif name.endswith("bias"):
            noise = 0.1 * noise
        else:
            gain = 2.0 if name.startswith("mlp") else 1.0
            noise = gain * noise / tensor[0].numel() ** 0.5
        state[name] = noise
    model.load_state_dict(state)
    return state


def smooth(rng, height, width, channels):
    """A colourful uint8 picture with both large shapes and noise."""
    coarse = (rng.random((5, 5, channels)) * 255).astype(np.uint8)
    planes = [Image.fromarray(coarse[..., c]).resize((width, height), Image.BICUBIC) for c in range(channels)]
    picture = np.stack(planes, -1) + rng.normal(0, 12, (height, width, channels))
    return np.clip(picture, 0, 255).astype(np.uint8)


def write_pictures(folder):
    """Pictures of every mode and shape that commonly turns up; returns their file names."""
    rng = np.random.default_rng(1)
    pictures = {
        "rgb.png": Image.fromarray(smooth(rng, 300, 400, 3)),
        "square.png": Image.fromarray(smooth(rng, 512, 512, 3)),
        "exact.png": Image.fromarray(smooth(rng, 224, 224, 3)),
        "rgba.png": Image.fromarray(smooth(rng, 331, 257, 4)),
        "grey.png": Image.fromarray(smooth(rng, 250, 251, 1)[..., 0]),
        "grey_alpha.png": Image.fromarray(smooth(rng, 260, 240, 2)),
        "palette.png": Image.fromarray(smooth(rng, 280, 300, 3)).quantize(64),
        "bilevel.png": Image.fromarray(smooth(rng, 230, 300, 1)[..., 0]).convert("1"),
        "cmyk.jpg": Image.fromarray(smooth(rng, 300, 270, 3)).convert("CMYK"),
        "wide.png": Image.fromarray(smooth(rng, 60, 900, 3)),
        "tall.png": Image.fromarray(smooth(rng, 1100, 97, 3)),
        "tiny.png": Image.fromarray(smooth(rng, 3, 5, 3)),
    }
    for name, picture in pictures.items():
        picture.save(folder / name)
    return list(pictures)


def image_gradients(model, transforms, shape, prompts):
    """Scores and their gradient by a float picture in [0, 1], through the tensor resize, crop and normalisation."""
    images = torch.from_numpy(np.random.default_rng(2).random(shape, np.float32)).requires_grad_()
    pixels = images.permute(0, 3, 1, 2)
    pixels = transforms.Resize(224, interpolation=transforms.InterpolationMode.BICUBIC, antialias=True)(pixels)
    pixels = transforms.CenterCrop(224)(pixels)
    pixels = transforms.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))(pixels)
    text = model.blip.tokenizer(prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    scores = model.score_gard(text.input_ids, text.attention_mask, pixels)[:, 0]
    scores.sum().backward()
    return images.detach().numpy(), scores.detach().numpy(), images.grad.numpy()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    (out / "med_config.json").write_text(json.dumps(MED_CONFIG))
    names = write_pictures(out)
    os.chdir(args.tokenizer)  # the original asks for "bert-base-uncased", which may be a folder here
    from torchvision import transforms

    model = original_class()(med_config=str(out / "med_config.json")).eval()
    torch.save(random_weights(model), out / "ImageReward.pt")
    model.requires_grad_(False)
    paths = [str(out / name) for name in names]
    with torch.no_grad():
        ranks, by_image = model.inference_rank(PROMPTS[0], paths)
        by_prompt = [model.score(prompt, paths[0]) for prompt in PROMPTS]
    tokens = [
        model.blip.tokenizer(prompt, padding="max_length", truncation=True, max_length=35).input_ids
        for prompt in PROMPTS
    ]
    arrays = {"ranks": ranks, "by_image": by_image, "by_prompt": by_prompt, "tokens": tokens}
    for name, shape in (("exact", (1, 224, 224, 3)), ("resized", (2, 256, 320, 3))):
        images, scores, gradients = image_gradients(model, transforms, shape, PROMPTS[: shape[0]])
        arrays |= {f"{name}_images": images, f"{name}_scores": scores, f"{name}_gradients": gradients}
    np.savez(out / "reference.npz", **arrays)
    (out / "reference.json").write_text(json.dumps({"prompts": PROMPTS, "pictures": names}))


if __name__ == "__main__":
    main()
