"""Training a reward model on people's rankings (ImageReward, arXiv 2304.05977, equation 1)."""

import jax
import jax.numpy as jnp


def pair_losses(scores, ranking):
    """The loss of every pair of a group whose ranks differ.

    Args:
        scores: [..., K] one score an image. ranking: [..., K] ints, 1 is best; equal ranks are ties and make no pair.

    Returns:
        (losses [..., K, K], correct [..., K, K], pairs [..., K, K]): at [i, j] -log sigmoid(score_i - score_j), whether
        score_i > score_j, and whether i is ranked better than j, which is where the other two count.
    """
    margin = scores[..., :, None] - scores[..., None, :]
    pairs = ranking[..., :, None] < ranking[..., None, :]
    return -jax.nn.log_sigmoid(margin), margin > 0, pairs


def make_ranking_loss(reward):
    """Cross entropy of (better, worse) over all pairs of a group; each image is scored once.

    Returns:
        (trainable, frozen, batch, key) -> (loss, metrics). batch: "images" [B, K, H, W, 3] in [0, 1], "ranking" [B, K],
        "reward" the tokens of the B prompts.
    """

    def loss(trainable, frozen, batch, key):
        groups, size = batch["images"].shape[:2]
        images = batch["images"].reshape(groups * size, *batch["images"].shape[2:])
        tokens = jax.tree.map(lambda rows: jnp.repeat(rows, size, axis=0), batch["reward"])
        scores = reward.apply(trainable["reward"], images, tokens).reshape(groups, size)
        losses, correct, pairs = pair_losses(scores, batch["ranking"])
        count = jnp.maximum(pairs.sum(), 1)
        accuracy = jnp.where(pairs, correct, False).sum() / count
        return jnp.where(pairs, losses, 0.0).sum() / count, {"accuracy": accuracy, "score_std": scores.std()}

    return loss
