"""Checkpoints of one file in the layout of Stability's code, `.safetensors` or `.ckpt`, which web UIs and ComfyUI use.

A file is recognised by its tensors: which family it is of, where each network lies in it, and the networks' sizes.
Files of one network (a VAE, a text encoder) are read too, to go with a model.
"""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from imagereward_jax.weights import diffusers, mapping, stability_names
from imagereward_jax.weights import single_file_configs as configs
from imagereward_jax.weights.files import PICKLES, WeightsError, read_tensors

SUFFIXES = (".safetensors", *PICKLES)
VARIANTS = (None, "ema")
_EMA = "model_ema."
_UNET, _MMDIT = "input_blocks.0.0.weight", "joint_blocks.0.x_block.attn.qkv.weight"
_TOKENS = "text_model.embeddings.token_embedding.weight"
_PROJECTION = "text_projection.weight"


class _Layout(NamedTuple):
    """How a network is stored: a key that tells, its naming, and the settings by its shapes."""

    probe: str
    naming: stability_names.Naming
    config: Callable[[configs.Shapes], dict[str, Any]]


_CLIP = _Layout(_TOKENS, stability_names.same, configs.clip)
_OPEN_CLIP = _Layout("token_embedding.weight", stability_names.open_clip, configs.open_clip)
_T5 = _Layout("encoder.block.0.layer.0.SelfAttention.q.weight", stability_names.same, configs.t5)
_VAE = _Layout("decoder.mid.block_1.conv1.weight", stability_names.vae, configs.vae)
_VAE_DIFFUSERS = _Layout("decoder.mid_block.resnets.0.conv1.weight", stability_names.same, configs.vae)
_UNET_LAYOUT = _Layout(_UNET, stability_names.unet, configs.unet)
_MMDIT_LAYOUT = _Layout(_MMDIT, stability_names.mmdit, configs.mmdit)

_DENOISER = "model.diffusion_model."
_VAE_PLACE = [("first_stage_model.", _VAE)]
# By pipeline class, the prefix and layout of each network; several: the first that is there.
_PLACES = {
    "StableDiffusionPipeline": {
        "unet": [(_DENOISER, _UNET_LAYOUT), ("", _UNET_LAYOUT)],
        "vae": _VAE_PLACE,
        "text_encoder": [("cond_stage_model.transformer.", _CLIP), ("cond_stage_model.model.", _OPEN_CLIP)],
    },
    "StableDiffusionXLPipeline": {
        "unet": [(_DENOISER, _UNET_LAYOUT), ("", _UNET_LAYOUT)],
        "vae": _VAE_PLACE,
        "text_encoder": [("conditioner.embedders.0.transformer.", _CLIP)],
        "text_encoder_2": [("conditioner.embedders.1.model.", _OPEN_CLIP)],
    },
    "StableDiffusion3Pipeline": {
        "transformer": [(_DENOISER, _MMDIT_LAYOUT), ("", _MMDIT_LAYOUT)],
        "vae": _VAE_PLACE,
        "text_encoder": [("text_encoders.clip_l.transformer.", _CLIP)],
        "text_encoder_2": [("text_encoders.clip_g.transformer.", _CLIP)],
        "text_encoder_3": [("text_encoders.t5xxl.transformer.", _T5)],
    },
}
# Layouts of a file that holds one network alone.
_ALONE = {"vae": [_VAE, _VAE_DIFFUSERS], "text_encoder_3": [_T5]}
_TEXT_ALONE = [_CLIP, _OPEN_CLIP]

# Keys of other kinds of files, and what these are.
_KINDS = (
    (
        r"lora_|\.lora\.|hada_w|lokr_w|\.oft_|\.diff$",
        "an adapter: pass it to --lora or config.lora.path",
    ),
    (r"^control_model\.|input_hint_block|controlnet_", "a ControlNet, which is not implemented"),
    (r"^emb_params$|^string_to_param", "an embedding of textual inversion, which is not implemented"),
    (r"motion_modules", "a motion module of AnimateDiff, which is not implemented"),
    (r"double_blocks\.", "a model of Flux's family, which is not implemented"),
    (r"^depth_model\.", "a model that reads depth maps, which is not implemented"),
    (r"^noise_augmentor\.", "an unCLIP, which is not implemented"),
    (r"^edm_(mean|std)|^edm_vpred", "a model of EDM's noise (Playground 2.5, CosXL), which is not implemented"),
    (r"^conditioner\.embedders\.0\.model\.", "SDXL's refiner, which is not implemented: pass the base model"),
    (r"^clip_txt_mapper|\.channelwise\.", "a Stable Cascade, which is not implemented"),
    (r"absmax$|quant_map$|quant_state", "quantised by bitsandbytes: get the weights in float16 or bfloat16"),
    (r"scaled_fp8$|\.scale_weight$|\.weight_scale$", "quantised to fp8 with scales: get the weights in float16"),
)
_CHANNELS = {
    5: "a model that reads depth maps, which is not implemented",
    7: "an upscaler, which is not implemented",
    8: "an InstructPix2Pix, which edits images and is not implemented",
    9: "an inpainting model, which is not implemented: pass the model that it was made from",
}
# Tensors beside a network's own that it does not read: tables of ids, CLIP's other half of a pair, and the last of
# ViT-H's 24 layers, whose input Stable Diffusion 2 reads; a VAE's loss of its training.
_UNUSED = re.compile(
    r"(.*position_ids|.*logit_scale|attn_mask|text_projection(\.weight)?|transformer\.resblocks\.23\..+|loss\..+"
    r"|model_ema\..+|decay|num_updates)"
)


