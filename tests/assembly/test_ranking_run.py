"""Runs that train a reward model: files of groups of unequal size, freezing, pairs, the best kept, the test set."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

for package in ("orbax.checkpoint", "grain", "ml_collections"):
    pytest.importorskip(package)

import imagereward_jax
from imagereward_jax.planning import counts
from imagereward_jax.rewards.imagereward import abstract_module, make_apply
from imagereward_jax.train import main
from imagereward_jax.training.metric_writers import read_rows
from imagereward_jax.weights import mapping
from imagereward_jax.weights.files import read_tensors

CONFIG = Path(__file__).parents[2] / "configs" / "imagereward.py"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Groups of two to four plain pictures, ranked by how bright they are: {split: path}."""
    folder, rng = tmp_path_factory.mktemp("groups"), np.random.default_rng(0)
    paths = {}
    for split in ("train", "held_out", "test"):
        rows = []
        for g in range(12):
            levels = rng.permutation(4)[: 2 + g % 3]
            names = [f"{split}_{g}_{k}.png" for k in range(len(levels))]
            for name, level in zip(names, levels):
                Image.new("RGB", (40, 36), (int(60 * level),) * 3).save(folder / name)
            ranks = (np.argsort(np.argsort(-levels)) + 1).tolist()
            rows.append({"prompt": "a red cat", "generations": names, "ranking": ranks})
        paths[split] = folder / f"{split}.json"
        paths[split].write_text(json.dumps(rows))
    return paths


def train(files, workdir, reward, *options):
    arguments = [
        *("train", f"--config={CONFIG}", f"--workdir={workdir}", f"--config.reward.path={reward}"),
        "--config.reward.blip=",
        *(f"--config.data.groups={files['train']}", f"--config.data.held_out_groups={files['held_out']}"),
        *(f"--config.data.test_groups={files['test']}", f"--config.data.cache={workdir.parent / 'cache'}"),
        *("--config.data.workers=0", "--config.writers=('jsonl',)", "--config.log_every=1"),
        *("--config.optimizer.learning_rate=1e-3", "--config.batch_size=2", *options),
    ]
    assert main(arguments) == 0
    return read_rows(workdir / "metrics.jsonl")


