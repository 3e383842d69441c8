"""Defaults of every training run, and the check that a config makes sense before anything is built.

A file in `configs/` starts from `default_config(method)` and changes what its recipe needs. Every field can be
overridden on the command line (`--config.optimizer.learning_rate=1e-4`).
"""

import difflib
import importlib.util
import re
from pathlib import Path

import ml_collections

from imagereward_jax.diffusion.samplers import SAMPLERS
from imagereward_jax.diffusion.schedule import PREDICTION_TYPES
from imagereward_jax.models import lora, quantized
from imagereward_jax.models.remat import REMAT_POLICIES
from imagereward_jax.training.step import OPTIMIZATION_LEVELS

METHODS = ("refl", "denoising", "autoencoder", "ranking")
PRETRAIN_MODES = ("off", "alternate", "add")
WRITERS = ("jsonl", "log", "tensorboard")
SCHEDULES = ("constant", "linear", "cosine")
DTYPES = ("float32", "bfloat16")
FILE_DTYPES = ("float32", "bfloat16", "float16")
RANKING_MODES = ("groups", "pairs")
ROLLOUT_QUANTIZATIONS = ("none", *quantized.DTYPES)


class ConfigError(ValueError):
    """A config field has a value that cannot work; the message names the field and the way out."""


def default_config(method):
    """The `ml_collections.ConfigDict` that recipes start from.

    Args:
        method: one of `METHODS`; decides which fields `config.method` has.
    """
    config = ml_collections.ConfigDict()
    config.seed = 0  # initial noise, stop indices, data order: the whole run follows from it
    config.steps = 1000  # optimizer steps (of each loss, where a method alternates two)
    config.batch_size = 8  # samples an update, over all devices and accumulation rounds
    config.accumulation = 1  # rounds that a batch is split into: less memory, same gradient
    config.dtype = "float32"  # arithmetic; "bfloat16" keeps float32 master weights of what trains
    config.compilation_cache = True  # keep compiled programs for the next start, in ~/.cache/imagereward_jax/compiled
    # O0 to O3: what the compiler spends on a fast step; None leaves it to jax; O0 is for `plan` on TPUs
    config.optimization_level = ml_collections.config_dict.placeholder(str)
    config.max_skipped = 20  # updates in a row that non-finite gradients may cost before the run stops

    config.model = ml_collections.ConfigDict()
    config.model.path = ""  # diffusers folder, hub name, or "tiny-shapes"
    config.model.variant = ml_collections.config_dict.placeholder(str)  # "fp16" reads *.fp16.safetensors
    config.model.vae_dtype = ml_collections.config_dict.placeholder(str)  # by default config.dtype; never "float16"
    config.model.prediction_type = ml_collections.config_dict.placeholder(str)  # instead of what the scheduler says
    # what the backward pass computes again: none, blocks, attention, full; offload: as blocks, but what is kept waits
    # in the host's memory (TPUs, GPUs)
    config.model.remat = "blocks"

    config.mesh = ml_collections.ConfigDict()
    config.mesh.data = -1  # devices along the batch; -1: all that are left
    config.mesh.fsdp = 1  # devices that share each weight, its moments and its EMA

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.learning_rate = 1e-5
    config.optimizer.scale_by_batch = False  # times config.batch_size: the rate is then that of one sample
    config.optimizer.schedule = "constant"  # after the warm-up: constant, linear or cosine (to 0)
    config.optimizer.warmup_steps = 0
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.weight_decay = 1e-2
    config.optimizer.clip_norm = 1.0  # global gradient norm; 0 switches clipping off
    config.ema_decay = (
        0.0  # > 0 averages the weights, which is what is sampled and exported; min(it, (1 + t) / (10 + t))
    )

    config.data = ml_collections.ConfigDict()
    config.data.workers = 0  # processes that decode pictures; 0: a thread of this one

    config.log_every = 10
    config.writers = ("jsonl", "log", "tensorboard")
    config.checkpoint = ml_collections.ConfigDict()
    config.checkpoint.every = 100
    config.checkpoint.keep = 2  # the latest ones; the best (by config.eval.best) is kept as well
    config.checkpoint.best_only = False  # save only what evaluates better than all before, and export the best
    config.checkpoint.export = "last"  # what is exported and tested: "last", or "best" by config.eval.best
    config.eval = ml_collections.ConfigDict()
    config.eval.every = 100
    config.profile = ml_collections.ConfigDict()
    config.profile.steps = 0  # > 0 traces that many steps, after the first two, into WORKDIR/profile

    config.method = ml_collections.ConfigDict()
    config.method.name = method
    _METHOD_DEFAULTS[method](config)
    return config


