"""Every recipe loads and passes validation."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("ml_collections")

from imagereward_jax.config import ConfigError, did_you_mean
from imagereward_jax.recipes import default_config, judge, recipe_beside, reward_term, validate

ROOT = Path(__file__).parents[2]


def recipe(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_recipes_are_valid_and_say_their_command(path):
    module = recipe(path)
    validate(module.get_config())
    assert f"--config configs/{path.name}" in module.__doc__


def test_the_nearest_choice_is_named():
    assert did_you_mean("eulr", ("ddpm", "ddim", "euler")) == " (did you mean 'euler'?)"
    assert did_you_mean("xyz", ("ddpm", "ddim")) == ""


def quantized(kind):
    config = recipe(ROOT / "configs/refl_tiny.py").get_config()
    config.method.rollout_quantization = kind
    return config


def test_a_quantised_rollout_needs_a_known_kind_and_qwix(monkeypatch):
    with pytest.raises(ConfigError, match=r"rollout_quantization='int4': expected one of none, int8, fp8"):
        validate(quantized("int4"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    validate(quantized("none"))
    with pytest.raises(ConfigError, match=r"rollout_quantization='fp8' needs qwix: pip install"):
        validate(quantized("fp8"))


def test_a_method_without_data_says_what_to_pass():
    with pytest.raises(ConfigError, match=r"--config\.data\.pairs="):
        validate(default_config("denoising"))


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("eval", {"guidance_scales": ("three",)}, r"config\.eval\.guidance_scales=\('three',\): expected numbers"),
        ("eval", {"guidance_scales": (-1.0,)}, r"config\.eval\.guidance_scales=.*expected at least 0"),
        (
            "method",
            {"guidance_scale": 3.0, "guidance_max": 2.0},
            r"guidance_scale=3 and guidance_max=2 must satisfy 1 <=",
        ),
    ],
)
def test_guidance_that_cannot_be_is_refused(section, changes, message):
    config = recipe(ROOT / "configs/refl_tiny.py").get_config()
    config[section].update(changes)
    with pytest.raises(ConfigError, match=message):
        validate(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": None}, "config.steps=None: expected a value of type int"),
        ({"stop.min_drop": float("inf")}, "config.stop.min_drop=inf: expected a finite number"),
        ({"eval.judges": {"one": "tiny-shapes"}}, r"judges.one='tiny-shapes': expected what judge\(path\) makes"),
        ({"eval.judges": {"a b": judge("x")}}, "the name 'a b' should be of letters"),
        ({"eval.judges": {"one": judge(3)}}, "judges.one.path=3: expected a text"),
        ({"reward.terms": {"one": reward_term("x", weight="2")}}, "terms.one.weight='2': expected a number"),
        ({"reward.terms": {"one": reward_term("x", weight=float("nan"))}}, "terms.one.weight=nan: expected a number"),
        ({"eval.best": "", "checkpoint.export": "best"}, "config.eval.best is empty, and .*export='best' chooses by"),
    ],
)
def test_values_that_cannot_work_name_their_field(fields, message):
    config = recipe(ROOT / "configs/ddpo_tiny.py").get_config()
    config.reward.path = "" if "reward.terms" in fields else config.reward.path
    config.update_from_flattened_dict(fields)
    with pytest.raises(ConfigError, match=message):
        validate(config)


def test_a_recipe_of_another_method_keeps_what_both_have():
    """What differs from the first method's defaults, optional fields included; the rest is the second's own."""
    grpo = recipe_beside(ROOT / "configs/x", "grpo_tiny")
    nft = recipe_beside(ROOT / "configs/x", "grpo_tiny", method="nft")
    assert nft.method.name == "nft" and nft.method.num_steps == 10 and nft.method.noise_levels == 9
    for name in ("group_size", "guidance_scale", "rounds", "height"):
        assert nft.method[name] == grpo.method[name] != default_config("nft").method[name], name
    assert "clip_range" not in nft.method and nft.eval == grpo.eval and nft.optimizer == grpo.optimizer
    validate(nft)
