"""`Trainer`: objects from Python in place of what a config names, resumed bit for bit, saved and uploaded."""

import itertools
import json
import os
import signal
import threading

import jax
import numpy as np
import pytest
import tiny_sd1
from hub_stand_in import serve
from score_server import serving

for package in ("orbax.checkpoint", "grain", "ml_collections"):
    pytest.importorskip(package)

from ml_collections import FrozenConfigDict

import imagereward_jax as RM
from imagereward_jax.assembly.run import assemble
from imagereward_jax.config import ConfigError
from imagereward_jax.data.errors import DataError
from imagereward_jax.methods import ddpo, refl
from imagereward_jax.rewards.functions import PythonReward
from imagereward_jax.rewards.registry import open_reward
from imagereward_jax.training.interruptions import Interrupted
from imagereward_jax.training.mesh import make_mesh
from imagereward_jax.training.metric_writers import read_rows
from imagereward_jax.training.workdir import WorkdirError
from imagereward_jax.weights.files import read_tensors

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
HELD_OUT = ["a red cube", ("a blue ball", {"colour": "blue"})]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """A tiny model, opened from its folder: (pipeline, params)."""
    folder = tmp_path_factory.mktemp("model")
    tiny_sd1.save_one_level(folder)
    return RM.load_pipeline(folder / "model")


def redness(images, prompts):
    return images[..., 0].mean((1, 2)) / 255


class Counting:
    """A prompt function with a memory of its own."""

    def __init__(self):
        self.calls = itertools.count()

    def __call__(self):
        number = next(self.calls)
        return f"a red cube {number}", {"number": number}


def make(workdir, opened, **given):
    """A DDPO run of 4 steps of 4 samples, an update each."""
    settings = ddpo.Config(num_steps=2, height=8, width=8, prompt_buffer=0, guidance_scale=1.0)
    fields = {"steps": 4, "batch_size": 4, "log_every": 1, "writers": ("jsonl",), "checkpoint.every": 1}
    fields |= {"eval.num_steps": 2, "eval.guidance_scale": 1.0, "eval.every": 4, "eval.batch_size": 2}
    fields |= {"optimizer.learning_rate": 1e-3} | given.pop("fields", {})
    given = {"pipeline": opened, "reward": redness, "prompts": Counting(), "eval_prompts": HELD_OUT} | given
    return RM.Trainer(settings, fields=fields, workdir=workdir, **given)


def numbers(workdir):
    rows = read_rows(workdir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in ("time", "images_per_second")} for row in rows]


@pytest.fixture(scope="module")
def trained(opened, tmp_path_factory):
    """(trainer after its run, what its hook was called with)"""
    seen = []
    workdir = tmp_path_factory.mktemp("trained") / "run"
    trainer = make(workdir, opened, image_samples_hook=lambda *given: seen.append(given))
    assert trainer.train()
    return trainer, seen


def test_every_prompt_of_a_function_is_trained_on_once_in_its_order(trained):
    _, seen = trained
    steps = [samples for samples, _, _ in seen if not samples.held_out]
    assert [prompt for one in steps for prompt in one.prompts] == [f"a red cube {n}" for n in range(16)]
    assert [row["number"] for one in steps for row in one.prompt_metadata] == list(range(16))


def test_the_hook_is_given_what_was_trained_on_and_what_was_evaluated(trained):
    """At steps 0 and 4 the held-out samples, after each step its own; rewards are those of the images and logs."""
    trainer, seen = trained
    assert [(step, samples.held_out) for samples, step, _ in seen] == [
        (0, True), (1, False), (2, False), (3, False), (4, False), (4, True)
    ]  # fmt: skip
    logged = {row["step"]: row for row in numbers(trainer.workdir)}
    for samples, step, writers in seen:
        assert samples.images.shape == (len(samples.prompts), 8, 8, 3) and samples.images.dtype == np.float32
        assert samples.images.min() >= 0 and samples.images.max() <= 1 and list(writers) == ["jsonl"]
        pixels = np.rint(samples.images * 255).astype(np.uint8)
        np.testing.assert_allclose(samples.rewards, redness(pixels, samples.prompts), rtol=1e-6)
        name = "eval/reward_mean" if samples.held_out else "ddpo/reward"
        np.testing.assert_allclose(logged[step][name], samples.rewards.mean(), rtol=1e-6)
    assert seen[0][0].prompts == ["a red cube", "a red cube", "a blue ball", "a blue ball"]
    assert seen[0][0].prompt_metadata == [{}, {}, {"colour": "blue"}, {"colour": "blue"}]


def test_an_evaluation_gives_the_metrics_that_it_announces(trained):
    """All of them and no others, so that config.stop.judge and config.eval.best can be checked before it."""
    trainer, _ = trained
    run = assemble(trainer.config, make_mesh(1, 1, jax.devices()[:1]), given=trainer.given)
    announced = run.method.evaluate["samples"].measures
    found = {name for row in numbers(trainer.workdir) for name in row if name.startswith("eval/")}
    assert found == {name for name in announced if "*" not in name}