def recipe_beside(file, name):
    """The config of the recipe `name`.py in the folder of `file`, for recipes that change a few fields of another."""
    spec = importlib.util.spec_from_file_location(name, Path(file).with_name(f"{name}.py"))
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    return recipe.get_config()


def _sampling_defaults(config):
    config.eval.prompts = ""  # held-out prompts: file, `datasets` name, or shapes:held_out
    config.eval.num_prompts = 32
    config.eval.images_per_prompt = 1
    config.eval.batch_size = 8
    config.eval.sampler = "ddim"
    config.eval.num_steps = 40
    config.eval.guidance_scale = 7.5
    config.eval.seed = 0  # the same noise for the same prompts at every evaluation
    config.eval.grid = 16  # pictures in samples/step_*.png


def _lora_defaults(config):
    config.lora = ml_collections.ConfigDict()
    config.lora.rank = 0  # > 0 trains low-rank parameters alone, over a base held in config.dtype; 0: all weights
    config.lora.alpha = ml_collections.config_dict.placeholder(float)  # updates are scaled by alpha / rank; None: rank
    config.lora.targets = lora.ATTENTION  # regular expression: layers of the UNet whose names end so
    config.lora.init = "gaussian"  # of A: gaussian (standard deviation 1 / rank) or kaiming; B is zero
    config.lora.dropout = 0.0  # of A's input, in the steps that carry gradient
    config.lora.dtype = "float32"  # of the exported file; the weights that train are float32
    config.lora.path = ""  # an adapter to continue from: file, folder or hub name; rank, alpha, targets as its own


def _pairs_defaults(config):
    config.data.pairs = ""  # image-text pairs: file, folder, `datasets` name, tfds:NAME or shapes:train
    config.data.pairs_image_column = ml_collections.config_dict.placeholder(str)
    config.data.pairs_text_column = ml_collections.config_dict.placeholder(str)
    config.data.image_size = 512
    config.data.random_crop = False
    config.data.random_flip = False
    config.data.caption_dropout = 0.1  # share of pairs trained with the empty prompt, for guidance
    config.data.caption_noise = 0.0  # shapes:train only: share of captions with one wrong word


def _cache_defaults(config):
    config.data.cache = ""  # folder for the pairs' latents and encoded prompts, computed once, crops included


def _reward_defaults(config, path):
    config.reward = ml_collections.ConfigDict()
    config.reward.path = path
    config.reward.weights = ""  # where the weights of a score are ("CLIP", "PickScore", ...), if not downloaded
    config.reward.tokenizer = ml_collections.config_dict.placeholder(str)  # the vocabulary, if not the reward's own
    config.reward.terms = ml_collections.ConfigDict()  # instead of path: a mixture, {name: reward_term(...)}


def reward_term(path, *, weight=1.0, mean=0.0, std=1.0, clip=0.0, weights="", tokenizer=None):
    """One reward of a mixture, config.reward.terms.NAME: it counts as `weight * clip((score - mean) / std)`.

    Args:
        path, weights, tokenizer: as in config.reward.
        mean, std: of its scores, so that rewards on different scales can be added.
        clip: bound on the normalised score, beyond which it is not rewarded further; 0 for none.
    """
    term = ml_collections.ConfigDict(
        {"path": path, "weights": weights, "weight": weight, "mean": mean, "std": std, "clip": clip}
    )
    term.tokenizer = ml_collections.config_dict.placeholder(str)
    term.tokenizer = tokenizer
    return term


