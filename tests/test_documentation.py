"""Every block of code on a page works: Python runs, commands parse, config fields and files that are named exist."""

import contextlib
import functools
import importlib
import importlib.util
import os
import re
import subprocess
import sys
import tomllib

import pytest
from PIL import Image

pytest.importorskip("ml_collections")
pytest.importorskip("orbax.checkpoint")

from pages import INDENTED, PAGES, PYTHON, ROOT, SHELL, SHOWN, blocks_of, commands_of

from imagereward_jax import plan, train
from imagereward_jax.__main__ import main
from imagereward_jax.config import flat_fields
from imagereward_jax.planning.topologies import find_topology
from imagereward_jax.recipes import default_config, validate
from imagereward_jax.shipped import shipped_files

# What blocks run on here in the place of published weights.
STAND_INS = {"ImageReward-v1.0": "tiny-shapes"}
# Added to commands that run, as far as the recipe has these fields: one update of a few images.
SHORT = {
    "steps": 1, "batch_size": 4, "eval.num_prompts": 2, "eval.images_per_prompt": 1, "eval.every": 1,
    "eval.guidance_scales": (), "eval.num_steps": 2, "checkpoint.every": 1, "method.num_class_images": 4,
    "method.rounds": 1, "eval.num_groups": 4,
}  # fmt: skip
SHORT_EVALUATION = ["--limit", "4", "--resamples", "10"]
OTHER_PROGRAMS = {".", "cd", "curl", "docker", "git", "mkdocs", "npm", "ruff", "sbatch", "kubectl", "twine"}


