"""Resources that a run needs on a topology, as figures and as text."""

import time
from typing import Any

import jax

from imagereward_jax.assembly.run import AssembledRun, assemble
from imagereward_jax.config import ConfigError
from imagereward_jax.planning import counts
from imagereward_jax.planning.topologies import GIB, Topology
from imagereward_jax.training.mesh import batch_sharding, check_batch, check_remat, make_mesh, weight_shardings
from imagereward_jax.training.program import TrainingProgram


def plan(config: Any, topology: Topology) -> dict[str, Any]:
    """Compiles a config's training step for a `Topology` and counts its resources.

    Returns:
        dict for JSON; bytes and FLOPs are those of one chip and one training step. "fits": whether the step can run.
        "hbm_bytes": memory of a chip, "usable_bytes": its part for programs. "bytes_per_chip": by kind;
        "temporaries" (also "temp_bytes") are needed beside the arguments; None if the step was not compiled
        because its arguments alone do not fit, or if the compiler did not report them. "host_temp_bytes": host memory
        per chip (config.model.remat="offload"); None likewise. "flops_per_chip":
        of products and convolutions, recomputed ones included, with the longest sampler loop; the total
        of all chips divided by their number; "flops_per_chip_by_dtype" splits it by the dtype of the operands.
        "images_per_sample": for ranked groups, images of the largest group; else 1. "flops_per_image": of all
        chips, divided by the batch's images. "compiled_flops": by the compiler,
        with each loop body once; None on NVIDIA. "collective_bytes": by kind. "assumptions": facts that the plan has
        to assume.

    Raises:
        ConfigError: mesh or batch do not fit the number of chips, or remat does not fit their kind.
        TopologyError: see `Topology.devices`.
    """
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, list(topology.devices()))
    check_batch(mesh, config.batch_size, config.accumulation)
    check_remat(mesh, config.model.remat)
    run = assemble(config, mesh, abstract=True)
    program = TrainingProgram(config, run, mesh)
    sizes = bytes_per_device(run, program)
    start = time.monotonic()
    traced = program.trace(run, topology.platform)
    flops = counts.flops_by_dtype(traced.jaxpr, run.method.loop_trips)
    images = run.method.phases[0].source.images
    total_flops = flops.total()
    figures = {
        "topology": topology.name,
        "chips": topology.chips,
        "mesh": dict(mesh.shape),
        "batch_size": config.batch_size,
        "samples_per_chip": config.batch_size // topology.chips // config.accumulation,
        "images_per_sample": images // config.batch_size,
        "accumulation": config.accumulation,
        "trainable_parameters": sum(leaf.size for leaf in jax.tree.leaves(run.trainable)),
        "fits": False,
        "hbm_bytes": topology.hbm_bytes,
        "usable_bytes": topology.usable_bytes,
        "bytes_per_chip": {**sizes, "temporaries": None, "total": sum(sizes.values())},
        "temp_bytes": None,
        "host_temp_bytes": None,
        "flops_per_chip": total_flops // topology.chips,
        "flops_per_chip_by_dtype": {dtype: count // topology.chips for dtype, count in flops.items()},
        "flops_per_image": total_flops // images,
        "attention_kernels": counts.attention_kernels(traced.jaxpr),
        "compiled_flops": None,
        "collective_bytes": None,
        "trace_seconds": round(time.monotonic() - start, 1),
        "compile_seconds": None,
        "compiler_message": None,
        "assumptions": [*run.assumptions, *_of_the_level(config, topology)],
    }
    if sum(sizes.values()) <= topology.usable_bytes:
        _compile(figures, program, topology, traced, run.method.loop_trips)
    return figures


def bytes_per_device(run: AssembledRun, program: TrainingProgram) -> dict[str, int]:
    """Counts {kind: bytes} per device of a program's mesh (or `AbstractMesh`): state between steps, and a batch."""
    state, fixed, batches = program.abstract_state, program.fixed(run), program.abstract_batches()
    kinds = {
        "parameters": state.params,
        "moments": state.opt_state,
        "ema": (state.ema, state.copies),
        "frozen": (fixed.frozen, fixed.reference),
    }
    mesh = program.mesh
    sizes = {name: counts.bytes_on_a_device(tree, weight_shardings(mesh, tree)) for name, tree in kinds.items()}
    rows = jax.tree.map(lambda _: batch_sharding(mesh), batches)
    return {**sizes, "batch": counts.bytes_on_a_device(batches, rows)}


def _of_the_level(config, topology):
    level = config.optimization_level
    if topology.platform != "tpu" or level not in ("O0", "O1"):
        return ()
    return (
        f"compiled at config.optimization_level={level}; a run at the default level is faster, and with fsdp takes "
        "some 20 % more temporaries, as weights are gathered ahead of their use (docs/benchmarks.md)",
    )


def _compile(figures, program, topology, traced, loop_trips):
    """Fills in the figures of the compiled step."""
    options = options_for(topology, program.compile_options)
    lowered = traced.lower()
    start = time.monotonic()
    try:
        compiled = lowered.compile(options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        figures["compile_seconds"] = round(time.monotonic() - start, 1)
        figures["compiler_message"] = str(error).splitlines()[0]
        if used := counts.used_at_overflow(str(error)):
            _set_total(figures, used)
        return
    figures["compile_seconds"] = round(time.monotonic() - start, 1)
    memory = compiled.memory_analysis()
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    kept = memory.argument_size_in_bytes + outputs + memory.generated_code_size_in_bytes
    _set_total(figures, kept + memory.temp_size_in_bytes)
    figures["temp_bytes"] = figures["bytes_per_chip"]["temporaries"] = memory.temp_size_in_bytes
    figures["host_temp_bytes"] = memory.host_temp_size_in_bytes
    figures["fits"] = figures["bytes_per_chip"]["total"] <= figures["usable_bytes"]
    figures["collective_bytes"] = counts.collective_bytes(compiled.as_text(), loop_trips)
    if flops := (compiled.cost_analysis() or {}).get("flops"):
        figures["compiled_flops"] = int(flops)


def options_for(topology: Topology, options: dict[str, Any]) -> dict[str, Any]:
    """Returns options of `Lowered.compile`, changed for hardware that this machine does not have."""
    if topology.platform == "gpu":
        # A GPU would try out tiles for Triton's matrix products; without one the compiler takes a first guess, which
        # does not divide some of ours. So all go to cuBLAS here.
        return {**options, "xla_gpu_enable_triton_gemm": False}
    return options


def _set_total(figures, total):
    sizes = figures["bytes_per_chip"]
    arguments = sum(sizes[name] for name in ("parameters", "moments", "ema", "frozen", "batch"))
    sizes["total"] = total
    figures["temp_bytes"] = sizes["temporaries"] = max(0, total - arguments)


def verdict(figures: dict[str, Any]) -> str:
    """Formats one line: whether the run fits, with the memory."""
    sizes = figures["bytes_per_chip"]
    if figures["fits"]:
        free = figures["usable_bytes"] - sizes["total"]
        return f"fits: {gib(sizes['total'])} of {gib(figures['hbm_bytes'])} a chip, {gib(free)} free"
    if figures["compile_seconds"] is None:
        return (
            f"does not fit: weights, moments and batch alone take {gib(sizes['total'])} a chip, of which a program "
            f"may have {gib(figures['usable_bytes'])}"
        )
    return f"does not fit: {gib(sizes['total'])} a chip, of which a program may have {gib(figures['usable_bytes'])}"


def advice(figures: dict[str, Any], config: Any) -> list[str]:
    """Lists changes that help the run to fit, most effective first."""
    sizes, ways = figures["bytes_per_chip"], []
    arguments = sizes["parameters"] + sizes["moments"] + sizes["ema"] + sizes["frozen"]
    if config.mesh.fsdp < figures["chips"]:
        saved = arguments - arguments * config.mesh.fsdp // figures["chips"]
        ways.append(f"--config.mesh.fsdp={figures['chips']} (about {gib(saved)} a chip less)")
    if figures["samples_per_chip"] > 1:
        rounds = config.accumulation * figures["samples_per_chip"]
        ways.append(f"--config.accumulation={rounds}, one sample a chip at a time")
    if config.model.remat in ("none", "attention"):
        ways.append("--config.model.remat=blocks, which computes more again and keeps less")
    elif config.model.remat != "offload" and not figures["topology"].startswith("cpu:"):
        ways.append("--config.model.remat=offload, which keeps activations in the host's memory")
    if "lora" in config and not config.lora.rank:
        ways.append("--config.lora.rank=4, which trains low-rank parameters alone")
    ways.append("a larger slice, or chips with more memory (--search names the smallest that fits)")
    return ways


def as_text(figures: dict[str, Any], config: Any) -> str:
    """Formats the figures as text."""
    sizes = figures["bytes_per_chip"]
    lines = [
        f"{figures['topology']}: {figures['chips']} chip(s), mesh "
        + " x ".join(f"{name} {size}" for name, size in figures["mesh"].items())
        + f", batch {figures['batch_size']} in {figures['accumulation']} round(s) of "
        f"{figures['samples_per_chip']} sample(s) a chip"
        + (f", each of {figures['images_per_sample']} images" if figures["images_per_sample"] > 1 else ""),
        *(f"assumed: {text}" for text in figures["assumptions"]),
        verdict(figures),
        "",
        "memory a chip",
    ]
    for name, size in sizes.items():
        lines.append(f"  {name:<20}{'not known' if size is None else gib(size):>12}")
    if figures["host_temp_bytes"]:
        lines.append(f"host memory for a chip {gib(figures['host_temp_bytes']):>11}")
    lines += ["", f"FLOPs a chip and step   {figures['flops_per_chip'] / 1e12:.4g} T"]
    lines += [f"  {name:<22}{count / 1e12:.4g} T" for name, count in figures["flops_per_chip_by_dtype"].items()]
    lines.append(f"FLOPs an image          {figures['flops_per_image'] / 1e12:.4g} T")
    kernels = [f"{name} at {calls} place(s)" for name, calls in figures["attention_kernels"].items()]
    lines.append(f"fused attention         {', '.join(kernels) or 'none'}")
    if figures["collective_bytes"] is not None:
        lines.append("bytes moved a chip and step, by collective")
        moved = figures["collective_bytes"]
        lines += [f"  {name:<20}{gib(size):>12}" for name, size in moved.items()] or ["  none"]
    if figures["compile_seconds"] is not None:
        lines.append(f"traced in {figures['trace_seconds']} s, compiled in {figures['compile_seconds']} s")
    if not figures["fits"]:
        lines += ["", "What would help:", *(f"- {way}" for way in advice(figures, config))]
    return "\n".join(lines)


def as_error(error: Exception) -> ConfigError:
    """Converts a compiler's error to a `ConfigError` with its first line."""
    return ConfigError(f"the step does not compile for this hardware: {str(error).splitlines()[0]}")


def gib(size: int) -> str:
    """Formats bytes in GiB."""
    return f"{size / GIB:.2f} GiB"
