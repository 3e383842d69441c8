"""Tunes a model by rewards, images or preferences, or trains a scorer: `imagereward train --config refl_tiny`.

    imagereward train --config refl_tiny --config.steps=20   # a recipe of this package, or a file of yours
    imagereward train --config refl_tiny --help              # its every field, with value and meaning
    imagereward recipes                                      # lists the recipes

The default --workdir is runs/NAME, after the config file's name. The same command again resumes an interrupted run, or
says that it is complete.

On several machines every process gets the same command: on TPU pods and in Slurm jobs with --distributed, elsewhere
with --coordinator HOST:PORT --num-processes N --process-id I (see launch/). WORKDIR is on a file system that all share.

Exit status: 0 done or complete already; 2 bad input; 1 the run failed; 128 + signal after SIGTERM or Ctrl-C, when
everything is saved; 130 at once after Ctrl-C before the first step, or a second Ctrl-C.
"""

import contextlib
import difflib
import os
import re
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagereward_jax.command import command
from imagereward_jax.config import did_you_mean, flat_fields
from imagereward_jax.distributed import join
from imagereward_jax.shipped import shipped_files
from imagereward_jax.terminal import program, say

if TYPE_CHECKING:
    from imagereward_jax.trainer import Trainer

DASHES = {"--num-processes": "--num_processes", "--process-id": "--process_id"}  # absl's flags have underscores
HELP = ("-h", "--help", "--helpshort", "--helpfull")
FLAGS = ("workdir", "distributed", "coordinator", "num_processes", "process_id")  # beside --config
# What a value should have been, by what absl and ml_collections say of one that cannot be read.
_EXPECTED = {
    "invalid literal for int": "a whole number",
    "could not convert string to float": "a number",
    "Non-boolean argument": "True or False",
    "as a ConfigDict": "a field of it, as --{name}.FIELD=value",
}
_FIELD = re.compile(r"--?config\.([\w.]+)")
USAGE = "--config RECIPE [--workdir DIR] [--config.field=value ...]"


@command
def main(argv=None):
    """Parses flags, builds, trains; returns the exit status."""
    argv = list(sys.argv if argv is None else argv)
    config, workdir, processes = parse_flags(argv)
    from imagereward_jax.trainer import Trainer

    trainer = Trainer(config, workdir=workdir)
    trainer.started_by = f"{program('train')} {shlex.join(argv[1:])}"
    if processes is not None:
        join(*processes)
    return run(trainer)


def run(trainer: "Trainer") -> int:
    """Trains; returns the exit status."""
    from imagereward_jax.training.interruptions import Interrupted, ProcessLost

    workdir = trainer.workdir
    try:
        if not trainer.train():
            say(
                f"{workdir} is complete: see {workdir / 'report.html'}; raise --config.steps to train on, or change "
                "config.stop if that ended it",
                file=sys.stderr,
            )
    except Interrupted as stop:
        say(stop, file=sys.stderr)
        return 128 + stop.signum
    except ProcessLost as error:
        # At once: on the way out jax would wait for the process that is gone.
        say(f"error: {error}", file=sys.stderr)
        os._exit(1)
    return 0


def parse_flags(argv, usage=None):
    """(config, workdir, processes) from the command line; processes are what `distributed.join` takes, or None.

    Raises:
        ValueError: an unknown flag or field (with its nearest neighbour), a value of another type.
        FileNotFoundError: the config file is not there.
    """
    from absl import flags
    from ml_collections import config_flags

    usage = usage or f"usage: {program('train')} {USAGE}"
    argv = [DASHES.get(name, name) + equals + value for name, equals, value in (text.partition("=") for text in argv)]
    asked = [argument for argument in argv[1:] if argument in HELP]
    argv = [argument for argument in argv if argument not in HELP]
    if asked and not any(argument.startswith(("--config", "-config")) for argument in argv[1:]):
        say(f"{__doc__}\n{usage}")
        raise SystemExit(0)
    argv, file = find_config(argv, usage)
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    flags.DEFINE_string("workdir", None, "folder of the run; default runs/NAME", flag_values=values)
    flags.DEFINE_boolean("distributed", False, "join the other processes of a TPU pod or Slurm job", flag_values=values)
    flags.DEFINE_string("coordinator", None, "elsewhere: HOST:PORT of process 0,", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "how many processes there are,", flag_values=values)
    flags.DEFINE_integer("process_id", None, "and which one this is, from 0", flag_values=values)
    try:
        rest = values(argv)
    except (AttributeError, KeyError) as error:  # how ml_collections reports an unknown field
        if "get_config" in str(error):
            raise ValueError(f"--config {file}: has no function get_config()") from error
        if (bare := [argument for argument in argv if not _FIELD.match(argument)]) != argv:
            config = parse_flags(bare)[0]  # raises what is wrong in the file itself
            raise ValueError(unknown_field(config, filter(None, map(_FIELD.match, argv)))) from error
        raise ValueError(f"--config {file}: {_plainly(error)}") from error
    except (flags.Error, TypeError) as error:
        raise ValueError(_of_flag(_one_line(error))) from error
    except ModuleNotFoundError:
        raise  # may be a package of an extra
    except Exception as error:  # of the config file, while it is imported
        raise ValueError(f"--config {file}: {type(error).__name__}: {_one_line(error)}") from error
    if len(rest) > 1:
        raise ValueError(f"unexpected argument {rest[1]!r}; {usage}")
    config = values.config
    _read_none(config)
    if asked:
        from imagereward_jax.config_help import describe

        say(f"{usage}\n\n{describe(config)}")
        raise SystemExit(0)
    workdir = values.workdir or Path("runs") / Path(values["config"].config_filename).stem
    processes = (values.coordinator, values.num_processes, values.process_id)
    joins = values.distributed or any(value is not None for value in processes)
    return config, Path(workdir), processes if joins else None


