"""Both clients in a Python whose NumPy and Pillow this package cannot run with; OTHER_PYTHON names one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import webui_stand_in as webui

from imagereward_jax.bulk_scoring.scorers import open_scorer
from imagereward_jax.integrations.__main__ import install

OTHER_PYTHON = os.environ.get("OTHER_PYTHON")
PROMPT = "a large red circle at the top left"
# Programs of their own in one process: the web UI's script, which starts the server, then ComfyUI's node.
PROGRAM = """
import importlib.util, json, sys, types
import numpy, PIL
tests, extension, node, python, url, prompt = sys.argv[1:]
sys.path[:0] = [tests, extension]
import webui_stand_in as webui
opts = webui.options(samples_save=False, grid_save=False, return_grid=False)
graph = types.ModuleType("comfy_execution.graph_utils")
graph.ExecutionBlocker = object
sys.modules.update(webui.make_modules(opts) | {"comfy_execution": types.ModuleType("c"), graph.__name__: graph})

def load(name, path, **options):
    spec = importlib.util.spec_from_file_location(name, path, **options)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

script = load("script", extension + "/scripts/imagereward_scores.py")
nodes = load("nodes", node + "/__init__.py", submodule_search_locations=[node])
request = webui.Processing(opts, prompt="[a cat:" + prompt + ":0.5]")
done = script.Script().run(request, False, 0.0, False, "tiny-shapes", url, python, "cpu")
first = [float(text.rpartition(": ")[2]) for text in done.infotexts]

class Tensor:  # what a node sees of PyTorch's
    def __init__(self, array): self.array = array
    def cpu(self): return self
    def numpy(self): return self.array

pixels = numpy.stack([numpy.asarray(webui.make_image(seed), numpy.float32) / 255 for seed in range(100, 104)])
server = {"reward": "tiny-shapes", "url": url, "python": "", "device": "cpu"}
second = nodes.score_images(Tensor(pixels), prompt, server)
versions = [sys.version.split()[0], numpy.__version__, PIL.__version__]
print(json.dumps([versions, first, second, script.server.stop()]))
"""


@pytest.mark.skipif(not OTHER_PYTHON, reason="OTHER_PYTHON names no Python with an older NumPy and Pillow")
def test_two_programs_share_a_server_from_another_environment(tmp_path, python, url):
    """Scores of the web UI's script and of ComfyUI's node are those of the scorer here, to the 4 digits shown."""
    for name, folder in (("webui", "extensions"), ("comfyui", "custom_nodes")):
        (tmp_path / name / folder).mkdir(parents=True)
    extension, node = (install(name, tmp_path / name) for name in ("webui", "comfyui"))
    arguments = [Path(__file__).parent, extension, node, python, url, PROMPT]
    done = subprocess.run(
        [OTHER_PYTHON, "-I", "-c", PROGRAM, *map(str, arguments)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    versions, first, second, stopped = json.loads(done.stdout.splitlines()[-1])
    assert versions[1:] != [np.__version__, sys.modules["PIL"].__version__], "the same pins as here"
    expected = open_scorer("tiny-shapes").score(PROMPT, [webui.make_image(seed) for seed in range(100, 104)])
    np.testing.assert_allclose(first, expected, atol=1e-4)
    np.testing.assert_allclose(second, expected, atol=1e-4)
    assert stopped == "The server is stopped."
    print(versions, expected)
