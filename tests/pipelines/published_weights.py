"""Full-size weights for the sets of published_configs.py, loaded as a user's would be: one line for each set.

    python tests/pipelines/published_weights.py [--only REGEX] [--gigabytes N]

A set's files have the names and shapes of PyTorch's own networks, float16, in shards where PyTorch makes some, and hold
zeros, which take no room on the disk. A network whose names and shapes are those of one before is not loaded again. One
that needs more than N gigabytes is held in one byte per number instead of two.
"""

import argparse
import functools
import json
import math
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("USE_TF", "0")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

SHARDS = {"diffusers": 10**10, "transformers": 5 * 10**9}  # the largest file of their `save_pretrained`
Shapes = dict[str, tuple[int, ...]]


def torch_shapes(config: dict[str, Any]) -> Shapes:
    """Names and shapes of the weights that PyTorch's class saves for a config.json."""
    return _torch_shapes(json.dumps(config))


@functools.cache
def _torch_shapes(text):
    import diffusers
    import torch
    import transformers

    config = json.loads(text)
    with torch.device("meta"):
        if "_class_name" in config:
            network = getattr(diffusers, config["_class_name"]).from_config(config)
        else:
            kind = getattr(transformers, (config["architectures"] or ["CLIPTextModel"])[0])
            network = kind(kind.config_class.from_dict(config))
    shapes = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    if config.get("model_type") == "t5":
        shapes.pop("encoder.embed_tokens.weight")  # the same tensor as shared.weight
    if config.get("model_type") == "clip_text_model":  # which transformers 5 names without their module
        bare = {key.removeprefix("text_model.") for key in shapes if not key.startswith("text_projection.")}
        kept = {key: shape for key, shape in shapes.items() if key.startswith("text_projection.")}
        named = {f"text_model.{key}": shapes.get(key, shapes.get(f"text_model.{key}")) for key in bare}
        shapes = kept | {key: shape for key, shape in named.items() if not key.endswith("position_ids")}
    return shapes


def write_weights(folder: Path, config: dict[str, Any]) -> None:
    """Writes zeros, float16, for the network of a config.json into its component's folder."""
    library = "diffusers" if "_class_name" in config else "transformers"
    stem = "diffusion_pytorch_model" if library == "diffusers" else "model"
    shards, size = [{}], 0
    for key, shape in torch_shapes(config).items():
        size += 2 * math.prod(shape)
        if size > SHARDS[library] and shards[-1]:
            shards.append({})
            size = 2 * math.prod(shape)
        shards[-1][key] = shape
    if len(shards) == 1:
        _write_zeros(folder / f"{stem}.safetensors", shards[0])
        return
    files = [f"{stem}-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for file, shapes in zip(files, shards):
        _write_zeros(folder / file, shapes)
    weight_map = {key: file for file, shapes in zip(files, shards) for key in shapes}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _write_zeros(path, shapes):
    """A safetensors file whose numbers are a hole in the file."""
    header, start = {}, 0
    for key, shape in shapes.items():
        end = start + 2 * math.prod(shape)
        header[key] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + start)


def load(folder: str, parts: list[str], gigabytes: float) -> dict[str, float]:
    """Loads networks of a model, one after the other: their number of parameters, seconds, bytes of memory at most."""
    import jax
    import jax.numpy as jnp

    from imagereward_jax.pipelines import open_pipeline

    start, pipeline = time.monotonic(), open_pipeline(folder, dtype=jnp.float16)
    parameters, abstract = 0, pipeline.abstract_params()
    for name in parts:
        shapes = abstract[name]
        count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
        dtype = jnp.float16 if 2 * count <= gigabytes * 1e9 else jnp.float8_e4m3fn
        target = jax.tree.map(lambda leaf, dtype=dtype: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)
        loaded = pipeline.load_params({name: target})[name]
        assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(loaded)), name
        parameters += sum(leaf.size for leaf in jax.tree.leaves(loaded))
        del loaded
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"parameters": parameters, "seconds": time.monotonic() - start, "peak": peak}


def write_model(folder: Path, files: dict[str, Any], parts: list[str]) -> None:
    """Writes a published set's folder: settings, tokenizers, and the weights of `parts`."""
    from tiny_sd3 import t5_tokenizer

    from imagereward_jax.pipelines import published_settings

    for file, content in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(json.dumps(content))
    for part in parts:
        write_weights(folder / part, files[f"{part}/config.json"])
    clip = published_settings.tokenizer(
        "StableDiffusionPipeline", "tokenizer", "text_encoder", {"text_encoder": {"vocab_size": 49408}}, download=False
    )
    for part in ("tokenizer", "tokenizer_2"):
        (folder / part).symlink_to(clip)
    t5_tokenizer().save_pretrained(folder / "tokenizer_3")


def measure(files: dict[str, Any], parts: list[str], gigabytes: float) -> dict[str, float]:
    """`load` in a process of its own; the folder is gone afterwards."""
    with tempfile.TemporaryDirectory() as place:
        write_model(Path(place), files, parts)
        program = "import json, sys, published_weights as p; print(json.dumps(p.load(*json.loads(sys.argv[1]))))"
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", program, json.dumps([place, parts, gigabytes])]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def new_parts(files: dict[str, Any], seen: dict[str, str], name: str) -> list[str]:
    """The networks of a set that no set before had; they are noted in `seen`, by shapes."""
    configs = {file.split("/")[0]: content for file, content in files.items() if "/config" in file}
    shapes = {part: json.dumps(torch_shapes(config)) for part, config in configs.items()}
    parts = [part for part, text in shapes.items() if text not in seen]
    seen |= {shapes[part]: name for part in parts}
    return parts


def main(argv: list[str] | None = None) -> None:
    """Prints the networks that are loaded of each set, their size, seconds and peak memory."""
    from published_configs import SETS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="REGEX", help="sets to load (default: all)")
    parser.add_argument("--gigabytes", type=float, default=12.0, metavar="N", help="default: %(default)s")
    args = parser.parse_args(argv)
    chosen = [name for name in SETS if re.search(args.only, name)]
    if not chosen:
        parser.error(f"--only {args.only}: no set has such a name")
    seen, networks = {}, 0
    for name in chosen:
        parts = new_parts(SETS[name], seen, name)
        if not parts:
            print(f"{name}: networks of sets before", flush=True)
            continue
        found = measure(SETS[name], parts, args.gigabytes)
        networks += len(parts)
        size = f"{found['parameters']:,} parameters, {found['parameters'] * 2e-9:.1f} GB of files"
        print(
            f"{name}: {', '.join(parts)}: {size}, {found['seconds']:.0f} s, {found['peak'] * 1e-9:.1f} GB", flush=True
        )
    print(f"{len(chosen)} of {len(chosen)} sets, {networks} networks")


if __name__ == "__main__":
    main()
