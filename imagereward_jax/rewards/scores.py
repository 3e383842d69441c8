"""Finds and reads the published weights of the scores that ImageReward is compared with."""

import dataclasses
import difflib
import os
from pathlib import Path
from typing import NamedTuple

import jax
from flax import nnx

from imagereward_jax.models.blip import RewardHead
from imagereward_jax.models.blip_config import BlipScoreConfig, ImageRewardConfig
from imagereward_jax.rewards.base import Reward, held_params, named_dtype
from imagereward_jax.rewards.blip import BlipScore
from imagereward_jax.rewards.checkpoint import (
    DEFAULT_ROOT,
    IGNORED_KEYS,
    MED_CONFIG_FILE,
    find_vocab_near,
    read_cached,
    with_text,
)
from imagereward_jax.rewards.clip import (
    AestheticScore,
    AlignPropAestheticScore,
    CLIPScore,
    HPSv2,
    PickScore,
    TRLAlignPropAestheticScore,
)
from imagereward_jax.rewards.clip_checkpoint import Base, read_clip
from imagereward_jax.rewards.imagereward import ImageReward
from imagereward_jax.rewards.tokens import CLIP_FILES, CLIPPromptTokenizer, NoTokens, PromptTokenizer
from imagereward_jax.weights import clip_layouts, hub, mapping
from imagereward_jax.weights.tokenizer_files import CLIP_BPE

BLIP_LARGE = BlipScoreConfig()
BLIP_URL = "https://storage.googleapis.com/sfr-vision-language-research/BLIP/models/model_large.pth"
AESTHETIC_FILE = "sac+logos+ava1-l14-linearMSE.pth"
AESTHETIC_URL = (
    "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/sac%2Blogos%2Bava1-l14-linearMSE.pth"
)
CLIP_REPO = "openai/clip-vit-large-patch14"
# BLIP's checkpoint also holds momentum copies, queues, a decoder and a matching head.
BLIP_UNUSED = (r"_m\.", r"^(text_decoder|itm_head)\.", r"^(temp|image_queue|text_queue|queue_ptr|ptr_queue)$")
CLIP_UNUSED = (*IGNORED_KEYS, *clip_layouts.BOOKKEEPING)


class Published(NamedTuple):
    """Source of a published CLIP score.

    local: its file name. hub: (repository, file or None for a folder). base: the CLIP it was trained from, if one.
    cleaning: how its authors' tokenizer reads prompts, see `CLIPPromptTokenizer`.
    """

    score: type
    local: str
    hub: tuple
    base: Base | None
    scaled: bool = False
    cleaning: str = "openai"


VIT_L, VIT_H = Base(1024, "quick_gelu"), Base(1280, "gelu")  # OpenAI's and LAION's
CLIPS = {
    "CLIP": Published(CLIPScore, "ViT-L-14.pt", (CLIP_REPO, None), None),
    "Aesthetic": Published(AestheticScore, "ViT-L-14.pt", (CLIP_REPO, None), VIT_L),
    "Aesthetic-AlignProp": Published(AlignPropAestheticScore, "ViT-L-14.pt", (CLIP_REPO, None), VIT_L),
    "Aesthetic-AlignProp-TRL": Published(TRLAlignPropAestheticScore, "ViT-L-14.pt", (CLIP_REPO, None), VIT_L),
    "PickScore": Published(
        PickScore, "PickScore_v1", ("yuvalkirstain/PickScore_v1", None), VIT_H, scaled=True, cleaning="transformers"
    ),
    "HPSv2.1": Published(HPSv2, "HPS_v2.1_compressed.pt", ("xswu/HPSv2", "HPS_v2.1_compressed.pt"), VIT_H),
}
SCORES = ("CLIP", "BLIP", "Aesthetic", "Aesthetic-AlignProp", "Aesthetic-AlignProp-TRL", "PickScore", "HPSv2.1")


def available_scores() -> list[str]:
    """Returns the names that `load_score` knows."""
    return list(SCORES)


def load_score(
    name: str = "CLIP",
    device: str | jax.Device | None = None,
    download_root: str | os.PathLike | None = None,
    *,
    path: str | os.PathLike | None = None,
    head: str | os.PathLike | None = None,
    tokenizer: str | os.PathLike | None = None,
    dtype: str = "float32",
    batch_size: int = 16,
    image_rule: str = "shown",
) -> Reward:
    """Loads one of the scores that ImageReward is compared with; it has the same methods as the result of `load`.

    Without `path` the published file is read from `download_root`, the original package's location, or downloaded.
    CLIP weights may be OpenAI's (`ViT-L-14.pt`), OpenCLIP's beside their open_clip_config.json, or a folder of
    transformers.

    "Aesthetic" preprocesses images as LAION's own code, ddpo-pytorch and TRL's DDPO do; "Aesthetic-AlignProp" as
    AlignProp's code does, and "Aesthetic-AlignProp-TRL" as TRL's AlignProp does, both for square images alone. Their
    numbers differ.

    Args:
        name: one of `available_scores()`.
        device, dtype, batch_size, image_rule: as for `load`.
        download_root: folder for downloads; ~/.cache/ImageReward by default.
        path: file or folder of the network's weights: CLIP weights for all scores except BLIP.
        head: Aesthetic scores only: path of `sac+logos+ava1-l14-linearMSE.pth`.
        tokenizer: path of the vocabulary: for BLIP a vocab.txt or its folder, else a folder with vocab.json and
            merges.txt, or `bpe_simple_vocab_16e6.txt.gz`. By default the one beside the weights, else the hub's.

    Returns:
        A `rewards.base.Reward`.

    Raises:
        FileNotFoundError: the score, a file or the vocabulary does not exist (`hub.ModelNotFound`).
        ValueError: the files do not match each other, or are broken.
    """
    if name not in SCORES:
        close = difflib.get_close_matches(str(name), SCORES, n=1, cutoff=0.4)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise hub.ModelNotFound(f"no score {name!r}{hint}; known: {', '.join(SCORES)}")
    if head is not None and not name.startswith("Aesthetic"):
        raise ValueError(f"head= applies only to the Aesthetic scores, not to {name}")
    root = Path(os.path.expanduser(download_root or DEFAULT_ROOT))
    options = {"device": device, "dtype": dtype, "batch_size": batch_size, "image_rule": image_rule}
    if name == "BLIP":
        return _load_blip(path, tokenizer, root, options)
    return _load_clip(name, path, head, tokenizer, root, options)


