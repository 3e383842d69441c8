"""Objects that Python code brings to a run beside its config: weights, a reward, prompts."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from imagereward_jax.config import ConfigError
from imagereward_jax.data.given_prompts import GivenPrompts, PromptFunction, draw_rows, rows_of_list, rows_of_text
from imagereward_jax.data.prompts import PromptRows, load_prompt_rows
from imagereward_jax.methods.base import Params
from imagereward_jax.rewards.functions import name_of_object
from imagereward_jax.training.mesh import from_all_processes

PROMPTS = "prompts.jsonl"  # in the workdir, the prompts that a list or function gave


@dataclasses.dataclass(frozen=True)
class Given:
    """Objects that take the place of what the config names; None for what is opened by its name.

    Attributes:
        params: all weights of the model, by component, instead of its files'.
        reward: instead of config.reward's, see `rewards.given_terms`.
        prompts: training prompts, a list or function of `data.given_prompts`.
        eval_prompts: a list of held-out prompts.
        workdir: of the run, where the prompts of a function are kept.
        keep_samples: whether on-policy sources keep the images that they make (`Source.samples`).
    """

    params: Params | None = None
    reward: Any = None
    prompts: Sequence[Any] | PromptFunction | None = None
    eval_prompts: Sequence[Any] | None = None
    workdir: Path | None = None
    keep_samples: bool = False


def name_of(value: Any) -> str:
    """How config fields call an object: its own name, "module:function", "a list of 3", "a mixture of a, b", or the
    name of its class."""
    if isinstance(value, Mapping):
        return f"a mixture of {', '.join(map(str, value))}"
    if isinstance(value, list | tuple | np.ndarray):
        return f"a list of {len(value)}"
    if isinstance(getattr(value, "name", None), str):
        return value.name
    return name_of_object(value)


def training_rows(parts: Any, count: int) -> PromptRows | GivenPrompts:
    """The training prompts of a run that takes `count` of them.

    Those of a list or function are written to `PROMPTS` in the workdir. A function is called for the prompts that are
    not there yet, in process 0 alone.

    Raises:
        ConfigError: the list is not the one that the run began with; data.cache is set and a function draws prompts.
        DataError: see `load_prompt_rows`, `rows_of_list` and `draw_rows`.
    """
    data, given = parts.config.data, parts.given.prompts
    if given is None:
        return load_prompt_rows(data.prompts, column=data.prompts_column, flag="--config.data.prompts_column=")
    table = None if parts.given.workdir is None else parts.given.workdir / PROMPTS
    kept = table.read_text(encoding="utf-8") if table is not None and table.is_file() else ""
    if callable(given):
        rows = _drawn(parts, rows_of_text(kept), count)
    else:
        rows = GivenPrompts(rows_of_list(given, "prompts"))
        if kept not in ("", rows.to_text()):
            raise ConfigError(f"prompts: the run began with others, which are in {table}; choose another workdir")
    parts.files[PROMPTS] = rows.to_text()
    return rows


def _drawn(parts, kept, count):
    config, function = parts.config, parts.given.prompts
    if config.data.get("cache"):
        raise ConfigError(
            f"config.data.cache={config.data.cache!r} keeps the prompts of a list or file, not of a function: leave it "
            "empty, or pass a list of prompts"
        )
    new = []
    if jax.process_index() == 0:
        new = draw_rows(function, len(kept), count, seed=config.seed, name=name_of(function))
    return GivenPrompts(kept + from_all_processes(new)[0], drawn=True)


def held_out_rows(parts: Any) -> PromptRows | GivenPrompts:
    """The prompts of config.eval, with their metadata; errors as for `training_rows`."""
    if parts.given.eval_prompts is None:
        return load_prompt_rows(parts.config.eval.prompts, flag="")
    return GivenPrompts(rows_of_list(parts.given.eval_prompts, "eval_prompts"))
