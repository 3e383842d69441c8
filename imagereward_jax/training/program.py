"""The compiled training step of a run: the loop runs it on arrays, planning compiles it over shapes."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from imagereward_jax.methods.base import Export, Method
from imagereward_jax.models.hardware import target_platform
from imagereward_jax.training.mesh import batch_sharding, replicated, weight_shardings
from imagereward_jax.training.optimizer import make_optimizer, make_schedule
from imagereward_jax.training.state import TrainState, init_state
from imagereward_jax.training.step import Fixed, cast, compile_options, make_train_step


@dataclasses.dataclass
class AssembledRun:
    """A method with its weights.

    Attributes:
        method: losses, sources, evaluators.
        trainable: the weights that train, {component: nested dict}, float32.
        frozen: the other weights that losses read, in the dtype that they are held in.
        export: how the result is written.
        reference_of: (cast) -> what training starts from, of what trains, for `Models.reference`.
        assumptions: sentences on what a plan over shapes cannot know.
        files: {name: text} that the run leaves in its workdir before its first step.
        license: of the model that training starts from, as the hub calls it; None if it is not known.
    """

    method: Method
    trainable: Any
    frozen: Any
    export: Export | None = None
    reference_of: Callable[[Callable[[Any], Any]], Any] | None = None
    assumptions: tuple[str, ...] = ()
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    license: str | None = None


class TrainingProgram:
    """The step of an assembled run, its state and its arguments on a mesh.

    Args:
        config: the run's config. run: its parts, arrays or shapes.
        mesh: what arrays are sharded over.

    Attributes:
        updates: calls of the program in one training step; each makes an update of every phase.
        on_policy: whether a source makes batches with the present weights.
        compile_options: for `Lowered.compile`.
    """

    def __init__(self, config: Any, run: AssembledRun, mesh: Mesh):
        self.config, self.mesh, self.method = config, mesh, run.method
        self.updates = _updates_of(run.method)
        self.on_policy = any(phase.source.on_policy for phase in run.method.phases)
        self.compile_options = compile_options(config.optimization_level, on_policy=self.on_policy)
        updates = config.steps * self.updates * len(run.method.phases)
        self._schedule = make_schedule(config.optimizer, updates, config.batch_size)
        self.optimizer = make_optimizer(config.optimizer, updates, config.batch_size)
        self._make_state = functools.partial(
            init_state,
            optimizer=self.optimizer,
            seed=config.seed,
            ema=config.ema_decay > 0,
            copies=tuple(run.method.copies),
        )
        self.abstract_state: TrainState = jax.eval_shape(self._make_state, run.trainable)
        self.state_shardings: TrainState = weight_shardings(mesh, self.abstract_state)

    def learning_rate(self, step: int) -> float:
        """That of the last update of a step, numbered from 1, if none was skipped."""
        return float(self._schedule(step * self.updates * len(self.method.phases) - 1))

    def initial_state(self, trainable: Any) -> TrainState:
        """The state of a new run, sharded."""
        return jax.jit(self._make_state, out_shardings=self.state_shardings)(trainable)

    def fixed(self, run: AssembledRun) -> Fixed:
        """The inputs of the step beside state and batches; arrays or shapes, as `run` has them."""
        reference = None
        if run.method.reference:
            dtype = jnp.dtype(self.config.dtype)
            reference = run.reference_of(lambda tree: cast(tree, dtype))
        tables = {phase.name: phase.tables for phase in run.method.phases if phase.tables is not None}
        return Fixed(run.frozen, reference, tables)

    def jitted(self) -> Any:
        """The step to be lowered: (state, fixed, batches, update) -> (state, metrics); the state is donated."""
        step = make_train_step(
            self.method.phases,
            self.optimizer,
            dtype=jnp.dtype(self.config.dtype),
            accumulation=self.config.accumulation,
            ema_decay=self.config.ema_decay,
            copies=self.method.copies,
            mesh=self.mesh,
        )
        return jax.jit(step, donate_argnums=0, out_shardings=(self.state_shardings, replicated(self.mesh)))

    def trace(self, run: AssembledRun, platform: str) -> Any:
        """The step over the shapes of `run`, traced for a mesh of `platform` ("cpu", "gpu" or "tpu")."""
        fixed = self.fixed(run)
        batches = self.abstract_batches()
        arguments = (
            placed(self.abstract_state, self.state_shardings),
            Fixed(
                placed(fixed.frozen, weight_shardings(self.mesh, fixed.frozen)),
                placed(fixed.reference, weight_shardings(self.mesh, fixed.reference)),
                fixed.tables,
            ),
            placed(batches, jax.tree.map(lambda _: batch_sharding(self.mesh), batches)),
            np.int32(0),
        )
        with target_platform(platform):
            return self.jitted().trace(*arguments)

    def abstract_batches(self) -> dict[str, Any]:
        """Shapes of a global batch of each phase."""
        return {phase.name: phase.source.spec() for phase in self.method.phases}


def _updates_of(method):
    """Updates of each phase in a training step, of which all phases make as many."""
    updates = {phase.name: phase.source.updates for phase in method.phases}
    if len(set(updates.values())) > 1:
        raise ValueError(f"the phases of a method make equally many updates in a step, not {updates}")
    return next(iter(updates.values()))


def placed(tree: Any, shardings: Any) -> Any:
    """The shapes of `tree`, each with its sharding."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree, shardings
    )
