"""Training a reward model on people's rankings (ImageReward, arXiv 2304.05977, equation 1, and its training code)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from imagereward_jax.config import ConfigError, field
from imagereward_jax.methods.base import Loss, Mean, Method, MethodConfig, Params, Phase
from imagereward_jax.models.dropout import noise


class Config(MethodConfig):
    """config.method of a scorer's training."""

    uses = ("groups", "scorer", "rankings")
    defaults = {"model.remat": "none", "eval.best": "eval/accuracy"}

    mode: str = field(
        "groups", choices=("groups", "pairs")
    )  # a batch is of groups, each image encoded once, or of pairs
    dropout: float = field(0.0, at_least=0.0, below=1.0)  # BERT's, in hidden states and attention; 0.1 in the original
    drop_path: float = field(
        0.0, at_least=0.0, below=1.0
    )  # of the last vision block, rising evenly from 0; original 0.1
    head_dropout: tuple[float, ...] = field((0.0, 0.0, 0.0), at_least=0.0, below=1.0)  # original: 0.2, 0.2, 0.1

    def check(self, config):
        """The head has three dropouts."""
        if len(self.head_dropout) != 3:
            raise ConfigError(f"config.method.head_dropout={self.head_dropout}: expected three rates")


def make(config: Config, parts) -> Method:
    """One phase: the pair loss over ranked groups. The best weights are exported, standardised, and tested."""
    scorer, groups = parts.scorer, parts.groups(pairs=config.mode == "pairs")
    evaluate = parts.rankings()
    return Method(
        (Phase("ranking", make_loss(config, scorer.apply), groups),),
        trains=lambda params: {"reward": trainable_mask(params["reward"], parts.config.reward.fix_rate)},
        evaluate=evaluate,
        export=parts.export_scorer(evaluate),
        test=parts.test_rankings(),
    )


def pair_losses(scores: jax.Array, ranking: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The loss of every pair of a group whose ranks differ.

    Args:
        scores: [..., K] one score an image. ranking: [..., K] ints, 1 is best; equal ranks are ties and make no pair,
            nor does rank 0, which pads a group.

    Returns:
        (losses [..., K, K], correct [..., K, K], pairs [..., K, K]): at [i, j] -log sigmoid(score_i - score_j), whether
        score_i > score_j, and whether i is ranked better than j, which is where the other two count.
    """
    margin = scores[..., :, None] - scores[..., None, :]
    pairs = (ranking[..., :, None] < ranking[..., None, :]) & (ranking[..., :, None] > 0)
    return -jax.nn.log_sigmoid(margin), margin > 0, pairs


def make_loss(config: Config, apply) -> Loss:
    """Cross entropy of (better, worse) over all pairs of all groups of a batch; each image is scored once.

    A batch of groups and the batch of all their pairs (groups of two) have the same loss and gradient: a group of K
    images costs K encodings instead of K (K - 1).

    Args:
        config: dropout rates, see `models.blip`. apply: (params, images, tokens) -> scores.

    Returns:
        (models, batch, key) -> (`Mean` over pairs, metrics). The component "reward" is the scorer's parameters. batch:
        "images" [B, K, H, W, 3] in [0, 1], "ranking" [B, K], "reward" the tokens of the B prompts.
    """
    rates = {"text": config.dropout, "path": config.drop_path, "head": tuple(config.head_dropout)}

    def loss(models, batch, key):
        groups, size = batch["images"].shape[:2]
        images = batch["images"].reshape(groups * size, *batch["images"].shape[2:])
        tokens = jax.tree.map(lambda rows: jnp.repeat(rows, size, axis=0), batch["reward"])
        with noise(key, **rates):
            scores = apply(models.policy["reward"], images, tokens).reshape(groups, size)
        losses, correct, pairs = pair_losses(scores, batch["ranking"])
        count = pairs.sum()
        accuracy = Mean(jnp.where(pairs, correct, False).sum(), count)
        metrics = {"accuracy": accuracy, "score_std": scores.std(where=batch["ranking"] > 0)}
        return Mean(jnp.where(pairs, losses, 0.0).sum(), count), metrics

    return loss


def trainable_mask(params: Params, fix_rate: float) -> Any:
    """A tree of the structure of an ImageReward's parameters, True for those that train.

    As in the original training code: the two projections never train. With `fix_rate` above 0 neither do the embeddings
    and the first int(fix_rate * depth) layers of both transformers, and of the layer after them its very first tensor
    (the original stops freezing one parameter late).

    Args:
        params: nested dict, {"blip": ..., "mlp": ...}.
        fix_rate: share of the layers, in [0, 1].
    """
    blip = params["blip"]
    depths = {
        "text_encoder": len(blip["text_encoder"]["encoder"]["layer"]),
        "visual_encoder": len(blip["visual_encoder"]["blocks"]),
    }
    return jax.tree_util.tree_map_with_path(functools.partial(_trains, depths, fix_rate), params)


# The layers of each transformer in the tree, and the first parameter of a layer in PyTorch's order.
_LAYERS = {
    "text_encoder": (("encoder", "layer"), ("attention", "self", "query", "kernel")),
    "visual_encoder": (("blocks",), ("norm1", "scale")),
}


def _trains(depths, fix_rate, path, _):
    top, part, *rest = (key.key for key in path)
    if top != "blip":
        return True
    if part not in _LAYERS:
        return False  # the projections
    if fix_rate <= 0:
        return True
    first_free = int(depths[part] * fix_rate)
    prefix, first_parameter = _LAYERS[part]
    if tuple(rest[: len(prefix)]) != prefix:
        # Embeddings come before the layers; the vision transformer's last norm comes after them.
        return rest[0] == "norm" and first_free < depths[part]
    layer, *inside = rest[len(prefix) :]
    return layer > first_free or (layer == first_free and tuple(inside) != first_parameter)
