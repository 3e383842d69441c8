"""The training of the reward model against the original's training code, written in PyTorch (tests/torch_blip.py)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

torch = pytest.importorskip("torch")
import torch_blip

from imagereward_jax.methods.base import Mean, Models, Phase
from imagereward_jax.methods.ranking import Config, make_loss, pair_losses, trainable_mask
from imagereward_jax.models import dropout
from imagereward_jax.models.blip import ImageRewardModel
from imagereward_jax.models.blip_config import ImageRewardConfig, TextConfig, VisionConfig
from imagereward_jax.models.param_tree import join, split
from imagereward_jax.recipes import default_config
from imagereward_jax.rewards.preprocess import CLIP_MEAN, CLIP_STD
from imagereward_jax.training.optimizer import make_optimizer, make_schedule
from imagereward_jax.training.state import init_state
from imagereward_jax.training.step import Fixed, make_train_step
from imagereward_jax.weights import mapping

CONFIG = ImageRewardConfig(
    vision=VisionConfig(image_size=16, patch_size=8, width=16, depth=2, heads=2),
    text=TextConfig(30, 12, 2, 2, 24, max_position_embeddings=10),
    projection_dim=6,
    head_sizes=(16, 12, 8, 4),
    max_prompt_tokens=6,
    score_mean=0.0,
    score_std=1.0,
)
TRAINED_TENSORS, TRAINED_NUMBERS = 210, 140_488_929  # of 624 and 446,665,953
CONFIG24 = VisionConfig(image_size=16, patch_size=8, width=16, depth=24, heads=2)
RATES = {"dropout": 0.1, "drop_path": 0.3, "head_dropout": (0.2, 0.2, 0.1)}


class Reward:
    """What the ranking loss needs of an ImageReward."""

    module = mapping.abstract(lambda: ImageRewardModel(CONFIG, rngs=nnx.Rngs(0)))

    def apply(self, params, images, tokens):
        pixels = (images - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)
        return nnx.merge(nnx.graphdef(self.module), params)(pixels, **tokens)


def ranking_loss(**rates):
    """(trainable, frozen, batch, key) -> (mean loss, metrics)."""
    loss = make_loss(Config(**rates), Reward().apply)

    def function(trainable, frozen, batch, key):
        value, metrics = loss(Models(join(frozen, trainable)), batch, key)
        means = {name: metric.value if isinstance(metric, Mean) else metric for name, metric in metrics.items()}
        return value.value, means

    return function


STEP = jax.jit(jax.value_and_grad(ranking_loss(), has_aux=True))  # compiled once for equal shapes


def reference(rates=None):
    """(PyTorch model, our parameters): weights of about unit gain, so that all of them matter."""
    rates = rates or {"dropout": 0.0, "drop_path": 0.0, "head_dropout": (0.0, 0.0, 0.0)}
    model = torch_blip.ImageReward(
        CONFIG, dropout=rates["dropout"], drop_path=rates["drop_path"], head_dropouts=rates["head_dropout"]
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_((1 if "norm" in name.lower() and name.endswith("weight") else 0) + 0.2 * noise)
            else:
                parameter.copy_(noise * (parameter[0].numel() ** -0.5 if name.endswith("weight") else 0.3))
    tensors = {key: value.detach().numpy().copy() for key, value in model.state_dict().items()}
    return model, mapping.from_torch(Reward.module, tensors)


def groups(count, size, seed=1):
    """A batch as the experiment makes it: the last picture of the first group is not there, two of the last tie."""
    rng = np.random.default_rng(seed)
    ranking = np.stack([rng.permutation(size) + 1 for _ in range(count)]).astype(np.int32)
    ranking[0, -1] = 0
    ranking[-1, 1] = ranking[-1, 0]
    mask = np.ones((count, 6), np.int32)
    mask[0, 4:] = 0
    return {
        "images": rng.random((count, size, 16, 16, 3), np.float32),
        "ranking": ranking,
        "reward": {"input_ids": rng.integers(0, 30, (count, 6)).astype(np.int32), "attention_mask": mask},
    }


def torch_inputs(batch):
    """Pixels [N, 3, S, S], ids, mask [N, L] of all pictures of all groups."""
    count, size = batch["ranking"].shape
    pixels = (batch["images"].reshape(count * size, 16, 16, 3) - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)
    tokens = (np.repeat(batch["reward"][name], size, axis=0) for name in ("input_ids", "attention_mask"))
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()), *(torch.from_numpy(ids).long() for ids in tokens)


def ranked_pairs(ranking):
    """[(group, better, worse)], as the original lists them; pictures that are not there are left out."""
    return [
        (g, i, j)
        for g, ranks in enumerate(ranking)
        for i in range(len(ranks))
        for j in range(len(ranks))
        if 0 < ranks[i] < ranks[j]
    ]


def torch_loss(model, batch):
    scores = model(*torch_inputs(batch)).reshape(batch["ranking"].shape)
    better, worse = zip(*((scores[g, i], scores[g, j]) for g, i, j in ranked_pairs(batch["ranking"])))
    return torch_blip.pair_loss(torch.stack(better), torch.stack(worse))


def as_tensors(params):
    return mapping.to_torch(Reward.module, params)


def assert_gradients(ours, model):
    """Within 1e-4 of the largest gradient of all, for every parameter that PyTorch trains."""
    theirs = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    largest = max(np.abs(value).max() for value in theirs.values())
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, atol=1e-4 * largest, err_msg=name)
    return theirs


def test_loss_accuracy_and_gradients_are_the_originals():
    """Loss and accuracy within 1e-5; two groups of four with a tie and a gap."""
    model, params = reference()
    batch = groups(2, 4)
    loss, accuracy = torch_loss(model, batch)
    loss.backward()
    (value, metrics), gradient = STEP({"reward": params}, {}, batch, jax.random.key(0))
    np.testing.assert_allclose([value, metrics["accuracy"]], [loss.item(), accuracy.item()], rtol=1e-5)
    assert 0 < metrics["accuracy"] < 1
    assert_gradients(as_tensors(gradient["reward"]), model)


def test_groups_and_pairs_have_the_same_loss_and_gradient():
    """The batch of all pairs of two groups, each picture encoded for each of its pairs, against whole groups."""
    _, params = reference()
    batch = groups(2, 4)
    listed = ranked_pairs(batch["ranking"])
    pairs = {
        "images": np.stack([batch["images"][g, [i, j]] for g, i, j in listed]),
        "ranking": np.stack([batch["ranking"][g, [i, j]] for g, i, j in listed]),
        "reward": {name: ids[[g for g, _, _ in listed]] for name, ids in batch["reward"].items()},
    }
    assert len(listed) == 3 + 5
    (one, _), by_group = STEP({"reward": params}, {}, batch, jax.random.key(0))
    (other, _), by_pair = STEP({"reward": params}, {}, pairs, jax.random.key(0))
    np.testing.assert_allclose(one, other, rtol=1e-5)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(by_pair))
    for a, b in zip(jax.tree.leaves(by_group), jax.tree.leaves(by_pair), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * largest)


def test_dropout_and_drop_path_are_the_originals(monkeypatch):
    """With the masks that were drawn here replayed in PyTorch: the same places, rates, order; gradients within 1e-4."""
    model, params = reference(RATES)
    batch, drawn = groups(2, 3), []
    keep_mask = dropout.keep_mask

    def record(key, rate, shape):
        drawn.append((rate, shape))
        return keep_mask(key, rate, shape)

    monkeypatch.setattr(dropout, "keep_mask", record)
    key, loss_of = jax.random.key(3), ranking_loss(**RATES)
    step = jax.jit(jax.value_and_grad(loss_of, has_aux=True)).lower({"reward": params}, {}, batch, key)
    masks = [np.asarray(keep_mask(jax.random.fold_in(key, i + 1), *call)) for i, call in enumerate(drawn)]
    (value, _), gradient = step.compile()({"reward": params}, {}, batch, key)
    # The second block's two drop paths (the first has none), the embeddings, 2 layers of 2 x 2 + 1, the head's 3.
    assert [rate for rate, _ in drawn] == pytest.approx([0.3, 0.3] + [0.1] * 11 + [0.2, 0.2, 0.1])
    monkeypatch.setattr(torch_blip.Noise, "masks", torch_blip.Masks(masks))
    loss, _ = torch_loss(model.train(), batch)
    loss.backward()
    np.testing.assert_allclose(value, loss.item(), rtol=1e-4)
    assert_gradients(as_tensors(gradient["reward"]), model)
    undisturbed, _ = torch_loss(model.eval(), batch)
    assert abs(undisturbed.item() - value) > 1e-3


def test_masks_keep_the_share_that_they_should():
    with dropout.noise(jax.random.key(0), text=0.25):
        x = dropout.drop(jnp.ones((40, 1000)), "text")
        paths = dropout.drop(jnp.ones((4000, 2, 2)), "text", per_sample=True)
        other = dropout.drop(x, "path")
    assert set(np.unique(x).round(5)) == {0, np.float32(4 / 3).round(5)}
    np.testing.assert_allclose([(x == 0).mean(), (paths == 0).mean()], 0.25, atol=0.02)
    assert (paths.reshape(4000, -1).std(1) == 0).all() and other is x
    assert dropout.drop(x, "text") is x


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.7, 1.0])
def test_what_freezes_is_what_the_original_freezes(rate):
    """Name by name. Both networks have two layers, so 0.7 freezes one layer and one tensor of the second."""
    model, params = reference()
    model.freeze(rate)
    theirs = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    mask = jax.tree.map(np.array, trainable_mask(params, rate))
    layout = mapping.torch_layout(Reward.module)

    def leaf(tree, path):
        for part in path:
            tree = tree[part]
        return tree

    assert {key for key, place in layout.items() if leaf(mask, place.path)} == theirs
    trainable, frozen = split({"reward": params}, {"reward": trainable_mask(params, rate)})
    assert jax.tree.structure(join(frozen, trainable)) == jax.tree.structure({"reward": params})


def test_what_trains_at_full_size():
    """fix_rate 0.7 of the 447 million numbers: blocks 16 to 23 and layers 8 to 11, less one tensor each, norm, head."""
    module = mapping.abstract(lambda: ImageRewardModel(ImageRewardConfig(), rngs=nnx.Rngs(0)))
    with torch.device("meta"):
        model = torch_blip.ImageReward(ImageRewardConfig())
    model.freeze(0.7)
    theirs = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    params = mapping.params_of(module)
    trainable, _ = split({"reward": params}, {"reward": trainable_mask(params, 0.7)})
    counts = [int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(trainable)]
    assert len(theirs) == len(counts) == TRAINED_TENSORS
    assert sum(map(math.prod, theirs.values())) == sum(counts) == TRAINED_NUMBERS
    assert "blip.visual_encoder.blocks.16.norm1.weight" not in theirs
    assert "blip.visual_encoder.blocks.16.norm1.bias" in theirs
    scales = [block.path_scale for block in module.blip.visual_encoder.blocks]
    published = [block.drop_path.rate for block in torch_blip.VisionTransformer(CONFIG24, 0.1).blocks]
    np.testing.assert_allclose(0.1 * np.array(scales), published)


def recipe():
    """The optimizer of configs/imagereward.py: Adam, cosine to 0, nothing else."""
    config = default_config("ranking").optimizer
    config.schedule, config.weight_decay, config.clip_norm = "cosine", 0.0, 0.0
    return config


@pytest.mark.parametrize("warmup", [0, 5])
def test_the_schedule_is_the_originals(warmup):
    """Its annealing: linear to the peak over the warm-up, then half a cosine to 0 over the rest; 20 updates."""
    config = recipe()
    config.warmup_steps = warmup
    ours = make_schedule(config, 20)
    for update in range(21):
        if update <= warmup and warmup:
            expected = 1e-5 * update / warmup
        else:
            expected = 1e-5 * (math.cos(math.pi * min(1, (update - warmup) / (20 - warmup))) + 1) / 2
        np.testing.assert_allclose(ours(update), expected, rtol=1e-5, atol=1e-12)


def test_two_updates_with_frozen_layers_are_the_originals():
    """Adam and cosine with fix_rate 0.7: weights within 1e-4, where an update moves them by some 1e-2.

    The learning rate is large, so that 1e-4 is a hundredth of an update. Epsilon is large, because Adam would otherwise
    blow the rounding of gradients that are nearly zero up to whole updates.
    """
    model, params = reference()
    model.freeze(0.7)
    batch, peak, eps = groups(2, 4), 1e-2, 1e-3
    optimizer = torch.optim.Adam(model.parameters(), lr=peak, eps=eps)
    before = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    for update in range(2):
        for group in optimizer.param_groups:
            group["lr"] = peak * (math.cos(math.pi * update / 4) + 1) / 2
        optimizer.zero_grad()
        torch_loss(model, batch)[0].backward()
        optimizer.step()
    trainable, frozen = split({"reward": params}, {"reward": trainable_mask(params, 0.7)})
    settings = recipe()
    settings.learning_rate, settings.eps = peak, eps
    ours = make_optimizer(settings, 4)
    state, gradient = ours.init(trainable), jax.jit(jax.grad(ranking_loss(), has_aux=True))
    for _ in range(2):
        grads, _ = gradient(trainable, frozen, batch, jax.random.key(0))
        updates, state = ours.update(grads, state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    tensors = as_tensors(join(frozen, trainable)["reward"])
    moved = 0
    for name, parameter in model.named_parameters():
        after = parameter.detach().numpy()
        np.testing.assert_allclose(tensors[name], after, atol=1e-4, err_msg=name)
        moved = max(moved, np.abs(after - before[name]).max())
        if not parameter.requires_grad:
            np.testing.assert_array_equal(tensors[name], before[name])
    assert moved > 1e-2


def test_pairs_of_a_group_by_hand():
    """Ranks 2, 1, 2 and a gap: of the pairs only (1, 0) and (1, 2) count."""
    losses, correct, pairs = pair_losses(jnp.array([0.0, 1.0, 2.0, 9.0]), jnp.array([2, 1, 2, 0]))
    assert np.argwhere(pairs).tolist() == [[1, 0], [1, 2]]
    np.testing.assert_allclose([losses[1, 0], losses[1, 2]], [np.log1p(np.exp(-1)), np.log1p(np.exp(1))], rtol=1e-6)
    assert bool(correct[1, 0]) and not bool(correct[1, 2])


def brightness(params, images, tokens):
    """A scorer of one number: the image's mean, bent."""
    return jnp.tanh(params["w"] * images.mean((1, 2, 3)))


