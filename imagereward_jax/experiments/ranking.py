"""Training an ImageReward on ranked groups of pictures."""

import dataclasses

import jax
import numpy as np

from imagereward_jax.data.groups import load_groups
from imagereward_jax.data.prompts import SHAPES_PREFIX
from imagereward_jax.experiments.parts import open_reward, stream
from imagereward_jax.experiments.scratch import init_reward
from imagereward_jax.methods.ranking import make_ranking_loss, pair_losses
from imagereward_jax.rewards.imagereward import ImageReward
from imagereward_jax.training.loop import Evaluation, Experiment
from imagereward_jax.training.mesh import put_whole, replicated
from imagereward_jax.training.sheets import contact_sheet
from imagereward_jax.training.step import Phase


def build(config, mesh):
    """See `experiments.build`."""
    reward = open_reward(config) if config.reward.path else init_reward(config)
    loss = make_ranking_loss(reward)

    def loss_on_groups(trainable, frozen, batches, key):
        return loss(trainable, frozen, batches["groups"], key)

    def transform(batch):
        tokens = reward.tokenize(batch["prompt"])
        return {"images": batch["images"], "ranking": batch["ranking"], "reward": tokens}

    size = reward.config.vision.image_size
    held_out = load_groups(
        config.data.held_out_groups, image_size=size, shapes=shapes_options(config, "held_out_groups")
    )
    groups = [held_out[index] for index in range(min(config.eval.num_groups, len(held_out)))]
    evaluate = RankingEvaluation(reward, groups, mesh)
    train_groups = load_groups(config.data.groups, image_size=size, shapes=shapes_options(config, "groups"))

    def export(trainable, folder):
        """Scores are standardised on held-out pictures: mean 0, standard deviation 1."""
        scores = evaluate.scores(trainable)
        config = dataclasses.replace(
            reward.config,
            score_mean=reward.config.score_mean + reward.config.score_std * float(scores.mean()),
            score_std=reward.config.score_std * float(scores.std()),
        )
        ImageReward(config, trainable["reward"], reward.tokenizer).save(folder)

    return Experiment(
        trainable={"reward": reward.params},
        frozen={},
        phases=(Phase("ranking", loss_on_groups),),
        streams={"groups": stream(config, train_groups, transform)},
        evaluate=evaluate,
        export=export,
        export_marker="config.json",
        images_per_step=config.batch_size * train_groups[0]["images"].shape[0],
    )


def shapes_options(config, field):
    """What `load_groups` takes as `shapes` for `config.data`'s source of that name."""
    builtin = str(config.data[field]).startswith(SHAPES_PREFIX)
    return {"images_per_prompt": config.data.images_per_prompt} if builtin else None


class RankingEvaluation:
    """Held-out `eval/accuracy` (share of pairs ordered as people did; ties are wrong) and `eval/loss`."""

    def __init__(self, reward, groups, mesh):
        self.groups, self.mesh = groups, mesh
        self.prompts = [group["prompt"] for group in groups for _ in group["images"]]
        self.images = np.concatenate([group["images"] for group in groups])
        self.tokens = reward.tokenize(self.prompts)
        self._score = jax.jit(
            lambda params, images, tokens: reward.apply(params["reward"], images, tokens),
            out_shardings=replicated(mesh),
        )

    def scores(self, trainable, batch=64):
        """[N] the score of every held-out picture."""
        batch = -(-batch // self.mesh.size) * self.mesh.size
        scores = []
        for start in range(0, len(self.images), batch):
            rows = np.minimum(np.arange(start, start + batch), len(self.images) - 1)
            tokens = {name: ids[rows] for name, ids in self.tokens.items()}
            placed = put_whole(self.mesh, {"images": self.images[rows], "tokens": tokens})
            scores.append(np.asarray(self._score(trainable, placed["images"], placed["tokens"])))
        return np.concatenate(scores)[: len(self.images)]

    def __call__(self, trainable, frozen):
        scores, start, losses, correct = self.scores(trainable), 0, [], []
        captions = [f"{score:+.2f} {prompt}" for score, prompt in zip(scores, self.prompts)]
        for group in self.groups:
            part = scores[start : start + len(group["images"])]
            start += len(part)
            loss, right, pairs = (np.asarray(x) for x in pair_losses(part, np.asarray(group["ranking"])))
            losses.append(loss[pairs])
            correct.append(right[pairs])
        metrics = {
            "eval/accuracy": float(np.concatenate(correct).mean()),
            "eval/loss": float(np.concatenate(losses).mean()),
        }
        columns = len(self.groups[0]["images"])
        return Evaluation(metrics, contact_sheet(self.images[: 6 * columns], captions[: 6 * columns], columns=columns))