def _refl_defaults(config):
    _reward_defaults(config, "ImageReward-v1.0")  # a name, ImageReward.pt, a converted folder, a score, "tiny-shapes"
    config.data.prompts = ""  # training prompts: file, `datasets` name, tfds:NAME or shapes:train
    config.data.prompts_column = ml_collections.config_dict.placeholder(str)
    method = config.method
    method.sampler = "ddpm"
    method.num_steps = 40  # sampler steps of a whole generation
    method.stop_min = 30  # the step that carries the gradient is drawn for each sample in [stop_min, stop_max]
    method.stop_max = 39
    method.rollout_quantization = "none"  # of the UNet in the steps without gradient: none, int8, fp8; needs qwix
    method.guidance_scale = 1.0  # at most 1: no guidance while training, half the work
    method.negative_prompt = ""
    method.height = 512
    method.width = 512
    method.threshold = 2.0  # loss is relu(threshold - reward) * scale
    method.scale = 1e-3
    method.pretrain = "alternate"  # denoising loss on pairs: off, alternate (an update of its own), add
    method.pretrain_weight = 1.0
    method.snr_gamma = 0.0  # > 0: min-SNR weights of the denoising loss; 5 is usual
    _lora_defaults(config)
    _sampling_defaults(config)
    _pairs_defaults(config)
    _cache_defaults(config)
    config.eval.best = "eval/reward_mean"


def _scratch_defaults(config):
    config.model.from_scratch = False  # start from random networks of config.model.architecture
    config.model.conv_bias_std = 0.0  # > 0: of the random UNet's convolution biases, which tell it where it is
    config.model.vae_from = ""  # with from_scratch: the model whose autoencoder is taken; "" for a random one


def _denoising_defaults(config):
    _scratch_defaults(config)
    config.method.train_text_encoder = False
    config.method.timestep_power = 1.0  # timesteps are T * u^power with u uniform: below 1, noisy ones come more often
    config.method.snr_gamma = 0.0  # > 0: min-SNR weights of the loss; 5 is usual
    _reward_defaults(config, "")  # scores the evaluation's samples; "" for none
    _lora_defaults(config)
    _sampling_defaults(config)
    _pairs_defaults(config)
    _cache_defaults(config)
    config.eval.best = "eval/checker_rate"


def _autoencoder_defaults(config):
    _scratch_defaults(config)
    config.method.kl_weight = 1e-6
    _pairs_defaults(config)
    config.eval.num_images = 64
    config.eval.best = "eval/psnr"


def _ranking_defaults(config):
    config.model.remat = "none"  # the only field of config.model that a scorer's training has a use for
    config.reward = ml_collections.ConfigDict()
    config.reward.path = ""  # what training starts from; "" for random weights of config.reward.architecture
    config.reward.unit_gain = False  # random weights only: variance 1 / inputs, for networks far smaller than BLIP
    config.reward.position_scale = 1.0  # random weights only: times the vision transformer's initial positions
    config.reward.head_scale = 1.0  # random weights only: times the head's initial matrices
    config.reward.tokenizer = ml_collections.config_dict.placeholder(str)
    config.reward.blip = ""  # BLIP's model_large.pth, to start from its encoders with a new head (path must be "")
    config.reward.fix_rate = 0.0  # share of both transformers' layers, from the first, that stays as it is
    config.method.mode = "groups"  # a batch is of groups, each picture encoded once, or of "pairs" (more work)
    config.method.dropout = 0.0  # BERT's, in hidden states and attention; 0.1 in the original
    config.method.drop_path = 0.0  # of the last vision block, rising evenly from 0; 0.1 in the original
    config.method.head_dropout = (0.0, 0.0, 0.0)  # of the head; 0.2, 0.2, 0.1 in the original
    config.data.groups = ""  # ranked groups: JSON of the protocol, ImageRewardDB (see data/groups.py), or shapes:train
    config.data.held_out_groups = ""  # for validation
    config.data.test_groups = ""  # for the accuracy of what is exported; "" for none
    config.data.groups_split = "train"  # of sources that have splits
    config.data.held_out_split = "validation"
    config.data.test_split = "test"
    config.data.images_folder = ""  # what paths are relative to; "" for the folder of the file
    config.data.cache = ""  # folder that keeps the resized pictures; "" decodes them each time
    config.data.images_per_prompt = 4  # shapes:train and shapes:held_out only: pictures in a group, 2 to 9
    config.data.spoilt = True  # shapes only: two groups in five hold spoilt pictures too; False: only words differ
    config.eval.num_groups = 128  # of the held-out ones, from the first; 0 for all
    config.eval.per_epoch = 0  # > 0 sets config.eval.every, so that an epoch has so many evaluations
    config.eval.best = "eval/accuracy"  # a minus before the name: the smallest is best, e.g. -eval/loss


_METHOD_DEFAULTS = {
    "refl": _refl_defaults,
    "denoising": _denoising_defaults,
    "autoencoder": _autoencoder_defaults,
    "ranking": _ranking_defaults,
}


