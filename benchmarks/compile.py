"""Cost of compiling a network for hardware that need not be here: seconds, temporary memory, FLOPs.

    python benchmarks/compile.py --model sdxl --topology v5e:2x4                 # the gradient at 1024 px
    python benchmarks/compile.py --model sd15 --topology h200:1 --batch 8 --remat none blocks
    python benchmarks/compile.py --model sdxl --topology v5e:2x4 --pass forward
    python benchmarks/compile.py --model sdxl --topology v5e:2x4 --pass forward --quantization none int8
    python benchmarks/compile.py --network decoder --topology h200:1 --remat none blocks offload
    python benchmarks/compile.py --network scorer --topology h200:1 --batch 64 --remat none blocks

The program is the forward pass, or the gradient of a mean square: of a UNet and of ImageReward's scorer by all
weights, of a VAE's decoder by the latents. Weights and arithmetic are in `--dtype`. Every chip has all weights, their
gradients and `--batch` images. Topologies are those of `imagereward_jax.plan` ("cpu:1" is this machine) and need the
same packages.

`docs/benchmarks.md` compares with diffusers' last Flax models, compiled on the same machine in the same way. `--torch`
times PyTorch's `torch.compile` of diffusers' UNet on this machine in the same run: its first call, which includes one
execution, at the same size and in float32. It works for "cpu:1" alone, and is of use at small sizes (--model tiny).

`--quantization` compiles the network as `config.method.rollout_quantization` has it in the sampler's steps without
gradient: its kernels are arguments that are quantised already.

Prints JSON, a line for each `--remat` and `--quantization`: trace_seconds, compile_seconds, compile_cpu_seconds (of all
threads; compare these if the machine has other work), temp_bytes, host_temp_bytes, argument_bytes, output_bytes, flops
and flops_by_dtype (per chip, counted in the traced program; by the dtype of the factors), and versions. If the program
does not fit a chip, the line has the compiler's error instead.
"""

import argparse
import datetime
import itertools
import json
import time

from common import versions

from imagereward_jax.pipelines.families import SD1, SDXL
from imagereward_jax.plan import use_virtual_devices

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
    parser.add_argument("--network", choices=("unet", "decoder", "scorer"), default="unet")
    parser.add_argument("--topology", default="v5e:2x4")
    parser.add_argument("--pass", dest="kind", choices=("gradient", "forward"), default="gradient")
    parser.add_argument("--batch", type=int, default=1, help="images per chip")
    parser.add_argument("--resolution", type=int, help="pixels; default: the model's own")
    parser.add_argument("--remat", nargs="+", default=["blocks"], help="none, attention, blocks, full, offload")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--quantization", nargs="+", default=["none"], help="none, int8, fp8; with --pass forward")
    parser.add_argument("--level", choices=("O0", "O1", "O2", "O3"), help="of the compiler (config.optimization_level)")
    parser.add_argument("--torch", action="store_true", help="also torch.compile, on this machine")
    args = parser.parse_args()
    if args.kind == "gradient" and args.quantization != ["none"]:
        parser.error("--quantization is for --pass forward: gradients are never quantised")
    if args.network != "unet" and (args.torch or args.quantization != ["none"] or args.model == "tiny"):
        parser.error(f"--network {args.network}: not with --torch, --quantization or --model tiny")
    return args


