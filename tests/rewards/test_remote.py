"""Rewards on a server: scores as here, servers of others, servers that fail or restart, and a run's config."""

import http.server
import json
import re
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from score_server import brightness, foreign, serving

from imagereward_jax import score
from imagereward_jax.assembly.rewards import open_judges, open_terms
from imagereward_jax.config import ConfigError
from imagereward_jax.recipes import default_config, judge, reward_term, validate
from imagereward_jax.rewards.errors import RewardError
from imagereward_jax.rewards.functions import PythonReward
from imagereward_jax.rewards.registry import open_reward
from imagereward_jax.rewards.remote import RemoteReward

IMAGES = np.arange(40, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
PROMPTS = [f"prompt {number}" for number in range(40)]


def light(images, prompts, metadata):
    """Brightness, its half, and the row's "plus"."""
    half = images.mean((1, 2, 3)) / 2
    return {"first": half, "second": half, "plus": [row.get("plus", 0.0) for row in metadata]}


def scores(request):
    return [brightness(image) for image in request["images"]]


def test_a_served_reward_gives_what_it_gives_here(tmp_path):
    """Equal scores and named scores for 40 images with metadata in requests of 7; `score` prints the same too."""
    local = PythonReward(light)
    metadata = [{"plus": np.float32(number), "note": "é"} for number in range(40)]
    with serving(PythonReward(light)) as server:
        reward = RemoteReward(server.url, batch_size=7)
        there, here = (one.named_scores(IMAGES, PROMPTS, metadata) for one in (reward, local))
        assert list(there) == list(here) == ["", "first", "second", "plus"]
        for name, values in here.items():
            np.testing.assert_array_equal(there[name], values)
        assert open_reward(server.url).score("a", [IMAGES[3], IMAGES[9, :2]]) == [3.0, 9.0]


def test_the_score_command_takes_a_url(capsys, tmp_path):
    from PIL import Image

    for number in (2, 7):
        Image.fromarray(IMAGES[number]).save(tmp_path / f"{number}.png")
    with serving(PythonReward(light)) as server:
        paths = [str(tmp_path / name) for name in ("2.png", "7.png")]
        assert score.main(["--model", server.url, "--prompt", "a", "--json", *paths]) == 0
    assert [row["score"] for row in json.loads(capsys.readouterr().out)["images"]] == [2.0, 7.0]


def test_a_server_of_others_needs_only_scores():
    """It has no health page, no errors and no names, and writes NaN as Python does."""

    def answer(request):
        values = [np.nan if value == 5 else value for value in scores(request)]
        return 200, json.dumps({"scores": values}).encode()

    with foreign(answer) as url:
        found = open_reward(url).score_arrays(IMAGES, PROMPTS)
    np.testing.assert_array_equal(found, np.where(np.arange(40) == 5, np.nan, np.arange(40)).astype(np.float32))


def test_a_failed_row_is_an_error_or_no_verdict(capsys):
    def answer(request):
        errors = ["broken\x1b" if value == 5 else None for value in scores(request)]
        values = [None if value == 5 else value for value in scores(request)]
        return 200, json.dumps({"scores": values, "errors": errors}).encode()

    with foreign(answer) as url:
        with pytest.raises(RewardError, match="1 of 40 images have no score; image 5: broken"):
            RemoteReward(url).score_arrays(IMAGES, PROMPTS)
        found = RemoteReward(url, on_error="nan").score_arrays(IMAGES, PROMPTS)
    assert np.isnan(found[5]) and np.isfinite(np.delete(found, 5)).all()
    assert "warning: " in (said := capsys.readouterr().err) and r"broken\x1b" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("answered", "message"),
    [
        ((200, b"<html>"), "not a JSON object"),
        ((200, b"[1, 2]"), "not a JSON object"),
        ((200, b"{}"), "without a list 'scores' of 2, one for each image"),
        ((200, b'{"scores": [1.0]}'), "without a list 'scores' of 2"),
        ((200, b'{"scores": [1.0, "2"]}'), "'2' in 'scores'"),
        ((200, b'{"scores": [1.0, true]}'), "True in 'scores'"),
        ((200, b'{"scores": [1.0, Infinity]}'), "an infinite number in 'scores'"),
        ((200, b'{"scores": [1, 2], "named": [1]}'), "list as 'named'"),
        ((200, b'{"scores": [1, 2], "named": {"a b": [1, 2]}}'), "named a score 'a b'"),
        ((200, b'{"scores": [1, 2], "errors": [null, 3]}'), "3 in 'errors'"),
        ((403, b"no"), "Forbidden 403"),
        ((400, b'{"error": "too wide"}'), "too wide"),
        ((401, b"{}"), "Unauthorized 401; set the environment variable with its token"),
    ],
)
def test_answers_that_are_not_of_the_protocol_end_the_run(answered, message):
    """Whatever `on_error` says: such a server will never answer."""
    with foreign(lambda request: answered) as url, pytest.raises(RewardError) as raised:
        RemoteReward(url, on_error="nan").score_arrays(IMAGES[:2], PROMPTS[:2])
    assert message in str(raised.value) and url in str(raised.value)


@pytest.mark.parametrize("failure", [None, (503, b"busy"), (502, b"<html>bad gateway")])
def test_requests_that_fail_for_now_are_sent_again(failure):
    """Every second request is hung up on, or told to come again."""
    count = iter(range(1000))

    def answer(request):
        return failure if next(count) % 2 == 0 else (200, json.dumps({"scores": scores(request)}).encode())

    with foreign(answer) as url:
        found = RemoteReward(url, batch_size=8).score_arrays(IMAGES, PROMPTS)
    np.testing.assert_array_equal(found, np.arange(40))


