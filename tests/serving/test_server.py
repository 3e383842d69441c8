"""The score server: scores and order, batches across clients, what a bad image or request costs, and how it ends."""

import base64
import concurrent.futures
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image
from score_server import grey, serving

from imagereward_jax import serve
from imagereward_jax.bulk_scoring.scorers import open_scorer
from imagereward_jax.rewards.functions import PythonReward
from imagereward_jax.rewards.http_client import ScoreClient, ServerError, encode_png
from imagereward_jax.serving.scoring import ItemScorer


class Recorder:
    """A reward that remembers the size of every batch: brightness, to which the metadata's "plus" is added."""

    def __init__(self, seconds=0.0):
        self.batches, self.seconds, self.inside = [], seconds, 0

    def __call__(self, images, prompts, metadata):
        self.inside += 1
        assert self.inside == 1, "called twice at a time"
        self.batches.append(len(images))
        time.sleep(self.seconds)
        if any("fail" in prompt for prompt in prompts):
            raise ValueError("a prompt that fails")
        light = images.mean((1, 2, 3))
        self.inside -= 1
        return {"light": light, "plus": [row.get("plus", 0.0) for row in metadata]}


class Forgiving(Recorder):
    """As `Recorder`, and may be called again after an error."""

    def __call__(self, *given):
        self.inside = 0
        return super().__call__(*given)


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    sizes = [(48, 40), (32, 32), (20, 64), (48, 40), (33, 57)]
    coarse = [Image.fromarray((rng.random((3, 3, 3)) * 255).astype(np.uint8)) for _ in sizes]
    return [image.resize(size, Image.Resampling.BICUBIC) for image, size in zip(coarse, sizes)]


@pytest.mark.parametrize("reward", ["network", "jpeg-compressibility", "random"])
def test_scores_are_those_of_the_scorer_in_order(reward, tiny_reward, pictures):
    """Within 1e-6 of `inference_rank`'s, for images of many sizes and requests of 1, 3 and 5 images."""
    scorer = tiny_reward if reward == "network" else open_scorer(reward)
    prompts = ["a red cat", "a dog", "a red cat", "the ocean", "a cube"]
    expected = [scorer.inference_rank(prompt, [image])[1][0] for prompt, image in zip(prompts, pictures)]
    with serving(scorer, reward) as server:
        for size in (1, 3, 16):
            scored = ScoreClient(server.url, batch_size=size).score(list(map(encode_png, pictures)), prompts)
            np.testing.assert_allclose(scored.scores, expected, atol=1e-6)
            assert scored.errors == [None] * 5 and scored.named == {}
        assert ScoreClient(server.url).health() == {
            **{"reward": reward, "device": "host", "batch_size": scorer.batch_size},
            **{"queued": 0, "served": 15, "failed": 0},
        }


def test_few_programs_serve_every_number_of_images(tiny_reward, pictures, monkeypatch):
    """After the warm-up no batch has a size that it did not have: 1, 2 or 4 of a batch size of 4."""
    sizes, score = [], tiny_reward.score_prepared

    def recorded(prompts, pixels):
        sizes.append(len(pixels))
        return score(prompts, pixels)

    monkeypatch.setattr(tiny_reward, "score_prepared", recorded)
    scorer = ItemScorer(tiny_reward, 4096)
    scorer.warm_up()
    assert sizes == [1, 2, 4]
    with serving(tiny_reward) as server:
        for count in range(1, 6):
            ScoreClient(server.url).score([encode_png(pictures[0])] * count, ["a cat"] * count)
    assert set(sizes) == {1, 2, 4}


def test_requests_of_many_clients_are_scored_together_and_none_is_mixed_up():
    """40 clients of 5 requests: each gets its own scores, from far fewer batches, one at a time."""
    recorder = Recorder(seconds=0.02)
    scorer = PythonReward(recorder)

    def client(number):
        for turn in range(5):
            plus = [{"plus": 1000.0 * number}, {"plus": 1000.0 * number + 500}]
            scored = ScoreClient(server.url).score([grey(number), grey(turn)], ["a", "b"], plus)
            assert scored.scores == [number + 1000 * number, turn + 1000 * number + 500]
            assert scored.named == {"light": [number, turn], "plus": [row["plus"] for row in plus]}
        return True

    with serving(scorer, images=400) as server, concurrent.futures.ThreadPoolExecutor(40) as pool:
        assert all(pool.map(client, range(40)))
    assert sum(recorder.batches) == 400 and max(recorder.batches) == 16 and len(recorder.batches) < 100


