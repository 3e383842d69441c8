"""The transformer of Stable Diffusion 3 against PyTorch diffusers on the same random weights, float32 unless said."""

import functools
import json
from pathlib import Path

import child
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
from collectives import CODE
from flax import nnx

from imagereward_jax.models import lora, param_tree
from imagereward_jax.models.mmdit import SD3Transformer2DModel
from imagereward_jax.models.mmdit_config import SD3_MEDIUM, SD35_LARGE, SD35_MEDIUM, SD3Transformer2DConfig
from imagereward_jax.models.remat import REMAT_POLICIES
from imagereward_jax.weights import components, mapping

MANIFESTS = Path(__file__).parents[3] / "shared" / "manifests"
TABLE = "pos_embed.pos_embed"
# Of diffusers' LoRA script for Stable Diffusion 3: not of the second attention.
SCRIPT_TARGETS = r"attn\.(?:to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"

TINY = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 20,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 12,
    "pos_embed_max_size": 7,
}
SMALL = {
    "sd3": TINY,
    "large": {**TINY, "num_layers": 3, "qk_norm": "rms_norm"},
    # two runs of more than one layer, and the last one
    "medium": {**TINY, "num_layers": 5, "qk_norm": "rms_norm", "dual_attention_layers": [0, 1]},
    # a layer with dual attention between others, and a last one; other channels out than in
    "mixed": {**TINY, "num_layers": 3, "dual_attention_layers": [1, 2], "in_channels": 3, "out_channels": 5},
}


@functools.cache
def reference(name):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    module = randomise(diffusers.SD3Transformer2DModel.from_config(SMALL[name]))
    # Published tables are not what the constructor computes.
    module.pos_embed.pos_embed += 0.1 * torch.randn(module.pos_embed.pos_embed.shape)
    return module


@functools.cache
def network(name, remat="none", dtype=jnp.float32):
    config = SD3Transformer2DConfig.from_dict(SMALL[name])
    module = mapping.abstract(lambda: SD3Transformer2DModel(config, remat=remat, dtype=dtype, rngs=nnx.Rngs(0)))
    return functional(module, tensors_of(reference(name)))


def whole(name):
    return nnx.merge(*network(name))


def inputs(name, height=8, width=8, batch=2):
    """(sample, timesteps, encoded prompts, pooled prompts); the timesteps are no whole numbers."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape, dtype=np.float32)  # noqa: E731
    sample = draw(batch, height, width, SMALL[name]["in_channels"])
    return sample, np.array([8.928_572, 857.69], np.float32)[:batch], draw(batch, 5, 20), draw(batch, 12)


def apply_reference(name, sample, timesteps, text, pooled, **options):
    """Returns (velocity, [(image tokens, text tokens) after each block])."""
    import torch

    blocks, module = [], reference(name)
    hooks = [block.register_forward_hook(lambda *call: blocks.append(call[-1])) for block in module.transformer_blocks]
    image = sample if isinstance(sample, torch.Tensor) else to_torch_image(sample)
    timesteps, text, pooled = (torch.from_numpy(x) for x in (timesteps, text, pooled))
    out = module(image, text, pooled, timesteps, **options).sample
    for hook in hooks:
        hook.remove()
    return out, [(x, text) for text, x in blocks]


def one_by_one(module, sample, timesteps, text, pooled):
    """Image and text tokens after each block, by the module's own blocks without a scan."""
    time = jax.nn.silu(module.time_text_embed(timesteps, pooled))
    x, text, found = module.pos_embed(sample), module.context_embedder(text), []
    for run in module.transformer_blocks:
        layout, state = nnx.split(run)
        for index in range(run.stacked):
            layer = nnx.merge(layout, jax.tree.map(lambda leaf, index=index: leaf[index], state))
            x, text = layer(x, text, time)
            found.append((x, text))
    return found


@pytest.mark.parametrize("size", [(8, 8), (4, 14)], ids=["square", "wide"])
@pytest.mark.parametrize("name", SMALL)
def test_every_block_and_the_velocity_agree_with_diffusers(name, size):
    """Within 2e-5 of the largest entry; a wide image takes other rows and columns of the position table."""
    import torch

    given = inputs(name, *size)
    with torch.no_grad():
        expected, of_blocks = apply_reference(name, *given)
    module = whole(name)
    found = jax.jit(one_by_one)(module, *given)
    assert len(found) == len(of_blocks) == SMALL[name]["num_layers"]
    for (x, text), (torch_x, torch_text) in zip(found, of_blocks):
        assert relative_error(x, torch_x) < 2e-5
        assert torch_text is None or relative_error(text, torch_text) < 2e-5
    actual = jax.jit(lambda module: module(*given))(module)
    assert actual.dtype == jnp.float32
    assert relative_error(actual, from_torch_image(expected)) < 2e-5


@pytest.mark.parametrize("name", SMALL)
def test_gradients_agree_with_diffusers(name):
    """By all weights and by the latents; the position table, a buffer there, has none here either."""
    sample, *conditions = inputs(name, 6, 8)
    module, image = reference(name), to_torch_image(sample).requires_grad_()
    module.zero_grad()
    apply_reference(name, image, *conditions)[0].sin().sum().backward()
    graphdef, params = network(name)

    def loss(params, sample):
        return jnp.sin(nnx.merge(graphdef, params)(sample, *conditions)).sum()

    of_params, of_sample = jax.jit(jax.grad(loss, (0, 1)))(params, sample)
    found = mapping.to_torch(whole(name), of_params)
    assert not found.pop(TABLE).any()
    # The last block's text queries cannot change the result.
    expected = {
        key: np.zeros(value.shape, np.float32) if value.grad is None else value.grad.numpy()
        for key, value in module.named_parameters()
    }
    assert worst_gradient_error(found, expected) < 1e-3
    assert relative_error(of_sample, from_torch_image(image.grad)) < 1e-4


@pytest.mark.parametrize("skipped", [[1], [0, 1], [2, 4]])
def test_skipped_layers_are_diffusers(skipped):
    import torch

    given = inputs("medium")
    with torch.no_grad():
        expected, _ = apply_reference("medium", *given, skip_layers=skipped)
        unskipped, _ = apply_reference("medium", *given)
    actual = jax.jit(lambda module: module(*given, skip_layers=skipped))(whole("medium"))
    assert relative_error(actual, from_torch_image(expected)) < 2e-5
    assert relative_error(actual, from_torch_image(unskipped)) > 1e-3


def test_remat_policy_checkpoints_what_it_names():
    """A call by run of equal layers: 3 runs, of which one has two attentions."""
    wanted = {"none": 0, "attention": 4, "blocks": 3, "full": 3, "offload": 2}
    given = inputs("medium")
    for policy in REMAT_POLICIES:
        graphdef, params = network("medium", remat=policy)
        assert count_checkpoints(lambda p, g=graphdef: nnx.merge(g, p)(*given), params) == wanted[policy]


def test_remat_changes_no_gradient_with_layers_skipped():
    given, gradients = inputs("medium"), []
    for policy in ("none", "blocks", "offload"):
        graphdef, params = network("medium", remat=policy)

        def loss(params, graphdef=graphdef):
            return jnp.square(nnx.merge(graphdef, params)(*given, skip_layers=(2,))).mean()

        gradients.append(mapping.to_torch(whole("medium"), jax.jit(jax.grad(loss))(params)))
    plain, *others = gradients
    assert not any(value.any() for key, value in plain.items() if key.startswith("transformer_blocks.2."))
    assert plain["transformer_blocks.3.attn.to_q.weight"].any()
    assert all(worst_gradient_error(other, plain) < 1e-5 for other in others)


def test_bfloat16_is_close_to_float32():
    given, outputs = inputs("medium"), []
    for dtype in (jnp.float32, jnp.bfloat16):
        graphdef, params = network("medium", dtype=dtype)
        outputs.append(jax.jit(lambda p, g=graphdef: nnx.merge(g, p)(*given))(params))
    assert outputs[1].dtype == jnp.float32
    assert 1e-5 < relative_error(outputs[1], outputs[0]) < 0.05


@pytest.mark.parametrize("name", SMALL)
def test_weights_survive_the_round_trip_to_the_bit(name):
    tensors, module = tensors_of(reference(name)), whole(name)
    back = mapping.to_torch(module, mapping.from_torch(module, tensors))
    assert TABLE in back and back.keys() == tensors.keys()
    assert all(back[key].tobytes() == tensors[key].tobytes() for key in tensors)


def test_a_new_position_table_is_diffusers():
    """Of a network that reads none; within 1e-5."""
    diffusers = pytest.importorskip("diffusers")
    expected = diffusers.SD3Transformer2DModel.from_config(TINY).pos_embed.pos_embed
    ours = SD3Transformer2DModel(SD3Transformer2DConfig.from_dict(TINY), rngs=nnx.Rngs(0)).pos_embed.position_table
    np.testing.assert_allclose(ours[...], expected, atol=1e-5)


def abstract(config):
    return components.abstract_network("SD3Transformer2DModel", config)


@pytest.mark.parametrize(
    ("config", "trained", "stored"),
    [
        (SD3_MEDIUM, 2_028_328_000, 2_084_951_104),
        (SD35_MEDIUM, 2_243_171_520, 2_469_663_936),
        (SD35_LARGE, 8_056_627_520, 8_146_280_768),
    ],
    ids=["sd3-medium", "sd3.5-medium", "sd3.5-large"],
)
def test_full_size_keys_and_shapes_are_diffusers_and_the_table_does_not_train(config, trained, stored):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        expected = diffusers.SD3Transformer2DModel.from_config(config)
    module = abstract(config)
    assert assert_same_layout(module, expected) == stored
    params = {"transformer": mapping.params_of(module)}
    mask = param_tree.trainable_mask(params, ["transformer"])
    trainable, frozen = param_tree.split(params, mask)
    assert sum(leaf.size for leaf in jax.tree.leaves(trainable)) == trained
    assert list(frozen["transformer"]) == ["pos_embed"] and list(frozen["transformer"]["pos_embed"]) == [
        "position_table"
    ]
    assert not any(jax.tree.leaves(param_tree.trainable_mask(params, ["transformer"], lora=True)))


@pytest.mark.parametrize(
    ("name", "config", "keys"), [("medium", SD35_MEDIUM, 909), ("large", SD35_LARGE, 1227)], ids=["medium", "large"]
)
def test_keys_and_shapes_are_those_of_the_published_checkpoints(name, config, keys):
    manifest = MANIFESTS / f"sd35_{name}_transformer.json"
    if not manifest.is_file():
        pytest.skip(f"needs the list of the checkpoint's keys, {manifest}")
    published = {key: tuple(shape) for key, shape in json.loads(manifest.read_text()).items()}
    assert len(published) == keys
    assert {key: leaf.torch_shape for key, leaf in mapping.torch_layout(abstract(config)).items()} == published


@pytest.mark.parametrize(
    ("config", "modules", "numbers"),
    [(SD35_MEDIUM, 191, 2_347_008), (SD35_LARGE, 303, 5_895_168)],
    ids=["medium", "large"],
)
def test_adapters_of_diffusers_script_have_its_layers(config, modules, numbers):
    """At rank 4, in the stacks of blocks; keys are numbered as in the checkpoint."""
    module = abstract(config)
    names = lora.attach(module, SCRIPT_TARGETS, rank=4, alpha=4)
    assert len(names) == modules
    layout = mapping.torch_layout(module, lora.LoRAParam)
    assert sum(np.prod(leaf.shape) for leaf in layout.values()) == numbers
    last = config["num_layers"] - 1
    assert f"transformer_blocks.{last}.attn.to_q.lora_A.weight" in layout
    assert f"transformer_blocks.{last}.attn.to_add_out.lora_A.weight" not in layout