def _load_blip(path, vocab, root, options):
    path = _existing(path) if path is not None else hub.resolve_url(BLIP_URL, root / "model_large.pth")
    config, med_config = BLIP_LARGE, path.with_name(MED_CONFIG_FILE)
    if med_config.is_file():
        config = with_text(config, med_config)
    tokenizer = PromptTokenizer.from_file(vocab or find_vocab_near(path.parent), config.max_prompt_tokens)
    module = BlipScore.abstract(config, named_dtype(options["dtype"]))
    tensors = read_cached(path, root)
    ignore, target = (*IGNORED_KEYS, *BLIP_UNUSED), held_params(module, options["dtype"])
    params = mapping.from_torch(module, tensors, what=str(path), ignore=ignore, target=target)
    return BlipScore(config, params, tokenizer, **options)


def imagereward_from_blip(
    path: str | os.PathLike, key: jax.Array, *, tokenizer: str | os.PathLike | None = None
) -> ImageReward:
    """Builds an ImageReward for training: the encoders of `model_large.pth` with a newly initialised head.

    Args:
        path: BLIP's checkpoint; a med_config.json beside it is used.
        key: a `jax.random` key for the head.
        tokenizer: as for `load_score`.

    Raises:
        FileNotFoundError, ValueError: as `load_score`.
    """
    root = Path(os.path.expanduser(DEFAULT_ROOT))
    blip = _load_blip(path, tokenizer, root, {"device": "cpu", "dtype": "float32", "batch_size": 1})
    sizes = {field.name: getattr(blip.config, field.name) for field in dataclasses.fields(blip.config)}
    config = ImageRewardConfig(**sizes, score_mean=0.0, score_std=1.0)
    head = RewardHead(config.text.hidden_size, config.head_sizes, rngs=nnx.Rngs(params=key))
    return ImageReward(config, {"blip": blip.params, "mlp": mapping.params_of(head)}, blip.tokenizer)


def _load_clip(name, path, head, vocab, root, options):
    published = CLIPS[name]
    path = _existing(path) if path is not None else _find_clip(published, root)
    tensors, config, statistics = read_clip(path, root, published.base)
    config = dataclasses.replace(config, scaled=published.scaled)
    ignore = CLIP_UNUSED
    aesthetic = issubclass(published.score, AestheticScore)
    if aesthetic:
        head = _existing(head) if head is not None else hub.resolve_url(AESTHETIC_URL, root / AESTHETIC_FILE)
        tensors = {**tensors, **{f"mlp.{key}": array for key, array in read_cached(head, root).items()}}
        ignore = (*ignore, r"^text_", r"^logit_scale$")
        tokenizer = NoTokens()
    else:
        vocab, length = vocab or _clip_vocab_near(path), config.text.max_position_embeddings
        tokenizer = CLIPPromptTokenizer(vocab, length, published.cleaning)
    module = published.score.abstract(config, named_dtype(options["dtype"]))
    what = f"{path} with {head}" if aesthetic else str(path)
    target = held_params(module, options["dtype"])
    params = mapping.from_torch(module, tensors, what=what, ignore=ignore, target=target)
    return published.score(config, params, tokenizer, statistics=statistics, **options)


def _existing(path):
    path = Path(os.path.expanduser(path))
    if not path.exists():
        raise hub.ModelNotFound(f"{path}: no such file or folder")
    return path


def _find_clip(published, root):
    local = root / published.local
    if local.exists():
        return local
    repo, file = published.hub
    if file is not None:
        return hub.resolve_file(repo, file, cache_dir=root)
    settings = ["config.json", "preprocessor_config.json", "tokenizer_config.json", "special_tokens_map.json"]
    return hub.resolve_model(repo, allow_patterns=["model.safetensors", *settings, *CLIP_FILES], cache_dir=root)


def _clip_vocab_near(path):
    """Finds the CLIP vocabulary in the weights' folder, else on the hub."""
    folder = path if path.is_dir() else path.parent
    if all((folder / name).is_file() for name in CLIP_FILES):
        return folder
    if (folder / CLIP_BPE).is_file():
        return folder / CLIP_BPE
    try:
        return hub.resolve_model(CLIP_REPO, allow_patterns=[*CLIP_FILES, "tokenizer_config.json"])
    except hub.ModelNotFound as error:
        raise hub.ModelNotFound(
            f"no CLIP vocabulary: {folder} has neither {' and '.join(CLIP_FILES)} nor {CLIP_BPE}, and {CLIP_REPO} "
            f"cannot be downloaded; pass `tokenizer=`, the path of one ({error})"
        ) from error
