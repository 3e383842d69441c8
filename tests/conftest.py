"""Compilation settings of the whole test session, and fixtures that several folders of tests share."""

import gc
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from imagereward_jax.compilation_cache import machine_name

TEST_CACHE = "IMAGEREWARD_JAX_TEST_CACHE"  # the environment variable that moves the folder of compiled programs
COMPILED = Path(os.environ.get(TEST_CACHE) or Path(__file__).parents[1] / ".pytest_cache" / "compiled")
# For this process and its children: programs compile in less time to slower code, and equal ones once, in this session
# and the next.
QUICK_COMPILATION = {
    "jax_disable_most_optimizations": True,
    "jax_compilation_cache_dir": str(COMPILED / f"{machine_name()}-jax{jax.__version__}"),
    "jax_persistent_cache_min_compile_time_secs": 0.3,
}
# XLA's fusion emitters compile three times slower (jax 0.12 has no others); code split for threads, a fifth slower.
QUICK_XLA_FLAGS = "--xla_cpu_parallel_codegen_split_count=1"
if jax.__version_info__ < (0, 11):
    QUICK_XLA_FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK_XLA_FLAGS}".strip()
# Traces are large graphs of Python objects, which the collector would walk again and again: a tenth of the time.
gc.set_threshold(50_000)
os.environ["IMAGEREWARD_JAX_CACHE"] = "off"  # no test fills the user's own cache
for _name, _value in QUICK_COMPILATION.items():
    os.environ[_name.upper()] = str(_value)
    jax.config.update(_name, _value)

WORDS = ["a", "an", "cat", "dog", "red", "blue", "cube", "ball", "painting", "of", "the", "on", "ocean", ",", "."]


@pytest.fixture(scope="module")
def real_compilation():
    """Compiles as users do, here and in child processes, and keeps nothing between programs."""
    with pytest.MonkeyPatch.context() as patch:
        for name in QUICK_COMPILATION:
            patch.delenv(name.upper())
        patch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"].replace(QUICK_XLA_FLAGS, "").strip())  # for child processes
        _configure({"jax_disable_most_optimizations": False, "jax_compilation_cache_dir": None})
        yield
    _configure(QUICK_COMPILATION)


def _configure(settings):
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    jax.clear_caches()  # functions that were compiled with the other settings


@pytest.fixture(scope="session")
def vocab_file(tmp_path_factory):
    """A BERT vocabulary of words, letters and continued letters."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    tokens = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *WORDS,
        *letters[1:],
        *(f"##{letter}" for letter in letters),
    ]
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text("\n".join(tokens) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_reward_config(vocab_file):
    """An ImageReward of some 40,000 numbers: pictures of 32 pixels, two layers a side."""
    from imagereward_jax.models.blip_config import ImageRewardConfig, TextConfig, VisionConfig

    vocab_size = len(vocab_file.read_text(encoding="utf-8").splitlines()) + 2
    return ImageRewardConfig(
        vision=VisionConfig(image_size=32, patch_size=8, width=32, depth=2, heads=4),
        text=TextConfig(vocab_size, 24, 2, 3, 48, max_position_embeddings=20, layer_norm_eps=1e-12),
        projection_dim=8,
        head_sizes=(16, 12, 8, 4),
        max_prompt_tokens=12,
    )


@pytest.fixture(scope="session")
def tiny_reward_folder(tiny_reward_config, vocab_file, tmp_path_factory):
    """A saved reward whose scores differ from picture to picture (random weights of unit gain)."""
    from imagereward_jax.rewards.imagereward import ImageReward, abstract_module
    from imagereward_jax.rewards.tokens import PromptTokenizer
    from imagereward_jax.weights import mapping

    rng = np.random.default_rng(0)

    def unit_gain(path, leaf):
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        if leaf.ndim == 1:
            return np.float32(path[-1].key == "scale") + 0.1 * noise
        return noise / np.float32(np.sqrt(leaf.shape[0])) if leaf.ndim == 2 else 0.3 * noise

    shapes = mapping.params_of(abstract_module(tiny_reward_config))
    tokenizer = PromptTokenizer.from_file(vocab_file, tiny_reward_config.max_prompt_tokens)
    folder = tmp_path_factory.mktemp("reward") / "tiny"
    ImageReward(tiny_reward_config, jax.tree_util.tree_map_with_path(unit_gain, shapes), tokenizer).save(folder)
    return folder


@pytest.fixture(scope="session")
def shortened(tmp_path_factory):
    """(text of a program that trains `tiny-shapes`, its number of steps) -> the same with two steps and a model that
    compiles in a fraction of the time."""
    import tiny_sd1

    folder = tmp_path_factory.mktemp("one_level")
    tiny_sd1.save_one_level(folder)

    def shorten(text, steps):
        changes = {steps: steps.replace("30", "2"), "height=32, width=32": "height=8, width=8"}
        for before, after in {**changes, '"tiny-shapes"': repr(str(folder / "model"))}.items():
            assert text.count(before) == 1, before
            text = text.replace(before, after)
        return text

    return shorten


@pytest.fixture(scope="session")
def tiny_reward(tiny_reward_folder):
    import imagereward_jax

    return imagereward_jax.load(tiny_reward_folder, device="cpu", batch_size=4)
