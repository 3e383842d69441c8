"""What a ReFL recipe holds on each device, from shapes alone: nothing is downloaded, allocated or compiled.

    python benchmarks/plan_refl.py --config configs/refl_sdxl.py --devices 1 8 32
    python benchmarks/plan_refl.py --config configs/refl_sdxl.py --lower        # traces and lowers the whole step too

Prints JSON: bytes a device of the weights that train, of the optimizer, of the gradient and of the frozen weights, with
every device along `fsdp`, in the dtypes and layout that training uses. Networks have the sizes of the published
Stable Diffusion 1.x and XL and of ImageReward v1.0; which family, the name of the config's model says. What the step
needs beside that, activations, only the compiler can tell.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh

from imagereward_jax.data.shapes_tokenizers import write_clip_tokenizer
from imagereward_jax.diffusion.samplers import make_sampler
from imagereward_jax.experiments.refl import make_phases
from imagereward_jax.experiments.weights import lora_alpha
from imagereward_jax.models import lora
from imagereward_jax.models.blip_config import ImageRewardConfig, TextConfig, VisionConfig
from imagereward_jax.models.params import join, split, trainable_mask
from imagereward_jax.pipelines.sd1 import StableDiffusion1
from imagereward_jax.pipelines.sdxl import StableDiffusionXL
from imagereward_jax.rewards import images as pictures
from imagereward_jax.rewards.imagereward import abstract_module, cast_params
from imagereward_jax.training.mesh import weight_shardings
from imagereward_jax.training.optimizer import make_optimizer
from imagereward_jax.training.step import init_state, make_train_step
from imagereward_jax.weights import mapping

# config.json of the published networks, what their class has as default left out.
VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "sample_size": 1024,
}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
SD1 = {
    "unet": {"sample_size": 64, "cross_attention_dim": 768},
    "vae": VAE,
    "text_encoder": CLIP_L,
}
SDXL = {
    "unet": {
        "sample_size": 128,
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "vae": VAE | {"scaling_factor": 0.13025},
    "text_encoder": CLIP_L,
    "text_encoder_2": {
        "architectures": ["CLIPTextModelWithProjection"],
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_attention_heads": 20,
        "num_hidden_layers": 32,
        "projection_dim": 1280,
        "hidden_act": "gelu",
    },
}
SCHEDULER = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
IMAGEREWARD = ImageRewardConfig(
    vision=VisionConfig(image_size=224, patch_size=16, width=1024, depth=24, heads=16),
    text=TextConfig(30524, 768, 12, 12, 3072, max_position_embeddings=512, layer_norm_eps=1e-12),
)


@dataclasses.dataclass
class Recipe:
    """A recipe's phases and optimizer, and the shapes of what trains, what is frozen and one batch of each stream."""

    config: object
    phases: tuple
    optimizer: object
    trainable: dict
    frozen: dict
    batches: dict


def make_pipeline(config):
    """The published family that `config.model.path` names, without weights."""
    options = {"dtype": config.dtype, "vae_dtype": config.model.vae_dtype, "remat": config.model.remat}
    folder = Path(tempfile.mkdtemp(prefix="plan-tokenizer-"))
    write_clip_tokenizer(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 77}))
    if "xl" in str(config.model.path).lower():
        return StableDiffusionXL.from_configs(
            **SDXL, scheduler=SCHEDULER, tokenizer_folder=folder, tokenizer_2_folder=folder, **options
        )
    return StableDiffusion1.from_configs(**SD1, scheduler=SCHEDULER, tokenizer_folder=folder, **options)


def make_reward(dtype):
    """ImageReward v1.0 without weights: `params` are shapes."""
    module = abstract_module(IMAGEREWARD, jnp.dtype(dtype))
    graphdef = nnx.graphdef(module)

    def apply(params, images, tokens):
        pixels = pictures.device_pixels(images, IMAGEREWARD.vision.image_size)
        return nnx.merge(graphdef, params)(pixels, tokens["input_ids"], tokens["attention_mask"])

    params = jax.eval_shape(lambda params: cast_params(params, jnp.dtype(dtype)), mapping.params_of(module))
    return SimpleNamespace(params=params, apply=apply)


