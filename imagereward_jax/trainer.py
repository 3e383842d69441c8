"""`Trainer`: a run from Python, of a config and of objects; the command `train` is the same with a config alone.

trainer = Trainer(config, pipeline="tiny-shapes", reward=my_function, prompts=my_prompts, workdir="runs/mine")
trainer.train()
trainer.save_pretrained("tuned")
"""

import functools
import inspect
import shutil
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from imagereward_jax.assembly.given import Given, name_of
from imagereward_jax.assembly.run import assemble
from imagereward_jax.compilation_cache import use_compilation_cache
from imagereward_jax.config import ConfigError, did_you_mean
from imagereward_jax.data.given_prompts import PromptFunction
from imagereward_jax.methods import base
from imagereward_jax.pipelines.base import TextToImage
from imagereward_jax.recipes import default_config, validate
from imagereward_jax.storage.folders import new_folder
from imagereward_jax.training import loop
from imagereward_jax.training.model_card import CARD
from imagereward_jax.training.workdir import DONE, is_complete
from imagereward_jax.weights import hub


class Trainer:
    """One run in `workdir`: trained, resumed, saved, uploaded.

    The arguments `pipeline`, `reward`, `prompts` and `eval_prompts` take the place of config.model.path, config.reward,
    config.data.prompts and config.eval.prompts. The run's config names the function or class of an object.

    Args:
        config: a recipe's config, which is copied, or a method's `Config` alone (`ddpo.Config(num_steps=20)`): the
            other fields then have the method's defaults.
        fields: further fields by their names in the config, {"steps": 100, "optimizer.learning_rate": 1e-4}.
        pipeline: a model's name or folder; an opened `TextToImage`, whose files are opened again in the config's
            dtypes; or what `load_pipeline` returns, (pipeline, params), whose weights training then starts from.
        reward: a name as of config.reward.path; an opened reward; a function f(images uint8 [B, H, W, 3], prompts) or
            f(images, prompts, metadata) of B scores, or a jax function (`jax_reward`), see docs/rewards.md; or
            {name: opened reward, function or `Term`} for their weighted sum.
        prompts: a file or name as of config.data.prompts; a list of prompts or of (prompt, metadata), shuffled by the
            run's seed; or a function () -> (prompt, metadata), see `data.given_prompts`. The function is called for
            the prompts of all steps before the first one. What it gave is kept in WORKDIR/prompts.jsonl: a resumed run
            is given the same prompts, whatever the function remembers, and a longer run calls it for the further ones.
        eval_prompts: a file or name as of config.eval.prompts, or a list: held-out prompts.
        image_samples_hook: called as (samples, step, writers) in process 0: after every evaluation, with its images of
            held-out prompts, and after every step of a method that trains on its own samples (DDPO), with this
            process's. samples: `methods.base.ImageSamples`; writers: {name: `MetricWriter`} of config.writers.
        workdir: folder of the run; the same arguments in the same folder continue it.

    Attributes:
        config: the run's config. workdir: a Path.
        started_by: the command that started the run, for its report; "" in Python.

    Raises:
        ConfigError: naming the field, or argument, and what is expected.
    """

    def __init__(
        self,
        config: ConfigDict | base.MethodConfig,
        *,
        workdir: str | PathLike,
        fields: Mapping[str, Any] | None = None,
        pipeline: str | PathLike | TextToImage | tuple[TextToImage, base.Params] | None = None,
        reward: Any = None,
        prompts: str | PathLike | Sequence[Any] | PromptFunction | None = None,
        eval_prompts: str | PathLike | Sequence[Any] | None = None,
        image_samples_hook: loop.SamplesHook | None = None,
    ):
        if not isinstance(workdir, str | PathLike) or not str(workdir):
            raise ConfigError(f"workdir={workdir!r:.200}: expected the path of a folder")
        self.workdir, self.started_by = Path(workdir), ""
        self.config = _config_of(config, {} if fields is None else fields)
        self.hook = _checked_hook(image_samples_hook)
        for name, value in (("prompts", prompts), ("eval_prompts", eval_prompts)):
            _check_prompts(name, value)
        self.given = Given(
            params=self._use_pipeline(pipeline),
            reward=self._use("reward", "path", reward),
            prompts=self._use("data", "prompts", prompts),
            eval_prompts=self._use("eval", "prompts", eval_prompts),
            workdir=self.workdir,
            keep_samples=image_samples_hook is not None,
        )
        validate(self.config)

    def train(self) -> bool:
        """Trains to config.steps, from the latest checkpoint if there is one; see `training.loop.train`.

        Returns:
            False if the run was complete already.
        """
        use_compilation_cache(self.config.compilation_cache)
        put_together = functools.partial(assemble, given=self.given)
        return loop.train(
            self.config, put_together, self.workdir, image_samples_hook=self.hook, started_by=self.started_by
        )

    def save_pretrained(self, folder: str | PathLike, *, overwrite: bool = False) -> None:
        """Copies what was exported (a diffusers folder, or an adapter's) with its model card to `folder`.

        Args:
            overwrite: replaces a folder that such a card is in.

        Raises:
            ValueError: the run is not complete, or `folder` is in its own export.
            FileExistsError, StorageError: see `storage.folders.new_folder`.
        """
        export = self._exported()
        if Path(folder).absolute().is_relative_to(export.absolute()):
            raise ValueError(f"{folder} is in what it would be copied from, {export}: choose another folder")
        with new_folder(folder, overwrite=overwrite, marker=CARD) as target:
            shutil.copytree(export, target, dirs_exist_ok=True)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        commit_message: str = "Tuned with imagereward-jax",
        token: str | None = None,
    ) -> str:
        """Uploads what was exported, with its model card, to the hub repository `repo_id`, which is made if need be.

        Returns:
            The address of the commit.

        Raises:
            ValueError: the run is not complete. UploadError: see `weights.hub.upload_folder`.
        """
        return hub.upload_folder(self._exported(), repo_id, private=private, message=commit_message, token=token)

    def _exported(self):
        if not is_complete(self.workdir, self.config):
            raise ValueError(f"{self.workdir} has no {DONE} of step {self.config.steps}: call train() first")
        export = self.workdir / "export"
        if not (export / CARD).is_file():
            raise ValueError(f"{export} is gone: remove {self.workdir / DONE}, and train() writes it again")
        return export

    def _use_pipeline(self, pipeline):
        """Names the model in the config; returns weights that are in memory, or None."""
        if pipeline is None:
            return None
        if isinstance(pipeline, str | PathLike):
            self.config.model.path = str(pipeline)
            return None
        opened, params = pipeline if isinstance(pipeline, tuple) and len(pipeline) == 2 else (pipeline, None)
        if not isinstance(opened, TextToImage):
            got = type(opened).__name__ if opened is pipeline else f"({type(opened).__name__}, ...)"
            raise ConfigError(
                f"pipeline: expected a name or folder, a TextToImage, or what load_pipeline returns; got {got}"
            )
        if opened.source is None or opened.adapted:
            why = "has adapted layers: pass config.lora" if opened.adapted else "was opened from no files: save it"
            raise ConfigError(f"pipeline: this {type(opened).__name__} {why}, and pass the folder of its base model")
        if params is not None:
            _check_params(opened, params)
        self.config.model.path = str(opened.source.name_or_path)
        self.config.model.variant = opened.source.variant
        self.config.model.parts = opened.source.parts
        self.config.model.prediction_type = opened.scheduler_config.get("prediction_type")
        return params

    def _use(self, section, field, value):
        """Names a value in the config; returns it if it is an object, or None."""
        if value is None:
            return None
        if section not in self.config or field not in self.config[section]:
            raise ConfigError(f"the method {self.config.method.name!r} has no config.{section}.{field} to give")
        named = isinstance(value, str | PathLike)
        if section == "reward" and not named and "terms" not in self.config.reward:
            raise ConfigError(
                f"the method {self.config.method.name!r} trains a reward, of a name or folder: reward='...'"
            )
        self.config[section][field] = str(value) if named else name_of(value)
        return None if named else value


