"""Bad inputs to the commands: each is refused before anything is compiled, with one line that says what to do.

`python tests/test_bad_inputs.py` prints every message.
"""

import json
import re
import shutil
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

for package in ("orbax.checkpoint", "grain", "ml_collections"):
    pytest.importorskip(package)

from imagereward_jax import generate, score, train
from imagereward_jax.weights.hub import resolve_model

ROOT = Path(__file__).parents[1]
REFL = str(ROOT / "configs" / "refl_tiny.py")


def training(*options):
    return lambda folder: train.main(
        ["train", "--config", REFL, *[option.format(folder=folder) for option in options]]
        + ([] if any("--workdir" in option for option in options) else ["--workdir", str(folder / "run")])
    )


def scoring(*arguments):
    return lambda folder: score.main([argument.format(folder=folder) for argument in arguments])


def generating(*arguments):
    return lambda folder: generate.main([argument.format(folder=folder) for argument in arguments])


def without_get_config(folder):
    sys.modules.pop("config_config", None)  # ml_collections reads every config file into one module
    return train.main(["train", f"--config={folder}/empty.py"])


TINY = ("--model", "tiny-shapes", "--prompt", "a large red circle at the top left")
CASES = {
    "no --config": (lambda folder: train.main(["train"]), "--config is missing; usage"),
    "misspelt config file": (
        lambda folder: train.main(["train", f"--config={ROOT / 'configs/refl_tny.py'}"]),
        "no such file, nor a recipe of this package .did you mean .*refl_tiny.py",
    ),
    "config file that raises": (
        lambda folder: train.main(["train", f"--config={folder}/raises.py"]),
        r"--config .*raises.py: ZeroDivisionError: division by zero$",
    ),
    "config file with a value of another type": (
        lambda folder: train.main(["train", f"--config={folder}/list.py"]),
        r"list.py: Error whilst parsing config file: TypeError: Could not override field 'judges'[^\n]*$",
    ),
    "config file that is no Python": (
        lambda folder: train.main(["train", f"--config={folder}/syntax.py"]),
        r"--config .*syntax.py: SyntaxError: .*line 1",
    ),
    "config file without get_config": (
        without_get_config,
        r"--config .*empty.py: has no function get_config\(\)",
    ),
    "config file that sets a misspelt field": (
        lambda folder: train.main(["train", f"--config={folder}/misspelt.py"]),
        r"--config .*misspelt.py: sets the field .*which is not there .did you mean .checkpoint",
    ),
    "misspelt field": (
        training("--config.method.guidnce_scale=2"),
        "guidnce_scale: this config has no such field .did you mean --config.method.guidance_scale",
    ),
    "flag taken for a field": (training("--config.workdir=x"), r"no such field \(did you mean --workdir\?\)"),
    "field without its section": (training("--config.learning_rate=1"), "mean --config.optimizer.learning_rate"),
    "field of no section": (
        training("--config.data.foo.bar=1"),
        "--config.data.foo.bar: this config has no such field",
    ),
    "column of prompts that is not known": (
        training("--config.data.prompts={folder}/words.csv"),
        r"words.csv: none of the columns.*say which with --config.data.prompts_column=$",
    ),
    "column of held-out prompts that is not known": (
        training("--config.eval.prompts={folder}/words.csv"),
        r"words.csv: none of the columns.*rename the one that is meant$",
    ),
    "field of another type": (training("--config.steps=many"), "--config.steps=many: expected a whole number$"),
    "field that is no number": (training("--config.log_every=1e3"), "--config.log_every=1e3: expected a whole number$"),
    "text for a number": (
        training("--config.optimizer.learning_rate=fast"),
        "--config.optimizer.learning_rate=fast: expected a number$",
    ),
    "neither true nor false": (
        training("--config.compilation_cache=maybe"),
        "--config.compilation_cache=maybe: expected True or False$",
    ),
    "value for a section": (
        training("--config.eval=3"),
        "--config.eval=3: expected a field of it, as --config.eval.FIELD=value$",
    ),
    "number of processes in words": (training("--num-processes=two"), "--num-processes=two: expected a whole number$"),
    "unknown flag": (training("--wrkdir=x"), r"--wrkdir: no such flag \(did you mean '--workdir'\?\)$"),
    "stop index past the sampler's steps": (training("--config.method.stop_max=12"), "stop_max=12 must satisfy"),
    "misspelt sampler": (training("--config.method.sampler=ddimm"), "did you mean 'ddim'"),
    "accumulation that does not divide the batch": (
        training("--config.batch_size=10", "--config.accumulation=4"),
        "batch_size=10 is not divisible by config.accumulation=4",
    ),
    "more devices than there are": (training("--config.mesh.data=64"), "data=64 x fsdp=1 is not the"),
    "misspelt metric writer": (training("--config.writers=('jsonl','tensorbord')"), "did you mean 'tensorboard'"),
    "EMA decay out of range": (training("--config.ema_decay=1.5"), r"expected a number in \[0, 1\)"),
    "resolution that the VAE does not divide": (
        training("--config.method.height=30"),
        "height=30 should be a positive",
    ),
    "no pairs for the denoising loss": (training("--config.data.pairs="), "config.method.pretrain='off'"),
    "prompt file that is not there": (
        training("--config.data.prompts={folder}/promts.json"),
        "promts.json.*prompts.json",
    ),
    "broken JSON": (training("--config.data.prompts={folder}/broken.json"), r"broken.json.*line 2"),
    "broken JSONL row": (training("--config.data.prompts={folder}/broken.jsonl"), r"broken.jsonl.*2"),
    "wrong column": (
        training("--config.data.prompts={folder}/prompts.json", "--config.data.prompts_column=promt"),
        "promt.*prompt",
    ),
    "empty prompt list": (training("--config.data.prompts={folder}/none.json"), "none.json.*(no |empty)"),
    "empty prompt in a row": (training("--config.data.prompts={folder}/gap.json"), "gap.json.*2.*empty"),
    "number instead of a prompt": (training("--config.data.prompts={folder}/number.json"), "number.json.*2"),
    "pair whose picture is not there": (
        training("--config.data.pairs={folder}/pairs.jsonl"),
        "pairs.jsonl, line 1.*gone.png",
    ),
    "model folder that is not there": (training("--config.model.path={folder}/modell"), "modell"),
    "folder that is no model": (training("--config.model.path={folder}"), "model_index.json"),
    "truncated safetensors": (
        training("--config.model.path={folder}/cut"),
        "safetensors.*(truncated|cut|short|incomplete)",
    ),
    "checkpoint of another model": (training("--config.model.path={folder}/other"), "does not fit the network"),
    "Git LFS pointer instead of weights": (training("--config.model.path={folder}/pointer"), "LFS"),
    "unknown reward": (training("--config.reward.path=ImageReward-v1.1"), "ImageReward-v1.0"),
    "pickle that runs code": (
        training("--config.reward.path={folder}/evil.pt", "--config.reward.tokenizer={folder}/vocab.txt"),
        "evil.pt",
    ),
    "workdir of another run": (training("--config.seed=5", "--workdir={folder}/seed0"), "config.seed: 0 there, 5 now"),
    "workdir in a file": (training("--workdir={folder}/gap.txt/run"), "gap.txt is not a folder: choose another"),
    "workdir whose name is too long": (
        training("--workdir={folder}/" + "x" * 300),
        "too long: choose another --workdir",
    ),
    "workdir with other things in it": (training("--workdir={folder}"), "not the workdir of a run"),
    "score: picture that is not there": (scoring(*TINY, "{folder}/gone.png"), "gone.png"),
    "score: truncated picture": (scoring(*TINY, "{folder}/cut.png"), "cut.png"),
    "score: text instead of a picture": (scoring(*TINY, "{folder}/prompts.json"), "prompts.json"),
    "score: 40,000 x 40,000 picture": (
        scoring(*TINY, "{folder}/huge.png"),
        "huge.png: the image is too large .at most 89,478,485 pixels",
    ),
    "generate: unknown sampler": (
        generating(*TINY, "--num-images", "1", "--out", "{folder}/out", "--sampler", "eulr"),
        "euler",
    ),
    "generate: size that does not fit": (
        generating(*TINY, "--num-images", "1", "--out", "{folder}/out", "--height", "30"),
        "height=30",
    ),
    "generate: empty prompt file": (
        generating(
            "--model", "tiny-shapes", "--prompts", "{folder}/empty.txt", "--num-images", "1", "--out", "{folder}/o"
        ),
        "empty.txt",
    ),
}


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