def validate(config):
    """Refuses values that cannot work.

    Raises:
        ConfigError: naming the field, its value and what is expected.
    """
    _choice(config, "method.name", METHODS)
    _choice(config, "dtype", DTYPES)
    _choice(config, "model.remat", REMAT_POLICIES)
    _choice(config, "model.vae_dtype", (None, *DTYPES))
    _choice(config, "model.prediction_type", (None, *PREDICTION_TYPES))
    _choice(config, "optimizer.schedule", SCHEDULES)
    _choice(config, "checkpoint.export", ("last", "best"))
    for field in ("steps", "batch_size", "accumulation", "max_skipped", "log_every"):
        _at_least(config, field, 1)
    for field in ("checkpoint.every", "checkpoint.keep", "eval.every", "mesh.fsdp"):
        _at_least(config, field, 1)
    _at_least(config, "profile.steps", 0)
    _at_least(config, "optimizer.learning_rate", 0.0)
    _at_least(config, "optimizer.clip_norm", 0.0)
    _at_least(config, "optimizer.warmup_steps", 0)
    _choice(config, "optimization_level", (None, *OPTIMIZATION_LEVELS))
    if not 0 <= config.ema_decay < 1:
        raise ConfigError(f"config.ema_decay={config.ema_decay}: expected a number in [0, 1); 0 switches EMA off")
    for writer in config.writers:
        if writer not in WRITERS:
            raise ConfigError(
                f"config.writers: {writer!r} is none of {', '.join(WRITERS)}{did_you_mean(writer, WRITERS)}"
            )
    if config.batch_size % config.accumulation:
        raise ConfigError(
            f"config.batch_size={config.batch_size} is not divisible by config.accumulation={config.accumulation}"
        )
    if "sampler" in config.eval:
        _choice(config, "eval.sampler", tuple(SAMPLERS))
        for field in ("eval.num_prompts", "eval.images_per_prompt", "eval.batch_size", "eval.num_steps", "eval.grid"):
            _at_least(config, field, 1)
    if "lora" in config:
        _validate_lora(config)
    if "snr_gamma" in config.method:
        _at_least(config, "method.snr_gamma", 0.0)
    if "terms" in config.get("reward", {}):
        _validate_terms(config)
    if config.method.name == "refl":
        _validate_refl(config)
    if config.method.name == "denoising" and config.method.timestep_power <= 0:
        raise ConfigError(f"config.method.timestep_power={config.method.timestep_power}: expected a positive number")
    if config.method.get("train_text_encoder") and config.data.cache:
        raise ConfigError("config.data.cache holds encoded prompts: it cannot be used with method.train_text_encoder")
    if config.method.name in ("denoising", "autoencoder"):
        _given(config, "data.pairs")
    elif config.method.name == "ranking":
        _validate_ranking(config)


def _validate_ranking(config):
    defaults = default_config("ranking").model
    for name in sorted(set(defaults) - {"remat"}):
        if config.model[name] != defaults[name]:
            raise ConfigError(
                f"config.model.{name}={config.model[name]!r}: training a scorer has no diffusion model; leave it out "
                "(config.reward.path is what training starts from)"
            )
    _given(config, "data.groups")
    _given(config, "data.held_out_groups")
    _choice(config, "method.mode", RANKING_MODES)
    _at_least(config, "data.images_per_prompt", 2)
    if config.reward.path and config.reward.blip:
        raise ConfigError("config.reward.path and config.reward.blip are both given: training starts from one of them")
    if not (config.reward.path or config.reward.blip or "architecture" in config.reward):
        raise ConfigError(
            "config.reward: nothing to start from; pass --config.reward.blip=model_large.pth (BLIP's weights) or "
            "--config.reward.path (an ImageReward), or set config.reward.architecture in the file (random weights)"
        )
    _at_least(config, "eval.num_groups", 0)
    _at_least(config, "eval.per_epoch", 0)
    if not 0 <= config.reward.fix_rate <= 1:
        raise ConfigError(f"config.reward.fix_rate={config.reward.fix_rate}: expected a share in [0, 1]")
    if len(config.method.head_dropout) != 3:
        raise ConfigError(f"config.method.head_dropout={config.method.head_dropout}: expected three rates")
    for rate in (config.method.dropout, config.method.drop_path, *config.method.head_dropout):
        if not 0 <= rate < 1:
            raise ConfigError(
                f"config.method: a rate of {rate} in dropout, drop_path or head_dropout; expected numbers in [0, 1)"
            )


