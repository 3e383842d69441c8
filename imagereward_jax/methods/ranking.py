"""Training a reward model on people's rankings (ImageReward, arXiv 2304.05977, equation 1, and its training code)."""

import functools

import jax
import jax.numpy as jnp

from imagereward_jax.models.dropout import noise
from imagereward_jax.models.param_tree import join


def pair_losses(scores, ranking):
    """The loss of every pair of a group whose ranks differ.

    Args:
        scores: [..., K] one score an image. ranking: [..., K] ints, 1 is best; equal ranks are ties and make no pair,
            nor does rank 0, which stands where a group has no picture.

    Returns:
        (losses [..., K, K], correct [..., K, K], pairs [..., K, K]): at [i, j] -log sigmoid(score_i - score_j), whether
        score_i > score_j, and whether i is ranked better than j, which is where the other two count.
    """
    margin = scores[..., :, None] - scores[..., None, :]
    pairs = (ranking[..., :, None] < ranking[..., None, :]) & (ranking[..., :, None] > 0)
    return -jax.nn.log_sigmoid(margin), margin > 0, pairs


def make_ranking_loss(apply, *, dropout=0.0, drop_path=0.0, head_dropout=(0.0, 0.0, 0.0)):
    """Cross entropy of (better, worse) over all pairs of all groups of a batch; each image is scored once.

    A batch of groups and the batch of all their pairs (groups of two) have the same loss and gradient: a group of K
    pictures costs K encodings instead of K (K - 1).

    Args:
        apply: (params, images, tokens) -> scores, see `Reward.apply`.
        dropout, drop_path, head_dropout: rates while training, see `models.blip`.

    Returns:
        (trainable, frozen, batch, key) -> (loss, metrics). "reward" of trainable and frozen together are the reward's
        parameters. batch: "images" [B, K, H, W, 3] in [0, 1], "ranking" [B, K], "reward" the tokens of the B prompts.
    """
    rates = {"text": dropout, "path": drop_path, "head": tuple(head_dropout)}

    def loss(trainable, frozen, batch, key):
        groups, size = batch["images"].shape[:2]
        images = batch["images"].reshape(groups * size, *batch["images"].shape[2:])
        tokens = jax.tree.map(lambda rows: jnp.repeat(rows, size, axis=0), batch["reward"])
        with noise(key, **rates):
            scores = apply(join(frozen, trainable)["reward"], images, tokens).reshape(groups, size)
        losses, correct, pairs = pair_losses(scores, batch["ranking"])
        count = jnp.maximum(pairs.sum(), 1)
        accuracy = jnp.where(pairs, correct, False).sum() / count
        present = batch["ranking"] > 0
        metrics = {"accuracy": accuracy, "score_std": scores.std(where=present)}
        return jnp.where(pairs, losses, 0.0).sum() / count, metrics

    return loss


def trainable_mask(params, fix_rate):
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