def huge_png(path, side):
    """The header of a picture of side x side pixels, and next to no data."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


def make_bad_files(folder):
    """Everything that the cases point at."""
    import pickle

    (folder / "prompts.json").write_text(json.dumps([{"prompt": "a cat"}]))
    (folder / "broken.json").write_text('[{"prompt": "a cat"},\n{"prompt": }]')
    (folder / "broken.jsonl").write_text('{"prompt": "a cat"}\n{"prompt": \n')
    (folder / "none.json").write_text("[]")
    (folder / "raises.py").write_text("def get_config():\n    return 1 / 0\n")
    (folder / "misspelt.py").write_text(Path(REFL).read_text().replace("config.checkpoint.", "config.checkpiont."))
    (folder / "syntax.py").write_text("def get_config(:\n")
    recipe = Path(REFL).read_text().replace("return config", "config.eval.judges = ['tiny-shapes']\n    return config")
    (folder / "list.py").write_text(recipe)
    (folder / "empty.py").write_text("")
    (folder / "words.csv").write_text("words,others\na,b\n")
    (folder / "gap.txt").write_text("a cat\n\na dog\n")
    (folder / "gap.json").write_text('["a cat", ""]')
    (folder / "number.json").write_text('["a cat", 5]')
    (folder / "empty.txt").write_text("")
    (folder / "pairs.jsonl").write_text('{"image": "gone.png", "text": "a cat"}\n')
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(folder / "whole.png")
    (folder / "cut.png").write_bytes((folder / "whole.png").read_bytes()[:3000])
    huge_png(folder / "huge.png", 40_000)
    shutil.copy(resolve_model("tiny-shapes", allow_patterns=None) / "reward/vocab.txt", folder)
    (folder / "evil.pt").write_bytes(pickle.dumps(Evil(folder / "marker")))
    model = resolve_model("tiny-shapes", allow_patterns=None)
    for name in ("cut", "other", "pointer"):
        shutil.copytree(model, folder / name)
    weights = next((folder / "cut/unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    config = folder / "other/unet/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "layers_per_block": 2}))
    next((folder / "pointer/vae").glob("*.safetensors")).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
    )
    (folder / "seed0").mkdir()
    values = ["train", "--config", REFL, "--workdir", str(folder / "seed0")]
    (folder / "seed0/config.json").write_text(train.parse_flags(values)[0].to_json())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bad")
    make_bad_files(path)
    return path


def status_of(run, folder):
    try:
        return run(folder)
    except SystemExit as stop:  # argparse's own
        return stop.code


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused_in_one_line(name, folder, capsys):
    run, message = CASES[name]
    assert status_of(run, folder) == 2
    errors = capsys.readouterr().err.strip()
    assert re.search(message, errors, re.DOTALL | re.IGNORECASE), errors
    assert "Traceback" not in errors
    assert not (folder / "marker").exists(), "a pickle ran code"
    assert not (folder / "run").exists(), "a refused run left a workdir behind"


if __name__ == "__main__":
    import contextlib
    import io
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        make_bad_files(place)
        for case, (command, _) in CASES.items():
            with contextlib.redirect_stderr(io.StringIO()) as stream:
                code = status_of(command, place)
            lines = stream.getvalue().strip().replace(str(place), "DIR").replace(str(ROOT), ".").splitlines()
            print(f"- {case} ({code}): {' / '.join(lines[-6:])}")
