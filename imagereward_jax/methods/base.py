"""What a method is: losses, where their batches come from, what trains, how a run is evaluated.

A method is a module with a `Config` (a `config.Section`) and a function `make(config, parts) -> Method`. It is handed
its parts (`assembly.parts.Parts`): pipeline, reward, data. Names in `imagereward_jax.methods` are short ("refl"); a
module of your own is named in full ("my_package.my_method").
"""

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import numpy as np

from imagereward_jax.config import ConfigError, Section, did_you_mean, require_given

Params = dict[str, Any]
Batch = dict[str, Any]
Metrics = dict[str, Any]
Key = jax.Array
HOST = "host"  # of a batch, what stays on the host: prompts, metadata
STEPS = "steps"  # of a batch, arrays [B, K, ...]: an update takes their K parts in turn, each in a round of its own


class Mean(NamedTuple):
    """A mean over rows that count differently: total / count. Accumulation adds both before it divides."""

    total: jax.Array
    count: jax.Array

    @property
    def value(self) -> jax.Array:
        """The mean of what was summed; 0 over nothing."""
        return self.total / jax.numpy.maximum(self.count, 1)


class Peak(NamedTuple):
    """A metric whose largest value counts, over accumulation rounds and the updates of a step."""

    value: jax.Array


class Models(NamedTuple):
    """Weights that a loss may read, in the compute dtype; gradient flows through `policy` alone.

    Attributes:
        policy: every component by name, trainable joined with frozen.
        reference: what training started from; None unless the method asks for it.
        copies: averages of the weights that the method asked for, {name: components as in `policy`}.
        tables: what the phase has as `Phase.tables`.
    """

    policy: Params
    reference: Params | None = None
    copies: dict[str, Params] = {}
    tables: Any = None


class ImageSamples(NamedTuple):
    """Images that a run made, and what they scored.

    Attributes:
        images: float32 [N, H, W, 3] in [0, 1]. prompts: N texts. prompt_metadata: the N dicts that came with them.
        rewards: float32 [N], NaN if there was no verdict; None if the run has no reward.
        held_out: whether an evaluation made them, not a training step.
    """

    images: np.ndarray
    prompts: list[str]
    prompt_metadata: list[dict[str, Any]]
    rewards: np.ndarray | None
    held_out: bool


