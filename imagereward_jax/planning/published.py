"""Pipelines and rewards as shapes: of local folders by their config.json, of published models by the tables here.

Nothing is read from the hub, and no weight from anywhere.
"""

import json
import tempfile
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp

from imagereward_jax.data.shapes.tokenizers import write_clip_tokenizer
from imagereward_jax.models.blip_config import ImageRewardConfig
from imagereward_jax.pipelines.base import override_prediction_type
from imagereward_jax.pipelines.sd1 import StableDiffusion1
from imagereward_jax.pipelines.sdxl import StableDiffusionXL
from imagereward_jax.planning.sizes import SD1, SDXL
from imagereward_jax.rewards.base import cast_params
from imagereward_jax.rewards.checkpoint import MED_CONFIG_FILE, V1, with_text
from imagereward_jax.rewards.imagereward import CONFIG_FILE, abstract_module, make_apply
from imagereward_jax.rewards.rules import is_rule
from imagereward_jax.rewards.scores import SCORES
from imagereward_jax.training.config import ConfigError, did_you_mean
from imagereward_jax.weights import diffusers, hub, mapping
from imagereward_jax.weights.files import read_json

SCHEDULER = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}


FAMILIES = {"sd1": (StableDiffusion1, SD1), "sdxl": (StableDiffusionXL, SDXL)}
# Published models of exactly these sizes.
PUBLISHED = {
    "CompVis/stable-diffusion-v1-4": "sd1",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd1",
    "runwayml/stable-diffusion-v1-5": "sd1",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "stabilityai/sdxl-turbo": "sdxl",
}


def abstract_pipeline(config):
    """The pipeline that `config.model` names, without weights.

    Raises:
        ConfigError: it is neither a folder, nor built in, nor a published model whose sizes are known here, or starts
            from scratch.
        FileNotFoundError, ValueError: the folder lacks a config, or has one that is not implemented.
    """
    model = config.model
    if model.get("from_scratch"):
        raise ConfigError(
            "config.model.from_scratch: plans are made for models that exist; pass --config.model.from_scratch=False "
            "and --config.model.path"
        )
    options = {"dtype": config.dtype, "vae_dtype": model.vae_dtype, "remat": model.remat}
    name = str(model.path).partition("@")[0]
    folder = Path(name).expanduser()
    folder = hub.ASSETS / name if name in hub.builtin_models() else folder
    if folder.is_dir():
        return _from_folder(folder, model.prediction_type, options)
    if name not in PUBLISHED:
        raise ConfigError(
            f"config.model.path={model.path!r}: no folder, and none of the models whose sizes are known here"
            f"{did_you_mean(name, PUBLISHED)}; pass its folder (only the config.json files are read) or one of "
            f"{', '.join(PUBLISHED)}"
        )
    family, networks = FAMILIES[PUBLISHED[name]]
    scheduler = override_prediction_type(SCHEDULER, model.prediction_type)
    with tempfile.TemporaryDirectory() as tokenizer:
        _write_tokenizer(Path(tokenizer))
        folders = {f"{name}_folder": tokenizer for name in family.text_encoders.values()}
        return family.from_configs(**networks, scheduler=scheduler, **folders, **options)


def _from_folder(folder, prediction_type, options):
    index = read_json(folder / diffusers.INDEX) if (folder / diffusers.INDEX).is_file() else {}
    family = StableDiffusionXL if "XL" in index.get("_class_name", "") else StableDiffusion1
    networks = {name: read_json(folder / name / "config.json") for name in family.components}
    scheduler = override_prediction_type(diffusers.load_scheduler_config(folder), prediction_type)
    folders = {f"{name}_folder": folder / name for name in family.text_encoders.values()}
    return family.from_configs(**networks, scheduler=scheduler, **folders, **family.read_index(folder), **options)


def _write_tokenizer(folder):
    """A tokenizer that stands for CLIP's: only the length of what it gives matters."""
    write_clip_tokenizer(folder)
    settings = read_json(folder / "tokenizer_config.json") | {"model_max_length": 77}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def abstract_reward(settings, dtype):
    """The reward of `config.reward` without weights: `params` are shapes, `config` its sizes, `apply` as
    `ImageReward`'s.

    A folder (or a built-in reward) has the sizes of its config.json; a file is taken for ImageReward v1.0.

    Raises:
        ConfigError: a mixture, or another score.
    """
    name = str(settings.path)
    if settings.terms or name in SCORES or is_rule(name):
        raise ConfigError(
            f"config.reward: {', '.join(settings.terms) or name!r} cannot be planned, only ImageReward's network; pass "
            "--config.reward.path=ImageReward-v1.0"
        )
    config = _scorer_config(name)
    return SimpleNamespace(params=_scorer_params(config, dtype), config=config, apply=make_apply(config, dtype))


def abstract_trained_reward(settings):
    """The (sizes, shapes of the float32 parameters) of the ImageReward that `config.reward` of a scorer's training
    starts from: the architecture of a random one; BLIP's model_large.pth has v1.0's sizes."""
    if settings.path or settings.blip:
        config = _scorer_config(str(settings.path or settings.blip))
    else:
        config = ImageRewardConfig.from_dict(settings.architecture.to_dict(), "config.reward.architecture")
    return config, _scorer_params(config, "float32")


def scorer_tokens(config, batch):
    """Shapes of what an ImageReward of these sizes reads of so many prompts."""
    ids = jax.ShapeDtypeStruct((batch, config.max_prompt_tokens), jnp.int32)
    return {"input_ids": ids, "attention_mask": ids}


def _scorer_config(name):
    """The sizes of a folder or a built-in reward; a file is an ImageReward v1.0, by the med_config.json beside it."""
    path = hub.ASSETS / name / "reward" if name in hub.builtin_models() else Path(name).expanduser()
    if (path / CONFIG_FILE).is_file():
        return ImageRewardConfig.from_dict(read_json(path / CONFIG_FILE), str(path / CONFIG_FILE))
    if path.name and (text := path.with_name(MED_CONFIG_FILE)).is_file():
        return with_text(V1, text)
    return V1


def _scorer_params(config, dtype):
    params = mapping.params_of(abstract_module(config))
    return jax.eval_shape(lambda params: cast_params(params, jnp.dtype(dtype)), params)
