"""Small runs of every method from the command line, for programs that disturb them: see `Project`."""

import hashlib
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import tiny_sd1
from PIL import Image

from imagereward_jax.training.metric_writers import read_rows

TIMES = ("time", "images_per_second")
RECIPE = """
from imagereward_jax.recipes import default_config

def get_config():
    config = default_config({method!r})
    config.update_from_flattened_dict({fields!r})
    return config
"""
STEPS = 4  # with checkpoints at 1, 2, 3 and 4, and evaluations at 0, 2 and 4
COMMON = {"steps": STEPS, "batch_size": 2, "log_every": 1, "checkpoint.every": 1, "eval.every": 2, "seed": 5}
COMMON |= {"writers": ("jsonl",), "ema_decay": 0.9}
MODEL = {"model.path": "model", "model.remat": "none", "optimizer.learning_rate": 1e-4}
SAMPLES = {"eval.num_prompts": 2, "eval.images_per_prompt": 1, "eval.batch_size": 2, "eval.num_steps": 2}
SAMPLES |= {"eval.prompts": "prompts.txt"}
SIZE = {"reward.path": "jpeg-compressibility"}
PROMPTS = {"data.prompts": "prompts.txt", "method.height": 8, "method.width": 8, "method.num_steps": 2}
PROMPTS |= {"method.guidance_scale": 1.0}
PAIRS = {"data.pairs": "shapes:train", "data.image_size": 8}
GROUPS = {**SIZE, "method.group_size": 2, "method.round_size": 2, "method.rounds": 2}
BY_GRADIENT = {"reward.path": "jax:brightness:score", "method.sampler": "ddim"}
BRIGHTNESS = """
def score(images, prompts):
    return images.mean((1, 2, 3))
"""
SCORER = {
    "vision": {"image_size": 32, "patch_size": 16, "width": 16, "depth": 1, "heads": 2},
    "text": {
        "vocab_size": 131,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 32,
    },
    "projection_dim": 8,
    "head_sizes": (8, 8, 8, 4),
    "max_prompt_tokens": 16,
}
METHODS = {
    "refl": {**MODEL, **SAMPLES, **PROMPTS, **PAIRS, **BY_GRADIENT, "method.stop_min": 0, "method.stop_max": 1},
    "reward_gradient": {**MODEL, **SAMPLES, **PROMPTS, **BY_GRADIENT},
    "ddpo": {
        **{**MODEL, **SAMPLES, **PROMPTS, **SIZE, "method.round_size": 2, "method.rounds": 2},
        **{"method.prompt_buffer": 8, "method.prompt_min_count": 2},
    },
    "denoising": {**MODEL, **SAMPLES, **PAIRS, "eval.best": ""},
    "dreambooth": {
        **{
            **MODEL,
            **SAMPLES,
            "data.pairs": "instances",
            "data.image_size": 8,
            "method.instance_prompt": "a red circle",
        },
        **{"method.class_prompt": "a circle", "method.num_class_images": 4},
    },
    "flow_grpo": {**MODEL, **SAMPLES, **PROMPTS, **GROUPS, "method.sampler": "ddim", "method.eta": 1.0},
    "nft": {**MODEL, **SAMPLES, **PROMPTS, **GROUPS, "method.noise_levels": 1},
    "awm": {**MODEL, **SAMPLES, **PROMPTS, **GROUPS, "method.noise_levels": 1},
    "dpo": {**MODEL, **SAMPLES, "data.preferences": "pairs", "data.image_size": 8, "data.cache": "cache"},
    "dpo_online": {**MODEL, **SAMPLES, **PROMPTS, **GROUPS},
    "ranking": {
        **{"data.groups": "shapes:train", "data.held_out_groups": "shapes:held_out", "data.images_per_prompt": 2},
        **{"eval.num_groups": 4, "reward.architecture": SCORER},
    },
    "autoencoder": {**MODEL, **PAIRS, "eval.num_images": 4},
}


class Project:
    """A folder of a user's with a tiny model, a reward of a function, data, and a recipe of each method.

    Args:
        folder: commands run in it.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def make(self) -> None:
        """Writes the files."""
        folder = self.folder
        folder.mkdir()
        tiny_sd1.save_one_level(folder)
        (folder / "brightness.py").write_text(BRIGHTNESS)
        (folder / "prompts.txt").write_text("a large red circle\na small blue square\na small green circle\n")
        rng = np.random.default_rng(0)
        for name in ("instances", "pairs/chosen", "pairs/rejected", "images"):
            (folder / name).mkdir(parents=True)
            for index in range(5):
                Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / f"{name}/{index}.png")
                (folder / f"{name}/{index}.txt").write_text(f"a red circle {index}")
        for method, fields in METHODS.items():
            (folder / f"{method}.py").write_text(RECIPE.format(method=method, fields={**COMMON, **fields}))

    def train(self, method: str, workdir: str | Path, *more: str) -> list[str]:
        """The arguments of `imagereward_jax.train.main` that train by a method."""
        return ["train", f"--config={method}.py", f"--workdir={workdir}", *more]

    def table(self, rows: int) -> str:
        """A table for `score`, of so many rows; its name."""
        lines = [json.dumps({"image": f"images/{i % 5}.png", "prompt": f"a cat {i}"}) for i in range(rows)]
        (self.folder / f"rows{rows}.jsonl").write_text("\n".join(lines) + "\n")
        return f"rows{rows}.jsonl"

    def score(self, rows: int, output: str | Path, *more: str) -> list[str]:
        """The arguments of `imagereward_jax.score.main` that score a table."""
        given = ("--model", "random", "--input", self.table(rows), "--output", str(output), "--batch-size", "4")
        return [*given, *more]


def save_scorer(folder: Path) -> None:
    """Saves an ImageReward of some thousand random numbers."""
    from imagereward_jax.data.shapes import write_bert_vocab
    from imagereward_jax.models.blip_config import ImageRewardConfig
    from imagereward_jax.rewards.imagereward import ImageReward, abstract_module
    from imagereward_jax.rewards.tokens import PromptTokenizer
    from imagereward_jax.weights import mapping

    write_bert_vocab(folder / "vocab")
    config = ImageRewardConfig.from_dict(SCORER)
    tokenizer = PromptTokenizer.from_file(folder / "vocab/vocab.txt", config.max_prompt_tokens)
    rng = np.random.default_rng(0)
    weights = jax.tree.map(
        lambda leaf: 0.3 * rng.standard_normal(leaf.shape).astype(np.float32),
        mapping.params_of(abstract_module(config)),
    )
    shutil.rmtree(folder / "vocab")
    folder.rmdir()
    ImageReward(config, weights, tokenizer).save(folder)


def outcome(workdir: Path) -> dict[str, object]:
    """The metrics of a run without times, and a digest of each file of its export."""
    rows = read_rows(workdir / "metrics.jsonl")
    numbers = [{name: value for name, value in row.items() if name not in TIMES} for row in rows]
    files = sorted(path for path in (workdir / "export").rglob("*") if path.is_file())
    return {"metrics": numbers} | {
        str(path.relative_to(workdir)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }
