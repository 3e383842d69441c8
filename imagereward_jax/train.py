"""`python -m imagereward_jax.train --config configs/refl_tiny.py [--workdir DIR] [--config.field=value ...]`

Trains what the config describes. Without --workdir the run lives in runs/NAME, NAME being the config file's. The same
command again continues an interrupted run, or says that it is complete.

Exit status: 0 done or complete already; 2 bad input; 1 the run failed; 128 + signal after SIGTERM or Ctrl-C, when
everything is saved.
"""

import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from imagereward_jax.training.config import did_you_mean, validate

USAGE = "usage: python -m imagereward_jax.train --config FILE.py [--workdir DIR] [--config.field=value ...]"


def main(argv=None):
    """Parses flags, builds, trains; prints one line and returns the exit status on an error."""
    argv = list(sys.argv if argv is None else argv)
    try:
        config, workdir = parse_flags(argv)
        validate(config)
        return run(config, workdir)
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def run(config, workdir):
    """Trains and says how it ended."""
    from imagereward_jax.experiments import build
    from imagereward_jax.training.checkpoints import CheckpointError
    from imagereward_jax.training.loop import Interrupted, RunError, train

    try:
        if not train(config, build, workdir):
            print(
                f"{workdir} is complete: see {workdir / 'report.html'}; raise --config.steps to train on",
                file=sys.stderr,
            )
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.signum
    except (RunError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parse_flags(argv, usage=USAGE):
    """(config, workdir) from the command line.

    Raises:
        ValueError: an unknown flag or field (with its nearest neighbour), a value of another type.
        FileNotFoundError: the config file is not there.
    """
    _check_config_file(argv, usage)
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    flags.DEFINE_string("workdir", None, "folder of the run; default runs/NAME", flag_values=values)
    try:
        rest = values(argv)
    except AttributeError as error:  # how ml_collections reports an unknown field
        raise ValueError("unknown config field " + " ".join(str(error.args[0]).split())) from error
    except (flags.Error, KeyError, TypeError) as error:
        raise ValueError(str(error).splitlines()[0]) from error
    if len(rest) > 1:
        raise ValueError(f"unexpected argument {rest[1]!r}; {usage}")
    config = values.config
    workdir = values.workdir or Path("runs") / Path(values["config"].config_filename).stem
    return config, Path(workdir)


def _check_config_file(argv, usage):
    given = [
        argument for argument in argv[1:] if argument in ("--config", "-config") or argument.startswith("--config=")
    ]
    if any(argument in ("-h", "--help", "--helpshort", "--helpfull") for argument in argv[1:]):
        print(f"{__doc__}\n{USAGE}")
        raise SystemExit(0)
    if not given:
        raise ValueError(f"--config is missing; {usage}")
    if given[0].startswith("--config="):
        path = given[0].partition("=")[2]
    else:
        after = argv[argv.index(given[0]) + 1 :]
        path = after[0] if after else ""
    path = Path(path.partition(":")[0])
    if not path.is_file():
        there = [str(other) for other in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise FileNotFoundError(f"--config {path}: no such file{did_you_mean(path, there)}")


if __name__ == "__main__":
    sys.exit(main())