class Source(Protocol):
    """Where a phase's batches come from.

    Attributes:
        updates: batches of one training step, an update each; all phases of a method have as many.
        images: images that one batch stands for, for images/s.
        on_policy: whether the batches of a step are made by its weights: then `batches` is called at every step.
        metrics: numbers of the present step's batches, logged beside those of the loss.
        samples: this process's images of the present step, if the source keeps them.
    """

    updates: int = 1
    images: int
    on_policy: bool = False
    metrics: Mapping[str, float] = {}
    samples: ImageSamples | None = None

    def spec(self) -> Batch:
        """Shapes of one global batch (`jax.ShapeDtypeStruct`): compiling and planning need no data."""

    def batches(self, models: Models | None, key: Key) -> Iterator[Batch | None]:
        """Batches of this process: nested dicts of NumPy arrays, and under "host" what stays there (lists: prompts,
        metadata). None between two pieces of long work, for the loop to look whether it should stop.

        Args:
            models: the present weights of an on-policy source; else None.
            key: of the run; of an on-policy source's step.
        """

    def prepare(self, models: Models, batch: Batch) -> Batch:
        """Makes what the loss reads of a batch, inside the compiled step: encodes prompts."""

    def get_state(self) -> dict[str, Any]:
        """Positions by the name of the data, for JSON."""

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Resumes from `get_state`."""


Loss = Callable[[Models, Batch, Key], tuple[jax.Array | Mean, Metrics]]


class Phase(NamedTuple):
    """One loss and the update that follows it.

    Attributes:
        loss: (models, batch, key) -> (value, metrics): a mean over the batch or a `Mean`; pure.
        tables: arrays that the compiled program takes as arguments (a sampler), given as `models.tables`.
    """

    name: str
    loss: Loss
    source: Source
    tables: Any = None

    @classmethod
    def sum(cls, name: str, parts: Mapping[str, "Phase"]) -> "Phase":
        """One update by the sum of several losses, each with batches and randomness of its own.

        The metrics are those of all parts, and each part's loss as NAME_loss.
        """
        parts = dict(parts)

        def loss(models, batch, key):
            total, metrics = 0.0, {}
            for index, (part, phase) in enumerate(parts.items()):
                own = models._replace(tables=models.tables[part])
                value, found = phase.loss(own, batch[part], jax.random.fold_in(key, index))
                value = value.value if isinstance(value, Mean) else value
                total, metrics = total + value, {**metrics, **found, f"{part}_loss": value}
            return total, metrics

        sources = {part: phase.source for part, phase in parts.items()}
        return cls(name, loss, JoinedSource(sources), {part: phase.tables for part, phase in parts.items()})


class JoinedSource(Source):
    """Several sources side by side: a batch has one of each, by name."""

    def __init__(self, sources: Mapping[str, Source]):
        self.sources = dict(sources)
        self.images = next(iter(self.sources.values())).images

    def spec(self) -> Batch:
        """See `Source`."""
        return {name: source.spec() for name, source in self.sources.items()}

    def batches(self, models: Models | None, key: Key) -> Iterator[Batch]:
        """See `Source`."""
        iterators = {
            name: source.batches(models, jax.random.fold_in(key, index))
            for index, (name, source) in enumerate(self.sources.items())
        }
        while True:
            yield {name: next(iterator) for name, iterator in iterators.items()}

    def prepare(self, models: Models, batch: Batch) -> Batch:
        """See `Source`."""
        return {name: source.prepare(models, batch[name]) for name, source in self.sources.items()}

    def get_state(self) -> dict[str, Any]:
        """See `Source`."""
        states = [source.get_state() for source in self.sources.values()]
        return {name: state for part in states for name, state in part.items()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """See `Source`."""
        for source in self.sources.values():
            source.set_state(state)


class Evaluation(NamedTuple):
    """What an evaluation found.

    Attributes:
        metrics: numbers by name ("eval/...").
        sheet: samples (PIL image), or None.
        samples: the samples themselves, or None.
        errors: standard errors of some of the metrics, by their names.
        embeds: unit vectors [N, D] of the images, under the name of a metric: that of their mean distance (1 - cosine)
            from those of the evaluation before the first step.
        scores: metrics by prompt: [P, K] of the K images of each, which follow each other in `samples`, or [P]; NaN if
            there was no verdict.
    """

    metrics: dict[str, float]
    sheet: Any = None
    samples: ImageSamples | None = None
    errors: Mapping[str, float] = {}
    embeds: Mapping[str, Any] = {}
    scores: Mapping[str, np.ndarray] = {}


# Takes every component, on the mesh, in the compute dtype. It may list its metrics as `measures`, see `training.watch`.
Evaluator = Callable[[Params], Evaluation]


class Export(NamedTuple):
    """How a run writes its result.

    Attributes:
        write: (components, what `measure` gave, empty folder) -> None; the weights that train in float32. Runs in
            process 0 alone.
        marker: a file of every such export: no other folder is replaced by one.
        components: which components `write` takes.
        measure: (components on the mesh) -> anything; runs in every process, so that it may compute.
    """

    write: Callable[[Params, Any, Path], None]
    marker: str
    components: tuple[str, ...]
    measure: Callable[[Params], Any] | None = None


@dataclasses.dataclass(frozen=True)
class Method:
    """A method with its parts, ready to be trained or planned.

    Attributes:
        phases: the losses, each with an update of its own, in order.
        trains: components that train, e.g. (pipeline.denoiser,), or a function (components) -> mask of them.
        evaluate: evaluators by name.
        reads: components that losses and evaluators read; None for all of the pipeline's and the reward.
        copies: averages to keep: {name: update -> decay}.
        reference: whether losses read `Models.reference`.
        shown: the metric that the progress bar calls reward, or None.
        export: how the result is written; None for the pipeline's folder or adapter file.
        test: (components) -> metrics ("test/...") of what is exported, once at the end, or None.
        loop_trips: how often a loop of traced length in a loss runs at most, for the FLOPs of plans.
        limits: {metric: (value that it should not exceed, what it means)}; the run warns of the first time.
    """

    phases: tuple[Phase, ...]
    trains: tuple[str, ...] | Callable[[Params], Params]
    evaluate: Mapping[str, Evaluator] = dataclasses.field(default_factory=dict)
    reads: tuple[str, ...] | None = None
    copies: Mapping[str, Callable[[jax.Array], jax.Array]] = dataclasses.field(default_factory=dict)
    reference: bool = False
    shown: str | None = None
    export: Export | None = None
    test: Callable[[Params], dict[str, float]] | None = None
    loop_trips: int = 1
    limits: Mapping[str, tuple[float, str]] = dataclasses.field(default_factory=dict)


class MethodConfig(Section, path="method"):
    """Base of a method's `Config`.

    Attributes:
        uses: sections of the config beside those of every run, by their names in `sections.parts.PARTS`.
        defaults: defaults of other sections that differ for this method, {"eval.best": "eval/reward_mean"}.
        needs_gradient: whether the reward has to be differentiable.
    """

    uses: ClassVar[tuple[str, ...]] = ()
    defaults: ClassVar[dict[str, Any]] = {}
    needs_gradient: ClassVar[bool] = True


def require_sampling(config: Any) -> None:
    """Refuses a config without what a method reads that samples images and scores them.

    Raises:
        ConfigError: model, reward or held-out prompts are not given.
    """
    require_given(config, "model.path")
    require_given(config, "eval.prompts")
    if not config.reward.terms:
        require_given(config, "reward.path", " (or name several in config.reward.terms)")


def find_method(name: str) -> ModuleType:
    """The module of a method.

    Raises:
        ConfigError: there is no such module, with the nearest built-in name, or it lacks `Config` or `make`.
    """
    full = name if "." in str(name) else f"{__package__}.{name}"
    try:
        module = importlib.import_module(full)
    except ModuleNotFoundError as error:
        if error.name is None or not full.startswith(error.name):
            raise  # the module is there, and lacks something that it imports
        known = built_in_methods()
        raise ConfigError(
            f"config.method.name={name!r}: expected one of {', '.join(known)}, or a module of yours that Python can "
            f"import, such as my_package.my_method{did_you_mean(name, known)}"
        ) from error
    missing = [part for part in ("Config", "make") if not hasattr(module, part)]
    if missing:
        raise ConfigError(f"config.method.name={name!r}: {full} is not a method: it has no {' and no '.join(missing)}")
    return module


def built_in_methods() -> list[str]:
    """Names of the methods of this package."""
    package = importlib.import_module(__package__)
    names = [module.name for module in pkgutil.iter_modules(package.__path__)]
    return [name for name in names if hasattr(importlib.import_module(f"{__package__}.{name}"), "make")]
