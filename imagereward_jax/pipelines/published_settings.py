"""Settings and tokenizers of models in files that have none, as the published models of each family have them."""

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from imagereward_jax.models import vae
from imagereward_jax.weights import hub
from imagereward_jax.weights.tokenizer_files import CLIP_BPE, read_clip_bpe

BETAS = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}
SCHEDULERS = {
    "StableDiffusionPipeline": {"_class_name": "PNDMScheduler"} | BETAS,
    "StableDiffusionXLPipeline": {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"} | BETAS,
    "StableDiffusion3Pipeline": {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": 3.0,
    },
}
_VAES = {
    "StableDiffusionPipeline": {"scaling_factor": 0.18215, "shift_factor": None},
    "StableDiffusionXLPipeline": {"scaling_factor": vae.SDXL["scaling_factor"], "shift_factor": None},
    "StableDiffusion3Pipeline": {name: vae.SD3[name] for name in ("scaling_factor", "shift_factor")},
}
CLIP_TOKENS = 49408
PROMPT_TOKENS, T5_TOKENS = 77, 512  # of the published tokenizers
T5_REPO = "google/t5-v1_1-xxl"
_T5_FILES = ("spiece.model", "tokenizer_config.json", "special_tokens_map.json")


def scheduler_of(
    pipeline_class: str, configs: Mapping[str, dict], stated: dict[str, Any], prediction_type: str | None
) -> dict[str, Any]:
    """The content of scheduler_config.json for a model whose file has none.

    Args:
        configs: config.json by component. stated: fields that the file states. prediction_type: what the caller states.

    Raises:
        ValueError: it is a Stable Diffusion 2, and nothing states what it predicts.
    """
    if is_second(pipeline_class, configs) and not (prediction_type or stated):
        raise ValueError(
            "a file of Stable Diffusion 2 does not show what it predicts: set prediction_type (config.model, or "
            "--prediction-type of generate) to 'v_prediction' for 2.0 and 2.1 of 768 px, to 'epsilon' for the base "
            "models of 512 px"
        )
    return SCHEDULERS[pipeline_class] | stated


def is_second(pipeline_class: str, configs: Mapping[str, dict]) -> bool:
    """Whether a model of Stable Diffusion 1's pipeline is a 2.x: OpenCLIP reads its prompts."""
    return pipeline_class == "StableDiffusionPipeline" and configs.get("text_encoder", {}).get("hidden_act") == "gelu"


def sample_size(pipeline_class: str, prediction_type: str | None) -> int:
    """Side of the latents that a model without config.json was trained on."""
    if pipeline_class != "StableDiffusionPipeline":
        return 128
    return 96 if prediction_type == "v_prediction" else 64


def vae_scale(pipeline_class: str) -> dict[str, Any]:
    """The fields of a VAE's config.json that weights do not show."""
    return _VAES[pipeline_class]


class StandInTokenizer:
    """Stands in for a tokenizer if only the shape of its ids matters: every id is 0."""

    def __init__(self, model_max_length: int = PROMPT_TOKENS):
        self.model_max_length = model_max_length

    def __len__(self):
        return 0

    def __call__(self, prompts: list[str], *, max_length: int, **_) -> dict[str, np.ndarray]:
        return {"input_ids": np.zeros((len(prompts), max_length), np.int32)}


def tokenizer(
    pipeline_class: str, name: str, encoder: str, configs: Mapping[str, dict], *, download: bool
) -> Path | StandInTokenizer:
    """The folder of the published tokenizer of a text encoder: CLIP's from the package, T5's from the hub.

    Args:
        name: of the tokenizer, e.g. "tokenizer_2". encoder: of its text encoder. configs: config.json by component.
        download: False asks the hub for nothing; T5 then has a `StandInTokenizer`.

    Raises:
        ValueError: the encoder has another vocabulary. hub.ModelNotFound: T5's tokenizer cannot be had.
    """
    advice = f"give its folder as a part of the model, {name}=FOLDER (config.model.parts, or --parts of generate)"
    config = configs[encoder]
    if "d_model" in config:
        try:
            return hub.resolve_model(T5_REPO, allow_patterns=_T5_FILES) if download else StandInTokenizer(T5_TOKENS)
        except hub.ModelNotFound as error:
            raise hub.ModelNotFound(
                f"{encoder} is a T5, whose tokenizer is neither in the file nor in the package: {advice}; it holds "
                f"spiece.model or tokenizer.json. {error}"
            ) from error
    if config["vocab_size"] < CLIP_TOKENS:
        raise ValueError(f"{encoder} has {config['vocab_size']} tokens, not CLIP's {CLIP_TOKENS}: {advice}")
    # OpenAI's CLIP pads by its end token, OpenCLIP by token 0, "!".
    open_clip = encoder == "text_encoder_2" or is_second(pipeline_class, configs)
    return _clip_tokenizer("!" if open_clip else "<|endoftext|>")


@functools.cache
def _clip_tokenizer(pad: str) -> Path:
    """Writes CLIP's tokenizer into a folder that goes with this process."""
    vocab, merges = read_clip_bpe(hub.ASSETS / CLIP_BPE)
    folder = Path(tempfile.mkdtemp(prefix="clip-tokenizer-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    start, end = "<|startoftext|>", "<|endoftext|>"
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": pad}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": PROMPT_TOKENS, "do_lower_case": True, **special}
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    for name, text in {
        "vocab.json": json.dumps(vocab, ensure_ascii=False),
        "merges.txt": "\n".join(lines) + "\n",
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        "special_tokens_map.json": json.dumps(special, indent=2) + "\n",
    }.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder
