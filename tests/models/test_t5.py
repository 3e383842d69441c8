"""T5's encoder against PyTorch transformers on the same random weights, float32 unless said otherwise."""

import functools
import json
from pathlib import Path

import agreement
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from published_parts import T5 as PUBLISHED

from imagereward_jax.models.t5 import XXL, T5Config, T5EncoderModel, relative_buckets
from imagereward_jax.weights import mapping

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

MANIFEST = Path(__file__).parents[3] / "shared/manifests/t5_v1_1_xxl_encoder.json"
TINY = {**PUBLISHED, "d_model": 32, "d_kv": 6, "d_ff": 40, "num_layers": 3, "num_heads": 4, "vocab_size": 60}


@functools.cache
def reference():
    torch.manual_seed(0)
    model = transformers.T5EncoderModel(transformers.T5Config(**TINY))
    with torch.no_grad():  # transformers draws it so small that mistakes would not show
        table = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
        table.copy_(torch.randn(table.shape))
    return agreement.randomise(model)


def tensors():
    """As files hold them: the embedding once."""
    found = agreement.tensors_of(reference())
    return {key: value for key, value in found.items() if key != "encoder.embed_tokens.weight"}


def build(config=TINY, dtype=jnp.float32):
    return mapping.abstract(lambda: T5EncoderModel(T5Config.from_dict(config), dtype=dtype, rngs=nnx.Rngs(0)))


@functools.cache
def network(dtype=jnp.float32):
    return agreement.functional(build(dtype=dtype), tensors())


@functools.cache
def compiled(dtype=jnp.float32):
    graphdef, _ = network(dtype)
    return jax.jit(lambda params, ids, mask=None: nnx.merge(graphdef, params)(ids, mask))


def prompts(length):
    """(ids, mask) of a long and a short prompt: words, the end (1) and padding (0)."""
    ids = np.random.default_rng(length).integers(3, 60, (2, length)).astype(np.int32)
    ids[0, -1] = 1
    ids[1, 5:] = 0
    ids[1, 5] = 1
    mask = np.ones_like(ids)
    mask[1, 6:] = 0
    return ids, mask


@pytest.mark.parametrize("length", [77, 256])
@pytest.mark.parametrize("masked", [False, True])
def test_outputs_agree_with_transformers(length, masked):
    """Padding attended to, as in Stable Diffusion 3, and masked."""
    ids, mask = prompts(length)
    given = torch.from_numpy(mask) if masked else None
    with torch.no_grad():
        expected = reference()(input_ids=torch.from_numpy(ids).long(), attention_mask=given).last_hidden_state
    actual = compiled()(network()[1], ids, mask if masked else None)
    assert agreement.relative_error(actual, expected) < 1e-5


def test_a_mask_changes_every_token_of_a_padded_prompt_alone():
    ids, mask = prompts(77)
    plain, masked = (np.asarray(compiled()(network()[1], ids, given)) for given in (None, mask))
    np.testing.assert_allclose(plain[0], masked[0], atol=1e-5)
    assert (np.abs(plain[1] - masked[1]).max(-1) > 1e-3).all()


@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (32, 1000), (8, 20), (4, 2)])
def test_buckets_are_those_of_transformers(buckets, distance):
    """All distances up to 2047, both signs; exact."""
    length = 2048
    ends = torch.tensor([0, length - 1])
    expected = transformers.models.t5.modeling_t5.T5Attention._relative_position_bucket(
        torch.arange(length)[None] - ends[:, None], num_buckets=buckets, max_distance=distance
    )
    actual = relative_buckets(length, buckets, distance)[[0, -1]]
    assert actual.dtype == np.int32
    np.testing.assert_array_equal(actual, expected)


def test_gradients_agree_with_transformers():
    ids, mask = prompts(20)
    module = reference()
    module.zero_grad()
    module(torch.from_numpy(ids).long(), attention_mask=torch.from_numpy(mask)).last_hidden_state.sin().sum().backward()
    graphdef, params = network()
    gradients = jax.jit(jax.grad(lambda p: jnp.sin(nnx.merge(graphdef, p)(ids, mask)).sum()))(params)
    expected = {key: value.grad.numpy() for key, value in module.named_parameters()}
    assert agreement.worst_gradient_error(mapping.to_torch(build(), gradients), expected) < 1e-4