@pytest.mark.parametrize("accumulation", [2, 4])
def test_groups_of_unequal_size_accumulate_to_the_whole_batchs_gradient(accumulation):
    """Groups of 2, 4, 2 and 4 images (1, 6, 1, 6 pairs) in rounds of two groups and of one: update within 1e-6."""
    rng = np.random.default_rng(0)
    ranking = np.array([[2, 1, 0, 0], [3, 1, 4, 2], [1, 2, 0, 0], [1, 4, 2, 3]], np.int32)
    batch = {"images": rng.random((4, 4, 2, 2, 3), np.float32), "ranking": ranking, "reward": {}}

    class Given:
        updates = images = 1

        def prepare(self, models, batch):
            return batch

    def update(rounds):
        phase = Phase("ranking", make_loss(Config(), brightness), Given())
        optimizer = optax.sgd(1.0)
        step = jax.jit(make_train_step((phase,), optimizer, accumulation=rounds))
        state = init_state({"reward": {"w": jnp.float32(1.5)}}, optimizer, seed=0, ema=False)
        state, metrics = step(state, Fixed({}), {"ranking": batch})
        return state.params["reward"]["w"] - 1.5, metrics

    (whole, expected), (accumulated, metrics) = update(1), update(accumulation)
    assert abs(whole) > 1e-4
    np.testing.assert_allclose(accumulated, whole, rtol=1e-5)
    for name in ("ranking/loss", "ranking/accuracy"):
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-6)
