"""DreamBooth: the loss with prior preservation against diffusers' formula in PyTorch, and the class images."""

import jax
import numpy as np
import pytest
import tiny_sd1
import tiny_sd3
import tiny_sdxl
from PIL import Image

for package in ("orbax.checkpoint", "grain", "ml_collections"):
    pytest.importorskip(package)

from imagereward_jax.assembly.parts import Parts
from imagereward_jax.assembly.run import assemble
from imagereward_jax.config import ConfigError
from imagereward_jax.methods import dreambooth
from imagereward_jax.methods.base import Models
from imagereward_jax.methods.denoising import USUAL, draw_share
from imagereward_jax.models.param_tree import join
from imagereward_jax.pipelines import open_pipeline
from imagereward_jax.recipes import default_config, validate
from imagereward_jax.training.mesh import make_mesh
from imagereward_jax.training.program import TrainingProgram
from imagereward_jax.training.workdir import check_workdir
from imagereward_jax.weights import mapping

WEIGHT = 0.7


def test_loss_and_gradient_are_those_of_diffusers_script(tmp_path):
    """Two instances and two class images on a Stable Diffusion 3: the loss within 1e-4, every gradient of the
    transformer within 1e-3 of its largest entry, as train_dreambooth_sd3.py computes them."""
    torch = pytest.importorskip("torch", reason="the reference is PyTorch diffusers")
    diffusers = pytest.importorskip("diffusers", reason="the reference is PyTorch diffusers")
    from sd3_reference import clean_predictions

    pipeline = open_pipeline(tiny_sd3.save_small(tmp_path))
    params, key = pipeline.load_params(), jax.random.key(4)
    encode = jax.jit(pipeline.encode_prompts)
    images = np.random.default_rng(0).random((2, 2, 8, 8, 3), np.float32)
    batch = {
        name: {"image": some, "cond": encode(params, pipeline.tokenize([prompt] * 2))}
        for name, some, prompt in zip(("instance", "class"), images, ("a red circle", "a circle"))
    }
    loss = dreambooth.make_loss(pipeline, WEIGHT)

    @jax.jit
    def function(transformer):
        return jax.value_and_grad(lambda t: loss(Models(join(params, {"transformer": t})), batch, key), has_aux=True)(
            transformer
        )

    (value, metrics), gradient = function(params["transformer"])

    # The draws of rows that are an instance and a class image in turn, put in the order of the script.
    encode_key, noise_key, time_key = jax.random.split(key, 3)
    in_turn = images.swapaxes(0, 1).reshape(4, 8, 8, 3)
    latents = jax.jit(pipeline.encode)(params, in_turn, encode_key)
    noise = jax.random.normal(noise_key, latents.shape)
    order = np.array([0, 2, 1, 3])
    latents, noise, share = (np.array(rows)[order] for rows in (latents, noise, draw_share(time_key, 4, USUAL)))
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(tmp_path / "model")
    embeds = [
        np.concatenate([batch[name]["cond"][kind] for name in batch])
        for kind in ("prompt_embeds", "pooled_prompt_embeds")
    ]
    prediction, latents, sigmas = clean_predictions(pipe, latents, noise, share, embeds)
    (instances, classes), (target, target_prior) = torch.chunk(prediction, 2), torch.chunk(latents, 2)
    instance_loss = torch.mean(((instances - target) ** 2).reshape(2, -1), 1).mean()
    prior_loss = torch.mean(((classes - target_prior) ** 2).reshape(2, -1), 1).mean()
    expected = instance_loss + WEIGHT * prior_loss
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-4)
    velocity = ((instances - target) / sigmas[:2]).square().mean().item()
    np.testing.assert_allclose(metrics["mse"], velocity, rtol=1e-4)
    ours = mapping.to_torch(pipeline.networks["transformer"], gradient)
    for name, weight in pipe.transformer.named_parameters():
        grad = np.zeros(weight.shape) if weight.grad is None else weight.grad.numpy()
        np.testing.assert_allclose(ours[name], grad, rtol=0, atol=1e-3 * max(np.abs(grad).max(), 1e-6), err_msg=name)


