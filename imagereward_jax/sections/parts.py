"""Sections of the config that describe a run's parts: model, rewards, data, adapters and evaluations."""

import re
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict, config_dict

from imagereward_jax.config import MAX_SIDE, MAX_STEPS, ConfigError, Section, check_value, field, require_given
from imagereward_jax.data.images import IMAGE_RULES
from imagereward_jax.diffusion.samplers import SAMPLERS
from imagereward_jax.diffusion.schedule import FLOW_PREDICTION, PREDICTION_TYPES
from imagereward_jax.models import lora
from imagereward_jax.models.remat import REMAT_POLICIES
from imagereward_jax.rewards.http_client import DAY, TOKEN_VARIABLE
from imagereward_jax.rewards.remote import ON_ERROR
from imagereward_jax.sections.run import DTYPES

FILE_DTYPES = ("float32", "bfloat16", "float16")
NAME = re.compile(r"\w[\w-]*")  # of a term or judge: a curve is named after it


class Model(Section, path="model"):
    """The text-to-image model."""

    path: str = ""  # diffusers folder, single file, folder of convert/from_diffusers.py, hub name, or "tiny-shapes"
    variant: str | None = None  # "fp16" reads *.fp16.safetensors; of a single file "ema" the averaged weights
    parts: str = ""  # networks and tokenizers from elsewhere: "vae=FILE,text_encoder_3=FILE,tokenizer_3=FOLDER"
    vae_dtype: str | None = field(None, choices=(None, *DTYPES))  # None: config.dtype; never "float16"
    # instead of the scheduler's
    prediction_type: str | None = field(None, choices=(None, *PREDICTION_TYPES, FLOW_PREDICTION))
    # recomputed in the backward pass: none, blocks, attention, full; offload: as blocks, but what is kept waits in the
    # host's memory (TPUs, GPUs)
    remat: str = field("blocks", choices=REMAT_POLICIES)


class Scratch(Section, path="model"):
    """A model that starts from random weights."""

    from_scratch: bool = False  # start from random networks of config.model.architecture
    architecture: ConfigDict = field(default_factory=ConfigDict)  # config.json by network, and "scheduler"
    conv_bias_std: float = field(0.0, at_least=0.0)  # > 0: of the random UNet's convolution biases
    vae_from: str = ""  # with from_scratch: the model whose autoencoder is taken; "" for a random one

    def check(self, config):
        """A model from scratch needs an architecture."""
        if self.from_scratch and not self.architecture:
            raise ConfigError("config.model.from_scratch: set config.model.architecture in the file")


class Workers(Section, path="data"):
    """How data is read."""

    workers: int = field(0, at_least=0, at_most=1024)  # processes that decode images; 0: a thread of this one


class Prompts(Section, path="data"):
    """Training prompts."""

    prompts: str = ""  # file, `datasets` name, tfds:NAME or shapes:train
    prompts_column: str | None = None  # None: text, prompt, caption or prompts

    def check(self, config):
        """Prompts must be given."""
        require_given(config, "data.prompts")


class Pairs(Section, path="data"):
    """Image-text pairs."""

    pairs: str = ""  # file, folder, `datasets` name, tfds:NAME or shapes:train
    pairs_image_column: str | None = None  # None: image, image_path, file_name, path or file
    pairs_text_column: str | None = None  # None: text, prompt, caption or prompts
    image_size: int = field(512, at_least=1, at_most=MAX_SIDE)  # side of the square crop, in pixels
    random_crop: bool = False  # False: the centre
    random_flip: bool = False  # mirror half of the images
    # aspect-ratio buckets: images keep their shape, with sides that are multiples of this and at most image_size^2
    # pixels; 64 is usual. Each size compiles a program of its own. 0: squares
    bucket_step: int = field(0, at_least=0, at_most=MAX_SIDE)
    bucket_max_ratio: float = field(2.0, at_least=1.0, at_most=16.0)  # of the longer to the shorter side of a bucket
    caption_dropout: float = field(0.1, at_least=0.0, at_most=1.0)  # share of pairs trained with the empty prompt
    # shapes:train only: share of captions with a wrong word
    caption_noise: float = field(0.0, at_least=0.0, at_most=1.0)


