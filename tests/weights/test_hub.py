"""Names are looked for where they can be, and never on the hub when they can only mean a path."""

import sys

import pytest
from hub_stand_in import serve

from imagereward_jax.weights import hub


@pytest.fixture
def assets(tmp_path, monkeypatch):
    for file in ("tiny-shapes/model_index.json", "tiny-shapes/reward/config.json", "a-reward/reward/config.json"):
        (tmp_path / "assets" / file).parent.mkdir(parents=True)
        (tmp_path / "assets" / file).touch()
    monkeypatch.setattr(hub, "ASSETS", tmp_path / "assets")
    return tmp_path / "assets"


@pytest.fixture
def no_network(monkeypatch):
    """Any request is an error of the test's own kind."""
    import huggingface_hub

    def refuse(*args, **kwargs):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)


def resolve(name):
    return hub.resolve_model(name, allow_patterns=["*.json"])


def test_folders_and_built_in_models(assets, no_network, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    assert resolve(tmp_path / "mine") == tmp_path / "mine"
    assert resolve("tiny-shapes") == assets / "tiny-shapes"
    assert hub.builtin_models() == ["tiny-shapes"] and hub.builtin_rewards() == ["a-reward", "tiny-shapes"]
    monkeypatch.chdir(tmp_path)
    assert resolve("mine").samefile(tmp_path / "mine")


@pytest.mark.parametrize("name", ["./model", "../model", "/abs", "~/model", "runs/a/export", "model/", r"C:\model"])
def test_paths_never_reach_the_hub(assets, no_network, name):
    with pytest.raises(hub.ModelNotFound, match="no folder"):
        resolve(name)


def test_near_misses_are_suggested(assets, no_network, tmp_path):
    with pytest.raises(hub.ModelNotFound, match="did you mean the built-in 'tiny-shapes'"):
        resolve("tiny-shape")
    (tmp_path / "model").mkdir()
    with pytest.raises(hub.ModelNotFound, match=r"no folder .*modle \(did you mean .*/model\?\)"):
        resolve(str(tmp_path / "modle"))
    with pytest.raises(hub.ModelNotFound, match=r"form owner/model\. Built-in models: tiny-shapes"):
        resolve("something")
    (tmp_path / "file").touch()
    with pytest.raises(hub.ModelNotFound, match="is a file; expected the folder"):
        resolve(str(tmp_path / "file"))


def test_downloads(assets, tmp_path, monkeypatch):
    """The hub library is called with the owner's name, the branch and the patterns, and its folder is given back."""
    import huggingface_hub

    calls = []

    def download(repo_id, **options):
        calls.append((repo_id, options))
        (tmp_path / "model_index.json").touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("owner/model@fp16") == tmp_path
    assert calls[-1] == ("owner/model", {"revision": "fp16", "allow_patterns": ["*.json"], "cache_dir": None})
    assert hub.resolve_file("owner/model", "model_index.json", cache_dir="c") == tmp_path / "model_index.json"
    assert calls[-1][1] == {"revision": None, "allow_patterns": ["model_index.json"], "cache_dir": "c"}
    with pytest.raises(hub.ModelNotFound, match=r"owner/model on the hub has no file that matches absent\.pt"):
        hub.resolve_file("owner/model", "absent.pt")


def test_offline_says_what_was_tried(assets, tmp_path, monkeypatch):
    """With the hub library itself, in its offline mode."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(hub.ModelNotFound, match=r"not a folder here.*not in the download cache.*local folder") as error:
        hub.resolve_model("owner/model", allow_patterns=["*.json"], cache_dir=tmp_path / "cache")
    assert "HF_HUB_OFFLINE" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("GatedRepoError", "licence"),
        ("RepositoryNotFoundError", "knows no such public repository"),
        ("RevisionNotFoundError", "no such branch"),
    ],
)
def test_refusals_of_the_hub_say_what_to_do(assets, monkeypatch, kind, message):
    import huggingface_hub
    from huggingface_hub import errors

    def refuse(*args, **kwargs):
        raise getattr(errors, kind).__new__(getattr(errors, kind))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(hub.ModelNotFound, match=message):
        resolve("owner/model")


def test_importing_needs_no_heavy_package():
    import subprocess

    code = (
        "import sys, imagereward_jax.weights.diffusers, imagereward_jax.weights.hub, imagereward_jax.weights.orbax;"
        "print([n for n in ('torch', 'diffusers', 'orbax', 'transformers', 'huggingface_hub') if n in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.fixture
def stand_in(monkeypatch):
    with serve(monkeypatch) as stand_in:
        yield stand_in


def test_a_folder_is_uploaded_to_a_repository_that_is_made(stand_in, tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "README.md").write_text("---\ntags: []\n---\n")
    (tmp_path / "unet/config.json").write_text("{}")
    made = hub.upload_folder(tmp_path, "someone/tuned", private=True, message="first", token="hf_secret")
    assert made.startswith(stand_in.url) and stand_in.created == {"someone/tuned": True}
    assert stand_in.commits == {"first": {"README.md": b"---\ntags: []\n---\n", "unet/config.json": b"{}"}}
    assert stand_in.tokens == {"Bearer hf_secret"}


def test_an_upload_that_is_refused_says_what_to_do(stand_in, tmp_path, monkeypatch):
    def refuse(path, body):
        raise RuntimeError("no")

    stand_in.answer = refuse  # the connection is dropped
    with pytest.raises(hub.UploadError, match=r"was not uploaded to someone/tuned \(.+\): .*hf auth login"):
        hub.upload_folder(tmp_path, "someone/tuned", private=None, message="first", token="hf_secret")
    with pytest.raises(hub.UploadError, match="was not uploaded to no name"):
        hub.upload_folder(tmp_path, "no name", private=None, message="first", token="hf_secret")
