"""The nodes for ComfyUI: against its contract, and in a real ComfyUI that COMFYUI and COMFYUI_PYTHON name."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import types
import urllib.request

import numpy as np
import pytest
from PIL import Image
from score_server import serving

from imagereward_jax.bulk_scoring.scorers import open_scorer
from imagereward_jax.integrations.__main__ import install
from imagereward_jax.rewards.functions import PythonReward
from imagereward_jax.rewards.http_client import ScoreClient, ServerUnavailable

torch = pytest.importorskip("torch", reason="ComfyUI's images are tensors")


class ExecutionBlocker:
    """`comfy_execution.graph_utils.ExecutionBlocker`."""

    def __init__(self, message):
        self.message = message


@pytest.fixture
def pack(tmp_path, monkeypatch):
    """The nodes, imported from where the command puts them as ComfyUI imports them."""
    graph_utils = types.SimpleNamespace(ExecutionBlocker=ExecutionBlocker)
    monkeypatch.setitem(sys.modules, "comfy_execution", types.ModuleType("comfy_execution"))
    monkeypatch.setitem(sys.modules, "comfy_execution.graph_utils", graph_utils)
    (tmp_path / "custom_nodes").mkdir()
    folder = install("comfyui", tmp_path)
    name = str(folder).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def light(images, prompts):
    return [np.nan if "none" in prompt else float(image.mean()) for image, prompt in zip(images, prompts)]


IMAGES = torch.tensor([0.2, 0.8, 0.4999])[:, None, None, None].expand(3, 8, 8, 3)
LIGHT = [51.0, 204.0, 127.0]  # 0.4999 x 255 = 127.47, cut as SaveImage does


def call(pack, name, *given, prompt="a cat"):
    cls = pack.NODE_CLASS_MAPPINGS[name]
    with serving(PythonReward(light)) as server:
        (settings,) = pack.ImageRewardServer().settings("", server.url, "", "default")
        return getattr(cls(), cls.FUNCTION)(IMAGES, prompt, settings, *given)


def test_nodes_keep_comfyuis_contract(pack):
    """Names, and as many outputs as types; every required input is an argument of the function."""
    assert set(pack.NODE_CLASS_MAPPINGS) == set(pack.NODE_DISPLAY_NAME_MAPPINGS)
    for cls in pack.NODE_CLASS_MAPPINGS.values():
        function, inputs = getattr(cls, cls.FUNCTION), cls.INPUT_TYPES()["required"]
        assert function.__code__.co_varnames[1 : function.__code__.co_argcount] == tuple(inputs)
        assert len(cls.RETURN_TYPES) == len(cls.RETURN_NAMES) == len(getattr(cls, "OUTPUT_IS_LIST", cls.RETURN_TYPES))
    assert pack.ImageRewardServer.INPUT_TYPES()["required"]["python"][1]["default"] == sys.executable


def test_scores_ranks_and_filters(pack):
    scores, text = call(pack, "ImageRewardScore")
    assert scores == LIGHT and text == "51.0000\n204.0000\n127.0000"
    images, scores = call(pack, "ImageRewardRank")
    assert scores == [204, 127, 51] and images.shape == IMAGES.shape
    assert images[:, 0, 0, 0].tolist() == IMAGES[[1, 2, 0], 0, 0, 0].tolist()
    images, scores = call(pack, "ImageRewardFilter", 127.0, 0)
    assert scores == [204, 127] and torch.equal(images, IMAGES[[1, 2]])
    images, scores = call(pack, "ImageRewardFilter", 0.0, 1)
    assert scores == [204] and torch.equal(images, IMAGES[[1]])


def test_nothing_above_the_limit_blocks_what_follows(pack, capsys):
    images, scores = call(pack, "ImageRewardFilter", 205.0, 0)
    assert isinstance(images, ExecutionBlocker) and isinstance(scores[0], ExecutionBlocker)
    assert "no image of 3 scores 205 or more (the best 204.0000)" in capsys.readouterr().out
    images, _ = call(pack, "ImageRewardFilter", -1e6, 0, prompt="none")
    assert isinstance(images, ExecutionBlocker), "no verdict is never kept"


def test_no_server_is_an_error_that_says_what_to_do(pack, url):
    (settings,) = pack.ImageRewardServer().settings("PickScore", url, "", "default")
    with pytest.raises(RuntimeError, match=r"start one there .python -m imagereward_jax.serve --reward PickScore"):
        pack.ImageRewardScore().score(IMAGES, "a cat", settings)


COMFYUI, COMFYUI_PYTHON = os.environ.get("COMFYUI"), os.environ.get("COMFYUI_PYTHON")
COLOURS = (0x000000, 0xFF0000, 0x30A0FF)


def workflow(server, limit):
    """Three images of one colour each, ranked and filtered, and what is left saved; the scores as text."""
    nodes = {
        str(number): {
            "class_type": "EmptyImage",
            "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": colour},
        }
        for number, colour in enumerate(COLOURS)
    }
    nodes |= {
        "two": {"class_type": "ImageBatch", "inputs": {"image1": ["0", 0], "image2": ["1", 0]}},
        "all": {"class_type": "ImageBatch", "inputs": {"image1": ["two", 0], "image2": ["2", 0]}},
        "server": {"class_type": "ImageRewardServer", "inputs": server},
    }
    given = {"prompt": "a large red circle at the top left", "server": ["server", 0]}
    nodes |= {
        "score": {"class_type": "ImageRewardScore", "inputs": {"images": ["all", 0], **given}},
        "rank": {"class_type": "ImageRewardRank", "inputs": {"images": ["all", 0], **given}},
        "keep": {
            "class_type": "ImageRewardFilter",
            "inputs": {"images": ["rank", 0], "limit": limit, "count": 2, **given},
        },
        "text": {"class_type": "PreviewAny", "inputs": {"source": ["score", 1]}},
        "save": {"class_type": "SaveImage", "inputs": {"images": ["keep", 0], "filename_prefix": "imagereward"}},
    }
    return nodes


@pytest.mark.skipif(not (COMFYUI and COMFYUI_PYTHON), reason="COMFYUI and COMFYUI_PYTHON name no ComfyUI")
def test_in_a_real_comfyui(tmp_path, python, url):
    """Its own executor runs the workflow: texts, order and saved images are those of the scorer; a limit that nothing
    reaches saves nothing, and is no error. The server that it started ends when it is killed."""
    (tmp_path / "custom_nodes").mkdir()
    (tmp_path / "extra.yaml").write_text(f"tested:\n  base_path: {tmp_path}\n  custom_nodes: custom_nodes\n")
    install("comfyui", tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    command = [COMFYUI_PYTHON, "main.py", "--cpu", "--port", str(port), "--disable-api-nodes"]
    command += ["--extra-model-paths-config", str(tmp_path / "extra.yaml"), "--output-directory", str(tmp_path / "out")]
    scorer = open_scorer("tiny-shapes")
    pixels = [np.array([c >> 16, c >> 8 & 255, c & 255], np.uint8) * np.ones((64, 64, 1), np.uint8) for c in COLOURS]
    expected = scorer.score("a large red circle at the top left", pixels)
    with open(tmp_path / "log", "w") as log:
        comfyui = subprocess.Popen(command, cwd=COMFYUI, stdout=log, stderr=log)
        try:
            settings = {"reward": "tiny-shapes", "url": url, "python": python, "device": "cpu"}
            outputs = run_workflow(port, workflow(settings, limit=min(expected) - 1))
            blocked = run_workflow(port, workflow(settings, limit=1e6))
            assert ScoreClient(url).health()["served"] > 0
        finally:
            comfyui.kill()
            comfyui.wait()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and answers(url):
        time.sleep(0.2)
    assert not answers(url)
    text = outputs["text"]["text"][0]
    np.testing.assert_allclose([float(line) for line in text.split()], expected, atol=1e-4)
    saved = [np.asarray(Image.open(tmp_path / "out" / image["filename"])) for image in outputs["save"]["images"]]
    best = np.argsort(expected)[::-1][:2]
    assert len(saved) == 2 and all(np.array_equal(image, pixels[row]) for image, row in zip(saved, best))
    assert "save" not in blocked


def answers(url):
    try:
        return ScoreClient(url).health()
    except ServerUnavailable:
        return None


def run_workflow(port, nodes):
    """Queues a workflow; returns the outputs of its nodes."""

    def ask(path, body=None):
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as response:
            return json.load(response)

    deadline, number = time.monotonic() + 240, None
    while time.monotonic() < deadline:
        try:
            number = number or ask("/prompt", json.dumps({"prompt": nodes}).encode())["prompt_id"]
            if found := ask(f"/history/{number}").get(number):
                assert found["status"]["status_str"] == "success", found["status"]
                return found["outputs"]
        except urllib.error.URLError as error:
            assert not isinstance(error, urllib.error.HTTPError), error.read()
        time.sleep(0.3)
    raise TimeoutError("ComfyUI did not answer")