class Preferences(Section, path="data"):
    """Pairs of images of which people prefer one."""

    # Parquet, JSON, `datasets` name or folder of pairs or ranked groups (see data/groups.py); a folder of chosen/ and
    # rejected/; or shapes:train
    preferences: str = ""
    preferences_split: str = "train"  # of sources that have splits
    images_folder: str = ""  # what paths are relative to; "" for the folder of the file
    image_size: int = field(512, at_least=1)  # side of the square crop, in pixels
    random_crop: bool = False  # False: the centre
    random_flip: bool = False  # each image by itself
    caption_dropout: float = field(0.2, at_least=0.0, at_most=1.0)  # share of pairs trained with the empty prompt
    preferences_size: int = field(20_000, at_least=1)  # shapes:train only: groups, of which each gives a pair
    images_per_prompt: int = field(2, at_least=2, at_most=9)  # shapes:train only: images of a group, the best and worst


class Cache(Section, path="data"):
    """Encoded data on disk."""

    cache: str = ""  # folder for latents and encoded prompts, computed once, crops included


class Groups(Section, path="data"):
    """Ranked groups of images."""

    groups: str = ""  # JSON of the protocol, ImageRewardDB (see data/groups.py), or shapes:train
    held_out_groups: str = ""  # for validation
    test_groups: str = ""  # for the accuracy of what is exported; "" for none
    groups_split: str = "train"  # of sources that have splits
    held_out_split: str = "validation"  # of sources that have splits
    test_split: str = "test"  # of sources that have splits
    images_folder: str = ""  # what paths are relative to; "" for the folder of the file
    cache: str = ""  # folder that keeps the resized images; "" decodes them each time
    image_rule: str = field("shown", choices=IMAGE_RULES)  # "original" reads odd images as ImageReward's code does
    images_per_prompt: int = field(4, at_least=2, at_most=9)  # shapes:train and shapes:held_out only
    spoilt: bool = True  # shapes only: two groups in five hold spoilt images too; False: only words differ
    unclear: float = field(0.0, at_least=0.0, at_most=1.0)  # shapes only: share of groups with images between words

    def check(self, config):
        """Training and validation groups must be given."""
        require_given(config, "data.groups")
        require_given(config, "data.held_out_groups")


class Remote(Section, path="reward.remote"):
    """How servers are asked whose URLs are rewards or judges of the run."""

    token: str = TOKEN_VARIABLE  # environment variable with the servers' token
    # of an image that a server has no score for: "error" ends the run, "nan" counts it as no verdict
    on_error: str = field("error", choices=ON_ERROR)
    timeout: float = field(60.0, above=0.0, at_most=DAY)  # seconds that a server may take for a batch
    patience: float = field(300.0, at_least=0.0, at_most=DAY)  # seconds that a server may be away, as when it restarts
    batch_size: int = field(16, at_least=1)  # images per request

    @classmethod
    def defaults(cls) -> ConfigDict:
        """The section in `recipes.default_config`."""
        return ConfigDict({name: default for name, (_, _, default) in cls.field_types().items()})


class Reward(Section, path="reward"):
    """The reward: one network, or a mixture."""

    # a name, ImageReward.pt, a converted folder, a score ("PickScore", ...), "tiny-shapes", module:function (a Python
    # function), jax:module:function (one that can be differentiated) or http://host:port (a server: docs/serve.md)
    path: str = ""
    weights: str = ""  # path of the weights of a score, if not downloaded
    tokenizer: str | None = None  # path of the vocabulary, if not the reward's own
    terms: ConfigDict = field(default_factory=ConfigDict)  # instead of path: a mixture, {name: reward_term(...)}
    remote: ConfigDict = field(default_factory=Remote.defaults)  # of paths that are URLs, here, in terms and in judges

    def check(self, config):
        """A mixture excludes a path, and its terms are what `reward_term` makes."""
        Remote.read(self.remote)
        if self.terms and self.path:
            raise ConfigError(
                f"config.reward.path={self.path!r} and config.reward.terms ({', '.join(self.terms)}) are both given: "
                "pass --config.reward.path= (empty) for the mixture"
            )
        for name, term in self.terms.items():
            _check_term(f"config.reward.terms.{name}", name, term)