def test_bfloat16_is_close_to_float32():
    ids, _ = prompts(77)
    exact, rounded = (compiled(dtype)(network(dtype)[1], ids) for dtype in (jnp.float32, jnp.bfloat16))
    assert rounded.dtype == jnp.bfloat16
    assert 1e-5 < agreement.relative_error(rounded, exact) < 0.05


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_a_feed_forward_beyond_float16_stays_finite(dtype):
    """The first one adds some 1e6; those of T5-XXL pass 65,504 too."""
    wo = "encoder.block.0.layer.1.DenseReluDense.wo.weight"
    params = mapping.from_torch(build(), {**tensors(), wo: 3e6 * tensors()[wo]})
    ids, _ = prompts(77)
    exact, rounded = (compiled(kind)(params, ids) for kind in (jnp.float32, dtype))
    assert rounded.dtype == dtype
    assert agreement.relative_error(rounded, exact) < 0.05


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_the_sum_over_the_layers_is_float32(dtype):
    graphdef, params = network(dtype)
    program = jax.make_jaxpr(lambda p: nnx.merge(graphdef, p)(prompts(20)[0]))(params)
    (scan,) = (equation for equation in program.eqns if equation.primitive.name == "scan")
    assert [(carry.aval.shape, carry.aval.dtype) for carry in scan.outvars] == [((2, 20, 32), jnp.float32)]


def test_weights_survive_the_round_trip_to_the_bit():
    module, expected = build(), tensors()
    back = mapping.to_torch(module, mapping.from_torch(module, expected))
    assert back.keys() == expected.keys()
    assert all(back[key].tobytes() == expected[key].tobytes() for key in expected)


def test_full_size_keys_and_shapes_are_transformers():
    with torch.device("meta"):
        expected = transformers.T5EncoderModel(transformers.T5Config(**PUBLISHED))
    theirs = {name: tuple(value.shape) for name, value in expected.named_parameters()}
    ours = {key: leaf.torch_shape for key, leaf in mapping.torch_layout(build(PUBLISHED)).items()}
    assert ours == theirs
    assert len(ours) == 219
    assert sum(int(np.prod(shape)) for shape in ours.values()) == 4_762_310_656


@pytest.mark.skipif(not MANIFEST.is_file(), reason="the published keys are not beside the repository")
def test_full_size_keys_and_shapes_are_the_published_ones():
    published = {key: tuple(shape) for key, shape in json.loads(MANIFEST.read_text()).items()}
    published.pop("encoder.embed_tokens.weight", None)
    assert {key: leaf.torch_shape for key, leaf in mapping.torch_layout(build(XXL)).items()} == published


def test_random_weights_have_the_spread_of_transformers():
    """Standard deviations within a fifth of those that transformers draws: the smallest tensor has 128 numbers."""
    torch.manual_seed(0)
    theirs = agreement.tensors_of(transformers.T5EncoderModel(transformers.T5Config(**TINY)))
    theirs.pop("encoder.embed_tokens.weight")
    module = T5EncoderModel(T5Config.from_dict(TINY), rngs=nnx.Rngs(0))
    ours = mapping.to_torch(module, mapping.params_of(module))
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert value.std() == pytest.approx(theirs[key].std(), rel=0.2), key


@pytest.mark.parametrize("config", [PUBLISHED, TINY])
def test_config_goes_to_transformers_and_back(config):
    parsed = T5Config.from_dict(config)
    saved = transformers.T5Config.from_dict(parsed.to_dict())
    assert T5Config.from_dict(saved.to_dict()) == parsed
    assert T5Config.from_dict(parsed.to_dict()) == parsed
    for name in ("d_model", "d_kv", "num_layers", "feed_forward_proj", "dense_act_fn", "layer_norm_epsilon"):
        assert getattr(saved, name) == config[name]
    assert T5Config.from_dict(XXL) == T5Config.from_dict(PUBLISHED)


@pytest.mark.parametrize(
    "changes",
    [
        {"feed_forward_proj": "relu"},
        {"dense_act_fn": "relu"},
        {"is_decoder": True},
        {"model_type": "umt5"},
        {"architectures": ["T5ForConditionalGeneration"]},
        {"num_heads": 0},
        {"relative_attention_num_buckets": 30},
        {"relative_attention_max_distance": 8},
        {"some_new_field": 3},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_config_refuses_what_is_not_implemented(changes):
    name = next(iter(changes))
    with pytest.raises(ValueError, match=name):
        T5Config.from_dict({**PUBLISHED, **changes})


def test_the_original_t5_is_refused():
    """Its config.json states no feed-forward, which means "relu"."""
    with pytest.raises(ValueError, match="feed_forward_proj='relu'"):
        T5Config.from_dict({key: value for key, value in PUBLISHED.items() if key != "feed_forward_proj"})


def test_inputs_that_do_not_fit_are_refused():
    model = nnx.merge(*network())
    ids, mask = prompts(20)
    for wrong in (ids[0], ids.astype(np.float32)):
        with pytest.raises(ValueError, match="input_ids should be"):
            model(wrong)
    with pytest.raises(ValueError, match="mask should be"):
        model(ids, mask[:, 1:])