def config_of(folder, **changes):
    config = default_config("dreambooth")
    fields = {"batch_size": 2, "model.path": str(folder / "model"), "data.image_size": 8, "eval.batch_size": 2}
    fields |= {"data.pairs": str(folder / "instances"), "method.class_prompt": "a circle"}
    fields |= {"method.instance_prompt": "a red circle", "method.num_class_images": 3}
    config.update_from_flattened_dict(fields | {name.replace("__", "."): value for name, value in changes.items()})
    return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model beside three images without captions."""
    folder, rng = tmp_path_factory.mktemp("dreambooth"), np.random.default_rng(0)
    tiny_sd1.save_one_level(folder)
    (folder / "instances").mkdir()
    for index in range(3):
        Image.fromarray(rng.integers(0, 256, (9, 8, 3), dtype=np.uint8)).save(folder / f"instances/{index}.png")
    return folder


def parts_of(config):
    return Parts(config, make_mesh(1, 1, jax.devices()[:1]))


def test_class_images_are_made_once_and_never_replaced(folder, tmp_path, capsys):
    """Of four, one of the user's own counts; one that is lost is made again to the bit, the others are not touched.
    The batches that follow are of the class prompt and the instance prompt."""
    classes = tmp_path / "classes"
    classes.mkdir()
    Image.new("RGB", (8, 8), "red").save(classes / "mine.jpg")
    config = config_of(folder, method__class_images=str(classes), method__num_class_images=4)

    def make():
        batch = next(
            dreambooth.make(config_section(config), parts_of(config)).phases[0].source.batches(None, jax.random.key(0))
        )
        return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in classes.iterdir()}, batch

    first, batch = make()
    assert sorted(first) == ["class_00000.png", "class_00001.png", "class_00002.png", "mine.jpg"]
    assert batch["instance"]["host"]["prompt"] == ["a red circle"] * 2
    assert batch["class"]["host"]["prompt"] == ["a circle"] * 2
    assert "1 class images of 4, making 3" in capsys.readouterr().err
    (classes / "class_00001.png").unlink()
    second, _ = make()
    assert {name: data for name, (data, _) in second.items()} == {name: data for name, (data, _) in first.items()}
    changed = [name for name in first if second[name][1] != first[name][1]]
    assert changed == ["class_00001.png"]
    assert len({data for data, _ in first.values()}) == 4
    assert make()[0] == second
    assert "making" not in capsys.readouterr().err.replace("making 1", "")


def test_class_images_of_several_prompts_keep_each_its_own(folder, tmp_path):
    """In turn, in a .txt beside each, also when one is made again; one of the user's own brings its caption."""
    (tmp_path / "prompts.txt").write_text("a circle\na cross\n")
    classes = tmp_path / "classes"
    changes = {"class_prompt": "", "class_prompts": str(tmp_path / "prompts.txt"), "class_images": str(classes)}
    config = config_of(folder, **{f"method__{name}": value for name, value in changes.items()})
    classes.mkdir()
    Image.new("RGB", (8, 8), "red").save(classes / "a.png")
    (classes / "a.txt").write_text("a red square")

    def batches(number):
        source = dreambooth.make(config_section(config), parts_of(config)).phases[0].source
        found = source.batches(None, jax.random.key(0))
        return [prompt for _ in range(number) for prompt in next(found)["class"]["host"]["prompt"]]

    assert set(batches(3)) == {"a red square", "a circle", "a cross"}
    captions = {path.name: path.read_text() for path in classes.glob("class*.txt")}
    assert captions == {"class_00000.txt": "a circle\n", "class_00001.txt": "a cross\n"}
    (classes / "class_00001.png").unlink()
    batches(1)
    assert (classes / "class_00001.png").is_file()
    assert {path.name: path.read_text() for path in classes.glob("class*.txt")} == captions


def config_section(config):
    validate(config)
    return dreambooth.Config.read(config.method)


def test_a_workdir_with_class_images_alone_is_a_runs(folder, tmp_path):
    """A run that was killed while it made them continues there; with anything else beside them it is refused."""
    (tmp_path / "run/class_images").mkdir(parents=True)
    check_workdir(tmp_path / "run", config_of(folder))
    (tmp_path / "run/notes.txt").touch()
    with pytest.raises(ValueError, match="is not the workdir of a run"):
        check_workdir(tmp_path / "run", config_of(folder))


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("make", [tiny_sd1.make_one_level, tiny_sdxl.make], ids=["sd1", "sdxl"])
def test_a_step_of_the_other_families_is_traced(folder, tmp_path, make, rank):
    """Full and adapters; from one prompt each, with both text encoders training in full."""
    pipeline, params = make(tmp_path / "tokenizers")
    pipeline.save(tmp_path / "model", params)
    changes = {"model__path": str(tmp_path / "model"), "lora__rank": rank, "data__image_size": 16}
    config = config_of(folder, **changes, method__train_text_encoder=not rank, method__snr_gamma=5.0)
    validate(config)
    mesh = make_mesh(1, 1, jax.devices()[:1])
    run = assemble(config, mesh, abstract=True)
    assert run.trainable.keys() == {"unet", *(() if rank else pipeline.text_encoders)}
    state, metrics = TrainingProgram(config, run, mesh).trace(run, "cpu").out_info
    assert jax.tree.structure(state.params) == jax.tree.structure(run.trainable)
    assert {"dreambooth/loss", "dreambooth/mse", "dreambooth/class_mse"} <= metrics.keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method__class_prompt": "", "method__class_images": "x"}, "class_images='x' has no effect without"),
        ({"method__class_images": "FOLDER/instances/classes"}, "one folder holds the other"),
        ({"method__class_images": "FOLDER"}, "one folder holds the other"),
        ({"method__class_prompts": "prompts.txt"}, "class_prompts='prompts.txt': give one"),
        ({"method__num_class_images": 0}, "num_class_images=0: expected at least 1"),
        ({"method__prior_weight": -1.0}, "prior_weight=-1.0: expected at least 0"),
        ({"data__pairs": ""}, "config.data.pairs is empty"),
    ],
)
def test_settings_that_cannot_work_are_refused(folder, changes, message):
    changes = {n: v.replace("FOLDER", str(folder)) if isinstance(v, str) else v for n, v in changes.items()}
    with pytest.raises(ConfigError, match=message):
        validate(config_of(folder, **changes))


def test_images_without_a_prompt_need_captions(folder, tmp_path):
    with pytest.raises(ValueError, match=r"no caption 0\.txt beside it"):
        parts_of(config_of(folder, method__instance_prompt="")).pairs(None)
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match=r"choose another config\.method\.class_images"):
        parts_of(config_of(folder)).class_images("a circle", 2, str(tmp_path / "file"))
