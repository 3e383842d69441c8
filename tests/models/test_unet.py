"""The UNet against PyTorch diffusers on the same random weights, float32 unless said otherwise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import (
    assert_same_layout,
    count_checkpoints,
    from_torch_image,
    functional,
    randomise,
    relative_error,
    tensors_of,
    to_torch_image,
    worst_gradient_error,
)
from flax import nnx
from published_parts import UNET as SD1

from imagereward_jax.models.embeddings import sinusoidal_embedding
from imagereward_jax.models.remat import REMAT_POLICIES
from imagereward_jax.models.unet import UNet2DConditionModel
from imagereward_jax.models.unet_config import UNet2DConditionConfig
from imagereward_jax.weights import mapping

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

# As stabilityai published it: old files leave out what was added later.
SDXL = {
    **SD1,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "upcast_attention": None,
    "use_linear_projection": True,
}
SMALL = {
    "sd1": {
        **SD1,
        "block_out_channels": [32, 64, 64, 64],
        "layers_per_block": 1,
        "cross_attention_dim": 24,
        "attention_head_dim": 4,
    },
    "sdxl": {
        **SDXL,
        "block_out_channels": [32, 64, 64],
        "attention_head_dim": [2, 4, 8],
        "cross_attention_dim": 24,
        "layers_per_block": 1,
        "transformer_layers_per_block": [0, 1, 2],
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 20,
    },
    "shallow": {
        "block_out_channels": [16, 32],
        "norm_num_groups": 8,
        "layers_per_block": [1, 2],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "attention_head_dim": 2,
        "cross_attention_dim": 12,
        "in_channels": 9,
        "out_channels": 3,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-3,
        "conv_in_kernel": 5,
        "conv_out_kernel": 1,
    },
}
SMALL["pruned"] = SMALL["shallow"] | {  # as SSD-1B
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, [1, 2]],
    "reverse_transformer_layers_per_block": [[2, 1, 1], 1],
    "mid_block_type": "UNetMidBlock2D",
}
AGREE = tuple(SMALL)
SMALL["without_mid_block"] = SMALL["pruned"] | {"mid_block_type": None}  # as KOALA-700M
SMALL["tiny"] = {
    **SD1,
    "block_out_channels": [8],
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D"],
    "attention_head_dim": 2,
    "cross_attention_dim": 12,
}


@functools.cache
def reference(name):
    torch.manual_seed(0)
    return randomise(diffusers.UNet2DConditionModel.from_config(SMALL[name]))


@functools.cache
def network(name, remat="none", dtype=jnp.float32):
    config = UNet2DConditionConfig.from_dict(SMALL[name])
    module = mapping.abstract(lambda: UNet2DConditionModel(config, remat=remat, dtype=dtype, rngs=nnx.Rngs(0)))
    return functional(module, tensors_of(reference(name)))


def inputs(name, height=8, width=8, batch=2):
    rng = np.random.default_rng(0)
    config = UNet2DConditionConfig.from_dict(SMALL[name])
    draw = lambda *shape: rng.standard_normal(shape, dtype=np.float32)  # noqa: E731
    added = None
    if config.addition_embed_type:
        ids = np.array([[512, 640, 3, 7, 512, 512], [1024, 1024, 0, 0, 1024, 1024]])[:batch]
        added = {"text_embeds": draw(batch, 20), "time_ids": ids}
    return draw(batch, height, width, config.in_channels), draw(batch, 5, config.cross_attention_dim), added


def apply_reference(name, sample, timesteps, context, added):
    added = None if added is None else {key: torch.from_numpy(value) for key, value in added.items()}
    return reference(name)(sample, timesteps, context, added_cond_kwargs=added).sample


def loss_function(graphdef, timesteps, context, added):
    """A scalar whose gradient reaches every parameter."""

    def loss(params, sample):
        out = nnx.merge(graphdef, params)(sample, timesteps, context, added)
        return jnp.sin(out).sum(), out

    return loss


@pytest.mark.parametrize("name", AGREE)
def test_output_and_gradients_agree_with_diffusers(name):
    sample, context, added = inputs(name, 8, 8)
    timesteps = np.array([40, 961])
    module, image = reference(name), to_torch_image(sample).requires_grad_()
    expected = apply_reference(name, image, torch.from_numpy(timesteps), torch.from_numpy(context), added)
    module.zero_grad()
    expected.sin().sum().backward()
    graphdef, params = network(name)
    loss = loss_function(graphdef, timesteps, context, added)
    (_, actual), (of_params, of_sample) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, sample)
    assert actual.dtype == jnp.float32
    assert relative_error(actual, from_torch_image(expected)) < 2e-5
    assert relative_error(of_sample, from_torch_image(image.grad)) < 1e-4
    expected = {key: value.grad.numpy() for key, value in module.named_parameters()}
    assert worst_gradient_error(mapping.to_torch(graphdef_module(name), of_params), expected) < 1e-3


@pytest.mark.parametrize("name", [*AGREE, "without_mid_block"])
def test_odd_sizes_agree_with_diffusers(name):
    """Sizes that cannot be halved at every level: the way up ends where the way down began."""
    sample, context, added = inputs(name, 13, 6)
    with torch.no_grad():
        expected = apply_reference(name, to_torch_image(sample), 500, torch.from_numpy(context), added)
    graphdef, params = network(name)
    actual = jax.jit(lambda p: nnx.merge(graphdef, p)(sample, 500, context, added))(params)
    assert relative_error(actual, from_torch_image(expected)) < 2e-5


def graphdef_module(name):
    graphdef, params = network(name)
    return nnx.merge(graphdef, params)


def test_one_timestep_serves_the_whole_batch():
    sample, context, _ = inputs("shallow")
    graphdef, params = network("shallow")
    apply = jax.jit(lambda timesteps: nnx.merge(graphdef, params)(sample, timesteps, context))
    batch = apply(np.array([7, 7]))
    assert relative_error(apply(7), batch) < 1e-6
    assert relative_error(apply(8), batch) > 1e-3


def test_remat_policy_checkpoints_what_it_names():
    # 3 + 2 + 6 residual blocks, (1 + 2) + 2 + (2 * 2 + 2 * 1) transformer blocks of two attentions, 4 resamplers;
    # the last layers. "full": also 3 + 1 + 3 whole blocks. "offload": jax.checkpoint in scans alone, 4 stacks of 2.
    wanted = {"none": 0, "attention": 2 * 7, "blocks": 23, "full": 7 + 23, "offload": 4}
    sample, context, added = inputs("sdxl")
    for policy in REMAT_POLICIES:
        graphdef, params = network("sdxl", remat=policy)
        apply = lambda p, g=graphdef: nnx.merge(g, p)(sample, 1, context, added)  # noqa: E731
        assert count_checkpoints(apply, params) == wanted[policy]


def test_remat_changes_no_result_in_a_scan():
    """Two sampler steps inside lax.scan, the parameters from outside: whole blocks, and layers on the host
    (tests/models/test_remat.py: every policy, part by part)."""
    sample, context, _ = inputs("tiny", 4, 4)

    def loss(params, sample, graphdef):
        unet = nnx.merge(graphdef, params)

        def step(x, t):
            return x - 0.1 * unet(x, t, context), None

        return jnp.square(jax.lax.scan(step, sample, jnp.array([9, 5]))[0]).mean()

    results = {}
    for policy in ("none", "full", "offload"):
        graphdef, params = network("tiny", remat=policy)
        function = jax.value_and_grad(lambda *args, g=graphdef: loss(*args, g), argnums=(0, 1))
        results[policy] = jax.jit(function)(params, sample)
    module = graphdef_module("tiny")
    value, (of_params, of_sample) = results.pop("none")
    for other_value, (other_of_params, other_of_sample) in results.values():
        assert relative_error(other_value, value) < 1e-5
        assert relative_error(other_of_sample, of_sample) < 1e-5
        assert (
            worst_gradient_error(mapping.to_torch(module, other_of_params), mapping.to_torch(module, of_params)) < 1e-4
        )


def test_unknown_remat_policy_lists_the_choices():
    config = UNet2DConditionConfig.from_dict(SMALL["shallow"])
    with pytest.raises(ValueError, match=r"'some'.*none, blocks, attention, full"):
        UNet2DConditionModel(config, remat="some", rngs=nnx.Rngs(0))


def test_bfloat16_is_close_to_float32(name="sdxl"):
    sample, context, added = inputs(name)
    outputs = []
    for dtype in (jnp.float32, jnp.bfloat16):
        graphdef, params = network(name, dtype=dtype)
        outputs.append(jax.jit(lambda p, g=graphdef: nnx.merge(g, p)(sample, 300, context, added))(params))
    assert outputs[1].dtype == jnp.float32
    assert 1e-5 < relative_error(outputs[1], outputs[0]) < 0.05


@pytest.mark.parametrize("name", AGREE)
def test_weights_survive_the_round_trip_to_the_bit(name):
    tensors = tensors_of(reference(name))
    module = graphdef_module(name)
    back = mapping.to_torch(module, mapping.from_torch(module, tensors))
    assert back.keys() == tensors.keys()
    assert all(back[key].tobytes() == tensors[key].tobytes() for key in tensors)


@pytest.mark.parametrize(("config", "count"), [(SD1, 859_520_964), (SDXL, 2_567_463_684)], ids=["sd1", "sdxl"])
def test_full_size_keys_and_shapes_are_diffusers(config, count):
    with torch.device("meta"):
        expected = diffusers.UNet2DConditionModel.from_config(config)
    parsed = UNet2DConditionConfig.from_dict(config)
    module = mapping.abstract(lambda: UNet2DConditionModel(parsed, rngs=nnx.Rngs(0)))
    assert assert_same_layout(module, expected) == count


@pytest.mark.parametrize("config", [SD1, SDXL, *SMALL.values()])
def test_config_goes_to_diffusers_and_back(config):
    with torch.device("meta"):
        saved = diffusers.UNet2DConditionModel.from_config(config).config
        parsed = UNet2DConditionConfig.from_dict(config)
        again = diffusers.UNet2DConditionModel.from_config(parsed.to_dict()).config
    assert UNet2DConditionConfig.from_dict(dict(saved)) == parsed
    assert UNet2DConditionConfig.from_dict(parsed.to_dict()) == parsed
    names = [name for name in saved if not name.startswith("_") and name != "upcast_attention"]
    assert [saved[name] for name in names] == [again[name] for name in names]


@pytest.mark.parametrize(
    "changes",
    [
        {"class_embed_type": "timestep"},
        {"encoder_hid_dim": 768},
        {"dual_cross_attention": True},
        {"addition_embed_type": "image"},
        {"down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["AttnDownBlock2D"]},
        {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"},
        {"only_cross_attention": [True, True, True, False]},
        {"cross_attention_dim": [768, 768, 768, 768]},
        {"transformer_layers_per_block": [[1, 1], [2, 2], 1, 1]},
        {"reverse_transformer_layers_per_block": [1, 1, 1, [1, 1]]},
        {"reverse_transformer_layers_per_block": [1, 1, 1, -1]},
        {"attention_head_dim": 7},
        {"attention_head_dim": [8, 8]},
        {"norm_num_groups": None},
        {"norm_eps": 0},
        {"norm_eps": 1e9},
        {"time_cond_proj_dim": 256},
        {"resnet_time_scale_shift": "scale_shift"},
        {"center_input_sample": True},
        {"dropout": 0.1},
        {"conv_in_kernel": 2},
        {"some_new_field": 3},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_config_refuses_what_is_not_implemented(changes):
    name = next(iter(changes))
    with pytest.raises(ValueError, match=name):
        UNet2DConditionConfig.from_dict({**SD1, **changes})


def test_inputs_that_do_not_fit_are_refused():
    graphdef, params = network("sdxl")
    unet = nnx.merge(graphdef, params)
    sample, context, added = inputs("sdxl")
    with pytest.raises(ValueError, match="sample should be"):
        unet(sample[..., :3], 1, context, added)
    with pytest.raises(ValueError, match="encoder_hidden_states should be"):
        unet(sample, 1, context[..., :3], added)
    with pytest.raises(ValueError, match="takes added_cond"):
        unet(sample, 1, context)
    with pytest.raises(ValueError, match="projection_class_embeddings_input_dim=68"):
        unet(sample, 1, context, {**added, "time_ids": added["time_ids"][:, :2]})
    graphdef, params = network("shallow")
    sample, context, _ = inputs("shallow")
    with pytest.raises(ValueError, match="takes no added_cond"):
        nnx.merge(graphdef, params)(sample, 1, context, added)


def test_time_embedding_is_float32_whatever_the_type_of_the_timestep():
    for timesteps in (np.array([999]), np.array([999.0], np.float32), np.array([999], np.int16)):
        embedding = np.asarray(sinusoidal_embedding(jnp.asarray(timesteps), 8))
        angles = 999 * 10000.0 ** (-np.arange(4) / 4)
        np.testing.assert_allclose(embedding[0], np.concatenate([np.cos(angles), np.sin(angles)]), atol=1e-4)
