"""What compiling a UNet costs, for hardware that need not be here: seconds, temporary memory, FLOPs.

    python benchmarks/compile.py --model sdxl --topology v5e:2x4                 # the gradient at 1024 px
    python benchmarks/compile.py --model sd15 --topology h200:1 --batch 8 --remat none blocks
    python benchmarks/compile.py --model sdxl --topology v5e:2x4 --pass forward
    python benchmarks/compile.py --model sdxl --topology v5e:2x4 --pass forward --quantization none int8

The program is the gradient of a mean square by all weights, or the network alone: bfloat16 weights and arithmetic,
weights and gradients on every chip whole, `--batch` pictures a chip. Topologies are those of `imagereward_jax.plan`
("cpu:1" is this machine), with the same packages needed.

`docs/benchmarks.md` compares with diffusers' last Flax models, compiled on the same machine in the same way. With
`--torch` PyTorch's `torch.compile` of diffusers' UNet is timed on this machine in the same run (its first call, that
is with one execution, at the same size and in float32): only for "cpu:1", and of use at small sizes (--model tiny).

`--quantization` compiles the network as `config.method.rollout_quantization` has it in the sampler's steps without
gradient: its kernels are arguments that are quantised already.

Prints JSON, a line for each `--remat` and `--quantization`: trace_seconds, compile_seconds, compile_cpu_seconds (of all
threads; what to compare on a machine that has other work), temp_bytes, host_temp_bytes, argument_bytes, output_bytes,
flops and flops_by_dtype (of one chip, from the traced program; by what is multiplied), and what it ran on; for a
program that a chip has no room for, the compiler's words.
"""

import argparse
import datetime
import itertools
import json
import time

from common import versions

from imagereward_jax.plan import use_virtual_devices
from imagereward_jax.planning.sizes import SD1, SDXL

PACKAGES = ("jax", "jaxlib", "flax", "libtpu", "jax-cuda13-plugin", "torch", "diffusers")
SIZES = {"sd15": 512, "sdxl": 1024, "tiny": 64}
TINY = {
    "sample_size": 8,
    "block_out_channels": [32, 64],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 4],
    "attention_head_dim": [2, 4],
    "cross_attention_dim": 64,
    "use_linear_projection": True,
    "norm_num_groups": 8,
}
VAES = {"sd15": SD1["vae"], "sdxl": SDXL["vae"]}
UNETS = {"sd15": SD1["unet"], "sdxl": SDXL["unet"], "tiny": TINY}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="sdxl")
    parser.add_argument("--network", choices=("unet", "decoder"), default="unet")
    parser.add_argument("--topology", default="v5e:2x4")
    parser.add_argument("--pass", dest="kind", choices=("gradient", "forward"), default="gradient")
    parser.add_argument("--batch", type=int, default=1, help="pictures a chip")
    parser.add_argument("--resolution", type=int, help="pixels; default: the model's own")
    parser.add_argument("--remat", nargs="+", default=["blocks"], help="none, attention, blocks, full, offload")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--quantization", nargs="+", default=["none"], help="none, int8, fp8; with --pass forward")
    parser.add_argument("--effort", type=float, default=0.0, help="of the compiler, -1 to 1 (config.compile_effort)")
    parser.add_argument("--torch", action="store_true", help="also torch.compile, on this machine")
    args = parser.parse_args()
    if args.kind == "gradient" and args.quantization != ["none"]:
        parser.error("--quantization is for --pass forward: gradients are never quantised")
    if args.network == "decoder" and (args.torch or args.quantization != ["none"] or args.model == "tiny"):
        parser.error("--network decoder is for --model sd15 and sdxl, without --torch and --quantization")
    return args


def inputs(network, settings, batch, latents):
    """Shapes of the network's inputs, by name."""
    if network == "decoder":
        return {"sample": (batch, latents, latents, 4)}
    shapes = {"sample": (batch, latents, latents, 4), "context": (batch, 77, settings["cross_attention_dim"])}
    if settings.get("addition_embed_type"):
        shapes |= {"text_embeds": (batch, 1280), "time_ids": (batch, 6)}
    return shapes


