"""Which runs may go on in a workdir."""

import json

import pytest

pytest.importorskip("ml_collections")

from imagereward_jax.recipes import default_config
from imagereward_jax.training.workdir import CONFIG, WorkdirError, check_workdir


def test_a_run_from_before_a_field_goes_on_with_its_default_only(tmp_path):
    """A later version of the package has more fields; what they do when left alone is what the run did."""
    config = default_config("refl")
    there = json.loads(config.to_json())
    del there["method"]["guidance_scale"], there["ema_decay"]
    (tmp_path / CONFIG).write_text(json.dumps(there))
    check_workdir(tmp_path, config)
    config.method.guidance_scale = 5.0
    with pytest.raises(WorkdirError, match=r"\(config\.method\.guidance_scale: 1\.0 there, 5\.0 now\)"):
        check_workdir(tmp_path, config)


def test_a_field_that_is_no_more_is_named(tmp_path):
    config = default_config("denoising")
    (tmp_path / CONFIG).write_text(json.dumps({**json.loads(config.to_json()), "gone": 3}))
    with pytest.raises(WorkdirError, match=r"config\.gone: 3 there, None now"):
        check_workdir(tmp_path, config)


def test_what_the_result_does_not_depend_on_may_change(tmp_path):
    config = default_config("refl")
    (tmp_path / CONFIG).write_text(json.dumps({**json.loads(config.to_json()), "compile_effort": 0.0}))
    config.optimization_level, config.mesh.fsdp, config.steps = "O0", 8, 5000
    check_workdir(tmp_path, config)
    config.method.guidance_scale, config.seed = 2.0, 1
    with pytest.raises(WorkdirError, match=r"config\.method\.guidance_scale: 1\.0 .* config\.seed: 0 there, 1 now"):
        check_workdir(tmp_path, config)
