"""How far DDPO's ratios are from 1 before the first update: rounding in the two programs that sample and update.

    python benchmarks/ddpo_ratio.py [--dtypes float32 bfloat16]

The built-in model, DDIM at eta 1 with guidance. Prints JSON, a line for each dtype and each way to compile: as a run
does, and with the compiler free to leave out roundings to bfloat16.
"""

import argparse
import json

import jax
import jax.numpy as jnp
import numpy as np
from common import versions

from imagereward_jax.data.prompts import load_prompts
from imagereward_jax.methods.base import STEPS, Models
from imagereward_jax.methods.ddpo import Config
from imagereward_jax.methods.policy_gradient import make_loss, make_sample, make_tables
from imagereward_jax.pipelines.families import open_pipeline
from imagereward_jax.training.step import cast, compile_options


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    return parser.parse_args()


def ratio_errors(args, dtype, options):
    """[steps] the largest |ratio - 1| of all samples at each step, and [steps] the ratios' mean square log."""
    pipeline = open_pipeline("tiny-shapes", dtype=dtype)
    params = jax.device_put(cast(jax.tree.map(jnp.asarray, pipeline.load_params()), jnp.dtype(dtype)))
    side = pipeline.default_size
    config = Config(num_steps=args.steps, guidance_scale=3.0, height=side, width=side)
    tables = make_tables(config, pipeline)
    prompts = list(load_prompts("shapes:held_out"))[: args.samples]
    encode = jax.jit(pipeline.encode_prompts)
    texts = {"cond": prompts, "negative_cond": [""] * len(prompts)}
    batch = {name: encode(params, pipeline.tokenize(some)) for name, some in texts.items()}
    sample = jax.jit(make_sample(config, pipeline), compiler_options=options)
    _, rows = sample(Models(params, tables=tables), batch, jax.random.key(0))
    loss = make_loss(config, pipeline)

    def of_unet(unet, batch):
        return loss(Models({**params, "unet": unet}, tables=tables.noisy), batch, None)

    gradient = jax.jit(jax.value_and_grad(of_unet, has_aux=True), compiler_options=options)
    ones, found = np.ones(len(prompts), np.float32), []
    for step in range(args.steps):
        at_step = {name: array[:, step] for name, array in rows[STEPS].items()}
        index = {"step": np.full(len(prompts), step, np.int32), "update": np.zeros(len(prompts), np.int32)}
        (_, metrics), _ = gradient(params["unet"], {**batch, **at_step, **index, "advantage": ones})
        found.append((float(metrics["ratio_error"].value), 2 * float(metrics["approx_kl"])))
    return np.array(found).T


def main():
    args = parse_args()
    for dtype in args.dtypes:
        for on_policy in (True, False):
            largest, squares = ratio_errors(args, dtype, compile_options(None, on_policy=on_policy))
            figures = {
                "dtype": dtype,
                "compiled": "as in a run" if on_policy else "free to leave out roundings",
                "largest": float(largest.max()),
                "root_mean_square": float(np.sqrt(squares.mean())),
                "largest_by_step": [float(f"{error:.2g}") for error in largest],
            }
            print(json.dumps(figures | {"versions": versions("jax", "flax")}), flush=True)


if __name__ == "__main__":
    main()