def reward_term(
    path: str,
    *,
    weight: float = 1.0,
    mean: float = 0.0,
    std: float = 1.0,
    clip: float = 0.0,
    weights: str = "",
    tokenizer: str | None = None,
) -> ConfigDict:
    """One reward of a mixture, config.reward.terms.NAME: it counts as `weight * clip((score - mean) / std)`.

    Args:
        path, weights, tokenizer: as in config.reward.
        mean, std: of its scores, so that rewards on different scales can be added.
        clip: bound on the normalised score, beyond which it is not rewarded further; 0 for none.
    """
    term = judge(path, weights=weights, tokenizer=tokenizer)
    term.update({"weight": weight, "mean": mean, "std": std, "clip": clip})
    return term


def judge(path: str, *, weights: str = "", tokenizer: str | None = None) -> ConfigDict:
    """One reward of config.eval.judges.NAME, logged as eval/judge_NAME: it scores evaluations and trains nothing.

    Args:
        path, weights, tokenizer: as in config.reward.
    """
    one = ConfigDict({"path": path, "weights": weights, "tokenizer": config_dict.placeholder(str)})
    one.tokenizer = tokenizer
    return one


def check_curve(where: str, name: Any) -> None:
    """Refuses a name of a mixture's term, after which a curve is called, that is taken or not of letters."""
    if name in ("mean", "std", "no_verdict"):
        raise ConfigError(f"{where}: its curve would be called reward_{name}, which is the mixture's: rename it")
    _check_name(where, name)


def _check_name(where, name):
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ConfigError(f"{where}: the name {name!r} should be of letters, digits, _ and -")


def _check_term(where: str, name: str, term: Any) -> None:
    check_curve(where, name)
    _check_made_by(reward_term, where, name, term)
    for part, bounds in (("weight", {}), ("mean", {}), ("std", {"above": 0}), ("clip", {"at_least": 0})):
        if not isinstance(term[part], int | float):
            raise ConfigError(f"{where}.{part}={term[part]!r}: expected a number")
        check_value(f"{where}.{part}", term[part], bounds)


def _check_made_by(make: Callable[[str], ConfigDict], where: str, name: Any, term: Any) -> None:
    """Refuses what does not have the fields that `make` gives, no path, or a name that no curve can have."""
    _check_name(where, name)
    if not isinstance(term, ConfigDict):
        raise ConfigError(f"{where}={term!r:.200}: expected what {make.__name__}(path) makes")
    missing, unknown = sorted(set(make("")) - set(term)), sorted(set(term) - set(make("")))
    if missing or unknown:
        raise ConfigError(f"{where} is not what {make.__name__}() makes: missing {missing}, unknown {unknown}")
    if not term.path:
        raise ConfigError(f"{where}.path is empty: pass --{where}.path=...")
    for part in ("path", "weights"):
        if not isinstance(term[part], str):
            raise ConfigError(f"{where}.{part}={term[part]!r:.200}: expected a text")


class Scorer(Section, path="reward"):
    """The scorer that trains: its initial weights and frozen layers."""

    path: str = ""  # an ImageReward to start from; "" for BLIP's weights or random ones
    blip: str = ""  # BLIP's model_large.pth, to start from its encoders with a new head (path must be "")
    architecture: ConfigDict = field(default_factory=ConfigDict)  # config.json of a random one
    tokenizer: str | None = None  # path of the vocabulary, if not the reward's own
    unit_gain: bool = False  # random weights only: variance 1 / inputs, for networks far smaller than BLIP
    position_scale: float = 1.0  # random weights only: scale of the vision transformer's initial positions
    head_scale: float = 1.0  # random weights only: scale of the head's initial matrices
    # share of both transformers' layers, from the first, frozen
    fix_rate: float = field(0.0, at_least=0.0, at_most=1.0)

    def check(self, config):
        """Training starts from exactly one of path, blip and architecture; config.model has only remat."""
        defaults = {name: default for name, (_, _, default) in Model.field_types().items()}
        for name in sorted(set(defaults) - {"remat"}):
            if config.model[name] != defaults[name]:
                raise ConfigError(
                    f"config.model.{name}={config.model[name]!r}: training a scorer has no diffusion model; leave it "
                    "out (config.reward.path is what training starts from)"
                )
        if self.path and self.blip:
            raise ConfigError(
                "config.reward.path and config.reward.blip are both given: training starts from one of them"
            )
        if not (self.path or self.blip or self.architecture):
            raise ConfigError(
                "config.reward: nothing to start from; pass --config.reward.blip=model_large.pth (BLIP's weights) or "
                "--config.reward.path (an ImageReward), or set config.reward.architecture in the file (random weights)"
            )