def test_it_resumes_bit_for_bit_in_a_thread_whatever_the_function_remembers(trained, opened, tmp_path):
    """Stopped in step 3 by a signal. Continued with a function that counts anew, in a thread, where no signals can be
    handled: metrics and weights of the run that was never stopped and had a hook."""
    calls = itertools.count(1)

    def interrupting(images, prompts):
        if next(calls) == 4:  # the evaluation and two steps came before
            os.kill(os.getpid(), signal.SIGTERM)
        return redness(images, prompts)

    interrupting.__module__, interrupting.__qualname__ = redness.__module__, redness.__qualname__
    with pytest.raises(Interrupted):
        make(tmp_path / "run", opened, reward=interrupting).train()
    assert not (tmp_path / "run/export").exists()
    results = []
    again = make(tmp_path / "run", opened)
    thread = threading.Thread(target=lambda: results.append(again.train()))
    thread.start()
    thread.join()
    assert results == [True] and again.train() is False
    assert numbers(tmp_path / "run") == numbers(trained[0].workdir)
    one, other = (read_tensors(folder / "export" / WEIGHTS) for folder in (tmp_path / "run", trained[0].workdir))
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def test_a_run_goes_on_when_its_reward_server_restarts_and_gives_the_same_numbers(trained, opened, tmp_path):
    """The server goes away after its second batch and comes back on its port: every metric is that of `trained`, whose
    reward is the same function in this process."""
    batches, gone, back = itertools.count(1), threading.Event(), threading.Event()

    def served(images, prompts):
        if next(batches) == 2:
            gone.set()
        return redness(images, prompts)

    def restart(first):
        gone.wait(60)
        first.__exit__(None, None, None)
        back.wait(0.5)
        second = serving(PythonReward(served), port=port)
        second.__enter__()
        running.append(second)

    first = serving(PythonReward(served))
    server, running = first.__enter__(), []
    port = server.server_port
    thread = threading.Thread(target=restart, args=(first,))
    thread.start()
    trainer = make(tmp_path / "run", opened, reward=server.url, fields={"reward.remote.patience": 60.0})
    assert trainer.train()
    thread.join()
    running[0].__exit__(None, None, None)
    assert next(batches) > 4 and numbers(tmp_path / "run") == numbers(trained[0].workdir)


def test_a_longer_run_draws_further_prompts_and_a_list_is_the_one_it_began_with(opened, tmp_path):
    prompts = ["a red cube", ("a blue ball", {"colour": "blue"}), "a dog"]
    assert make(tmp_path / "list", opened, prompts=prompts, fields={"steps": 1, "eval.every": 1}).train()
    kept = [json.loads(line)["prompt"] for line in (tmp_path / "list/prompts.jsonl").read_text().splitlines()]
    assert kept == ["a red cube", "a blue ball", "a dog"]
    with pytest.raises(ConfigError, match="prompts: the run began with others"):
        make(tmp_path / "list", opened, prompts=["a", "b", "c"]).train()
    with pytest.raises(WorkdirError, match=r"config\.data\.prompts: 'a list of 3' there, 'a list of 2' now"):
        make(tmp_path / "list", opened, prompts=["a", "b"]).train()
    assert make(tmp_path / "longer", opened, fields={"steps": 1, "eval.every": 1}).train()
    continued = make(tmp_path / "longer", opened, prompts=Counting(), fields={"steps": 2, "eval.every": 1})
    assert continued.train()
    rows = [json.loads(line) for line in (tmp_path / "longer/prompts.jsonl").read_text().splitlines()]
    assert [row["metadata"]["number"] for row in rows] == [0, 1, 2, 3, 0, 1, 2, 3]


def test_weights_in_memory_are_what_training_starts_from(opened, tmp_path):
    """The text encoder, which does not train, is exported as it was given, not as it is in the pipeline's files."""
    pipeline, params = opened
    encoder = {**params["text_encoder"]}
    marked = {**params, "text_encoder": _plus_one(encoder)}
    trainer = make(tmp_path / "run", (pipeline, marked), fields={"steps": 1, "eval.every": 1})
    trainer.train()
    trainer.save_pretrained(tmp_path / "saved")
    _, saved = RM.load_pipeline(tmp_path / "saved")
    _same(saved["text_encoder"], marked["text_encoder"])


def _plus_one(tree):
    return {name: _plus_one(part) if isinstance(part, dict) else part + np.float32(1) for name, part in tree.items()}


def _same(one, other):
    for name in one:
        if isinstance(one[name], dict):
            _same(one[name], other[name])
        else:
            np.testing.assert_array_equal(one[name], other[name])


