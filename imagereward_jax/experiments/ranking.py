"""Training an ImageReward on ranked groups of pictures."""

import dataclasses
import functools

import jax
import numpy as np

from imagereward_jax.data.groups import Pairs, load_groups, padded
from imagereward_jax.data.prompts import SHAPES_PREFIX
from imagereward_jax.experiments.parts import stream
from imagereward_jax.experiments.scratch import init_reward
from imagereward_jax.methods.ranking import make_ranking_loss, pair_losses, trainable_mask
from imagereward_jax.models.param_tree import join, split
from imagereward_jax.rewards.checkpoint import load
from imagereward_jax.rewards.imagereward import ImageReward, make_apply
from imagereward_jax.rewards.scores import imagereward_from_blip
from imagereward_jax.storage.contact_sheet import contact_sheet
from imagereward_jax.training.loop import Evaluation, Experiment
from imagereward_jax.training.mesh import put_whole, replicated
from imagereward_jax.training.step import Phase

TEST_SHAPES = {"size": 512, "seed": 1}  # the shapes world has no end: so many groups, drawn for the test alone


def build(config, mesh):
    """See `experiments.build`."""
    reward = open_trained(config)
    size = reward.image_size
    train_groups, held_out = open_groups(config, "groups", size), open_groups(config, "held_out_groups", size)
    tested = open_groups(config, "test_groups", size) if config.data.test_groups else None
    count = config.eval.num_groups or len(held_out)
    evaluate = RankingEvaluation(reward, held_out, mesh, count)
    source = Pairs(train_groups) if config.method.mode == "pairs" else train_groups
    if config.eval.per_epoch:
        config.eval.every = max(1, len(source) // config.batch_size // config.eval.per_epoch)
    mask = trainable_mask(reward.params, config.reward.fix_rate)
    trainable, frozen = split({"reward": reward.params}, {"reward": mask})

    def transform(batch):
        tokens = reward.tokenize(batch["prompt"])
        return {"images": batch["images"], "ranking": batch["ranking"], "reward": tokens}

    def test(trainable, frozen):
        found = RankingEvaluation(reward, tested, mesh, len(tested))(trainable, frozen).metrics
        return {name.replace("eval/", "test/"): value for name, value in found.items()}

    def export(trainable, folder):
        """Scores are standardised on held-out pictures: mean 0, standard deviation 1."""
        params = join(frozen, trainable)["reward"]
        scores = evaluate.scores(jax.device_put({"reward": params}, replicated(mesh)))
        settings = dataclasses.replace(
            reward.config,
            score_mean=reward.config.score_mean + reward.config.score_std * float(scores.mean()),
            score_std=reward.config.score_std * float(scores.std()),
        )
        ImageReward(settings, params, reward.tokenizer).save(folder)

    return Experiment(
        trainable=trainable,
        frozen=frozen,
        phases=make_phases(config, reward.config),
        streams={
            "groups": stream(config, source, transform, item_transform=functools.partial(pad_item, size=source.largest))
        },
        evaluate=evaluate,
        export=export,
        export_marker="config.json",
        images_per_step=config.batch_size * source.largest,
        test=None if tested is None else test,
    )


def make_phases(config, reward_config):
    """The loss of a step, for a reward of these sizes."""
    method = config.method
    loss = make_ranking_loss(
        make_apply(reward_config, config.dtype, config.model.remat),
        dropout=method.dropout,
        drop_path=method.drop_path,
        head_dropout=method.head_dropout,
    )

    def loss_on_groups(trainable, frozen, batches, key):
        return loss(trainable, frozen, batches["groups"], key)

    return (Phase("ranking", loss_on_groups),)


def open_trained(config):
    """The ImageReward that training starts from: of config.reward.path, of BLIP's weights, or random."""
    settings = config.reward
    if settings.path:
        return load(settings.path, tokenizer=settings.tokenizer)
    if settings.blip:
        return imagereward_from_blip(settings.blip, jax.random.key(config.seed), tokenizer=settings.tokenizer)
    return init_reward(config)


def open_groups(config, name, image_size):
    """The ranked groups of config.data's source `name`, their pictures of so many pixels."""
    data = config.data
    source = str(data[name])
    if source.startswith(SHAPES_PREFIX):
        shapes = {"images_per_prompt": data.images_per_prompt, "spoilt": data.spoilt}
        shapes |= TEST_SHAPES if name == "test_groups" else {}
        return load_groups(source, image_size=image_size, shapes=shapes)
    return load_groups(
        source,
        image_size=image_size,
        split=data[f"{name.removesuffix('_groups')}_split"],
        images=data.images_folder or None,
        cache=data.cache or None,
    )


def pad_item(item, rng, *, size):
    """A group with as many pictures as the largest, so that they stack."""
    return padded(item, size)


class RankingEvaluation:
    """`eval/accuracy` (share of pairs ordered as people did; ties are wrong) and `eval/loss` over ranked groups.

    Args:
        groups: random access to groups; the first `count` are read at each evaluation, a batch at a time.
    """

    batch = 64
    shown = 6
    remembered = 2**28  # bytes of pictures that are kept from one evaluation to the next

    def __init__(self, reward, groups, mesh, count):
        self.reward, self.groups, self.mesh = reward, groups, mesh
        self.count, self.columns = min(count, len(groups)), groups.largest
        if self.count * groups.largest * reward.image_size**2 * 12 <= self.remembered:
            self.groups = [groups[index] for index in range(self.count)]
        self._score = jax.jit(
            lambda params, images, tokens: reward.apply(params["reward"], images, tokens),
            out_shardings=replicated(mesh),
        )

    def scores(self, params):
        """[N] the score of every picture; params: {"reward": the reward's parameters}."""
        return np.concatenate([scores for _, scores in self._scored(params)])

    def _scored(self, params):
        """(group, its scores) for every group."""
        waiting, pictures = [], 0
        for index in range(self.count):
            waiting.append(self.groups[index])
            pictures += len(waiting[-1]["ranking"])
            if pictures >= self.batch or index == self.count - 1:
                yield from self._score_groups(params, waiting)
                waiting, pictures = [], 0

    def _score_groups(self, params, groups):
        images = np.concatenate([group["images"] for group in groups])
        tokens = self.reward.tokenize([group["prompt"] for group in groups for _ in group["ranking"]])
        batch = -(-self.batch // self.mesh.size) * self.mesh.size
        scores = []
        for start in range(0, len(images), batch):
            rows = np.minimum(np.arange(start, start + batch), len(images) - 1)
            part = {"images": images[rows], "tokens": {name: ids[rows] for name, ids in tokens.items()}}
            part = put_whole(self.mesh, part)
            scores.append(np.asarray(self._score(params, part["images"], part["tokens"])))
        scores = np.concatenate(scores)[: len(images)]
        ends = np.cumsum([len(group["ranking"]) for group in groups])
        return zip(groups, np.split(scores, ends[:-1]))

    def __call__(self, trainable, frozen):
        losses, correct, images, captions = [], [], [], []
        for group, scores in self._scored(join(frozen, trainable)):
            loss, right, pairs = (np.asarray(x) for x in pair_losses(scores, group["ranking"]))
            losses.append(loss[pairs])
            correct.append(right[pairs])
            if len(losses) <= self.shown:
                images += list(padded(group, self.columns)["images"])
                captions += [f"{score:+.2f} {group['prompt']}" for score in scores]
                captions += [""] * (self.columns - len(scores))
        metrics = {
            "eval/accuracy": float(np.concatenate(correct).mean()),
            "eval/loss": float(np.concatenate(losses).mean()),
        }
        return Evaluation(metrics, contact_sheet(np.stack(images), captions, columns=self.columns))
