"""The files of settings of published text-to-image models, in the form that their repositories have them.

Sizes are the published ones, and every field is there, the odd ones above all. `SETS` maps a repository to its folder's
JSON files; `cut` makes them small.
"""

from typing import Any

from published_parts import CLIP, T5, UNET, VAE

# As diffusers 0.2 wrote it.
UNET_1 = UNET
UNET_2 = UNET_1 | {
    "_diffusers_version": "0.10.0.dev0",
    "attention_head_dim": [5, 10, 20, 20],
    "class_embed_type": None,
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_time_scale_shift": "default",
    "upcast_attention": True,
    "use_linear_projection": True,
}
# What diffusers of 2023 added.
LATER = {
    "_diffusers_version": "0.24.0.dev0",
    "addition_embed_type": None,
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": None,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "dropout": 0.0,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_only_cross_attention": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "projection_class_embeddings_input_dim": None,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": 1,
    "upcast_attention": None,
}
UNET_XL = {
    **UNET_2,
    **LATER,
    "_diffusers_version": "0.19.0.dev0",
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
}
VAE_1 = VAE | {"norm_num_groups": 32}
VAE_XL = VAE_1 | {"_diffusers_version": "0.20.0.dev0", "force_upcast": True, "scaling_factor": 0.13025}
VAE_XL |= {"sample_size": 1024}
VAE_LATER = VAE_XL | {
    "_name_or_path": "madebyollin/sdxl-vae-fp16-fix",
    "force_upcast": False,
    "latents_mean": None,
    "latents_std": None,
    "mid_block_add_attention": True,
    "shift_factor": None,
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}
VAE_3 = VAE_LATER | {
    "_diffusers_version": "0.29.0.dev0",
    "force_upcast": True,
    "latent_channels": 16,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}
CLIP_L = CLIP | {"projection_dim": 768, "transformers_version": "4.22.0.dev0"}
CLIP_H = CLIP_L | {
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "projection_dim": 512,
}
CLIP_G = CLIP_L | {
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
    "torch_dtype": "float16",
}
MMDIT = {
    "_class_name": "SD3Transformer2DModel",
    "_diffusers_version": "0.29.0.dev0",
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "in_channels": 16,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 24,
    "out_channels": 16,
    "patch_size": 2,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
    "sample_size": 128,
}
MMDIT_35 = MMDIT | {"_diffusers_version": "0.31.0.dev0", "dual_attention_layers": [], "qk_norm": "rms_norm"}
MMDIT_35_LARGE = MMDIT_35 | {"caption_projection_dim": 2432, "num_attention_heads": 38, "num_layers": 38}

