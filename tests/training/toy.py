"""A run of the real loop on a toy: least squares in two phases. As a script: `toy.py WORKDIR [--field=value ...]`."""

import os
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from imagereward_jax.data.batches import make_iterator
from imagereward_jax.distributed import join
from imagereward_jax.experiments.parts import Stream
from imagereward_jax.training.config import default_config
from imagereward_jax.training.loop import Evaluation, Experiment, Interrupted, ProcessLost, RunError, train
from imagereward_jax.training.step import Phase


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


def build_toy(config, mesh, nan_from=None, nan_until=None, die_at=None, die_on=0, terminate_at=None):
    """The experiment. nan_from, nan_until: batches in between hold a NaN. die_at, terminate_at: SIGKILL or SIGTERM
    there, the first to process die_on."""

    def predict(params, x):
        return x @ params["w"] + jnp.sum(params["big"])

    def loss_by(power):
        def loss(trainable, frozen, batches, key):
            batch = batches["rows"]
            error = predict(trainable["net"], batch["x"]) - batch["y"] * frozen["scale"]
            return jnp.mean(jnp.abs(error) ** power), {"reward": -jnp.mean(jnp.abs(error))}

        return loss

    def transform(batch):
        return {"x": batch["x"], "y": batch["y"]}

    class Watched(Stream):
        """Counts batches by position, so that a resumed run knows where it is."""

        def __next__(self):
            batch = super().__next__()
            index = self.get_state()["examples"] // config.batch_size
            if nan_from is not None and nan_from < index <= nan_until:
                batch = {**batch, "y": batch["y"] * np.nan}
            if index == die_at and jax.process_index() == die_on:
                os.kill(os.getpid(), signal.SIGKILL)
            if index == terminate_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return batch

    shares = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    size = config.batch_size // jax.process_count()
    rows = Watched(make_iterator(Rows(), batch_size=size, seed=config.seed, **shares), transform)
    rng = np.random.default_rng(0)
    trainable = {"net": {"w": rng.normal(size=64).astype(np.float32), "big": np.zeros((256, 128), np.float32)}}

    def evaluate(trainable, frozen):
        good = -float(jnp.abs(trainable["net"]["w"]).sum())
        return Evaluation({"eval/good": good}, Image.new("RGB", (16, 16), "red"))

    def export(trainable, folder):
        np.save(folder / "w.npy", trainable["net"]["w"])

    return Experiment(
        trainable=trainable,
        frozen={"scale": np.float32(2.0)},
        phases=(Phase("refl", loss_by(2)), Phase("denoising", loss_by(1))),
        streams={"rows": rows},
        evaluate=evaluate,
        export=export,
        export_marker="w.npy",
        images_per_step=config.batch_size,
        reward_metric="refl/reward",
    )


JOINING = ("--coordinator=", "--num-processes=", "--process-id=")


def main(workdir, *options):
    """--steps=..., --config fields by name, build_toy's faults as --fault.NAME=INT, and flags of `distributed.join`.

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
    pairs = [option.lstrip("-").split("=") for option in options]
    faults = {name.removeprefix("fault."): int(value) for name, value in pairs if name.startswith("fault.")}
    config = toy_config(
        **{name: float(value) if "." in value else int(value) for name, value in pairs if "fault." not in name}
    )
    try:
        started = train(config, lambda config, mesh: build_toy(config, mesh, **faults), workdir)
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
