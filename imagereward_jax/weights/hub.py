"""Finds a model by its folder, by a name that comes with the package, or by a name on the hub."""

import difflib
import fnmatch
import os
import re
import shutil
import urllib.request
from collections.abc import Sequence
from pathlib import Path

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(@.+)?")
ASSETS = Path(__file__).resolve().parent.parent / "assets"


class ModelNotFound(FileNotFoundError):
    """No folder, built-in model or hub repository has the given name; the message says what was tried."""


class UploadError(RuntimeError):
    """A folder could not be uploaded to the hub; the message says why and what to do."""

    exit_status = 1


def builtin_models() -> list[str]:
    """Lists the names of the text-to-image models that come with the package."""
    return _builtin("model_index.json")


def builtin_rewards() -> list[str]:
    """Lists the names of the rewards that come with the package; each is in the folder `reward` of its name."""
    return _builtin("reward/config.json")


def _builtin(file):
    return sorted(path.name for path in ASSETS.iterdir() if (path / file).is_file()) if ASSETS.is_dir() else []


def resolve_model(
    name_or_path: str | Path, *, allow_patterns: Sequence[str], cache_dir: str | Path | None = None
) -> Path:
    """Finds the folder of a model; downloads it first if necessary.

    Args:
        name_or_path: an existing folder; a built-in name such as "tiny-shapes"; or a hub name "owner/model", with
            "@branch" after it for a branch, tag or commit other than the main one.
        allow_patterns: which files to download from the hub, e.g. `["*.json", "unet/*.safetensors"]`.
        cache_dir: where downloads are kept; the hub library's own cache by default.

    Raises:
        ModelNotFound: there is no such model, or the hub cannot be reached.
    """
    name = str(name_or_path)
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        return path
    if path.is_file():
        raise ModelNotFound(
            f"{name} is a file; expected the folder of a model (convert/single_file.py makes one of a checkpoint)"
        )
    if name in builtin_models():
        return ASSETS / name
    if looks_like_path(name) or not isinstance(name_or_path, str):
        raise ModelNotFound(f"no folder {name}{_nearby(path)}")
    repo_id, _, revision = name.partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise ModelNotFound(
            f"no model {name!r}: it is not a folder here{_suggestion(name)}, and names on the Hugging Face hub have "
            f"the form owner/model. Built-in models: {', '.join(builtin_models()) or 'none'}"
        )
    return _download(repo_id, revision, allow_patterns, cache_dir)


def resolve_file(repo_id: str, filename: str, *, cache_dir: str | Path | None = None) -> Path:
    """Finds one file of a hub repository "owner/model" (or "owner/model@branch"); downloads it first if necessary.

    Raises:
        ModelNotFound: there is no such file, or the hub cannot be reached.
    """
    repo, _, revision = repo_id.partition("@")
    return _download(repo, revision, [filename], cache_dir) / filename


def find_file(name_or_path: str | Path, filename: str, what: str) -> Path:
    """Finds a file: itself, in a folder (`filename`, or the only .safetensors), or `filename` of a hub repository.

    Raises:
        FileNotFoundError: there is none; the message says what was looked for and calls it `what`.
    """
    name = str(name_or_path)
    path = Path(os.path.expanduser(name))
    if path.is_file():
        return path
    if path.is_dir():
        found = sorted(path.glob("*.safetensors"))
        if (path / filename).is_file():
            return path / filename
        if len(found) == 1:
            return found[0]
        names = ", ".join(each.name for each in found) or "no .safetensors file"
        raise FileNotFoundError(f"{path}: expected {filename}, found {names}; pass the path of the file")
    if is_repository(name) and not path.suffix:
        return resolve_file(name, filename)
    raise FileNotFoundError(f"{name}: no such {what}; expected a .safetensors file, or a folder with {filename}")


