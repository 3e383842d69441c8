"""A run of the real loop on a toy: least squares in two phases. As a script: `toy.py WORKDIR [--field=value ...]`."""

import os
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from imagereward_jax.assembly.conditions import DataSource
from imagereward_jax.data.batches import make_iterator
from imagereward_jax.distributed import join
from imagereward_jax.methods.base import Evaluation, Export, Method, Phase
from imagereward_jax.recipes import default_config
from imagereward_jax.training.interruptions import Interrupted, ProcessLost, RunError
from imagereward_jax.training.loop import train
from imagereward_jax.training.mesh import weight_shardings
from imagereward_jax.training.program import AssembledRun


class Rows:
    """Rows of a linear problem, random access."""

    def __len__(self):
        return 37

    def __getitem__(self, index):
        x = np.random.default_rng(index).normal(size=(64,)).astype(np.float32)
        return {"x": x, "y": np.float32(x[:4].sum())}


def toy_config(**changes):
    config = default_config("autoencoder")
    config.steps, config.batch_size, config.log_every = 20, 8, 3
    config.eval.every, config.checkpoint.every, config.ema_decay = 10, 4, 0.9
    config.optimizer.learning_rate, config.optimizer.schedule = 1e-2, "cosine"
    config.eval.best, config.writers, config.max_skipped = "eval/good", ("jsonl",), 3
    config.update_from_flattened_dict(changes)
    return config


def loss_by(power):
    """The mean error to this power of y = x w + sum(big)."""

    def loss(models, batch, key):
        net = models.policy["net"]
        error = batch["x"] @ net["w"] + jnp.sum(net["big"]) - batch["y"] * models.policy["scale"]
        return jnp.mean(jnp.abs(error) ** power), {"reward": -jnp.mean(jnp.abs(error))}

    return loss


NOT_A_NUMBER = ("nan_from", "nan_until")


class WatchedSource(DataSource):
    """Rows that know their position, so that faults happen at a batch: see `assemble_toy`."""

    def __init__(self, config, name, faults):
        shares = {"process_index": jax.process_index(), "process_count": jax.process_count()}
        rows = make_iterator(Rows(), batch_size=config.batch_size // jax.process_count(), seed=config.seed, **shares)
        super().__init__(name, rows, dict, {}, images=config.batch_size)
        self.config, self.faults = config, faults

    def batches(self, models, key):
        for batch in super().batches(models, key):
            index = self.get_state()[self.name]["examples"] // self.config.batch_size
            faults = self.faults
            if faults.get("nan_from") is not None and faults["nan_from"] < index <= faults["nan_until"]:
                batch = {**batch, "y": batch["y"] * np.nan}
            if index == faults.get("die_at") and jax.process_index() == faults.get("die_on", 0):
                os.kill(os.getpid(), signal.SIGKILL)
            if index == faults.get("terminate_at"):
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch


def assemble_toy(config, mesh, **faults):
    """The run. nan_from, nan_until: batches in between hold a NaN. die_at, terminate_at: SIGKILL or SIGTERM there, the
    first to process die_on (0)."""
    rng = np.random.default_rng(0)
    trainable = {"net": {"w": rng.normal(size=64).astype(np.float32), "big": np.zeros((256, 128), np.float32)}}
    frozen = {"scale": np.float32(2.0)}

    def evaluate(components):
        good = -float(jnp.abs(components["net"]["w"]).sum())
        return Evaluation({"eval/good": good}, Image.new("RGB", (16, 16), "red"))

    def export(components, _, folder):
        np.save(folder / "w.npy", np.asarray(components["net"]["w"]))

    method = Method(
        phases=(
            Phase("refl", loss_by(2), WatchedSource(config, "rows", faults)),
            Phase(
                "denoising",
                loss_by(1),
                WatchedSource(config, "more", {name: faults[name] for name in NOT_A_NUMBER if name in faults}),
            ),
        ),
        trains=("net",),
        evaluate={"good": evaluate},
        shown="refl/reward",
    )
    return AssembledRun(
        method,
        jax.device_put(trainable, weight_shardings(mesh, trainable)),
        jax.device_put(frozen, weight_shardings(mesh, frozen)),
        Export(export, "w.npy", ("net",)),
    )


JOINING = ("--coordinator=", "--num-processes=", "--process-id=")


def main(workdir, *options):
    """--steps=..., --config fields by name, assemble_toy's faults as --fault.NAME=INT, and flags of `distributed.join`.

    The exit status is that of `imagereward_jax.train`, but 3 for a RunError.
    """
    if "--distributed" in options:
        join()
        options = [option for option in options if option != "--distributed"]
    processes = dict(option.lstrip("-").split("=") for option in options if option.startswith(JOINING))
    options = [option for option in options if not option.startswith(JOINING)]
    if processes:
        number, index = int(processes["num-processes"]), int(processes["process-id"])
        join(processes["coordinator"], number, index)
    pairs = [option.lstrip("-").split("=") for option in options if option != "--tensorboard=1"]
    faults = {name.removeprefix("fault."): int(value) for name, value in pairs if name.startswith("fault.")}
    config = toy_config(
        **{name: float(value) if "." in value else int(value) for name, value in pairs if "fault." not in name}
    )
    if "--tensorboard=1" in options:
        config.writers = ("jsonl", "tensorboard")
    try:
        started = train(config, lambda config, mesh: assemble_toy(config, mesh, **faults), workdir)
        print("trained" if started else "complete")
    except RunError as error:
        print(f"{type(error).__name__}: {error}")
        return 3
    except Interrupted as stop:
        print(stop)
        return 128 + stop.signum
    except ProcessLost as error:
        print(f"error: {error}", flush=True)
        os._exit(1)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