def test_what_is_wrong_with_an_image_costs_that_image_alone():
    """Broken files, another format, too many pixels, a prompt that the reward fails on, no verdict."""

    def odd(images, prompts, metadata):
        light = Forgiving()(images, prompts, metadata)["light"]
        return [{"no verdict": np.nan}.get(prompt, one) for prompt, one in zip(prompts, light)]

    cases = {
        "good": (grey(7), None),
        "broken": (grey(7)[:40], "not a readable image|broken or cut short"),
        "a program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "not a readable image"),
        "empty": (b"", "not a readable image"),
        "large": (grey(7, 65), r"65 x 65 pixels are too many \(at most 4,096\)"),
        "fail": (grey(7), "ValueError: a prompt that fails"),
        "no verdict": (grey(7), None),
        "also good": (grey(9), None),
    }
    with serving(PythonReward(odd), pixels=64 * 64) as server:
        scored = ScoreClient(server.url).score([image for image, _ in cases.values()], list(cases))
        assert ScoreClient(server.url).health()["failed"] == 5
    assert scored.scores == [7, None, None, None, None, None, None, 9]
    for error, (_, expected) in zip(scored.errors, cases.values()):
        assert (error is None) == (expected is None)
        if expected:
            assert re.search(expected, error), error


def send(server, text, *, end=True):
    """What the server answers to raw bytes: (status, its JSON)."""
    with socket.create_connection(server.server_address, timeout=10) as connection:
        connection.sendall(text)
        if end:
            connection.shutdown(socket.SHUT_WR)
        response = http.client.HTTPResponse(connection)
        response.begin()
        return response.status, json.loads(response.read())


def post(body, *, headers="", kind="application/json", length=None):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    length = len(body) if length is None else length
    return f"POST /score HTTP/1.1\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n{headers}\r\n".encode() + body


GOOD = {"images": [base64.b64encode(grey(3)).decode()], "prompts": ["a"]}


@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        (post(b"{"), 400, "the body is not JSON"),
        (post(b"[" * 100_000), 400, "the body is not JSON"),
        (post(b"\xff\xfe"), 400, "the body is not JSON"),
        (post([]), 400, "expected a JSON object"),
        (post({"prompts": ["a"]}), 400, "images: expected a list of texts in base64"),
        (post(GOOD | {"prompts": "a"}), 400, "prompts: expected a list of texts"),
        (post(GOOD | {"prompts": ["a", "b"]}), 400, "2 prompts for 1 images"),
        (post(GOOD | {"metadata": ["x"]}), 400, "metadata: expected a list of objects"),
        (post(GOOD | {"prompt": "a"}), 400, "unknown fields 'prompt'"),
        (post({"images": [""] * 65, "prompts": [""] * 65}), 413, "65 images in one request; at most 64"),
        (post(b"", length=200 * 2**20), 413, "a body of 209715200 bytes; at most 1048576"),
        (post(b"", length="9" * 5000), 413, "at most 1048576"),
        (post(b"", length=-1), 411, "expected a Content-Length"),
        (post(b"{}", length=20), 408, "the body ended early"),
        (post(GOOD, kind="text/plain"), 415, "application/json"),
        (post(GOOD, headers="Expect: 100-continue\r\n", kind="text/plain"), 415, "application/json"),
        (b"GET /elsewhere HTTP/1.1\r\n\r\n", 404, "POST /score or GET /health"),
        (b"PUT /score HTTP/1.1\r\n\r\n", 501, "Unsupported method"),
        (b"\x16\x03\x01 garbage\r\n\r\n", 400, "Bad"),
        (b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n", 414, "Too Long"),
    ],
)
def test_requests_that_cannot_be_answered_say_why_and_the_server_goes_on(request_, status, message):
    with serving(PythonReward(Recorder())) as server:
        got, answer = send(server, request_)
        assert got == status and message in answer["error"]
        assert send(server, post(GOOD))[1] == {
            "scores": [3.0],
            "named": {"light": [3.0], "plus": [0.0]},
            "errors": [None],
        }


def test_a_body_that_is_too_large_is_refused_while_it_is_sent():
    """20 MB against a limit of 1 MiB: this client still reads why; one that asks first sends nothing."""
    with serving(PythonReward(Recorder())) as server:
        with pytest.raises(ServerError, match="send fewer images per request"):
            ScoreClient(server.url).score([b"0" * 15_000_000], ["a"])
        head = post(b"", length=20_000_000, headers="Expect: 100-continue\r\n")
        assert send(server, head, end=False)[0] == 413