def resolve_url(url: str, path: str | Path) -> Path:
    """Downloads `url` to `path`, if there is no file at `path`; the file appears whole or not at all.

    Raises:
        ModelNotFound: it is not there and could not be downloaded.
    """
    path = Path(path)
    if path.is_file():
        return path
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=60) as source, open(partial, "wb") as target:
            shutil.copyfileobj(source, target)
            expected = source.headers.get("Content-Length")
            if expected is not None and target.tell() != int(expected):
                raise OSError(f"{target.tell():,} of {int(expected):,} bytes arrived")
        os.replace(partial, path)
    except OSError as error:  # the class of urllib's errors too
        raise ModelNotFound(
            f"there is no {path}, and {url} could not be downloaded to it ({_why(error)}): put the file there, or pass "
            "its path"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def upload_folder(folder: str | Path, repo_id: str, *, private: bool | None, message: str, token: str | None) -> str:
    """Uploads a model's folder to the hub repository "owner/model", which is made if there is none.

    Args:
        private: of a new repository; None leaves it to the owner's settings. token: None for that of `hf auth login`.

    Returns:
        The address of the commit.

    Raises:
        UploadError: the hub refuses it or cannot be reached.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message).commit_url)
    except Exception as error:  # names that are not valid, no token, no network: each has a class of its own
        raise UploadError(
            f"{folder} was not uploaded to {repo_id} ({_why(error)}): check the name owner/model, run `hf auth login` "
            "with a token that may write, and try again"
        ) from error


def is_repository(name: str) -> bool:
    """Whether `name` can be that of a hub repository, "owner/model" or "owner/model@branch", and of no path here."""
    return bool(_REPOSITORY.fullmatch(name)) and not looks_like_path(name) and not os.path.exists(name)


def looks_like_path(name: str) -> bool:
    """Whether `name` can only be meant as a path, so that the hub must not be asked for it."""
    return bool(re.match(r"[./~]|[A-Za-z]:[\\/]", name)) or "\\" in name or name.endswith("/") or name.count("/") > 1


def _download(repo_id, revision, allow_patterns, cache_dir):
    """Downloads files of a hub repository; turns the hub library's many errors into one that says what to do."""
    from huggingface_hub import errors, snapshot_download

    name = f"{repo_id}@{revision}" if revision else repo_id
    try:
        folder = snapshot_download(
            repo_id, revision=revision or None, allow_patterns=allow_patterns, cache_dir=cache_dir
        )
    except errors.GatedRepoError as error:
        raise ModelNotFound(
            f"{name} asks for its licence to be accepted: do so on its page on the Hugging Face hub, "
            f"then run `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelNotFound(
            f"no model {name!r}: it is not a folder here{_suggestion(name)}, and the Hugging Face hub knows no such "
            f"public repository (for a private one, run `hf auth login`)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelNotFound(f"{name}: the hub repository has no such branch, tag or commit") from error
    except Exception as error:  # offline mode, no network, nothing cached, timeouts: each has a class of its own
        raise ModelNotFound(
            f"no model {name!r}: it is not a folder here{_suggestion(name)}, it is not in the download cache, and the "
            f"Hugging Face hub could not be asked for it ({_why(error)}). Connect to the internet (and unset "
            f"HF_HUB_OFFLINE if it is set), or pass the path of a local folder"
        ) from error
    found = [path for path in Path(folder).rglob("*") if path.is_file()]
    if not any(fnmatch.fnmatch(str(path.relative_to(folder)), pattern) for path in found for pattern in allow_patterns):
        raise ModelNotFound(f"{name} on the hub has no file that matches {', '.join(allow_patterns)}")
    return Path(folder)


def _why(error):
    """The innermost cause of a hub error, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join([f"{type(error).__name__}:", *str(error).strip().splitlines()[:1]]).rstrip(":. ")


def _suggestion(name):
    """Suggests another name: a built-in model of nearly that name, or a path in a folder that is here."""
    close = difflib.get_close_matches(name.split("/")[-1].lower(), builtin_models(), n=1)
    if close:
        return f" (did you mean the built-in {close[0]!r}?)"
    return _nearby(Path(name)) if Path(name).parent != Path() else ""


def _nearby(path):
    """Suggests a folder with nearly the name of a path that does not exist."""
    parent = path.parent
    if not parent.is_dir():
        return ""
    close = difflib.get_close_matches(path.name, [entry.name for entry in parent.iterdir() if entry.is_dir()], n=1)
    return f" (did you mean {parent / close[0]}?)" if close else ""
