"""A method in a file of the user's own: trained by the command, resumed after a kill, planned."""

import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny_sd1

for package in ("orbax.checkpoint", "grain", "ml_collections"):
    pytest.importorskip(package)

from imagereward_jax import plan
from imagereward_jax.train import main
from imagereward_jax.training.metric_writers import read_rows
from imagereward_jax.weights.files import read_tensors

METHOD = '''"""A denoising loss that weighs large errors more and stays near the weights that it began with."""

import jax
import jax.numpy as jnp

from imagereward_jax.config import field, require_given
from imagereward_jax.methods.base import Method, MethodConfig, Phase


class Config(MethodConfig):
    """config.method of this method."""

    uses = ("pairs",)

    sharpness: float = field(1.0, at_least=0.0)
    pull: float = field(0.1, at_least=0.0)

    def check(self, config):
        require_given(config, "data.pairs")


def make(config, parts):
    pipeline = parts.pipeline

    def loss(models, batch, key):
        keys = jax.random.split(key, 3)
        latents = pipeline.encode(models.policy, batch["image"], keys[0])
        noise = jax.random.normal(keys[1], latents.shape)
        timesteps = jax.random.randint(keys[2], latents.shape[:1], 0, pipeline.schedule.num_train_timesteps)
        noisy = pipeline.schedule.add_noise(latents, noise, timesteps)
        both = (models.policy, models.reference)
        output, start = (pipeline.denoise(weights, noisy, timesteps, batch["cond"]) for weights in both)
        errors = jnp.square(output - noise).mean((1, 2, 3))
        weights = jax.lax.stop_gradient(jax.nn.softmax(config.sharpness * errors))
        moved = jnp.square(output - start).mean()
        return jnp.sum(weights * errors) + config.pull * moved, {"mse": errors.mean(), "moved": moved}

    return Method((Phase("sharp", loss, parts.pairs()),), trains=(pipeline.denoiser,), reference=True)
'''
RECIPE = '''"""A recipe of a method of my own."""

from imagereward_jax.recipes import default_config


def get_config():
    config = default_config("my_package.sharp")
    config.steps, config.batch_size, config.log_every, config.writers = 6, 2, 1, ("jsonl",)
    config.model.path, config.data.pairs, config.data.image_size = "model", "shapes:train", 16
    config.optimizer.learning_rate, config.checkpoint.every, config.eval.every = 1e-3, 2, 6
    return config
'''
KILLED = """
import os, signal, sys
from imagereward_jax.training import loop
save = loop._Loop._save
def save_and_die(self, *args, **options):
    save(self, *args, **options)
    if self.step == 4:
        self.manager.wait()
        os.kill(os.getpid(), signal.SIGKILL)
loop._Loop._save = save_and_die
from imagereward_jax.train import main
main(sys.argv)
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder as a user has it: a package with the method, a recipe and a model."""
    folder = tmp_path_factory.mktemp("project")
    tiny_sd1.save_one_level(folder)
    (folder / "my_package").mkdir()
    (folder / "my_package/__init__.py").touch()
    (folder / "my_package/sharp.py").write_text(METHOD)
    (folder / "recipe.py").write_text(RECIPE)
    return folder


def losses(workdir):
    rows = read_rows(workdir / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name.startswith("sharp/")} for row in rows]


def test_it_is_short():
    assert len(METHOD.splitlines()) < 40


def test_it_trains_and_resumes_bit_for_bit(here, project):
    """Killed after step 4 in a process of its own, and finished by the command: metrics and weights of a whole run."""
    whole, killed = project / "runs/whole", project / "runs/killed"
    assert main(["train", "--config=recipe.py", f"--workdir={whole}"]) == 0
    command = [sys.executable, "-c", KILLED, "--config=recipe.py", f"--workdir={killed}"]
    done = subprocess.run(
        command, cwd=project, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert main(["train", "--config=recipe.py", f"--workdir={killed}"]) == 0
    assert losses(killed) == losses(whole) and len(losses(whole)) == 6
    assert losses(whole)[0]["sharp/moved"] < 1e-10 < losses(whole)[-1]["sharp/moved"]
    file = "export/unet/diffusion_pytorch_model.safetensors"
    tensors, others = read_tensors(whole / file), read_tensors(killed / file)
    assert tensors.keys() == others.keys()
    for name in tensors:
        np.testing.assert_array_equal(tensors[name], others[name])


def test_it_is_planned(here, capsys, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert plan.main(["--config=recipe.py", f"--topology=cpu:{len(jax.devices())}", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["fits"] and figures["trainable_parameters"] > 10_000
    assert figures["bytes_per_chip"]["frozen"] > 4 * figures["trainable_parameters"]  # the reference is among them


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("refll", r"config.method.name='refll': expected one of .*refl.*did you mean 'refl'"),
        ("my_package.absent", r"config.method.name='my_package.absent': expected one of"),
        ("json", r"config.method.name='json': expected one of"),
        ("os.path", r"config.method.name='os.path': os.path is not a method: it has no Config and no make"),
    ],
)
def test_what_is_no_method_is_refused(here, name, message, capsys):
    assert main(["train", "--config=recipe.py", f"--config.method.name={name}"]) == 2
    import re

    assert re.search(message, capsys.readouterr().err)


def test_a_field_misspelt_in_the_file_is_refused_with_its_neighbour(here, project, capsys):
    """Not stored beside the real one and trained to the end; the same in a section of the method's own."""
    for line, message in (
        ("config.optimizer.learning_rat = 3.0", "config.optimizer.learning_rat is not a field of this method (did you"),
        (
            "config.method.sharpnes = 3.0",
            "config.method.sharpnes is not a field of this method (did you mean 'sharpness'?)",
        ),
        ("config.stepz = 3", "config.stepz is not a field of this method (did you mean 'steps'?)"),
        ("del config.optimizer.b1", "config.optimizer.b1 is missing"),
    ):
        (project / "typo.py").write_text(RECIPE.replace("    return config", f"    {line}\n    return config"))
        assert main(["train", "--config=typo.py", f"--workdir={project / 'runs/typo'}"]) == 2
        assert message in capsys.readouterr().err
        assert not (project / "runs/typo").exists()