def open_network(args, batch):
    """The network, its call and its inputs.

    Returns:
        ((dtype, remat) -> network, (network, inputs) -> result, {name: (shape, dtype)} of the inputs of a batch).
    """
    from flax import nnx

    from imagereward_jax.models.blip import ImageRewardModel
    from imagereward_jax.models.unet import UNet2DConditionModel
    from imagereward_jax.models.unet_config import UNet2DConditionConfig
    from imagereward_jax.models.vae import AutoencoderKL, AutoencoderKLConfig
    from imagereward_jax.rewards.checkpoint import V1

    latents = (args.resolution or SIZES[args.model]) // 8
    sample = {"sample": ((batch, latents, latents, 4), "float32")}
    if args.network == "decoder":
        kind, config = AutoencoderKL, AutoencoderKLConfig.from_dict(VAES[args.model])
        shapes = sample

        def call(network, arrays):
            return network.decode(arrays["sample"])
    elif args.network == "scorer":
        kind, config = ImageRewardModel, V1
        size, tokens = config.vision.image_size, ((batch, config.max_prompt_tokens), "int32")
        shapes = {"pixels": ((batch, size, size, 3), "float32"), "input_ids": tokens, "attention_mask": tokens}

        def call(network, arrays):
            return network(**arrays)
    else:
        settings = UNETS[args.model]
        kind, config = UNet2DConditionModel, UNet2DConditionConfig.from_dict(settings)
        context = (batch, 77, settings["cross_attention_dim"])
        shapes = {**sample, "timesteps": ((batch,), "int32"), "context": (context, "float32")}
        added = {"text_embeds": ((batch, 1280), "float32"), "time_ids": ((batch, 6), "float32")}
        shapes |= added if settings.get("addition_embed_type") else {}

        def call(network, arrays):
            extra = {name: arrays[name] for name in added if name in arrays} or None
            return network(arrays["sample"], arrays["timesteps"], arrays["context"], extra)

    return lambda dtype, remat: kind(config, dtype=dtype, remat=remat, rngs=nnx.Rngs(0)), call, shapes


def measure(args, remat, quantization):
    """Traces and compiles one program; returns its figures."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from imagereward_jax.models import quantized
    from imagereward_jax.models.hardware import target_platform
    from imagereward_jax.models.sharding import batch_over
    from imagereward_jax.planning.counts import flops_by_dtype
    from imagereward_jax.planning.report import options_for
    from imagereward_jax.planning.topologies import find_topology
    from imagereward_jax.training.mesh import batch_sharding, make_mesh, replicated, weight_shardings
    from imagereward_jax.training.program import placed
    from imagereward_jax.training.step import cast, compile_options

    topology = find_topology(args.topology)
    mesh = make_mesh(-1, 1, list(topology.devices()))
    batch, dtype = args.batch * topology.chips, jnp.dtype(args.dtype)
    make, call, shapes = open_network(args, batch)
    network = nnx.eval_shape(lambda: make(dtype, remat))
    layout, params = nnx.split(network)
    params = jax.eval_shape(lambda tree: cast(tree, dtype), nnx.to_pure_dict(params))
    if quantization != "none":
        params = jax.eval_shape(lambda tree: quantized.quantize(network, tree, quantization), params)

    def forward(params, arrays):
        return call(nnx.merge(layout, params), arrays)

    def loss(params, arrays):
        with batch_over(mesh):
            return jnp.square(forward(params, arrays)).mean()

    arrays = {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}
    gradient, by_inputs = args.kind == "gradient", args.network == "decoder"
    outputs = replicated(mesh) if gradient and not by_inputs else batch_sharding(mesh)
    start = time.perf_counter()
    with target_platform(topology.platform), batch_over(mesh):
        jitted = jax.jit(jax.grad(loss, int(by_inputs)) if gradient else forward, out_shardings=outputs)
        rows = jax.tree.map(lambda _: batch_sharding(mesh), arrays)
        traced = jitted.trace(placed(params, weight_shardings(mesh, params)), placed(arrays, rows))
    lowered = traced.lower()
    compiling, busy = time.perf_counter(), time.process_time()
    try:
        memory = lowered.compile(options_for(topology, compile_options(args.level))).memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"model": args.model, "topology": topology.name, "remat": remat, "error": str(error).splitlines()[0]}
    done, busy = time.perf_counter(), time.process_time() - busy
    flops = {name: count // topology.chips for name, count in flops_by_dtype(traced.jaxpr).items()}
    return {
        "model": "ImageReward-v1.0" if args.network == "scorer" else args.model,
        "network": args.network,
        "pass": args.kind,
        "topology": topology.name,
        "batch_per_chip": args.batch,
        "resolution": 224 if args.network == "scorer" else args.resolution or SIZES[args.model],
        "remat": remat,
        "quantization": quantization,
        "dtype": args.dtype,
        "optimization_level": args.level,
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
    """Times `torch.compile` until the first result of the same pass."""
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