@pytest.fixture(scope="module")
def runs(files, tiny_reward_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("ranking")
    groups = train(files, root / "groups", tiny_reward_folder, "--config.steps=12", "--config.eval.per_epoch=2")
    two_steps = ("--config.steps=2", "--config.method.mode=pairs")
    pairs = train(files, root / "pairs", tiny_reward_folder, *two_steps)
    narrow = ("--config.dtype=bfloat16", "--config.model.remat=blocks")
    half = train(files, root / "half", tiny_reward_folder, *two_steps, *narrow)
    return root, {"groups": groups, "pairs": pairs, "half": half}


def evaluations(rows):
    return {row["step"]: row["eval/loss"] for row in rows if "eval/loss" in row}


def test_an_epoch_has_the_evaluations_that_were_asked_for(runs):
    """12 groups in batches of 2 are 6 steps: two evaluations are one every 3 steps."""
    assert list(evaluations(runs[1]["groups"])) == [0, 3, 6, 9, 12]


def test_bfloat16_is_what_the_scorer_computes_in(runs, tiny_reward_config):
    """Losses of two steps are float32's within 2 % and not the same; the export has weights that only float32 holds;
    nine tenths of the products are of bfloat16, attention and the head the rest."""
    root, rows = runs
    losses = {name: [row["ranking/loss"] for row in rows[name] if "ranking/loss" in row] for name in ("pairs", "half")}
    assert len(losses["half"]) == 2 and losses["half"] != losses["pairs"]
    np.testing.assert_allclose(losses["half"], losses["pairs"], rtol=0.02)
    weights = read_tensors(root / "half" / "export" / "model.safetensors")["mlp.layers.0.weight"]
    assert weights.dtype == np.float32 and np.any(weights != weights.astype(jnp.bfloat16).astype(np.float32))
    params = mapping.params_of(abstract_module(tiny_reward_config))
    tokens = {name: np.zeros((2, 12), np.int32) for name in ("input_ids", "attention_mask")}
    apply = make_apply(tiny_reward_config, "bfloat16")
    counted = counts.flops_by_dtype(jax.make_jaxpr(apply)(params, np.zeros((2, 32, 32, 3), np.float32), tokens))
    assert counted["bfloat16"] > 0.9 * counted.total()


def test_fields_of_a_diffusion_model_are_refused(files, tiny_reward_folder, tmp_path, capsys):
    with pytest.raises(AssertionError):
        train(files, tmp_path / "run", tiny_reward_folder, "--config.model.path=tiny-shapes")
    said = capsys.readouterr().err
    assert "config.model.path='tiny-shapes': training a scorer has no diffusion model" in said


def test_the_best_is_exported_and_tested(runs, tiny_reward_config):
    """The exported weights are those of the smallest held-out loss; scored by `load`, they have the test accuracy."""
    root, rows = runs[0], runs[1]["groups"]
    last = [row for row in rows if "test/accuracy" in row]
    assert len(last) == 1 and {"test/accuracy", "test/loss"} <= last[0].keys()
    losses = evaluations(rows)
    config = json.loads((root / "groups" / "config.json").read_text())
    model = imagereward_jax.load(root / "groups" / "export", device="cpu")
    for split, expected in (("held_out_groups", min(losses.values())), ("test_groups", last[0]["test/loss"])):
        path = Path(config["data"][split])
        found = []
        for row in json.loads(path.read_text()):
            scores = np.array(model.score(row["prompt"], [str(path.parent / name) for name in row["generations"]]))
            scores = scores * model.config.score_std / tiny_reward_config.score_std  # as they were while training
            ranks = np.array(row["ranking"])
            better, worse = np.nonzero(ranks[:, None] < ranks[None, :])
            found += np.log1p(np.exp(scores[worse] - scores[better])).tolist()
        np.testing.assert_allclose(np.mean(found), expected, rtol=2e-3)


def test_frozen_tensors_stay_as_they_were(runs, tiny_reward_folder):
    """fix_rate 0.7 of two layers: the first one, the embeddings, the projections and one tensor of the second."""
    before = read_tensors(tiny_reward_folder / "model.safetensors")
    after = read_tensors(runs[0] / "pairs" / "export" / "model.safetensors")
    same = {key for key in before if np.array_equal(before[key], after[key])}
    assert {
        "blip.visual_encoder.pos_embed",
        "blip.vision_proj.weight",
        "blip.visual_encoder.blocks.1.norm1.weight",
    } <= same
    moved = before.keys() - same
    assert {key for key in before if key.startswith("mlp.") and key.endswith("weight")} <= moved
    assert {"blip.visual_encoder.blocks.1.mlp.fc1.weight", "blip.visual_encoder.norm.weight"} <= moved
    assert all(key in same for key in before if ".blocks.0." in key or ".layer.0." in key or "embeddings" in key)


def test_pairs_are_batches_of_two_pictures(runs):
    rows = runs[1]["pairs"]
    assert rows[-1]["step"] == 2 and "ranking/accuracy" in rows[1]
    assert rows[1]["ranking/accuracy"] in (0.0, 0.5, 1.0)  # two pairs a batch


def test_the_report_shows_the_test_set(runs):
    page = (runs[0] / "groups" / "report.html").read_text()
    assert "Test set" in page and "test/accuracy" in page


def test_training_starts_from_blip(vocab_file, tmp_path, tiny_reward_config):
    """The encoders of BLIP's checkpoint bit for bit, and a new head with small weights."""
    torch = pytest.importorskip("torch")
    import torch_blip

    from imagereward_jax.models.blip_config import BlipScoreConfig
    from imagereward_jax.rewards import scores

    small = tiny_reward_config
    blip = BlipScoreConfig(small.vision, small.text, small.projection_dim, small.max_prompt_tokens)
    model = torch_blip.Blip(blip)
    torch.save({"model": model.state_dict()}, tmp_path / "model_large.pth")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores, "BLIP_LARGE", blip)
        reward = scores.imagereward_from_blip(tmp_path / "model_large.pth", jax.random.key(0), tokenizer=vocab_file)
    kernel = reward.params["blip"]["visual_encoder"]["blocks"][1]["attn"]["qkv"]["kernel"]
    np.testing.assert_array_equal(kernel, model.visual_encoder.blocks[1].attn.qkv.weight.detach().numpy().T)
    first = np.asarray(reward.params["mlp"]["layers"][0]["kernel"])
    np.testing.assert_allclose(first.std(), 1 / (24 + 1), rtol=0.05)
    assert (reward.config.score_mean, reward.config.score_std) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--config.reward.fix_rate=1.5", "fix_rate=1.5: expected a number in [0, 1]"),
        ("--config.method.dropout=1.0", "config.method.dropout=1.0: expected a number in [0, 1)"),
        ("--config.method.mode=pair", "did you mean 'pairs'"),
        ("--config.data.held_out_groups=", "data.held_out_groups is empty"),
        ("--config.reward.blip=x.pth", "both given"),
        ("--config.reward.path=", "config.reward: nothing to start from; pass --config.reward.blip=model_large.pth"),
        ("--config.checkpoint.export=worst", "checkpoint.export='worst'"),
    ],
)
def test_settings_that_cannot_work_are_refused(files, tmp_path, tiny_reward_folder, option, message, capsys):
    arguments = [
        *("train", f"--config={CONFIG}", f"--workdir={tmp_path / 'run'}", f"--config.reward.path={tiny_reward_folder}"),
        "--config.reward.blip=",
        *(f"--config.data.groups={files['train']}", f"--config.data.held_out_groups={files['held_out']}", option),
    ]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["head_scale", "position_scale"])
def test_initial_weights_are_scaled_as_the_config_says(name):
    """Three times the head's matrices, or the vision transformer's positions, and nothing else."""
    from imagereward_jax.assembly.random_init import init_scorer
    from imagereward_jax.recipes import recipe_beside

    config = recipe_beside(CONFIG, "imagereward_tiny")
    config.reward[name] = 1.0
    before = init_scorer(config).params
    config.reward[name] = 3.0
    leaves = jax.tree_util.tree_flatten_with_path(before)[0]
    after = jax.tree.leaves(init_scorer(config).params)
    assert len(after) == len(leaves)
    for (path, was), now in zip(leaves, after):
        keys = [str(getattr(key, "key", getattr(key, "idx", key))) for key in path]
        scaled = (keys[0] == "mlp" and keys[-1] == "kernel") if name == "head_scale" else "pos_embed" in keys
        np.testing.assert_allclose(now, was * (3.0 if scaled else 1.0), rtol=1e-6, err_msg="/".join(keys))
