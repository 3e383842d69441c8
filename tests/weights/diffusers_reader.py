"""Images by PyTorch diffusers alone, of whichever version this interpreter has; for formats_in_diffusers.py.

    python diffusers_reader.py JOBS.json OUT

A job is {"name", "model" (folder), "prompt", "noise" (file), "steps", "guidance"} and perhaps "file" (a checkpoint of
one file whose settings are those of the folder), "variant", "flax" (folder whose VAE is used), "prediction_type",
"lora" (file), "peft" (folder), "embeddings" ([file, suffix of the text encoder]). Writes OUT/NAME.npy; errors by name
are in OUT/answers.json.
"""

import dataclasses
import json
import os
import sys
import warnings
from pathlib import Path

os.environ |= {"USE_TF": "0", "HF_HUB_OFFLINE": "1"}
warnings.filterwarnings("ignore")

import diffusers
import numpy as np
import peft
import torch
import transformers

OLD = not hasattr(diffusers.UNet2DConditionModel, "from_single_file")  # 0.27: parts of a file are converted one by one
WORD = "<cat-toy>"


def open_model(job):
    """The pipeline of a job, without its adapters and embeddings."""
    index = json.loads(Path(job["model"], "model_index.json").read_text())
    # Stable Diffusion 3's pipeline has to be told that T5 is absent.
    options = {"torch_dtype": torch.float32} | {name: None for name, entry in index.items() if entry == [None, None]}
    if "file" in job and not OLD:
        kind = getattr(diffusers, index["_class_name"])
        return kind.from_single_file(job["file"], config=job["model"], **options)
    if "file" in job:
        options |= parts_of_file(job["model"], job["file"])
    if "flax" in job:  # 0.27 loses the attention of Flax's VAE, whose names are another
        kinds = {"unet": diffusers.UNet2DConditionModel, "text_encoder": transformers.CLIPTextModel}
        options |= {n: kind.from_pretrained(job["model"], subfolder=n, from_flax=True) for n, kind in kinds.items()}
        options["vae"] = diffusers.AutoencoderKL.from_pretrained(job["flax"], subfolder="vae")
    return diffusers.DiffusionPipeline.from_pretrained(job["model"], variant=job.get("variant"), **options)


def parts_of_file(folder, file):
    """The networks of a file as `from_single_file` of diffusers 0.27 converts them, with the settings of a folder.

    The method itself knows the published sizes alone, and asks the hub for the settings of text encoders.
    """
    from diffusers.loaders import single_file_utils as reading

    checkpoint = reading.load_single_file_model_checkpoint(file)
    networks = {}
    for name, kind, convert in (
        ("unet", diffusers.UNet2DConditionModel, reading.convert_ldm_unet_checkpoint),
        ("vae", diffusers.AutoencoderKL, reading.convert_ldm_vae_checkpoint),
    ):
        networks[name] = kind.from_config(kind.load_config(folder, subfolder=name))
        networks[name].load_state_dict(convert(checkpoint, networks[name].config))
    openclip = {
        "cond_stage_model.model.": ("text_encoder", False),
        "conditioner.embedders.1.model.": ("text_encoder_2", True),
    }
    for prefix, (name, projection) in openclip.items():
        if f"{prefix}ln_final.weight" in checkpoint:
            networks[name] = reading.create_text_encoder_from_open_clip_checkpoint(
                f"{folder}/{name}", checkpoint, prefix, has_projection=projection, local_files_only=True
            )
    if "text_encoder" not in networks:
        networks["text_encoder"] = reading.create_text_encoder_from_ldm_clip_checkpoint(
            f"{folder}/text_encoder", checkpoint, local_files_only=True
        )
    return networks


def add_adapter(pipe, job):
    """Loads the adapter of a job, by diffusers or by PEFT."""
    if "lora" in job:
        pipe.load_lora_weights(str(Path(job["lora"]).parent), weight_name=Path(job["lora"]).name)
    if "peft" in job:
        settings = json.loads(Path(job["peft"], "adapter_config.json").read_text())
        kind = {"LORA": peft.LoraConfig, "LOHA": peft.LoHaConfig, "LOKR": peft.LoKrConfig}[settings["peft_type"]]
        known = {field.name for field in dataclasses.fields(kind)}
        config = kind(**{key: value for key, value in settings.items() if key in known})
        pipe.unet = peft.PeftModel.from_pretrained(pipe.unet, job["peft"], config=config).merge_and_unload()
    for path, suffix in job.get("embeddings", ()):
        encoder = {name: getattr(pipe, f"{name}{suffix}") for name in ("tokenizer", "text_encoder")}
        pipe.load_textual_inversion(
            str(Path(path).parent), weight_name=Path(path).name, token=WORD, local_files_only=True, **encoder
        )


def image(job):
    """The image [1, H, W, 3] of a job, in [0, 1]."""
    pipe = open_model(job)
    pipe.set_progress_bar_config(disable=True)
    add_adapter(pipe, job)
    if "Flow" not in type(pipe.scheduler).__name__:
        override = {"prediction_type": job["prediction_type"]} if "prediction_type" in job else {}
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, **override)
    latents = torch.from_numpy(np.load(job["noise"]).transpose(0, 3, 1, 2).copy())
    side = latents.shape[-1] * pipe.vae_scale_factor
    options = {"height": side, "width": side, "latents": latents, "output_type": "np"}
    return pipe(job["prompt"], num_inference_steps=job["steps"], guidance_scale=job["guidance"], **options).images


def main(jobs, out):
    answers = {"versions": {m.__name__: m.__version__ for m in (diffusers, torch, transformers, peft)}, "errors": {}}
    for job in json.loads(Path(jobs).read_text()):
        try:
            np.save(Path(out, f"{job['name']}.npy"), image(job))
        except Exception as error:  # any refusal of diffusers is an answer; the caller knows which are right
            answers["errors"][job["name"]] = f"{type(error).__name__}: {error}"
    Path(out, "answers.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
