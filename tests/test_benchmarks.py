"""benchmarks/: names that scripts import exist, both sides of refl_step.py train the same, a trace is read."""

import ast
import sys
from pathlib import Path

import jax
import pytest
import tiny_sdxl

ROOT = Path(__file__).parents[1]
OPTIONS = ["--preset=tiny", "--batch=1", "--sampler-steps=1", "--iterations=1"]


def test_scripts_import_names_that_the_package_has():
    """Every `from imagereward_jax... import` of benchmarks/, convert/ and configs/, most of which no test runs."""
    scripts = [path for folder in ("benchmarks", "convert", "configs") for path in ROOT.glob(f"{folder}/*.py")]
    absent = []
    for path in scripts:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("imagereward_jax"):
                try:
                    exec(ast.unparse(node), {})
                except ImportError as error:
                    absent.append(f"{path.name}: {error}")
    assert not absent, absent


@pytest.fixture(scope="module")
def benchmarks():
    """(common, refl_step), with a preset of a tiny SDXL."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import common
        import refl_step
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    common.PRESETS["tiny"] = {"unet": tiny_sdxl.UNET, "vae": tiny_sdxl.VAE, "remat": "blocks"}
    yield common, refl_step
    for name in ("common", "refl_step"):
        del sys.modules[name]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_both_sides_of_a_step_run_and_train_as_many_parameters(benchmarks, rank):
    pytest.importorskip("peft")
    _, refl_step = benchmarks
    arguments = refl_step.parse_args([*OPTIONS, f"--lora={rank}"])
    ours = refl_step.run_ours(arguments)
    theirs = refl_step.run_torch(arguments)
    assert ours["trained_parameters"] == theirs["trained_parameters"] > 0
    assert len(ours["times"]) == len(theirs["times"]) == 1


@pytest.mark.parametrize("rank", [0, 2])
def test_as_many_parameters_train_as_with_diffusers_and_peft(benchmarks, rank):
    diffusers, peft = pytest.importorskip("diffusers"), pytest.importorskip("peft")
    _, refl_step = benchmarks
    unet = diffusers.UNet2DConditionModel(**tiny_sdxl.UNET)
    if rank:
        unet.requires_grad_(False).add_adapter(peft.LoraConfig(r=rank, target_modules=list(refl_step.ATTENTION)))
    initial, *_ = refl_step.our_problem(refl_step.parse_args([*OPTIONS, f"--lora={rank}"]), "none")
    trainable = jax.eval_shape(initial)[0]
    trained = sum(weight.numel() for weight in unet.parameters() if weight.requires_grad)
    assert sum(leaf.size for leaf in jax.tree.leaves(trainable)) == trained > 0


def test_model_flops_leave_out_what_is_recomputed(benchmarks):
    """One more step of the sampler costs one forward pass; the gradient by all weights costs two and the decoder's one
    (within 10 %: neither the first convolution's input nor what comes before the pictures has a gradient)."""
    from imagereward_jax.planning.counts import flops

    _, refl_step = benchmarks

    def traced(*options, remat="none", of=jax.grad):
        arguments = refl_step.parse_args([*OPTIONS, *options])
        shapes = refl_step.loss_inputs(refl_step.our_problem(arguments, remat)[0])
        return jax.make_jaxpr(of(refl_step.loss_function(arguments, remat)))(*shapes)

    loss = traced(of=lambda function: function)
    value, gradient = flops(loss, 1), flops(traced(), 1)
    unet = flops(loss, 2) - value
    decoder = value - 2 * unet
    assert gradient == pytest.approx(value + 2 * unet + decoder, rel=0.1)
    assert flops(traced(remat="blocks"), 1) > 1.1 * gradient
    assert flops(traced("--lora=2"), 1) < gradient


def test_a_trace_of_a_gpu_is_summed_by_operation(benchmarks, tmp_path):
    """Times by name without the number, over all streams; other planes are not the device's."""
    from jax.profiler import ProfileData

    common, _ = benchmarks
    events = "".join(
        f"events {{ metadata_id: {kind} offset_ps: {start} duration_ps: {length} }} "
        for kind, start, length in ((1, 0, 5000), (2, 5000, 1000), (3, 6000, 2000))
    )
    names = "".join(
        f'event_metadata {{ key: {key} value {{ id: {key} name: "{name}" }} }} '
        for key, name in ((1, "gemm_fusion_dot_12"), (2, "loop_add_fusion"), (3, "gemm_fusion_dot.3"))
    )
    lines = f'lines {{ id: 1 name: "Stream #13(Compute)" {events} }} lines {{ id: 2 name: "Steps" {events} }}'
    text = f'planes {{ name: "/device:GPU:0" {names} {lines} }} planes {{ name: "/host:CPU" {names} {lines} }}'
    folder = tmp_path / "plugins" / "profile" / "now"
    folder.mkdir(parents=True)
    (folder / "host.xplane.pb").write_bytes(ProfileData.text_proto_to_serialized_xspace(text))
    assert common.longest_operations(tmp_path) == [("gemm_fusion_dot", 0.875, 2), ("loop_add_fusion", 0.125, 1)]
    assert common.longest_operations(tmp_path / "nothing") == []
