"""The VAE against PyTorch diffusers on the same random weights, float32 unless said otherwise."""

import functools
import json
from pathlib import Path

import agreement
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from published_parts import VAE as SD1

from imagereward_jax.models import vae
from imagereward_jax.models.remat import REMAT_POLICIES
from imagereward_jax.models.vae import AutoencoderKL, AutoencoderKLConfig
from imagereward_jax.weights import mapping

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

# What diffusers saves today for SDXL.
SDXL = {
    **SD1,
    "force_upcast": True,
    "latents_mean": None,
    "latents_std": None,
    "mid_block_add_attention": True,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
    "shift_factor": None,
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}
SD3 = {
    **SDXL,
    "latent_channels": 16,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}
SMALL = {**SD1, "block_out_channels": [8, 16, 16], "layers_per_block": 1, "norm_num_groups": 4}
SMALL |= {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
SMALL_SD3 = {**SD3, **{name: SMALL[name] for name in SMALL if SMALL[name] != SD1.get(name)}}
MANIFEST = Path(__file__).parents[3] / "shared/manifests/sd3_vae.json"


@functools.cache
def reference(sd3=False):
    torch.manual_seed(0)
    return agreement.randomise(diffusers.AutoencoderKL.from_config(SMALL_SD3 if sd3 else SMALL))


@functools.cache
def network(remat="none", dtype=jnp.float32, sd3=False):
    config = AutoencoderKLConfig.from_dict(SMALL_SD3 if sd3 else SMALL)
    module = mapping.abstract(lambda: AutoencoderKL(config, remat=remat, dtype=dtype, rngs=nnx.Rngs(0)))
    return agreement.functional(module, agreement.tensors_of(reference(sd3)))


def images(height=20, width=12):
    return np.random.default_rng(0).uniform(-1, 1, (2, height, width, 3)).astype(np.float32)


def loss_function(graphdef):
    """A scalar of encoder and decoder whose gradient reaches every parameter."""

    def loss(params, pixels):
        network = nnx.merge(graphdef, params)
        mean, logvar = network.encode(pixels)
        decoded = network.decode(mean)
        return jnp.sin(decoded).sum() + jnp.sin(logvar).sum(), (mean, logvar, decoded)

    return loss


@pytest.mark.parametrize("sd3", [False, True], ids=["four channels", "sixteen channels of SD 3"])
def test_outputs_and_gradients_agree_with_diffusers(sd3):
    module, pixels = reference(sd3), agreement.to_torch_image(images()).requires_grad_()
    moments = module.encode(pixels).latent_dist
    decoded = module.decode(moments.mean).sample
    module.zero_grad()
    (decoded.sin().sum() + moments.logvar.sin().sum()).backward()
    graphdef, params = network(sd3=sd3)
    (_, outputs), (of_params, of_images) = jax.jit(jax.value_and_grad(loss_function(graphdef), (0, 1), has_aux=True))(
        params, images()
    )
    for actual, expected in zip(outputs, (moments.mean, moments.logvar, decoded)):
        assert actual.dtype == jnp.float32
        assert agreement.relative_error(actual, agreement.from_torch_image(expected)) < 2e-5
    assert agreement.relative_error(of_images, agreement.from_torch_image(pixels.grad)) < 1e-4
    expected = {key: value.grad.numpy() for key, value in module.named_parameters()}
    assert agreement.worst_gradient_error(mapping.to_torch(nnx.merge(graphdef, params), of_params), expected) < 1e-3


def test_odd_image_sizes_agree_with_diffusers():
    pixels = images(21, 15)
    with torch.no_grad():
        expected = reference().encode(agreement.to_torch_image(pixels)).latent_dist.mean
    graphdef, params = network()
    mean, _ = jax.jit(lambda p: nnx.merge(graphdef, p).encode(pixels))(params)
    assert mean.shape == (2, 5, 3, 4)
    assert agreement.relative_error(mean, agreement.from_torch_image(expected)) < 2e-5


def test_log_variance_is_clipped_as_in_diffusers():
    graphdef, params = network()
    bias = np.array([0, 0, 0, 0, -1000, 1000, 5, 0], np.float32)
    params = {**params, "quant_conv": {**params["quant_conv"], "bias": bias}}
    _, logvar = jax.jit(lambda p: nnx.merge(graphdef, p).encode(images()))(params)
    assert (np.asarray(logvar[..., 0]) == -30).all()
    assert (np.asarray(logvar[..., 1]) == 20).all()


def test_remat_policy_checkpoints_what_it_names():
    # Encoder 3 + 2, decoder 6 + 2 residual blocks; two attentions; four resamplers; the last layers
    # of both. Whole blocks: 3 + 1 each. "offload" does without jax.checkpoint.
    wanted = {"none": 0, "attention": 2, "blocks": 13 + 2 + 4 + 2, "full": 8 + 13 + 2 + 4 + 2, "offload": 0}
    for policy in REMAT_POLICIES:
        graphdef, params = network(policy)
        assert agreement.count_checkpoints(loss_function(graphdef), params, images()) == wanted[policy]


def test_unknown_remat_policy_lists_the_choices():
    with pytest.raises(ValueError, match=r"'some'.*none, blocks, attention, full"):
        AutoencoderKL(AutoencoderKLConfig.from_dict(SMALL), remat="some", rngs=nnx.Rngs(0))


def test_bfloat16_is_close_to_float32():
    decoded = []
    latents = np.random.default_rng(0).standard_normal((1, 5, 3, 4), dtype=np.float32)
    for dtype in (jnp.float32, jnp.bfloat16):
        graphdef, params = network(dtype=dtype)
        decoded.append(jax.jit(lambda p, g=graphdef: nnx.merge(g, p).decode(latents))(params))
    assert decoded[1].dtype == jnp.float32
    assert decoded[1].shape == (1, 20, 12, 3)
    assert 1e-5 < agreement.relative_error(decoded[1], decoded[0]) < 0.05


@pytest.mark.parametrize("sd3", [False, True])
def test_weights_survive_the_round_trip_to_the_bit(sd3):
    tensors, module = agreement.tensors_of(reference(sd3)), nnx.merge(*network(sd3=sd3))
    assert sd3 != ("quant_conv.weight" in tensors)
    back = mapping.to_torch(module, mapping.from_torch(module, tensors))
    assert back.keys() == tensors.keys()
    assert all(back[key].tobytes() == tensors[key].tobytes() for key in tensors)


def abstract(config):
    return mapping.abstract(lambda: AutoencoderKL(AutoencoderKLConfig.from_dict(config), rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(("config", "count"), [(SD1, 83_653_863), (SD3, 83_819_683)], ids=["sd1", "sd3"])
def test_full_size_keys_and_shapes_are_diffusers(config, count):
    with torch.device("meta"):
        expected = diffusers.AutoencoderKL.from_config(config)
    assert agreement.assert_same_layout(abstract(config), expected) == count


@pytest.mark.skipif(not MANIFEST.is_file(), reason="the published keys are not beside the repository")
def test_full_size_keys_and_shapes_of_sd3_are_the_published_ones():
    published = {key: tuple(shape) for key, shape in json.loads(MANIFEST.read_text()).items()}
    assert {key: leaf.torch_shape for key, leaf in mapping.torch_layout(abstract(vae.SD3)).items()} == published


def test_sizes_of_sd3_are_the_published_ones():
    assert AutoencoderKLConfig.from_dict(vae.SD3) == AutoencoderKLConfig.from_dict(SD3)


@pytest.mark.parametrize("config", [SD1, SDXL, SD3, SMALL], ids=["sd1", "sdxl", "sd3", "small"])
def test_config_goes_to_diffusers_and_back(config):
    with torch.device("meta"):
        saved = diffusers.AutoencoderKL.from_config(config).config
        parsed = AutoencoderKLConfig.from_dict(config)
        again = diffusers.AutoencoderKL.from_config(parsed.to_dict()).config
    assert AutoencoderKLConfig.from_dict(dict(saved)) == parsed
    names = [name for name in saved if not name.startswith("_")]
    assert [saved[name] for name in names] == [again[name] for name in names]
    assert parsed.downsampling == 2 ** (len(config["block_out_channels"]) - 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"down_block_types": ["DownEncoderBlock2D"] * 3 + ["AttnDownEncoderBlock2D"]},
        {"up_block_types": ["UpDecoderBlock2D"] * 3},
        {"use_quant_conv": 1},
        {"mid_block_add_attention": False},
        {"latents_mean": [0.0, 0.0, 0.0, 0.0]},
        {"act_fn": "relu"},
        {"block_out_channels": []},
        {"layers_per_block": 0},
        {"scaling_factor": 0},
        {"some_new_field": 3},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_config_refuses_what_is_not_implemented(changes):
    name = next(iter(changes))
    with pytest.raises(ValueError, match=name):
        AutoencoderKLConfig.from_dict({**SD1, **changes})


def test_inputs_that_do_not_fit_are_refused():
    model = nnx.merge(*network())
    with pytest.raises(ValueError, match="images should be"):
        model.encode(np.zeros((2, 16, 16, 4), np.float32))
    with pytest.raises(ValueError, match="latents should be"):
        model.decode(np.zeros((2, 4, 4, 3), np.float32))