def test_what_was_tuned_is_saved_and_uploaded_with_its_card(trained, tmp_path, monkeypatch):
    trainer, _ = trained
    trainer.save_pretrained(tmp_path / "saved")
    RM.load_pipeline(tmp_path / "saved")
    with pytest.raises(FileExistsError):
        trainer.save_pretrained(tmp_path / "saved")
    trainer.save_pretrained(tmp_path / "saved", overwrite=True)
    card = (tmp_path / "saved/README.md").read_text()
    rows = numbers(trainer.workdir)
    for said in ("tuned by ddpo", "test_trainer:redness", "test_trainer:Counting", "config.method.num_steps = 2"):
        assert said in card.replace("\\_", "_")
    figures = f"| {rows[0]['eval/reward_mean']:.4g} | {rows[-1]['eval/reward_mean']:.4g} |"
    assert figures in card and str(tmp_path.parent) not in card
    with serve(monkeypatch) as stand_in:
        assert trainer.push_to_hub("someone/tuned", token="hf_x").startswith(stand_in.url)
        (files,) = stand_in.commits.values()
    assert files["README.md"].decode() == card and "model_index.json" in files and WEIGHTS in files


def test_an_export_is_not_copied_into_itself_and_one_that_is_gone_is_named(trained):
    trainer, _ = trained
    export = trainer.workdir / "export"
    for folder in (export, export / "copy"):
        with pytest.raises(ValueError, match="is in what it would be copied from"):
            trainer.save_pretrained(folder, overwrite=True)
    export.rename(trainer.workdir / "moved")
    try:
        with pytest.raises(ValueError, match=r"export is gone: remove .*done.json, and train\(\) writes it again"):
            trainer.push_to_hub("someone/tuned")
    finally:
        (trainer.workdir / "moved").rename(export)


