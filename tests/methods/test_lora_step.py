"""One LoRA ReFL step against the same step in PyTorch with diffusers' networks and PEFT's layers."""

import jax
import numpy as np
import optax
import pytest
from refl_reference import (
    PROMPTS,
    TinyReward,
    draws,
    method_config,
    refl_batch,
    refl_function,
    saved_pair,
    torch,
    torch_step,
)

from imagereward_jax.models import lora
from imagereward_jax.models.param_tree import join, split, trainable_mask
from imagereward_jax.recipes import default_config
from imagereward_jax.training.optimizer import make_optimizer
from imagereward_jax.weights import mapping

peft = pytest.importorskip("peft", reason="the reference is PyTorch PEFT")

RANK, ALPHA = 3, 6
# What SD 1.x has of both kinds of layers: the projections around its transformers are convolutions.
TARGETS = lora.ATTENTION + r"|proj_in|resnets\.\d+\.conv1"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(pipeline, params, diffusers' pipeline), the same weights and the same random adapter in both."""
    pipeline, params, reference = saved_pair(tmp_path_factory.mktemp("model"))
    pipeline = pipeline.with_lora("unet", TARGETS, rank=RANK, alpha=ALPHA)
    layers = [key for key in mapping.torch_layout(pipeline.networks["unet"], lora.LoRAParam) if "lora_A" in key]
    names = [key.removesuffix(".lora_A.weight") for key in layers]
    rng = np.random.default_rng(4)
    shapes = mapping.params_of(pipeline.networks["unet"], lora.LoRAParam)
    adapter = jax.tree.map(lambda leaf: 0.2 * rng.standard_normal(leaf.shape).astype(np.float32), shapes)
    reference.unet.add_adapter(peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names))
    tensors = mapping.to_torch(pipeline.networks["unet"], adapter, kind=lora.LoRAParam)
    weights = {name: weight for name, weight in reference.unet.named_parameters() if weight.requires_grad}
    assert {name.replace(".default", "") for name in weights} == tensors.keys()
    for name, weight in weights.items():
        weight.data = torch.from_numpy(tensors[name.replace(".default", "")].copy())
    return pipeline, join(params, {"unet": adapter}), reference


@pytest.fixture(scope="module")
def problem(made):
    """(loss, trainable, frozen, batch)."""
    pipeline, params, _ = made
    reward = TinyReward()
    trainable, frozen = split(params, trainable_mask(params, ("unet",), lora=True))
    loss = refl_function(pipeline, reward, method_config(), "ddpm")
    return loss, trainable, {**frozen, "reward": reward.params}, refl_batch(pipeline, params, reward)


def test_loss_and_every_lora_gradient_agree_with_peft(made, problem):
    """Within 1e-3 relative: the loss, and each gradient against its own largest entry."""
    pipeline, _, reference = made
    loss, trainable, frozen, batch = problem
    key, config = jax.random.key(3), method_config()
    (value, _), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(trainable, frozen, batch, key)
    noise, step_noise, stop = draws(key, config, pipeline.latent_shape(config.height, config.width), len(PROMPTS))
    expected, theirs = torch_step(
        reference, TinyReward(), "ddpm", config, pipeline.tokenize, batch, noise, step_noise, stop
    )

    np.testing.assert_allclose(value, expected, rtol=1e-3)
    ours = mapping.to_torch(pipeline.networks["unet"], gradient["unet"], kind=lora.LoRAParam)
    assert len(ours) == len(theirs) == len(jax.tree.leaves(trainable))
    worst = 0.0
    for name, their_gradient in theirs.items():
        size = np.abs(their_gradient).max()
        assert size > 0, name
        error = np.abs(ours[name.replace(".default", "")] - their_gradient).max() / size
        assert error < 1e-3, name
        worst = max(worst, error)
    print(f"loss {float(value):.7g} and {expected:.7g}; {len(ours)} gradients, worst relative error {worst:.1e}")


def test_the_optimizer_holds_moments_of_low_rank_parameters_alone(made, problem):
    """Two moments for each of them, a few counts, and nothing for any other weight."""
    _, params, _ = made
    _, trainable, _, _ = problem
    state = jax.eval_shape(make_optimizer(default_config("refl").optimizer, 10).init, trainable)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    of_moments, of_trainable, of_all = (
        sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (moments, trainable, params)
    )
    print(f"{of_moments:,} numbers of moments for {of_trainable:,} trainable parameters of {of_all:,}")
    assert of_moments == 2 * of_trainable < 0.2 * of_all


def test_optax_masked_by_the_mask_makes_the_same_update():
    """To the bit, over the whole tree, and the frozen weights get none."""
    rng = np.random.default_rng(0)
    layer = {"kernel": (4, 4), "lora_A": (4, 2), "lora_B": (2, 4)}
    shapes = {"unet": {"conv": {"kernel": (3, 3)}, "to_q": layer}, "vae": {"kernel": (2, 2)}}
    params, grads = (
        jax.tree.map(lambda shape: rng.normal(size=shape), shapes, is_leaf=lambda x: isinstance(x, tuple))
        for _ in range(2)
    )
    mask = trainable_mask(params, ("unet",), lora=True)
    settings = default_config("refl").optimizer
    settings.clip_norm = 0.0
    optimizer = make_optimizer(settings, 10)
    (trainable, _), (trainable_grads, _) = split(params, mask), split(grads, mask)
    updates, _ = optimizer.update(trainable_grads, optimizer.init(trainable), trainable)
    masked = optax.masked(optimizer, mask)
    zeroed = jax.tree.map(lambda grad, trains: grad * trains, grads, mask)
    whole, _ = masked.update(zeroed, masked.init(params), params)
    expected, others = split(whole, mask)
    jax.tree.map(np.testing.assert_array_equal, updates, expected)
    assert len(jax.tree.leaves(updates)) == 2
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(others))


def test_split_and_join_are_inverse(made):
    _, params, _ = made
    trainable, frozen = split(params, trainable_mask(params, ("unet",), lora=True))
    assert set(trainable) == {"unet"} and set(frozen) == set(params)
    assert all(path[-1].key.startswith("lora_") for path, _ in jax.tree_util.tree_leaves_with_path(trainable))
    jax.tree.map(np.testing.assert_array_equal, join(frozen, trainable), params)
    trainable, frozen = split(params, trainable_mask(params, ("unet", "vae")))
    assert set(trainable) == {"unet", "vae"} and set(frozen) == {"text_encoder"}