def measure(args, remat, quantization):
    """The figures of one program."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from imagereward_jax.models import quantized
    from imagereward_jax.models.platform import batch_over, target_platform
    from imagereward_jax.models.unet import UNet2DConditionConfig, UNet2DConditionModel
    from imagereward_jax.models.vae import AutoencoderKL, AutoencoderKLConfig
    from imagereward_jax.planning.counts import flops_by_dtype
    from imagereward_jax.planning.program import placed
    from imagereward_jax.planning.report import options_for
    from imagereward_jax.planning.topologies import find_topology
    from imagereward_jax.training.mesh import batch_sharding, make_mesh, replicated, weight_shardings
    from imagereward_jax.training.step import cast

    topology = find_topology(args.topology)
    mesh = make_mesh(-1, 1, list(topology.devices()))
    settings, dtype = (UNETS if args.network == "unet" else VAES)[args.model], jnp.dtype(args.dtype)
    if args.network == "unet":
        kind, config = UNet2DConditionModel, UNet2DConditionConfig.from_dict(settings)
    else:
        kind, config = AutoencoderKL, AutoencoderKLConfig.from_dict(settings)
    network = nnx.eval_shape(lambda: kind(config, dtype=dtype, remat=remat, rngs=nnx.Rngs(0)))
    layout, params = nnx.split(network)
    params = jax.eval_shape(lambda tree: cast(tree, dtype), nnx.to_pure_dict(params))
    if quantization != "none":
        params = jax.eval_shape(lambda tree: quantized.quantize(network, tree, quantization), params)

    def forward(params, arrays):
        if args.network == "decoder":
            return nnx.merge(layout, params).decode(arrays["sample"])
        added = {name: arrays[name] for name in ("text_embeds", "time_ids") if name in arrays} or None
        return nnx.merge(layout, params)(arrays["sample"], arrays["timesteps"], arrays["context"], added)

    def loss(params, arrays):  # the UNet's gradient is by all weights, the decoder's by the latents
        with batch_over(mesh):
            return jnp.square(forward(params, arrays)).mean()

    batch = args.batch * topology.chips
    shapes = inputs(args.network, settings, batch, (args.resolution or SIZES[args.model]) // 8)
    arrays = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    by = 1
    if args.network == "unet":
        arrays["timesteps"], by = jax.ShapeDtypeStruct((batch,), jnp.int32), 0
    gradient = args.kind == "gradient"
    outputs = replicated(mesh) if gradient and by == 0 else batch_sharding(mesh)
    start = time.perf_counter()
    with target_platform(topology.platform), batch_over(mesh):
        jitted = jax.jit(jax.grad(loss, by) if gradient else forward, out_shardings=outputs)
        rows = jax.tree.map(lambda _: batch_sharding(mesh), arrays)
        traced = jitted.trace(placed(params, weight_shardings(mesh, params)), placed(arrays, rows))
    lowered = traced.lower()
    compiling, busy = time.perf_counter(), time.process_time()
    try:
        memory = lowered.compile(options_for(topology, args.effort)).memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"model": args.model, "topology": topology.name, "remat": remat, "error": str(error).splitlines()[0]}
    done, busy = time.perf_counter(), time.process_time() - busy
    flops = {name: count // topology.chips for name, count in flops_by_dtype(traced.jaxpr).items()}
    return {
        "model": args.model,
        "network": args.network,
        "pass": args.kind,
        "topology": topology.name,
        "batch_per_chip": args.batch,
        "resolution": args.resolution or SIZES[args.model],
        "remat": remat,
        "quantization": quantization,
        "dtype": args.dtype,
        "effort": args.effort,
        "trace_seconds": round(compiling - start, 1),
        "compile_seconds": round(done - compiling, 1),
        "compile_cpu_seconds": round(busy, 1),
        "temp_bytes": memory.temp_size_in_bytes,
        "host_temp_bytes": memory.host_temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "flops": sum(flops.values()),
        "flops_by_dtype": flops,
    }


def measure_torch(args):
    """Seconds that `torch.compile` takes until the first result of the same pass."""
    import torch
    from diffusers import UNet2DConditionModel

    settings = UNETS[args.model]
    if settings.get("addition_embed_type"):
        raise SystemExit("--torch: sd15 and tiny only")
    unet = UNet2DConditionModel(**settings)
    compiled = torch.compile(unet)
    sample = torch.randn(args.batch, 4, *[(args.resolution or SIZES[args.model]) // 8] * 2)
    context = torch.randn(args.batch, 77, settings["cross_attention_dim"])
    start = time.perf_counter()
    with torch.set_grad_enabled(args.kind == "gradient"):
        loss = compiled(sample, 1, context).sample.square().mean()
        if args.kind == "gradient":
            loss.backward()
    return {"torch_compile_seconds": round(time.perf_counter() - start, 1)}


def main():
    args = parse_args()
    if args.torch and args.topology != "cpu:1":
        raise SystemExit("--torch compiles for this machine: pass --topology cpu:1")
    use_virtual_devices(args.topology)
    for remat, quantization in itertools.product(args.remat, args.quantization):
        figures = measure(args, remat, quantization)
        if args.torch:
            figures |= measure_torch(args)
        figures |= {"date": datetime.date.today().isoformat(), "versions": versions(*PACKAGES)}
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