def page_id(page):
    return str(page.relative_to(ROOT))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the files that pages name, in which blocks run."""
    for name, colour in (("1.webp", (200, 60, 30)), ("2.webp", (30, 60, 200))):
        Image.new("RGB", (32, 32), colour).save(tmp_path / name)
    (tmp_path / "rows.csv").write_text("prompt,image\na red circle,1.webp\na blue square,2.webp\n")
    (tmp_path / "configs").symlink_to(ROOT / "configs")  # as in a clone
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("my_rewards", "my_package"):
        for module in [loaded for loaded in sys.modules if loaded.partition(".")[0] == name]:
            monkeypatch.delitem(sys.modules, module)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_block_says_what_it_is(page):
    """A language, and for what does not run a reason; a fence that is not closed would swallow the next."""
    fenced = [block for block in blocks_of(page) if block.mark != INDENTED]
    lines = re.findall("^```", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(lines) == 2 * len(fenced), "a fence that is not closed, or within another"
    for block in fenced:
        assert block.language in SHELL | PYTHON | SHOWN, f"{block.place}: language {block.language!r}"
        if block.language in SHELL:
            assert block.mark == "run" or re.match(r"not run, \S+", block.mark), f"{block.place}: {block.mark!r}"
        elif block.language in PYTHON:
            assert block.mark in ("", "slow") or re.match(r"not run, \S+", block.mark), f"{block.place}: {block.mark!r}"


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)], ids=page_id)
def test_blocks(page, folder):
    """Python that is quick runs; every command is one that its program would take."""
    walk(page, folder, run_shell=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [p for p in PAGES if any(b.mark in ("run", "slow") for b in blocks_of(p))], ids=page_id
)
def test_blocks_run(page, folder):
    """All blocks of a page, one after the other, but for those that say why not."""
    walk(page, folder, run_shell=True)


def walk(page, folder, run_shell):
    names = {"__name__": "page"}
    for block in blocks_of(page):
        if block.title:
            path = folder / block.title
            path.parent.mkdir(exist_ok=True)
            path.write_text(block.code)
        if block.language in PYTHON:
            code = compile(with_stand_ins(block.code), block.place, "exec")
            if block.mark == "" or (run_shell and block.mark == "slow"):
                exec(code, names)
        elif block.language in SHELL:
            for words in commands_of(block.code):
                try:
                    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                        check_command(words)
                except (Exception, SystemExit) as error:
                    raise AssertionError(f"{block.place}: {' '.join(words)}: {error}") from error
            if run_shell and block.mark == "run":
                run_block(block.code, folder)


def with_stand_ins(code):
    for name, stand_in in STAND_INS.items():
        code = code.replace(name, stand_in)
    return code


def run_block(code, folder):
    """Executes a shell block by bash, with commands shortened."""
    lines = []
    for line in with_stand_ins(code).replace("\\\n", " ").splitlines():
        words = next(iter(commands_of(line)), [])
        lines.append(" ".join([line, *shortening(words)]))
    python = f'"{sys.executable}"'
    shims = f'imagereward() {{ {python} -m imagereward_jax "$@"; }}\npython() {{ {python} "$@"; }}\n'
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", shims + "\n".join(lines)],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=3600,
    )  # fmt: skip
    assert done.returncode == 0, f"{code}\n{done.stderr[-3000:]}"


def shortening(words):
    if words[:2] == ["imagereward", "evaluate"]:
        return SHORT_EVALUATION
    if words[:2] != ["imagereward", "train"] or "--help" in words:
        return []
    config, *_ = train.parse_flags(words[1:])
    fields = dict(flat_fields(config.to_dict()))
    given = {word.partition("=")[0] for word in words}
    short = {name: value for name, value in SHORT.items() if name in fields and f"--config.{name}" not in given}
    return [f"'--config.{name}={value}'" for name, value in short.items()]


def check_command(words):
    """Refuses a command that its program would refuse before it opens a model or a file."""
    program, *rest = words
    if program == "eval":
        (inner,) = re.findall(r"\$\((.*)\)", rest[0])
        check_command(inner.split())
    elif program == "imagereward":
        check_own(rest)
    elif program in ("python", "python3"):
        check_python(rest)
    elif program == "pip":
        check_pip(rest)
    elif program.startswith("launch/"):
        assert (ROOT / program).is_file(), "no such script"
        check_command(rest[rest.index("python") :])
    elif program == "pytest":
        check_pytest(rest)
    else:
        assert program in OTHER_PROGRAMS or program.endswith("/python"), f"unknown program {program}"


def check_own(rest):
    """A command of this package, by its own parser."""
    name, *rest = rest
    if name.startswith("-") or name == "recipes":
        assert main([name, *rest]) == 0, "it ends with an error"
    elif name == "convert":
        script(ROOT / f"convert/{rest[0].replace('-', '_')}.py").parse_args(rest[1:])
    elif name == "train":
        check_config(["train", *rest])
    elif name == "plan":
        args, rest = plan.parse_args(rest)
        find_topology(args.topology)
        check_config(["plan", *rest])
    else:
        importlib.import_module(f"imagereward_jax.{name}").parse_args(rest)


def check_config(argv):
    if "--help" in argv:
        with pytest.raises(SystemExit):
            train.parse_flags(argv)
    else:
        config, *_ = train.parse_flags(argv)
        validate(config)


def script(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_python(rest):
    if rest[0] == "-m" and rest[1] == "pip":
        check_pip(rest[2:])
    elif rest[0] == "-m" and rest[1] in ("build", "venv"):
        pass
    elif rest[:2] == ["-m", "imagereward_jax.integrations"]:
        assert rest[2] in ("comfyui", "webui"), rest[2]
    elif rest[0] == "-m":
        check_own([rest[1].removeprefix("imagereward_jax."), *rest[2:]])
    elif rest[0].startswith("convert/"):
        script(ROOT / rest[0]).parse_args(rest[1:])
    else:
        source = (ROOT / rest[0]).read_text(encoding="utf-8")
        for flag in re.findall(r"^(--[\w-]+)", "\n".join(rest[1:]), re.MULTILINE):
            # benchmarks take some of their flags from benchmarks/common.py
            common = (ROOT / "benchmarks/common.py").read_text(encoding="utf-8")
            assert f'"{flag}"' in source + common, f"{rest[0]} has no flag {flag}"


@functools.cache
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def check_pip(rest):
    assert rest[0] == "install", rest[0]
    for extras in re.findall(r"(?:^|\n)(?:\.|imagereward-jax)\[([\w,-]+)\]", "\n".join(rest)):
        assert set(extras.split(",")) <= set(project()["project"]["optional-dependencies"]), extras


def check_pytest(rest):
    markers = {marker.partition(":")[0] for marker in project()["tool"]["pytest"]["ini_options"]["markers"]}
    for before, word in zip(["", *rest], rest):
        if before == "-m":
            assert word in markers, f"no marker {word}"
        elif word.startswith("tests/"):
            assert (ROOT / word.partition("::")[0]).exists(), f"no file {word}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_to_pages_and_headings(page):
    """Relative links of the repository; mkdocs checks those of the site, generated pages included."""
    text = re.sub(r"(?ms)^```.*?^```$", "", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists() and linked.is_relative_to(ROOT), f"{target}: no such file"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{target}: no such heading"


def test_config_fields_that_pages_name_exist():
    """`config.a.b` anywhere, of any method."""
    names = {"config.py", "config.json"}  # files
    names |= {"config.eval.judges", "config.reward.terms"}  # empty by default
    for path in (ROOT / "imagereward_jax/methods").glob("*.py"):
        if re.search(r"^def make\(", path.read_text(encoding="utf-8"), re.MULTILINE):
            names |= {f"config.{name}" for name, _ in flat_fields(default_config(path.stem).to_dict())}
    names |= {name.rpartition(".")[0] for name in names}
    missing = []
    for page in PAGES:
        text = "".join(re.split(r"(?ms)^```python.*?^```$", page.read_text(encoding="utf-8")))
        for name in re.findall(r"(?<![\w/.])(config\.[a-z0-9_]+(?:\.[a-z0-9_]+)*)\b(?!\()", text):
            if name not in names and not name.startswith(("config.reward.terms.", "config.eval.judges.")):
                missing.append(f"{page.relative_to(ROOT)}: {name}")
    assert not missing, missing


def test_recipes_and_files_that_pages_name_exist():
    recipes = {path.stem for path in shipped_files("configs")}
    pattern = r"\b((?:configs|convert|docs|benchmarks|tests|examples|launch|notebooks|docker)/[\w/.-]+\.\w+)"
    missing = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        paths = [path for path in re.findall(pattern, text) if "NAME" not in path]
        missing += [f"{page.name}: {path}" for path in paths if not (ROOT / path).exists()]
        named = re.findall(r"(?<!-)\b--config (\w+)(?= |\n|`)|`(\w+_(?:tiny|sd15|sd35_lora|sdxl_lora))`", text)
        missing += [f"{page.name}: recipe {name}" for name in map("".join, named) if name not in recipes]
    assert not missing, missing