class Place(NamedTuple):
    """A network in a file: its prefix and naming, and the content of its config.json without class."""

    prefix: str
    naming: stability_names.Naming
    config: dict[str, Any]


class Checkpoint(NamedTuple):
    """A file that was recognised.

    Attributes:
        pipeline_class: of diffusers. places: by component, of those that the file holds.
        scheduler: fields of scheduler_config.json that the file states.
    """

    pipeline_class: str
    places: dict[str, Place]
    scheduler: dict[str, Any]


def is_single_file(name_or_path: str | Path) -> bool:
    """Whether a model's name is that of a file of weights here."""
    path = Path(os.path.expanduser(name_or_path))
    return path.suffix in SUFFIXES and path.is_file()


def recognise(path: str | Path) -> Checkpoint:
    """Finds out which model a file holds.

    Raises:
        WeightsError: it cannot be read, or holds something else than a text-to-image model; the message says what.
    """
    tensors = read_tensors(path)
    shapes = _shapes(tensors)
    _refuse_kinds(path, shapes)
    if any(f"{prefix}{_MMDIT}" in shapes for prefix in (_DENOISER, "")):
        pipeline_class = "StableDiffusion3Pipeline"
    elif any(f"{prefix}{_UNET}" in shapes for prefix in (_DENOISER, "")):
        labels = any(f"{prefix}label_emb.0.0.weight" in shapes for prefix in (_DENOISER, ""))
        pipeline_class = "StableDiffusionXLPipeline" if labels else "StableDiffusionPipeline"
    else:
        raise WeightsError(f"{path}: {_not_a_model(shapes)}")
    places = {
        name: place
        for name, candidates in _PLACES[pipeline_class].items()
        if (place := _find(path, name, tensors, candidates)) is not None
    }
    for prefix in (_DENOISER, ""):
        if kind := _CHANNELS.get(shapes.get(prefix + _UNET, (0, 0))[1]):
            raise WeightsError(f"{path}: {kind}")
    scheduler = {"prediction_type": "v_prediction"} if "v_pred" in shapes else {}
    if "ztsnr" in shapes:
        scheduler["rescale_betas_zero_snr"] = True
    return Checkpoint(pipeline_class, places, scheduler)


def recognise_part(path: str | Path, name: str, pipeline_class: str) -> Place:
    """Finds a network in a file of its own, or in a checkpoint of the same family.

    Args:
        name: of the component, e.g. "vae". pipeline_class: of the model that it is to go with.

    Raises:
        WeightsError: it cannot be read, or holds no such network.
    """
    tensors = read_tensors(path)
    shapes = _shapes(tensors)
    _refuse_kinds(path, shapes)
    alone = _ALONE.get(name, _TEXT_ALONE if name.startswith("text_encoder") else [])
    candidates = [*_PLACES[pipeline_class][name], *(("", layout) for layout in alone)]
    place = _find(path, name, tensors, candidates)
    if place is None:
        raise WeightsError(f"{path}: holds no {name} in a layout that is known; {_not_a_model(shapes)}")
    return place


def _refuse_kinds(path, shapes):
    for pattern, kind in _KINDS:
        if any(re.search(pattern, key) for key in shapes):
            raise WeightsError(f"{path}: {kind}")


def _not_a_model(shapes):
    """Says what a file holds that has no denoiser of a known layout."""
    for name, layouts in {**_ALONE, "text_encoder": _TEXT_ALONE}.items():
        if any(layout.probe in shapes for layout in layouts):
            return f"it holds a {name} alone: pass a model, and this file as its part ({name}=FILE)"
    if any(re.match(r"(down_blocks|transformer_blocks|up_blocks)\.0\.", key) for key in shapes):
        return "it holds one network of a diffusers folder: pass the folder that has model_index.json"
    first = ", ".join(sorted(shapes)[:3])
    return f"not a checkpoint of Stable Diffusion 1.x, 2.x, XL or 3.x in Stability's layout; it begins with {first}"


def _shapes(tensors):
    return {key: tuple(array.shape) for key, array in tensors.items()}