def abstract_recipe(config):
    """The `Recipe` of a ReFL config."""
    pipeline, reward, method, rank = make_pipeline(config), make_reward(config.dtype), config.method, config.lora.rank
    params = pipeline.abstract_params()
    if rank:
        options = {"rank": rank, "alpha": lora_alpha(config), "dropout": config.lora.dropout}
        pipeline.add_lora("unet", config.lora.targets, **options)
        network = pipeline.networks["unet"]
        params = join(params, {"unet": jax.eval_shape(lambda key: lora.init(network, key, config.lora.init), KEY)})
    trainable, frozen = split(params, trainable_mask(params, ("unet",), lora=rank > 0))
    frozen = {
        name: _in_dtype(part, pipeline.vae_dtype if name == "vae" else config.dtype) for name, part in frozen.items()
    }
    sampler = make_sampler(method.sampler, pipeline.scheduler_config, method.num_steps)
    updates = config.steps * (2 if method.pretrain == "alternate" else 1)
    return Recipe(
        config,
        make_phases(pipeline, reward, sampler, method),
        make_optimizer(config.optimizer, updates, config.batch_size),
        trainable,
        {**frozen, "reward": reward.params},
        _batches(config, pipeline),
    )


KEY = jax.ShapeDtypeStruct((), jax.eval_shape(lambda: jax.random.key(0)).dtype)


def _in_dtype(tree, dtype):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), tree)


def _batches(config, pipeline):
    """Shapes of a global batch of prompts and one of pairs."""
    batch, data = config.batch_size, config.data
    ids = jax.ShapeDtypeStruct((batch, *pipeline.tokenize([""]).shape[1:]), jnp.int32)
    tokens = jax.ShapeDtypeStruct((batch, IMAGEREWARD.max_prompt_tokens), jnp.int32)
    prompts = {"input_ids": ids, "negative_ids": ids, "reward": {"input_ids": tokens, "attention_mask": tokens}}
    pairs = {
        "image": jax.ShapeDtypeStruct((batch, data.image_size, data.image_size, 3), jnp.float32),
        "input_ids": ids,
    }
    if pipeline.micro_conditioned:
        pairs["time_ids"] = jax.ShapeDtypeStruct((batch, 6), jnp.float32)
    return {"prompts": prompts} if config.method.pretrain == "off" else {"prompts": prompts, "pairs": pairs}


def abstract_state(recipe):
    """The `TrainState`, as shapes."""
    config = recipe.config

    def make(params):
        return init_state(params, recipe.optimizer, seed=config.seed, ema=config.ema_decay > 0)

    return jax.eval_shape(make, recipe.trainable)


def bytes_a_device(recipe, devices):
    """Bytes on each of `devices`, all along `fsdp`, by kind."""
    mesh = AbstractMesh((1, devices), ("data", "fsdp"))
    state = abstract_state(recipe)
    kinds = {
        "trainable": state.params,
        "optimizer": state.opt_state,
        "ema": state.ema,
        "gradient": state.params,
        "frozen": recipe.frozen,
    }
    return {name: _bytes(tree, weight_shardings(mesh, tree)) for name, tree in kinds.items()}


def _bytes(tree, shardings):
    sizes = jax.tree.map(
        lambda leaf, sharding: int(np.prod(sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize, tree, shardings
    )
    return sum(jax.tree.leaves(sizes))


def lower(recipe, platform="cpu"):
    """The whole training step, traced and lowered for a platform, as `jax.stages.Lowered`."""
    config = recipe.config
    options = {"accumulation": config.accumulation, "ema_decay": config.ema_decay}
    step = make_train_step(recipe.phases, recipe.optimizer, dtype=jnp.dtype(config.dtype), **options)
    with contextlib.ExitStack() as stack:
        from imagereward_jax.models.layers import target_platform

        stack.enter_context(target_platform(platform))
        traced = jax.jit(step, donate_argnums=0).trace(abstract_state(recipe), recipe.frozen, recipe.batches)
        return traced.lower(lowering_platforms=("cuda" if platform == "gpu" else platform,))


def load_config(path):
    """`get_config()` of a config file."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def plan(config, devices):
    """The figures of a config, for JSON."""
    recipe = abstract_recipe(config)
    count = {
        name: sum(leaf.size for leaf in jax.tree.leaves(getattr(recipe, name))) for name in ("trainable", "frozen")
    }
    on_each = {}
    for number in devices:
        kinds = bytes_a_device(recipe, number)
        on_each[number] = {**kinds, "total": sum(kinds.values())}
    return recipe, {"parameters": count, "bytes_a_device": on_each}


def main(argv=None):
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--lower", action="store_true", help="also trace and lower the step")
    parser.add_argument("--platform", choices=("cpu", "gpu", "tpu"), default="cpu", help="to lower for")
    arguments = parser.parse_args(argv)
    recipe, figures = plan(load_config(arguments.config), arguments.devices)
    if arguments.lower:
        start = time.perf_counter()
        text = lower(recipe, arguments.platform).as_text()
        figures["lowered"] = {"seconds": round(time.perf_counter() - start, 1), "characters": len(text)}
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    sys.exit(main())