def _read_none(config):
    """Reads "None" as None in the texts that may be none; of numbers ml_collections does that itself."""
    from imagereward_jax.config import ConfigError
    from imagereward_jax.recipes import sections_of

    with contextlib.suppress(ConfigError, AttributeError):  # what is wrong is said where the config is checked
        for section in sections_of(config):
            values = config[section.location] if section.location else config
            for name, (kind, optional, _) in section.field_types().items():
                if optional and kind is str and values.get(name) == "None":
                    values[name] = None


def unknown_field(config: Any, given: Iterable[re.Match]) -> str:
    """Names the first field on the command line that a config has not, with the nearest field or flag.

    Args:
        given: matches of `_FIELD`.
    """
    paths = dict(flat_fields(config.to_dict()))
    for name in (match[1] for match in given):
        if name in paths or any(path.startswith(f"{name}.") for path in paths):
            continue
        leaves = {path.rpartition(".")[2]: path for path in paths}
        ways = {known: f"--config.{path}" for known, path in {**leaves, **{path: path for path in paths}}.items()}
        ways |= {flag: f"--{flag}" for flag in FLAGS}
        leaf = name.rpartition(".")[2]
        near = (
            [leaf] * (leaf in ways)
            or difflib.get_close_matches(name, ways, 1)
            or difflib.get_close_matches(leaf, ways, 1)
        )
        return f"--config.{name}: this config has no such field" + (f" (did you mean {ways[near[0]]}?)" if near else "")
    return "the fields on the command line do not fit this config: see --help"


def _plainly(error):
    """What ml_collections says of a field in a config file that is not there."""
    names = re.findall(r"\w[\w.]*", str(error.args[0]))
    told = re.search(r'Did you mean "(\w+)" instead of "(\w+)"', str(error.args[0]))
    near, name = told.groups() if told else (None, names[0] if names else "")
    return f"sets the field {name!r}, which is not there" + (f" (did you mean {near!r}?)" if near else "")


def _one_line(error):
    """The first line of an error of the flags; of one in the config file, whose traceback follows, also the last."""
    first, *others = str(error).splitlines() or [type(error).__name__]
    told = [line for line in others if re.match(r"[\w.]+: ", line)]
    return f"{first} {told[-1]}" if told else first


def _of_flag(told):
    """Says in the words of other errors what absl tells of a flag."""
    for dashes, plain in DASHES.items():
        told = told.replace(plain, dashes)
    if unknown := re.match(r"Unknown command line flag '([^']*)'", told):
        known = ["--config", *DASHES, *({f"--{name}" for name in FLAGS} - set(DASHES.values()))]
        return f"--{unknown[1]}: no such flag{did_you_mean('--' + unknown[1], known)}"
    if value := re.match(r"flag --([\w.-]+)=(.*?): (.*)", told, re.DOTALL):
        for sign, expected in _EXPECTED.items():
            if sign in value[3]:
                return f"--{value[1]}={value[2]}: expected {expected.format(name=value[1])}"
    return told


def find_config(argv: list[str], usage: str) -> tuple[list[str], Path]:
    """Puts `--config` first, before its fields, with the file of a packaged recipe in the place of its name.

    Returns:
        (argv, the config's file).

    Raises:
        ValueError: there is no --config. FileNotFoundError: nor such a file or recipe.
    """
    for position, argument in enumerate(argv[1:], 1):  # noqa: B007
        flag, equals, value = argument.partition("=")
        if flag in ("--config", "-config"):
            break
    else:
        raise ValueError(f"--config is missing; {usage}")
    others = argv[1:position], argv[position + (1 if equals else 2) :]
    if not equals:
        value = argv[position + 1] if position + 1 < len(argv) else ""
    name, colon, option = value.partition(":")
    path = Path(name)
    if not path.is_file():
        recipes = {recipe.stem: recipe for recipe in shipped_files("configs")}
        there = [str(other) for other in path.parent.glob("*.py")] if path.parent.is_dir() else []
        if name not in recipes:
            near = did_you_mean(name, [*there, *recipes])
            raise FileNotFoundError(f"--config {name}: no such file, nor a recipe of this package{near}")
        path = recipes[name]
    return [argv[0], f"--config={path}{colon}{option}", *others[0], *others[1]], path


if __name__ == "__main__":
    sys.exit(main())