def _validate_lora(config):
    _at_least(config, "lora.rank", 0)
    _choice(config, "lora.init", lora.INITS)
    _choice(config, "lora.dtype", FILE_DTYPES)
    settings = config.lora
    if settings.alpha is not None and settings.alpha <= 0:
        raise ConfigError(f"config.lora.alpha={settings.alpha}: expected a number above 0; None stands for the rank")
    if not 0 <= settings.dropout < 1:
        raise ConfigError(f"config.lora.dropout={settings.dropout}: expected a number in [0, 1)")
    try:
        re.compile(settings.targets)
    except re.error as error:
        raise ConfigError(f"config.lora.targets={settings.targets!r} is no regular expression: {error}") from error
    if settings.path and not settings.rank:
        raise ConfigError(f"config.lora.path={settings.path!r} has no effect with config.lora.rank=0: pass its rank")
    if settings.rank and config.method.get("train_text_encoder"):
        raise ConfigError(
            "config.method.train_text_encoder: adapters are the UNet's alone; set it to False, or config.lora.rank to 0"
        )


def _validate_refl(config):
    method = config.method
    _given(config, "model.path")
    if not config.reward.terms:
        _given(config, "reward.path", " (or name several in config.reward.terms)")
    _given(config, "data.prompts")
    _given(config, "eval.prompts")
    _choice(config, "method.sampler", tuple(SAMPLERS))
    _choice(config, "method.pretrain", PRETRAIN_MODES)
    if method.pretrain != "off":
        _given(config, "data.pairs", " (or config.method.pretrain='off' to tune without the denoising loss)")
    _choice(config, "method.rollout_quantization", ROLLOUT_QUANTIZATIONS)
    if method.rollout_quantization != "none" and importlib.util.find_spec("qwix") is None:
        raise ConfigError(
            f"config.method.rollout_quantization={method.rollout_quantization!r} needs qwix: "
            "pip install 'imagereward-jax[quantization]', or qwix alone"
        )
    _at_least(config, "method.num_steps", 1)
    if not 0 <= method.stop_min <= method.stop_max < method.num_steps:
        raise ConfigError(
            f"config.method: stop_min={method.stop_min}, stop_max={method.stop_max} must satisfy "
            f"0 <= stop_min <= stop_max < num_steps={method.num_steps}"
        )


def _validate_terms(config):
    """Checks the mixture of config.reward.terms; its rewards are opened later."""
    terms = config.reward.terms
    if terms and config.reward.path:
        raise ConfigError(
            f"config.reward.path={config.reward.path!r} and config.reward.terms ({', '.join(terms)}) are both given: "
            "pass --config.reward.path= (empty) for the mixture"
        )
    for name, term in terms.items():
        where = f"config.reward.terms.{name}"
        if name in ("mean", "std"):
            raise ConfigError(f"{where}: its curve would be called reward_{name}, which is the mixture's: rename it")
        missing = sorted(set(reward_term("")) - set(term))
        unknown = sorted(set(term) - set(reward_term("")))
        if missing or unknown:
            raise ConfigError(f"{where} is not what reward_term() makes: missing {missing}, unknown {unknown}")
        if not term.path:
            raise ConfigError(f"{where}.path is empty: pass --{where}.path=...")
        if not term.std > 0:
            raise ConfigError(f"{where}.std={term.std}: expected a number above 0")
        if term.clip < 0:
            raise ConfigError(f"{where}.clip={term.clip}: expected 0 (no clipping) or more")


def did_you_mean(word, choices):
    """' (did you mean ...?)' for the nearest of `choices`, or ''."""
    near = difflib.get_close_matches(str(word), [str(choice) for choice in choices], n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


def field(config, path):
    """The value at a dotted path."""
    for part in path.split("."):
        config = config[part]
    return config


def _choice(config, path, choices):
    value = field(config, path)
    if value not in choices:
        raise ConfigError(
            f"config.{path}={value!r}: expected one of {', '.join(map(str, choices))}{did_you_mean(value, choices)}"
        )


def _at_least(config, path, least):
    if field(config, path) < least:
        raise ConfigError(f"config.{path}={field(config, path)}: expected at least {least}")


def _given(config, path, way_out=""):
    if not field(config, path):
        raise ConfigError(f"config.{path} is empty: pass --config.{path}=...{way_out}")