@pytest.mark.parametrize("config", [SD3_MEDIUM, SD35_MEDIUM, SD35_LARGE, *SMALL.values()])
def test_config_goes_to_diffusers_and_back(config):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    parsed = SD3Transformer2DConfig.from_dict(config)
    with torch.device("meta"):
        saved = dict(diffusers.SD3Transformer2DModel.from_config(parsed.to_dict()).config)
    assert SD3Transformer2DConfig.from_dict(saved) == parsed
    assert {name: saved[name] for name in config} == config


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"qk_norm": "layer_norm"}, "qk_norm='layer_norm'"),
        ({"caption_projection_dim": 24}, "caption_projection_dim=24 should be .* 16"),
        ({"dual_attention_layers": [0, 2]}, "dual_attention_layers has 2, and num_layers=2"),
        ({"pos_embed_max_size": None}, "pos_embed_max_size=None"),
        ({"num_attention_heads": 1, "attention_head_dim": 18, "caption_projection_dim": 18}, "multiple of 4"),
        ({"force_zeros_for_pooled_projection": True}, "force_zeros_for_pooled_projection"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_config_refuses_what_is_not_implemented(changes, match):
    with pytest.raises(ValueError, match=match):
        SD3Transformer2DConfig.from_dict({**TINY, **changes})


def test_inputs_that_do_not_fit_are_refused():
    module = abstract(TINY)
    sample, timesteps, text, pooled = inputs("sd3")
    for match, given, options in (
        ("sample should be", (sample[..., :3], timesteps, text, pooled), {}),
        ("height of 7; it should be a multiple of patch_size=2", (sample[:, :7], timesteps, text, pooled), {}),
        ("width of 16.* at most 14", (np.tile(sample, (1, 1, 2, 1)), timesteps, text, pooled), {}),
        ("encoder_hidden_states should be", (sample, timesteps, text[:1], pooled), {}),
        ("pooled_projections should be", (sample, timesteps, text, pooled[:, :3]), {}),
        ("skip_layers has 2; the layers are 0 to 1", (sample, timesteps, text, pooled), {"skip_layers": [2]}),
    ):
        with pytest.raises(ValueError, match=match):
            jax.eval_shape(lambda given=given, options=options: module(*given, **options))


SHARDED = (
    CODE
    + """
from imagereward_jax.models.mmdit import SD3Transformer2DModel
from imagereward_jax.models.mmdit_config import SD3Transformer2DConfig

config = SD3Transformer2DConfig(
    sample_size=40, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=32, num_attention_heads=4,
    joint_attention_dim=192, caption_projection_dim=128, pooled_projection_dim=224, pos_embed_max_size=24,
    dual_attention_layers=(0, 1), qk_norm="rms_norm")
found, shardings = moved_by(
    lambda: SD3Transformer2DModel(config, remat="blocks", rngs=nnx.Rngs(0)), (40, 40, 4), (), (77, 192), (224,))
print(json.dumps({**found, "table": str(shardings["pos_embed"]["position_table"].spec)}))
"""
)


def test_weights_are_gathered_and_of_the_position_table_what_is_used_and_nothing_else_moves():
    """Over data 2 x fsdp 4. 400 patches of a table of 576: the devices sum the rows that each of them has."""
    found = child.run(SHARDED, devices=8)
    assert "fsdp" in found["table"]
    weights = {tuple(shape) for shape in found["weights"]} - {(1, 576, 128)}
    layers = {(1, *shape[1:]) for shape in weights} | {shape[1:] for shape in weights} | weights
    assert found["moved"]["all-gather"]
    for shape in found["moved"].pop("all-gather"):
        assert tuple(shape) in layers, shape
    assert set(found["moved"]) <= {"all-reduce", "reduce-scatter"}
    summed = [shape for shapes in found["moved"].values() for shape in shapes]
    assert [400, 128] in summed
    for shape in summed:  # gradients of weights: nothing with an axis of patches or tokens
        assert shape == [400, 128] or not {20, 40, 77, 400, 477, 576} & set(shape), shape