def test_a_server_that_starts_later_is_waited_for_and_one_that_does_not_is_given_up():
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    reward, found = RemoteReward(f"http://127.0.0.1:{port}", batch_size=8), []
    thread = threading.Thread(target=lambda: found.append(reward.score_arrays(IMAGES, PROMPTS)))
    thread.start()
    time.sleep(0.3)
    with serving(PythonReward(light), port=port):
        thread.join(20)
        np.testing.assert_array_equal(found[0], np.arange(40))
    started = time.monotonic()
    with pytest.raises(RewardError, match=r"40 of 40 images have no score; image 0: .* does not answer"):
        RemoteReward(f"http://127.0.0.1:{port}", patience=0.5, batch_size=4).score_arrays(IMAGES, PROMPTS)
    assert time.monotonic() - started < 5  # ten requests share the patience


def test_a_server_that_hangs_is_given_up_after_the_timeout():
    release = threading.Event()
    with foreign(lambda request: release.wait(20) and None) as url:
        with pytest.raises(RewardError, match=r"does not answer .*timed out"):
            RemoteReward(url, timeout=0.2, patience=0.0).score_arrays(IMAGES[:1], PROMPTS[:1])
        release.set()


@pytest.mark.parametrize(
    ("url", "settings", "message"),
    [
        ("http://", {}, "is not the URL of a server"),
        ("http://host:port", {}, "is not the URL of a server"),
        ("http://host:99999", {}, "is not the URL of a server"),
        ("http://host/?token=x", {}, "is not the URL of a server"),
        ("http://me:secret@host", {}, "the URL of host holds a password"),
        ("http://host", {"token": "NO_SUCH_VARIABLE"}, "'NO_SUCH_VARIABLE', which should hold the server's token"),
        ("http://host", {"on_error": "zero"}, "on_error must be one of error, nan"),
        ("http://host", {"timeout": 0.0}, "0 < timeout <= 86400"),
        ("http://host", {"timeout": 1e12}, "0 < timeout <= 86400"),
    ],
)
def test_settings_that_cannot_work_are_refused(url, settings, message):
    with pytest.raises(ValueError) as raised:
        RemoteReward(url, **settings)
    assert message in str(raised.value) and "secret@" not in str(raised.value)


def settings(**fields):
    config = default_config("ddpo")
    config.data.prompts = config.eval.prompts = "shapes:train"
    config.model.path = "tiny-shapes"
    config.update_from_flattened_dict(fields)
    return config


def test_a_mixture_and_judges_may_be_on_servers(monkeypatch):
    """Terms on a server with a token beside one that is here; the settings of config.reward.remote hold for all."""
    monkeypatch.setenv("MY_TOKEN", "secret")
    config = settings(**{"reward.remote.token": "MY_TOKEN", "reward.remote.batch_size": 3})
    with serving(PythonReward(light), token="secret") as server:
        config.reward.terms = {
            "there": reward_term(server.url, weight=2.0, mean=1.0),
            "here": reward_term("jpeg-compressibility"),
        }
        config.eval.judges = {"eye": judge(server.url)}
        validate(config)
        terms = open_terms(config.reward, "float32", needs_gradient=False)
        curves = terms.call_function("there", IMAGES, PROMPTS) | terms.call_function("here", IMAGES, PROMPTS)
        local = open_reward("jpeg-compressibility").score_arrays(IMAGES, PROMPTS)
        np.testing.assert_allclose(terms.total(curves), 2.0 * (np.arange(40) - 1.0) + local, rtol=1e-6)
        assert "there.first" in curves
        judges = open_judges(config.eval.judges, config.reward.remote, "float32")
        np.testing.assert_array_equal(judges.call_function("eye", IMAGES, PROMPTS)["eye"], np.arange(40))
        monkeypatch.setenv("MY_TOKEN", "another")
        with pytest.raises(ConfigError, match=r"config.reward.terms.there.path: .*token is missing or another"):
            open_terms(config.reward, "float32", needs_gradient=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reward.remote.on_error": "zero"}, "config.reward.remote.on_error='zero': expected one of error, nan"),
        ({"reward.remote.timeout": 0.0}, "config.reward.remote.timeout=0.0: expected a number in (0, 86400]"),
        ({"reward.remote.batch_size": 0}, "config.reward.remote.batch_size=0: expected at least 1"),
    ],
)
def test_a_config_that_cannot_work_names_its_field(fields, message):
    with pytest.raises(ConfigError) as raised:
        validate(settings(**{"reward.path": "http://host", **fields}))
    assert message in str(raised.value)


def test_a_run_without_its_server_ends_before_anything_is_compiled_and_a_plan_needs_none():
    with socket.create_server(("127.0.0.1", 0)) as unused:
        config = settings(**{"reward.path": f"http://127.0.0.1:{unused.getsockname()[1]}"})
    with pytest.raises(ConfigError, match=r"config.reward.path: .* does not answer .*; start it"):
        open_terms(config.reward, "float32", needs_gradient=False)
    assert open_terms(config.reward, "float32", needs_gradient=False, abstract=True).functions
    with pytest.raises(ConfigError, match="has no gradient"):
        open_terms(config.reward, "float32", needs_gradient=True)


def test_the_server_of_the_docs_works():
    """The example of docs/serve.md, as it stands there."""
    page = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")
    scope = {"__name__": "example"}
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], scope)
    scope["Handler"].log_message = lambda *_: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), scope["Handler"])
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        found = open_reward(f"http://127.0.0.1:{server.server_port}").score_arrays(IMAGES, PROMPTS)
    finally:
        server.shutdown()
        server.server_close()
    np.testing.assert_allclose(found, np.arange(40) / 255, atol=1e-6)