BETAS = {"beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000}
BETAS |= {"trained_betas": None}
PNDM = {"_class_name": "PNDMScheduler", "_diffusers_version": "0.7.0.dev0", **BETAS, "clip_sample": False}
PNDM |= {"set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1}
EULER = PNDM | {
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.19.0.dev0",
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}
EULER_LATER = EULER | {
    "final_sigmas_type": "zero",
    "rescale_betas_zero_snr": False,
    "sigma_max": None,
    "sigma_min": None,
    "timestep_type": "discrete",
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
}
ANCESTRAL = EULER_LATER | {"_class_name": "EulerAncestralDiscreteScheduler"}
DPM = EULER_LATER | {
    "_class_name": "DPMSolverMultistepScheduler",
    "algorithm_type": "dpmsolver++",
    "dynamic_thresholding_ratio": 0.995,
    "euler_at_final": False,
    "lambda_min_clipped": -float("inf"),
    "lower_order_final": True,
    "solver_order": 2,
    "solver_type": "midpoint",
    "thresholding": False,
    "use_karras_sigmas": True,
    "use_lu_lambdas": False,
    "variance_type": None,
}
DEIS = DPM | {"_class_name": "DEISMultistepScheduler", "algorithm_type": "deis", "solver_type": "logrho"}
UNIPC = DPM | {
    "_class_name": "UniPCMultistepScheduler",
    "disable_corrector": [],
    "flow_shift": 1.0,
    "predict_x0": True,
    "solver_p": None,
    "solver_type": "bh2",
    "use_flow_sigmas": False,
    "use_karras_sigmas": False,
}
LCM = PNDM | {
    "_class_name": "LCMScheduler",
    "clip_sample_range": 1.0,
    "dynamic_thresholding_ratio": 0.995,
    "original_inference_steps": 50,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "sample_max_value": 1.0,
    "thresholding": False,
    "timestep_scaling": 10.0,
    "timestep_spacing": "leading",
}
EDM = {
    "_class_name": "EDMDPMSolverMultistepScheduler",
    "_diffusers_version": "0.27.0.dev0",
    "algorithm_type": "dpmsolver++",
    "dynamic_thresholding_ratio": 0.995,
    "euler_at_final": False,
    "final_sigmas_type": "zero",
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "rho": 7.0,
    "sample_max_value": 1.0,
    "sigma_data": 0.5,
    "sigma_max": 80.0,
    "sigma_min": 0.002,
    "solver_order": 2,
    "solver_type": "midpoint",
    "thresholding": False,
}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "_diffusers_version": "0.29.0.dev0"}
FLOW |= {"num_train_timesteps": 1000, "shift": 3.0}
FLOW_LATER = FLOW | {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "invert_sigmas": False,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "shift_terminal": None,
    "stochastic_sampling": False,
    "time_shift_type": "exponential",
    "use_beta_sigmas": False,
    "use_dynamic_shifting": False,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}


def model(pipeline_class, parts, scheduler, **fields):
    """{file: content} of a folder."""
    entries = {}
    for name, config in {**parts, "scheduler": scheduler}.items():
        if "_class_name" in config:
            entries[name] = ["diffusers", config["_class_name"]]
        else:
            entries[name] = ["transformers", (config["architectures"] or ["CLIPTextModel"])[0]]
            tokenizer = "T5TokenizerFast" if name == "text_encoder_3" else "CLIPTokenizer"
            entries[name.replace("text_encoder", "tokenizer")] = ["transformers", tokenizer]
    index = {"_class_name": pipeline_class, "_diffusers_version": "0.24.0", **entries, **fields}
    configs = {f"{name}/config.json": config for name, config in parts.items()}
    return {"model_index.json": index, "scheduler/scheduler_config.json": scheduler, **configs}


CHECKED = {
    "feature_extractor": ["transformers", "CLIPFeatureExtractor"],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
}
UNCHECKED = {
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
}


def sd(unet=UNET_1, vae=VAE_1, text=CLIP_L, scheduler=PNDM, **fields):
    parts = {"unet": unet, "vae": vae, "text_encoder": text}
    return model("StableDiffusionPipeline", parts, scheduler, **(fields or CHECKED))


def sdxl(unet=UNET_XL, vae=VAE_XL, scheduler=EULER, **fields):
    parts = {"unet": unet, "vae": vae, "text_encoder": CLIP_L, "text_encoder_2": CLIP_G}
    return model("StableDiffusionXLPipeline", parts, scheduler, force_zeros_for_empty_prompt=True, **fields)


def sd3(transformer=MMDIT, scheduler=FLOW, t5=True):
    first = CLIP_L | {"architectures": ["CLIPTextModelWithProjection"], "torch_dtype": "float16"}
    parts = {"transformer": transformer, "vae": VAE_3, "text_encoder": first, "text_encoder_2": CLIP_G}
    if t5:
        return model("StableDiffusion3Pipeline", parts | {"text_encoder_3": T5}, scheduler)
    absent = {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    return model("StableDiffusion3Pipeline", parts, scheduler, **absent)


SSD_1B = UNET_XL | {
    "mid_block_type": "UNetMidBlock2D",
    "transformer_layers_per_block": [1, [2, 2], [4, 4]],
    "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
}
VEGA = SSD_1B | {
    "transformer_layers_per_block": [1, [1, 1], [2, 2]],
    "reverse_transformer_layers_per_block": [[2, 2, 2], [1, 1, 1], 1],
}
ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
# {"decay": ...}: the UNet was saved by diffusers' EMAModel.
AVERAGE = {"decay": 0.9999, "inv_gamma": 1.0, "min_decay": 0.0, "optimization_step": 37000, "power": 2 / 3}
AVERAGE |= {"update_after_step": 0, "use_ema_warmup": False}

SETS = {
    "CompVis/stable-diffusion-v1-4": sd(),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": sd(scheduler=PNDM | {"_diffusers_version": "0.6.0"}),
    "prompthero/openjourney": sd(scheduler={key: value for key, value in PNDM.items() if key != "clip_sample"}),
    "hakurei/waifu-diffusion": sd(text=CLIP_L | {"architectures": None}, scheduler=PNDM | {"set_alpha_to_one": None}),
    "dreamlike-art/dreamlike-photoreal-2.0": sd(unet=UNET_1 | {"sample_size": 96}, **UNCHECKED),
    "SG161222/Realistic_Vision_V5.1_noVAE": sd(unet=UNET_1 | LATER, **UNCHECKED),
    "Lykon/dreamshaper-8": sd(unet=UNET_1 | LATER, scheduler=DEIS, **UNCHECKED),
    "Lykon/dreamshaper-8-lcm": sd(unet=UNET_1 | LATER, scheduler=LCM, **UNCHECKED),
    "nota-ai/bk-sdm-base": sd(unet=UNET_1 | {"layers_per_block": 1, "mid_block_type": "UNetMidBlock2DCrossAttn"}),
    "nota-ai/bk-sdm-tiny": sd(
        unet=UNET_1
        | {
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["CrossAttnDownBlock2D"] * 3,
            "layers_per_block": 1,
            "mid_block_type": None,
            "up_block_types": ["CrossAttnUpBlock2D"] * 3,
        }
    ),
    "stabilityai/stable-diffusion-2-base": sd(UNET_2 | {"upcast_attention": False}, VAE_1, CLIP_H, PNDM),
    "stabilityai/stable-diffusion-2-1-base": sd(UNET_2, VAE_1, CLIP_H, PNDM | {"prediction_type": "epsilon"}),
    "stabilityai/stable-diffusion-2-1": sd(
        UNET_2 | {"sample_size": 96},
        VAE_1 | {"sample_size": 768},
        CLIP_H,
        PNDM | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"},
        **UNCHECKED,
    ),
    "ptx0/pseudo-flex-v2": sd(
        UNET_2 | LATER | AVERAGE, VAE_1, CLIP_H, PNDM | ZERO_SNR | {"_class_name": "DDIMScheduler"}, **UNCHECKED
    ),
    "stabilityai/sd-turbo": sd(
        UNET_2 | LATER, VAE_1, CLIP_H, EULER_LATER | {"timestep_spacing": "trailing"}, **UNCHECKED
    ),
    "stabilityai/stable-diffusion-xl-base-1.0": sdxl(),
    "stabilityai/stable-diffusion-xl-base-0.9": sdxl(vae=VAE_XL | {"force_upcast": True}, add_watermarker=None),
    "stabilityai/sdxl-turbo": sdxl(scheduler=ANCESTRAL | {"timestep_spacing": "trailing"}),
    "ByteDance/SDXL-Lightning": sdxl(scheduler=EULER | {"timestep_spacing": "trailing"}),
    "playgroundai/playground-v2-1024px-aesthetic": sdxl(scheduler=EULER | {"_diffusers_version": "0.24.0"}),
    "segmind/SSD-1B": sdxl(SSD_1B, VAE_LATER),
    "segmind/Segmind-Vega": sdxl(VEGA, VAE_LATER),
    "etri-vilab/koala-700m": sdxl(
        UNET_XL | {"layers_per_block": 1, "mid_block_type": None, "transformer_layers_per_block": [1, 2, 5]}
    ),
    "cagliostrolab/animagine-xl-3.1": sdxl(vae=VAE_LATER, scheduler=ANCESTRAL, **UNCHECKED),
    "Pony-Diffusion-V6-XL": sdxl(vae=VAE_LATER, scheduler=ANCESTRAL | {"timestep_spacing": "linspace"}),
    "RunDiffusion/Juggernaut-XL-v9": sdxl(vae=VAE_LATER, scheduler=DPM | {"timestep_spacing": "linspace"}),
    "SG161222/RealVisXL_V4.0": sdxl(vae=VAE_LATER, scheduler=DPM | {"solver_order": 2, "euler_at_final": True}),
    "Lykon/dreamshaper-xl-v2-turbo": sdxl(scheduler=DPM | {"use_karras_sigmas": False}),
    "Laxhar/noobai-XL-Vpred-1.0": sdxl(scheduler=EULER_LATER | ZERO_SNR | {"timestep_spacing": "trailing"}),
    "a UniPC of SDXL": sdxl(scheduler=UNIPC),
    "stabilityai/stable-diffusion-3-medium-diffusers": sd3(),
    "stabilityai/stable-diffusion-3.5-medium": sd3(
        MMDIT_35 | {"dual_attention_layers": list(range(13)), "pos_embed_max_size": 384}, FLOW_LATER
    ),
    "stabilityai/stable-diffusion-3.5-large": sd3(MMDIT_35_LARGE, FLOW_LATER),
    "stabilityai/stable-diffusion-3.5-large-turbo": sd3(
        MMDIT_35_LARGE, FLOW_LATER | {"use_dynamic_shifting": True}, t5=False
    ),
}
ANOTHER = "_class_name={!r} is not implemented, only StableDiffusionPipeline"
REFUSED = {
    "playgroundai/playground-v2.5-1024px-aesthetic": (
        sdxl(vae=VAE_LATER | {"latents_mean": [-1.6, -0.6, 2.1, -0.9], "latents_std": [8.4, 5.9, 7.2, 5.9]}),
        "latents_mean=",
    ),
    "playground-v2.5 with another VAE": (sdxl(scheduler=EDM), "'EDMDPMSolverMultistepScheduler': it scales the"),
    "stabilityai/cosxl": (sdxl(scheduler=EDM | {"_class_name": "EDMEulerScheduler"}), "EDM's sigma_data"),
    "latent-consistency/lcm-sdxl": (sdxl(UNET_XL | {"time_cond_proj_dim": 256}), "the guidance scale is an input"),
    "h94/IP-Adapter": (sdxl(UNET_XL | {"encoder_hid_dim_type": "ip_image_proj"}), "projects its conditions"),
    "a field of tomorrow": (sd(scheduler=PNDM | {"some_new_field": 3}), "'some_new_field' (value 3) is not known here"),
    "a refiner saved as SDXL": (
        sdxl(UNET_XL | {"projection_class_embeddings_input_dim": 2560}),
        "SDXL's refiner has 5 and is not implemented",
    ),
    **{
        name: (sd() | {"model_index.json": sd()["model_index.json"] | {"_class_name": kind}}, ANOTHER.format(kind))
        for name, kind in {
            "stabilityai/stable-diffusion-xl-refiner-1.0": "StableDiffusionXLImg2ImgPipeline",
            "runwayml/stable-diffusion-inpainting": "StableDiffusionInpaintPipeline",
            "timbrooks/instruct-pix2pix": "StableDiffusionInstructPix2PixPipeline",
            "stabilityai/stable-diffusion-2-depth": "StableDiffusionDepth2ImgPipeline",
            "stabilityai/stable-diffusion-x4-upscaler": "StableDiffusionUpscalePipeline",
            "SimianLuo/LCM_Dreamshaper_v7": "LatentConsistencyModelPipeline",
            "black-forest-labs/FLUX.1-dev": "FluxPipeline",
            "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": "PixArtSigmaPipeline",
            "Kwai-Kolors/Kolors-diffusers": "KolorsPipeline",
            "DeepFloyd/IF-I-XL-v1.0": "IFPipeline",
        }.items()
    },
}


def cut(files: dict[str, Any]) -> dict[str, Any]:
    """A folder's files with widths divided by 8 and few layers, so that structures are quick to build."""
    return {
        name: {key: _cut(key, value, content) for key, value in content.items()} if "/config" in name else content
        for name, content in files.items()
    }


_WIDTHS = {
    *("addition_time_embed_dim", "block_out_channels", "cross_attention_dim", "projection_class_embeddings_input_dim"),
    *("caption_projection_dim", "joint_attention_dim", "pooled_projection_dim", "d_ff", "d_kv", "d_model"),
    *("hidden_size", "intermediate_size", "projection_dim"),
}


def _cut(field, value, config):
    kind = config.get("_class_name")
    if field in _WIDTHS or (field, kind) == ("attention_head_dim", "SD3Transformer2DModel"):
        return _map(lambda width: width and width // 8, value)
    if field == "norm_num_groups":  # 40 and 16 channels
        return 8 if kind == "UNet2DConditionModel" else 4
    if field.endswith("transformer_layers_per_block"):
        return _map(lambda layers: layers and min(layers, 2), value)
    if field in ("num_layers", "num_hidden_layers"):
        return min(value, 3 if kind else 2)
    return [layer for layer in value if layer < 2] if field == "dual_attention_layers" else value


def _map(function, value):
    return [_map(function, item) for item in value] if isinstance(value, list) else function(value)
