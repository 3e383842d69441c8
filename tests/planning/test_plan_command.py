"""The whole command on virtual CPU devices, and what it says of bad input."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import child
import pytest
import tiny_sd1

pytest.importorskip("ml_collections")

from imagereward_jax import plan
from imagereward_jax.planning import report, topologies
from imagereward_jax.planning.topologies import TopologyError, find_topology

CONFIGS = Path(__file__).parents[2] / "configs"


def command(*arguments, config="shapes_pretrain"):
    env = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    line = [sys.executable, "-m", "imagereward_jax.plan", f"--config={CONFIGS / config}.py", *map(str, arguments)]
    return subprocess.run(line, env=env, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def options(tmp_path_factory, tiny_reward_folder):
    folder = tmp_path_factory.mktemp("plan")
    tiny_sd1.save_one_level(folder)
    for weights in (folder / "model").rglob("*.safetensors"):
        weights.unlink()  # plans need none
    return [
        f"--config.model.path={folder / 'model'}",
        f"--config.reward.path={tiny_reward_folder}",
        *("--config.model.from_scratch=False", "--config.model.vae_from=", "--config.data.image_size=16"),
        *("--config.batch_size=16", "--config.mesh.fsdp=4"),
    ]


def test_plans_for_virtual_devices(options):
    done = command("--topology", "cpu:8", "--json", *options)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["fits"] and figures["mesh"] == {"data": 2, "fsdp": 4} and figures["samples_per_chip"] == 2
    sizes = figures["bytes_per_chip"]
    total = sizes.pop("total")
    assert sizes["temporaries"] == figures["temp_bytes"] > 0
    assert sizes["moments"] >= 2 * sizes["parameters"] > figures["trainable_parameters"]  # between 4 / 4 and 4 bytes
    assert 0 < total <= figures["usable_bytes"] <= figures["hbm_bytes"]
    assert figures["flops_per_chip"] * 8 == pytest.approx(figures["flops_per_image"] * 16, rel=1e-6)
    assert figures["collective_bytes"]["all-reduce"] > 0 and figures["compile_seconds"] > 0


def test_plans_the_training_of_a_scorer():
    """Two groups; what the plan does not know of their sizes is said."""
    options = ("--config.batch_size=2", "--config.data.groups=nowhere.json")
    done = command("--topology", "cpu:2", *options, config="imagereward_tiny")
    assert done.returncode == 0, done.stderr
    assert "batch 2 in 1 round(s) of 1 sample(s) a chip, each of 9 images" in done.stdout
    assert "assumed: config.data.groups='nowhere.json' is not here" in done.stdout and "fits: " in done.stdout


@pytest.mark.slow
def test_searches_for_the_largest_batch_and_the_smallest_slice(options):
    """With the real compiler: what one more step of the search would need is more than there is."""
    done = command("--topology", "cpu:2", "--json", "--search", *options, "--config.mesh.fsdp=1")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    largest, tried = figures["largest_batch"], {}
    for line in done.stderr.splitlines():
        if found := re.match(r"(\d+) sample\(s\) a chip: (fits|does not fit): ([\d.]+) GiB", line):
            tried[int(found[1])] = (found[2] == "fits", float(found[3]))
    best, more = largest["samples_per_chip"], min(n for n, (fits, _) in tried.items() if not fits)
    assert (
        largest["batch_size"] == 2 * best
        and tried[best][0]
        and max(n for n, (fits, _) in tried.items() if fits) == best
    )
    assert tried[best][1] <= figures["usable_bytes"] / 2**30 < tried[more][1] and more - best <= best / 8
    assert figures["smallest_slice"] == "cpu:1"


@pytest.mark.parametrize(
    ("topology", "fields", "said"),
    [
        ("cpu:1", (), "error: config.mesh: data=1 x fsdp=4"),
        ("cpu:1", ("--config.mesh.fsdp=1", "--config.model.remat=offload"), "pass --config.model.remat=blocks"),
        ("v5e:2x5", (), "error: --topology v5e:2x5: unknown (did you mean 'v5e:2x4'?); v5e comes as v5e:1x1,"),
    ],
)
def test_bad_input_is_refused(options, topology, fields, said, monkeypatch, capsys):
    """Before anything is compiled, with status 2 and one line."""
    for name in ("JAX_PLATFORMS", "XLA_FLAGS"):  # what the command sets
        monkeypatch.setenv(name, os.environ.get(name, ""))
    recipe = f"--config={CONFIGS / 'shapes_pretrain.py'}"
    assert plan.main([recipe, "--topology", topology, *options, *fields]) == 2
    assert said in capsys.readouterr().err


def test_unknown_topologies_name_the_nearest():
    with pytest.raises(TopologyError, match=r"did you mean 'h200:8'.*h200 comes as h200:1, h200:2, h200:4, h200:8"):
        find_topology("h200:9")
    with pytest.raises(TopologyError, match=r"kinds: v4, v5e, v5p, v6e, a100, h100, h200, b200, cpu"):
        find_topology("gtx1080")


@pytest.mark.parametrize("name, extra", [("v5e:2x4", "tpu"), ("h200:8", "cuda13")])
def test_what_to_install_is_said(name, extra, monkeypatch):
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TopologyError, match=rf"pip install 'imagereward-jax\[{extra}\]'"):
        find_topology(name).devices()


EVERY_SLICE = """
import json
from imagereward_jax.planning.topologies import TPUS, find_topology
slices = [find_topology(f"{kind}:{shape}") for kind, (shapes, _) in TPUS.items() for shape in shapes]
print(json.dumps([(topology.name, topology.chips, len(topology.devices())) for topology in slices]))
"""


def test_libtpu_knows_every_slice():
    """From one chip alone (v5e:1x1) to whole pods, with as many devices as the name says chips."""
    pytest.importorskip("libtpu")
    found = child.run(EVERY_SLICE)
    assert len(found) > 20 and all(chips == devices for _, chips, devices in found), found


@pytest.mark.parametrize("there, unfit", [("0.0.42.1", False), ("0.0.42", False), ("0.0.421", True), ("0.0.51", True)])
def test_a_libtpu_of_another_version_is_named(there, unfit, monkeypatch):
    monkeypatch.setattr(topologies.metadata, "version", lambda name: there)
    monkeypatch.setattr(topologies.metadata, "requires", lambda name: ["x", "libtpu==0.0.42.*; extra == 'tpu'"])
    said = topologies._libtpu_unfit()
    assert (said is not None) is unfit
    assert not unfit or (f"libtpu {there} is installed" in said and "pip install 'libtpu==0.0.42.*'" in said)


def test_says_what_does_not_fit_and_what_would_help():
    from imagereward_jax.recipes import default_config

    gib, config = 2**30, default_config("refl")
    config.accumulation = 2
    sizes = {"parameters": 4 * gib, "moments": 8 * gib, "ema": 0, "frozen": 2 * gib, "batch": 0}
    figures = {
        "topology": "v5e:2x4", "chips": 8, "mesh": {"data": 8, "fsdp": 1}, "batch_size": 32, "accumulation": 2,
        "samples_per_chip": 2, "images_per_sample": 1, "assumptions": [], "fits": False,
        "hbm_bytes": 16 * gib, "usable_bytes": 15.75 * gib,
        "bytes_per_chip": {**sizes, "temporaries": 6 * gib, "total": 20 * gib},
        "flops_per_chip": 1e12,
        "flops_per_chip_by_dtype": {"bfloat16": 3e11, "int8": 7e11}, "flops_per_image": 1e12,
        "attention_kernels": {"pallas": 2}, "host_temp_bytes": None, "collective_bytes": None,
        "trace_seconds": 1, "compile_seconds": 2,
    }  # fmt: skip
    text = report.as_text(figures, config)
    assert "does not fit: 20.00 GiB a chip, of which a program may have 15.75 GiB" in text
    assert "fused attention         pallas at 2 place(s)" in text
    assert "- --config.mesh.fsdp=8 (about 12.25 GiB a chip less)\n- --config.accumulation=4, one sample" in text
    assert "\n- --config.model.remat=offload, which" in text and "host memory" not in text
    config.model.remat, figures["host_temp_bytes"] = "attention", 3 * gib
    text = report.as_text(figures, config)
    assert "\n- --config.model.remat=blocks, which" in text and "host memory for a chip    3.00 GiB" in text
    config.model.remat = "offload"
    text = report.as_text(figures, config)
    assert "--config.model.remat" not in text and "--config.lora.rank=4" in text and "sample(s) a chip\n" in text
    config.model.remat, figures["topology"] = "blocks", "cpu:8"
    assert "--config.model.remat" not in report.as_text(figures, config)
    text = report.as_text({**figures, "images_per_sample": 9, "assumptions": ["so it is"]}, default_config("ranking"))
    assert "sample(s) a chip, each of 9 images\nassumed: so it is\ndoes not fit" in text and "lora" not in text


@pytest.mark.parametrize(
    "name, level, said", [("v5e:2x4", "O0", True), ("v5e:2x4", None, False), ("cpu:8", "O0", False)]
)
def test_a_level_that_the_run_may_not_have_is_named(name, level, said):
    from imagereward_jax.recipes import default_config

    config = default_config("refl")
    config.optimization_level = level
    assert bool(report._of_the_level(config, find_topology(name))) is said