def test_an_opened_reward_tunes_by_its_gradient(opened, tiny_reward, tmp_path):
    """ReFL of a `ConfigDict`, which stays as it was; and the command's `config.json` says what the reward is."""
    from imagereward_jax.recipes import default_config

    config = default_config("refl")
    config.steps, config.batch_size, config.writers, config.log_every = 1, 2, ("jsonl",), 1
    config.method.update({"num_steps": 3, "stop_min": 1, "stop_max": 2, "height": 8, "width": 8, "pretrain": "off"})
    config.eval.update({"num_steps": 2, "guidance_scale": 1.0})
    before = config.to_json()
    given = {"pipeline": opened[0], "reward": tiny_reward, "prompts": ["a cat", "a dog"], "eval_prompts": HELD_OUT}
    trainer = RM.Trainer(config, workdir=tmp_path / "run", **given)
    assert config.to_json() == before and trainer.train()
    row = numbers(tmp_path / "run")[-1]
    assert row["refl/grad_norm"] > 0 and "eval/reward_mean" in row
    assert trainer.config.reward.path == "imagereward_jax.rewards.imagereward:ImageReward"


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"config": refl.Config(), "reward": redness}, ConfigError, "redness' has no gradient: .*policy-gradient"),
        ({"config": "ddpo"}, ConfigError, "config='ddpo': expected a recipe's ConfigDict or a method's Config"),
        ({"fields": {"stepz": 1}}, ConfigError, r"fields: config\.stepz is not a field .*did you mean 'steps'"),
        ({"fields": {"optimizer.lr": 1}}, ConfigError, r"fields: config\.optimizer\.lr is not a field"),
        ({"fields": {"steps.many": 1}}, ConfigError, r"fields: config\.steps\.many is not a field"),
        ({"fields": {"steps": "many"}}, ConfigError, r"fields: config\.steps='many': .*"),
        ({"fields": [("steps", 1)]}, ConfigError, r"fields=.*: expected a dict"),
        ({"fields": {3: 1}}, ConfigError, "fields: 3 should be the name of a field"),
        ({"fields": {"steps": None}}, ConfigError, r"config\.steps=None: expected a value of type int"),
        ({"fields": {"method.name": "refl"}}, ConfigError, "fields: the method is 'ddpo': for 'refl', start from"),
        ({"config": ddpo.Config(num_steps="two")}, ConfigError, r"config\.method\.num_steps='two'"),
        ({"workdir": None}, ConfigError, "workdir=None: expected the path of a folder"),
        (
            {"image_samples_hook": 3},
            ConfigError,
            "image_samples_hook=3: expected a function of .samples, step, writers",
        ),
        ({"image_samples_hook": lambda samples: None}, ConfigError, "image_samples_hook=.*too many positional"),
        ({"pipeline": 3}, ConfigError, "pipeline: expected a name or folder, a TextToImage, .*; got int"),
        ({"reward": 3}, ConfigError, "reward: expected a function or an opened reward .*, not int"),
        ({"reward": {"red": "tiny-shapes"}}, ConfigError, r"reward\['red'\]: .*open_reward\(name\)\), not str"),
        ({"reward": {"mean": redness}}, ConfigError, r"reward\['mean'\]: its curve would be called reward_mean"),
        ({"reward": {"": redness, "b": redness}}, ConfigError, "the name '' should be of letters"),
        ({"prompts": {"a": 1}}, ConfigError, "prompts: expected a file, a name, a list or a function .*; got dict"),
        ({"prompts": (prompt for prompt in "ab")}, ConfigError, "prompts: expected .*; got generator"),
        ({"eval_prompts": lambda: "a"}, ConfigError, "eval_prompts: expected a file, a name, a list; got function"),
        ({"fields": {"stop.judge": "eval/diversity"}}, ConfigError, "gives no eval/diversity, but .*/diversity_pixels"),
        ({"fields": {"eval.best": "eval/checker_rate"}}, ConfigError, "config.eval.best='eval/checker_rate': .* no"),
        ({"prompts": []}, DataError, "prompts: there are no prompts in it"),
        ({"eval_prompts": None}, ConfigError, r"config\.eval\.prompts is empty"),
        ({"prompts": lambda: None}, DataError, "call 1: expected a prompt"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(opened, tmp_path, given, error, message):
    given = {"config": ddpo.Config(height=8, width=8), "reward": redness, "prompts": ["a"]} | given
    given = {"pipeline": opened[0], "eval_prompts": HELD_OUT} | given
    if isinstance(given["config"], refl.Config):
        given["fields"] = {"method.pretrain": "off", "method.height": 8, "method.width": 8}
    given = {"workdir": tmp_path / "run"} | given
    with pytest.raises(error, match=message):
        RM.Trainer(given.pop("config"), **given).train()
    assert not (tmp_path / "run").exists()


def test_pipelines_that_have_no_files_or_are_adapted_are_refused(opened, tmp_path):
    pipeline, _ = opened
    fresh, _ = tiny_sd1.make_one_level(tmp_path / "tokenizer")
    with pytest.raises(ConfigError, match="was opened from no files: save it"):
        make(tmp_path / "run", fresh)
    with pytest.raises(ConfigError, match=r"has adapted layers: pass config\.lora"):
        make(tmp_path / "run", pipeline.with_lora("unet", pipeline.lora_targets, rank=2, alpha=2.0))


def test_weights_that_are_not_the_pipelines_are_refused(opened, tmp_path):
    pipeline, params = opened
    for vae, message in (
        ({}, r"params\['vae'\].* should be floating point \[.*\]; got nothing"),
        ({**params["vae"], "more": np.zeros(3)}, r"params\['vae'\]\['more'\] is no weight of this StableDiffusion1"),
        (_plus_one(params["vae"]) | {"quant_conv": {}}, r"params\['vae'\]\['quant_conv'\].*; got nothing"),
    ):
        with pytest.raises(ConfigError, match=message):
            make(tmp_path / "run", (pipeline, {**params, "vae": vae}))
    with pytest.raises(ConfigError, match="; got tuple"):
        make(tmp_path / "run", (pipeline, params, 3))


def test_numbers_of_numpy_and_frozen_configs_are_taken(opened, tmp_path):
    config = FrozenConfigDict(make(tmp_path / "run", opened).config)
    given = {"pipeline": opened, "reward": redness, "prompts": ["a"], "eval_prompts": HELD_OUT}
    trainer = RM.Trainer(config, fields={"steps": np.int64(7)}, workdir=tmp_path / "run", **given)
    assert type(trainer.config.steps) is int and trainer.config.steps == 7 and config.steps == 4


def test_a_run_that_is_not_complete_has_nothing_to_save(opened, tmp_path):
    with pytest.raises(ValueError, match=r"call train\(\) first"):
        make(tmp_path / "run", opened).save_pretrained(tmp_path / "saved")


def test_the_reward_may_be_named(opened, tmp_path):
    named = make(tmp_path / "run", opened, reward="jpeg-compressibility", prompts="shapes:train")
    assert named.given.reward is None and named.config.reward.path == "jpeg-compressibility"
    assert named.given.prompts is None and named.config.data.prompts == "shapes:train"
    rule = make(tmp_path / "run", opened, reward=open_reward("jpeg-compressibility"))
    assert rule.config.reward.path == "imagereward_jax.rewards.rules:JPEGSize"
    jax_function = make(tmp_path / "run", opened, reward=RM.jax_reward(lambda images: images.mean((1, 2, 3))))
    assert jax_function.config.reward.path.startswith("jax:test_trainer:")
    mixture = make(tmp_path / "run", opened, reward={"red": redness, "small": open_reward("jpeg-compressibility")})
    assert mixture.config.reward.path == "a mixture of red, small"