class Lora(Section, path="lora"):
    """Low-rank adaptation of the denoiser, and of the text encoders that a method trains."""

    # > 0 trains low-rank parameters alone, over a base held in config.dtype
    rank: int = field(0, at_least=0, at_most=16_384)
    alpha: float | None = field(None, above=0.0)  # updates are scaled by alpha / rank; None: the rank
    # regular expression: layers of the denoiser whose names end so; None: the projections of its attention that PEFT's
    # users adapt in this family
    targets: str | None = None
    # of A: gaussian (standard deviation 1 / rank) or kaiming; B is zero
    init: str = field("gaussian", choices=lora.INITS)
    dropout: float = field(0.0, at_least=0.0, below=1.0)  # of A's input, in the steps that carry gradient
    dtype: str = field("float32", choices=FILE_DTYPES)  # of the exported file; the weights that train are float32
    path: str = ""  # an adapter to continue from: file, folder or hub name; rank and targets as its own

    def check(self, config):
        """The targets must be a regular expression, and a path needs a rank."""
        try:
            re.compile(self.targets or "")
        except re.error as error:
            raise ConfigError(
                f"config.lora.targets={self.targets!r} is not a valid regular expression: {error}"
            ) from error
        if self.path and not self.rank:
            raise ConfigError(f"config.lora.path={self.path!r} has no effect with config.lora.rank=0: pass its rank")


class Samples(Section, path="eval"):
    """Evaluation by sampling held-out prompts."""

    prompts: str = ""  # file, `datasets` name, or shapes:held_out
    num_prompts: int = field(32, at_least=1, at_most=2**20)  # of the file, from the first
    images_per_prompt: int = field(2, at_least=1, at_most=2**20)  # at least 2 for eval/diversity
    judges: ConfigDict = field(default_factory=ConfigDict)  # rewards that only judge, {name: judge(...)}
    batch_size: int = field(8, at_least=1, at_most=2**20)  # images that are sampled at a time, over all devices
    sampler: str | None = field(None, choices=(None, *SAMPLERS))  # None: what the model's folder says
    num_steps: int | None = field(None, at_least=1, at_most=MAX_STEPS)  # None: what the model's folder says
    guidance_scale: float | None = None  # None: what the model's folder says; at most 1: no guidance
    guidance_scales: tuple[float, ...] = field((), at_least=0.0)  # evaluated as well: eval/reward_mean@3, ...
    eta: float = field(0.0, at_least=0.0, at_most=1.0)  # noise of ddim's and tcd's steps
    seed: int = field(0, at_least=0)  # the same noise for the same prompts at every evaluation
    grid: int = field(16, at_least=1, at_most=2**20)  # images in samples/step_*.png

    def check(self, config):
        """Judges are what `judge` makes."""
        for name, one in self.judges.items():
            _check_made_by(judge, f"config.eval.judges.{name}", name, one)


class Reconstructions(Section, path="eval"):
    """Evaluation of an autoencoder."""

    num_images: int = field(64, at_least=1)  # held-out images that are encoded and decoded


class Rankings(Section, path="eval"):
    """Evaluation of a scorer on ranked groups."""

    num_groups: int = field(128, at_least=0)  # of the held-out ones, from the first; 0 for all
    per_epoch: int = field(0, at_least=0)  # > 0 sets config.eval.every, so that an epoch has so many evaluations


# What a method's Config may name in `uses`.
PARTS = {
    "model": Model,
    "scratch": Scratch,
    "workers": Workers,
    "prompts": Prompts,
    "pairs": Pairs,
    "preferences": Preferences,
    "cache": Cache,
    "groups": Groups,
    "reward": Reward,
    "scorer": Scorer,
    "lora": Lora,
    "samples": Samples,
    "reconstructions": Reconstructions,
    "rankings": Rankings,
}