def test_the_token_is_asked_for_everywhere():
    with serving(PythonReward(Recorder()), token="secret") as server:
        for token in (None, "secre", "secrets", "Secret"):
            for ask in (ScoreClient.health, lambda client: client.score([grey(1)], ["a"])):
                with pytest.raises(ServerError, match="token is missing or another; set the environment variable"):
                    ask(ScoreClient(server.url, token=token))
        assert ScoreClient(server.url, token="secret").score([grey(1)], ["a"]).scores == [1.0]


def test_a_full_queue_makes_clients_come_again_and_loses_nothing():
    """32 images of 8 clients for a queue of 4."""
    with serving(PythonReward(Recorder(seconds=0.02)), images=4) as server:

        def client(number):
            client = ScoreClient(server.url, patience=30, batch_size=2, connections=2)
            return client.score([grey(number + i) for i in range(4)], ["a"] * 4).scores

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            assert list(pool.map(client, range(8))) == [[n, n + 1, n + 2, n + 3] for n in range(8)]


def test_what_nobody_waits_for_any_more_is_not_scored():
    """30 images of a client that gives up after 0.3 s; batches of 16 take 2 s: the second is never scored."""
    recorder = Recorder(seconds=2.0)
    with serving(PythonReward(recorder)) as server:
        client = ScoreClient(server.url, timeout=0.3, batch_size=30)
        assert "timed out" in client.score([grey(i) for i in range(30)], ["a"] * 30).errors[29]
        time.sleep(2.5)
        assert ScoreClient(server.url).score([grey(7)], ["a"]).scores == [7]
    assert recorder.batches == [16, 1]


def test_a_server_that_stops_answers_what_it_accepted():
    with serving(PythonReward(Recorder(seconds=0.5))) as server, concurrent.futures.ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(ScoreClient(server.url).score, [grey(i)], ["a"]) for i in range(4)]
        time.sleep(0.2)
        assert server.stop(10) == 0
        assert [future.result().scores for future in waiting] == [[0], [1], [2], [3]]
        with pytest.raises(ServerError, match="does not answer"):
            ScoreClient(server.url).health()
        server.shutdown = server.server_close = lambda: None  # the fixture stops it too


def test_the_command_serves_and_ends_gracefully(tmp_path):
    """A real process with a slow function: SIGTERM while 6 requests wait, which are answered; then one line."""
    module = "import time\ndef slow(images, prompts):\n    time.sleep(0.3)\n    return images.mean((1, 2, 3))\n"
    (tmp_path / "slow_reward.py").write_text(module)
    command = [sys.executable, "-m", "imagereward_jax.serve", "--reward", "slow_reward:slow", "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]), "IMAGEREWARD_TOKEN": "t"}
    process = subprocess.Popen([*command, "--batch-size", "2"], stdout=subprocess.PIPE, env=environment, text=True)
    try:
        line = process.stdout.readline()
        assert line.startswith("slow_reward:slow on host at http://127.0.0.1:") and "token" in line
        client = ScoreClient(line.split()[4], token="t")
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            waiting = [pool.submit(client.score, [grey(i)], ["a"]) for i in range(6)]
            time.sleep(0.25)
            process.send_signal(signal.SIGTERM)
            assert [future.result().scores for future in waiting] == [[i] for i in range(6)]
        assert process.communicate(timeout=30)[0] == "stopped: 6 images were scored, 0 of them without success\n"
        assert process.returncode == 0
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reward", "tiny-shapse"], "did you mean 'tiny-shapes'?"),
        (["--reward", "no_module:score"], "reward 'no_module:score': No module named"),
        (["--reward", "tiny-shapes", "--port", "{taken}"], "127.0.0.1:{taken}: the port is in use: choose another"),
        (["--reward", "tiny-shapes", "--host", "no.such.host.invalid"], "no.such.host.invalid:8765: "),
        (["--reward", "tiny-shapes", "--host", "203.0.113.7"], "this machine does not have this address"),
    ],
)
def test_what_cannot_be_served_is_one_line(arguments, message, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert serve.main([argument.format(taken=port) for argument in arguments]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("error: ") and error.count("\n") == 1 and message.format(taken=port) in error


@pytest.mark.parametrize("flag", ["--max-body=0", "--max-pixels=0", "--max-queue=0", "--batch-size=0", "--port=65536"])
def test_numbers_out_of_range_are_refused(flag, capsys):
    with pytest.raises(SystemExit) as exit_:
        serve.parse_args(["--reward", "tiny-shapes", flag])
    assert exit_.value.code == 2 and flag.partition("=")[0] in capsys.readouterr().err


def test_no_thread_stays(pictures):
    before = threading.active_count()
    with serving(PythonReward(Recorder())) as server:
        ScoreClient(server.url).score([grey(1)], ["a"])
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before
