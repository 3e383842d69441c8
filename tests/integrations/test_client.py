"""The client that other programs carry: alone with the standard library, and a server that it starts and stops."""

import os
import subprocess
import sys

import pytest
from score_server import grey, serving

from imagereward_jax.bulk_scoring.scorers import open_scorer
from imagereward_jax.integrations.__main__ import PROGRAMS, install, main
from imagereward_jax.rewards.http_client import LocalServer, ServerError

ALONE = """
import sys
sys.path.insert(0, sys.argv[1])
import imagereward_client as client
scored = client.ScoreClient(sys.argv[2]).score([open(path, "rb").read() for path in sys.argv[3:]], ["a", "b"])
assert not {"numpy", "PIL", "jax"} & set(sys.modules)
print(scored.scores, client.installed_python())
"""


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_copied_client_needs_only_the_standard_library(program, tmp_path):
    """Run by a Python that sees no installed package (-I -S), from the folder that the command made."""
    (tmp_path / PROGRAMS[program][0]).mkdir()
    for _ in range(2):  # the same command again replaces its own folder
        folder = install(program, tmp_path, python="/env/bin/python")
    for number in (40, 9):
        (tmp_path / f"{number}.png").write_bytes(grey(number, 8 if number == 9 else 64))
    reward = open_scorer("jpeg-compressibility")
    with serving(reward) as server:
        images = [str(tmp_path / f"{number}.png") for number in (40, 9)]
        command = [sys.executable, "-I", "-S", "-c", ALONE, str(folder), server.url, *images]
        done = subprocess.run(command, capture_output=True, text=True)
    expected = [reward.score("a", image) for image in images]
    assert expected[0] < expected[1]
    assert done.stdout == f"{expected} /env/bin/python\n", done.stderr


def test_the_client_is_of_python_3_9():
    """Its syntax, by Python's own parser: web UIs run in 3.10."""
    import ast

    for path in {path for _, files in PROGRAMS.values() for path in files.values()}:
        ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 9))


def test_a_server_is_started_once_scores_and_is_stopped(python, url, monkeypatch):
    """From an environment of its own: what steers this Python (PYTHONPATH) is not passed on."""
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    monkeypatch.setenv("PYTHONHOME", "/nowhere")
    local = LocalServer()
    try:
        with pytest.raises(ServerError, match=r"did not start: error: .*did you mean 'jpeg-compressibility'"):
            local.connect(url, "jpeg-compresibility", python=python, device="cpu")
        assert local.process is None
        client = local.connect(url, "jpeg-compressibility", python=python, device="cpu")
        process = local.process
        assert client.score([grey(9)], ["a"]).scores[0] < 0 and client.health()["device"] == "host"
        assert local.connect(url, " jpeg-compressibility ").health() and local.connect(url).health()
        assert local.process is process, "it is found, not started again"
        process.stdin.close()  # as when the program that started it is killed
        assert process.wait(20) == 0 and local.connect(url, "jpeg-compressibility", python=python).health()
        process = local.process
        with pytest.raises(ServerError, match="serves jpeg-compressibility, not PickScore: name that one"):
            LocalServer().connect(url, "PickScore", python=python)
    finally:
        message = local.stop()
    assert message == "The server is stopped." and process.returncode == 0
    assert local.stop() == "No server was started here."


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "no server at {url}: start one there (python -m imagereward_jax.serve --reward NAME --port"),
        ({"reward": "PickScore"}, "--reward PickScore"),
        ({"reward": "PickScore", "python": "/no/python"}, "/no/python: No such file"),
        ({"reward": "PickScore", "python": sys.executable, "url": "http://192.0.2.1:1"}, "can be started from here"),
    ],
)
def test_a_server_that_is_not_there_says_the_way_out(arguments, message, url):
    if "url" in arguments:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LocalServer, "_served", lambda self, client: None)  # a machine that is not there
            with pytest.raises(ServerError) as raised:
                LocalServer().connect(**arguments)
    else:
        with pytest.raises(ServerError) as raised:
            LocalServer().connect(url, **arguments)
    assert message.format(url=url) in str(raised.value)


def test_a_folder_of_something_else_is_refused(tmp_path, capsys):
    assert main(["comfyui", str(tmp_path)]) == 2
    assert "has no folder custom_nodes: expected the folder of comfyui" in capsys.readouterr().err
    (tmp_path / "custom_nodes" / "imagereward").mkdir(parents=True)
    (tmp_path / "custom_nodes" / "imagereward" / "mine.txt").write_text("")
    assert main(["comfyui", str(tmp_path)]) == 2
    assert os.listdir(tmp_path / "custom_nodes" / "imagereward") == ["mine.txt"]