def _find(path, name, tensors, candidates):
    for prefix, layout in candidates:
        own = _shapes(_stored(name, tensors, prefix, layout.naming))
        if layout.probe not in own:
            continue
        try:
            config = layout.config(own)
        except (KeyError, ValueError, IndexError) as error:
            reason = f"{error.args[0]} is absent" if isinstance(error, KeyError) else error
            raise WeightsError(
                f"{path}: its {name} is not whole, or has a structure that is not implemented ({reason}). If PyTorch "
                "opens the file, StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER) makes a folder "
                "of it to try"
            ) from error
        if layout is _OPEN_CLIP and config["num_hidden_layers"] == 24:
            config["num_hidden_layers"] = 23  # Stable Diffusion 2 reads what goes into ViT-H's last layer
        return Place(prefix, layout.naming, config)
    return None


def _stored(name, tensors, prefix, naming):
    """A network's part of a file, under Stability's names, or under today's names of transformers and diffusers."""
    own = {key.removeprefix(prefix): array for key, array in tensors.items() if key.startswith(prefix)}
    if naming is not stability_names.same:
        return own
    return diffusers.modern_names(name, {key: array for key, array in own.items() if not key.endswith("logit_scale")})


def read_network(
    path: str | Path, name: str, place: Place, network: nnx.Module, *, variant: str | None = None
) -> dict[str, Any]:
    """Reads a network's tensors by the keys of diffusers or transformers, in the dtype of the file.

    Arrays are views of the file where the layouts agree. Unknown tensors keep their names, for the mapping to report.

    Args:
        place: from `recognise`. variant: "ema" for the denoiser's averaged weights.

    Raises:
        WeightsError: the file has no averaged weights.
    """
    tensors = read_tensors(path)
    own, rename = _stored(name, tensors, place.prefix, place.naming), str
    if variant == "ema" and name in ("unet", "transformer"):
        rename = _averaged
        own = {key: array for key, array in tensors.items() if key.startswith(_EMA)}
        if not own:
            raise WeightsError(f"{path}: it holds no averaged weights ({_EMA}...): leave out variant='ema'")
    layout, found, used = mapping.torch_layout(network), {}, set()
    if name == "text_encoder" and _PROJECTION in layout:
        # Stable Diffusion 3 reads CLIP-L's state as it is. Files lack the matrix, or have one that is not applied.
        found[_PROJECTION] = np.eye(place.config["hidden_size"], dtype=np.asarray(own[_TOKENS][:0]).dtype)
    for key in layout.keys() - found.keys():
        origin = place.naming(key, network.config)
        if (stored := rename(origin.key)) in own:
            found[key] = origin.read(own[stored])
            used.add(stored)
    return found | {key: own[key] for key in own.keys() - used if not _UNUSED.fullmatch(key)}


def _averaged(key):
    """The name of the averaged weight of the denoiser's tensor `key`: without its dots."""
    return _EMA + f"diffusion_model.{key}".replace(".", "")


def to_single_file(pipeline_class: str, networks: Mapping[str, tuple[nnx.Module, dict[str, Any]]]) -> dict[str, Any]:
    """Brings a model's tensors to Stability's layout; `recognise` and `read_network` are the inverse, to the bit.

    Args:
        networks: by component, the network and its tensors in PyTorch's names.

    Raises:
        WeightsError: naming a setting that the layout cannot hold and that is not the usual one.
    """
    tensors = {}
    for name, (network, own) in networks.items():
        candidates = _PLACES[pipeline_class][name]
        open_clip = len(candidates) > 1 and getattr(network.config, "hidden_act", None) == "gelu"
        prefix, layout = candidates[1 if open_clip else 0]
        if name == "text_encoder" and _PROJECTION in own:
            own = _without_identity(own)
        stored = _gather(own, layout.naming, network.config)
        _check_settings(name, layout.config(_shapes(stored)), network.config)
        tensors |= {prefix + key: array for key, array in stored.items()}
    return tensors


def _without_identity(tensors):
    """CLIP-L's tensors without the projection, which Stable Diffusion 3 does not have."""
    projection = np.asarray(tensors[_PROJECTION])
    if not np.array_equal(projection, np.eye(len(projection))):
        raise WeightsError(f"text_encoder: {_PROJECTION} is not the identity; a single file has no place for it")
    return {key: array for key, array in tensors.items() if key != _PROJECTION}


def _gather(tensors, naming, config):
    """A network's tensors under Stability's names: thirds joined, halves, axes and shapes as there."""
    parts = {}
    for key, array in tensors.items():
        origin = naming(key, config)
        parts.setdefault(origin.key, {})[origin.third or 0] = origin.write(array)
    return {
        key: found[0] if len(found) == 1 else np.concatenate([found[third] for third in sorted(found)])
        for key, found in parts.items()
    }


# Settings that do not change what a network computes from given latents or ids.
_FREE = {
    *("sample_size", "force_upcast", "scaling_factor", "shift_factor", "architectures", "projection_dim"),
    *("pad_token_id", "bos_token_id"),
}


def _check_settings(name, read, settings):
    """Refuses settings that would be read otherwise from the file."""
    own = settings.to_dict()
    expected = type(settings).from_dict(read).to_dict()
    for field in own.keys() - _FREE:
        if own[field] != expected[field]:
            raise WeightsError(
                f"{name}: {field}={own[field]!r} does not show in a single file, whose readers take {expected[field]!r}"
            )
