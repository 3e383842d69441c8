"""What `imagereward push` uploads is opened by its name: a model, an adapter and a scorer, by the hub's own library."""

import re
import shutil

import jax
import numpy as np
import pytest
from hub_stand_in import serve
from PIL import Image

import imagereward_jax as RM
from imagereward_jax import push, score
from imagereward_jax.models import lora
from imagereward_jax.weights import adapters, hub
from imagereward_jax.weights.diffusers import INDEX
from imagereward_jax.weights.generation import Generation


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("imagereward_jax.rewards.checkpoint.DEFAULT_ROOT", str(tmp_path / "cache"))
    with serve(monkeypatch) as stand_in:
        yield stand_in


def pushed(capsys, *argv):
    assert push.main([*map(str, argv)]) == 0, capsys.readouterr().err
    return capsys.readouterr()


def test_a_scorer_comes_back_with_the_same_scores(stand_in, tmp_path, capsys):
    folder = hub.ASSETS / "tiny-shapes" / "reward"
    printed = pushed(capsys, folder, "me/scorer", "--private")
    assert printed.out.strip() == f"{stand_in.url}/me/scorer/commit/1" and "has no README.md" in printed.err
    assert stand_in.created == {"me/scorer": True}
    image = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(image)
    assert RM.load("me/scorer").score("a red circle", image) == RM.load("tiny-shapes").score("a red circle", image)
    assert score.main(["--model", "me/scorer", "--prompt", "a red circle", str(image)]) == 0
    assert score.main(["--model", "me/scorrer", "--prompt", "a red circle", str(image)]) == 2
    assert "no model 'me/scorrer'" in capsys.readouterr().err


def test_a_runs_export_comes_back_as_the_model_that_it_is(stand_in, tmp_path, capsys):
    """To the bit: every file, and the weights that `load_pipeline` reads of them."""
    workdir = tmp_path / "run"
    shutil.copytree(hub.ASSETS / "tiny-shapes", workdir / "export", ignore=shutil.ignore_patterns("reward"))
    (workdir / "metrics.jsonl").touch()
    (workdir / "export/README.md").write_text("---\ntags: []\n---\n")
    assert "warning" not in pushed(capsys, workdir, "me/model").err
    files = {str(path.relative_to(workdir / "export")): path.read_bytes() for path in (workdir / "export").rglob("*.*")}
    assert stand_in.files["me/model"] == files and stand_in.created == {"me/model": False}
    (_, ours), (_, theirs) = RM.load_pipeline("me/model"), RM.load_pipeline("tiny-shapes")
    np.testing.assert_equal(ours, theirs)


def test_an_adapter_comes_back_with_its_weights(stand_in, tmp_path, capsys):
    pipeline, _ = RM.load_pipeline("tiny-shapes")
    adapted = pipeline.with_lora("unet", pipeline.lora_targets, rank=1, alpha=1.0)
    own = {"unet": lora.init(adapted.networks["unet"], jax.random.key(0))}
    (tmp_path / "run").mkdir()
    options = {"rank": 1, "alpha": 1.0, "generation": Generation("ddim", 3, 1.0)}
    adapters.write_adapter(tmp_path / "run", adapted.networks, own, **options)
    pushed(capsys, tmp_path / "run", "me/adapter")
    ours, theirs = (adapters.read_adapter(name, pipeline.networks) for name in (tmp_path / "run", "me/adapter"))
    assert ours["unet"].keys() == theirs["unet"].keys()
    for layer, update in ours["unet"].items():
        np.testing.assert_equal(theirs["unet"][layer], update)
    assert adapters.read_generation("me/adapter") == options["generation"]


@pytest.mark.parametrize(
    ("make", "status", "message"),
    [
        (lambda folder: None, 2, r"no folder"),
        (lambda folder: folder.mkdir(), 2, r"holds no model, adapter or scorer .*: expected model_index.json; or "),
        (
            lambda folder: (folder.mkdir(), (folder / "metrics.jsonl").touch()),
            2,
            r"no export yet: .*imagereward export",
        ),
        (lambda folder: (folder.mkdir(), (folder / INDEX).touch()), 1, r"was not uploaded to no name .*hf auth login"),
    ],
)
def test_what_cannot_be_uploaded_is_told_before_it_is_tried(make, status, message, tmp_path, capsys):
    make(tmp_path / "run")
    assert push.main([str(tmp_path / "run"), "no name"]) == status
    assert re.search(message, capsys.readouterr().err)