def _config_of(config, fields):
    """A config of one's own, with `fields` changed."""
    if not isinstance(fields, Mapping):
        raise ConfigError(f"fields={fields!r:.200}: expected a dict, {{'steps': 100}}")
    if isinstance(config, FrozenConfigDict):
        config = config.as_configdict()
    elif isinstance(config, ConfigDict):
        config = config.copy_and_resolve_references()
    elif isinstance(config, base.MethodConfig):
        config = _config_of_method(config)
    else:
        raise ConfigError(f"config={config!r:.200}: expected a recipe's ConfigDict or a method's Config")
    for name, value in fields.items():
        _set_field(config, name, value)
    return config


def _set_field(config, name, value):
    """Changes the field of a dotted name; numbers of NumPy become Python's."""
    if not isinstance(name, str):
        raise ConfigError(f"fields: {name!r:.200} should be the name of a field, such as 'optimizer.learning_rate'")
    *path, last = name.split(".")
    section = config
    for step in path:
        section = section.get(step) if isinstance(section, ConfigDict) else None
    if not isinstance(section, ConfigDict) or last not in section:
        near = did_you_mean(last, section) if isinstance(section, ConfigDict) else ""
        raise ConfigError(f"fields: config.{name} is not a field of this method{near}")
    if name == "method.name" and value != section[last]:
        raise ConfigError(f"fields: the method is {section[last]!r}: for {value!r}, start from that method's Config")
    try:
        section[last] = value.item() if isinstance(value, np.generic) else value
    except TypeError as error:
        raise ConfigError(f"fields: config.{name}={value!r:.200}: {error}") from error


def _config_of_method(settings):
    """The defaults of a method, with its own fields from a `Config` of it."""
    module = type(settings).__module__
    config = default_config(module.removeprefix(f"{base.__package__}."))
    for name in type(settings).field_types():
        _set_field(config, f"method.{name}", getattr(settings, name))
    return config


def _checked_hook(hook):
    if hook is None:
        return None
    try:
        inspect.signature(hook).bind("samples", "step", "writers")
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"image_samples_hook={hook!r:.200}: expected a function of (samples, step, writers): {error}"
        ) from error
    return hook


def _check_prompts(name, value):
    """Refuses at once what is neither a name nor a list nor, of training prompts, a function."""
    draws = name == "prompts" and callable(value)
    if not (value is None or draws or isinstance(value, str | PathLike | list | tuple | np.ndarray)):
        also = " or a function that returns one (prompt, metadata)" if name == "prompts" else ""
        raise ConfigError(f"{name}: expected a file, a name, a list{also}; got {type(value).__name__}")


def _check_params(pipeline, params):
    """Refuses weights that are not the pipeline's, all of them."""
    expected, found = pipeline.abstract_params(), {}
    if isinstance(params, Mapping):
        found = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
        where = jax.tree_util.keystr(path)
        given = found.pop(where, None)
        shape, dtype = getattr(given, "shape", None), getattr(given, "dtype", None)
        if shape != leaf.shape or not jnp.issubdtype(dtype, jnp.floating):
            got = "nothing" if given is None else f"{type(given).__name__} of shape {shape} and type {dtype}"
            raise ConfigError(f"pipeline: params{where} should be floating point {list(leaf.shape)}; got {got}")
    if found:
        raise ConfigError(f"pipeline: params{next(iter(found))} is no weight of this {type(pipeline).__name__}")
