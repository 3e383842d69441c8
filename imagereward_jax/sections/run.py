"""Sections of the config that every run has: the run itself, its optimizer, mesh, checkpoints and evaluations."""

from imagereward_jax.config import ConfigError, Section, did_you_mean, field

WRITERS = ("jsonl", "log", "tensorboard", "wandb")
SCHEDULES = ("constant", "linear", "cosine")
DTYPES = ("float32", "bfloat16")
OPTIMIZATION_LEVELS = {"O0": 9, "O1": 19, "O2": 29, "O3": 39}  # XLA's numbers: jax 0.10 takes no names


class Run(Section):
    """Fields at the top of the config."""

    seed: int = field(0, at_least=0)  # initial noise, stop indices, data order: the whole run follows from it
    steps: int = field(1000, at_least=1)  # training steps; each makes an update per loss of the method
    # samples per update, over all devices and accumulation rounds
    batch_size: int = field(8, at_least=1, at_most=2**20)
    accumulation: int = field(1, at_least=1)  # rounds that a batch is split into: less memory, same gradient
    dtype: str = field("float32", choices=DTYPES)  # of the arithmetic; master weights of what trains are float32
    compilation_cache: bool = True  # keep compiled programs for the next start, in ~/.cache/imagereward_jax/compiled
    # what the compiler spends on a fast step; None leaves it to jax; O0 is for `plan` on TPUs
    optimization_level: str | None = field(None, choices=(None, *OPTIMIZATION_LEVELS))
    # updates skipped in a row (loss, gradient or result not finite) before it stops
    max_skipped: int = field(20, at_least=1)
    # > 0 averages the weights, which is what is sampled and exported; after update u it is min(it, (1 + u) / (10 + u))
    ema_decay: float = field(0.0, at_least=0.0, below=1.0)
    log_every: int = field(10, at_least=1)  # steps between two lines of metrics
    # where metrics go: WORKDIR/metrics.jsonl, the terminal, TensorBoard's files, Weights & Biases
    writers: tuple[str, ...] = field(("jsonl", "log", "tensorboard"), choices=WRITERS)

    def check(self, config):
        """The batch must be divisible into the accumulation rounds."""
        if self.batch_size % self.accumulation:
            raise ConfigError(
                f"config.batch_size={self.batch_size} is not divisible by config.accumulation={self.accumulation}"
            )


class Mesh(Section, path="mesh"):
    """The device mesh."""

    data: int = -1  # devices along the batch; -1: all that are left
    fsdp: int = field(1, at_least=1)  # devices that share each weight, its moments and its EMA


class Optimizer(Section, path="optimizer"):
    """AdamW."""

    learning_rate: float = field(1e-5, at_least=0.0)  # after the warm-up
    scale_by_batch: bool = False  # multiply by config.batch_size: the rate is then that of one sample
    schedule: str = field("constant", choices=SCHEDULES)  # after the warm-up: constant, linear or cosine (to 0)
    warmup_steps: int = field(0, at_least=0)  # updates in which the rate rises from 0
    b1: float = field(0.9, at_least=0.0, below=1.0)  # decay of the gradient's average
    b2: float = field(0.999, at_least=0.0, below=1.0)  # decay of the squared gradient's average
    eps: float = field(1e-8, at_least=0.0)  # added to the root of the squared gradient's average
    weight_decay: float = field(1e-2, at_least=0.0)  # of all weights that train, times the learning rate
    clip_norm: float = field(1.0, at_least=0.0)  # global gradient norm; 0 switches clipping off


class Checkpoint(Section, path="checkpoint"):
    """Checkpoints, and which weights are exported."""

    every: int = field(100, at_least=1)  # steps between two checkpoints
    keep: int = field(2, at_least=1)  # the latest ones; the best (by config.eval.best) is kept as well
    best_only: bool = False  # save only what evaluates better than all before, and export the best
    export: str = field("last", choices=("last", "best"))  # what is exported and tested; best by config.eval.best

    def check(self, config):
        """The best is the best by a metric."""
        if (self.best_only or self.export == "best") and not config.eval.best:
            chosen = "config.checkpoint.best_only" if self.best_only else "config.checkpoint.export='best'"
            raise ConfigError(f"config.eval.best is empty, and {chosen} chooses by it: name a metric of the evaluation")


class Evaluation(Section, path="eval"):
    """When the run evaluates."""

    every: int = field(100, at_least=1)  # steps between two evaluations; the first comes before any step
    best: str = ""  # metric whose largest value is best; with a minus before it the smallest ("-eval/loss")


class Stop(Section, path="stop"):
    """The watch against reward hacking: a judge that falls while eval/reward_mean rises. See docs/watch.md."""

    # metric that ends the run and chooses what is then exported: "eval/judge_NAME", "eval/checker_rate",
    # "eval/diversity", "-eval/drift" (less is better); "" ends no run, and only warns
    judge: str = ""
    evaluations: int = field(3, at_least=1)  # in a row that show it
    # how far below its best a judge counts as fallen; None: two standard errors of its mean over prompts (0 for a
    # metric that has none)
    min_drop: float | None = field(None, at_least=0.0)

    def check(self, config):
        """The judge must be a metric of the evaluation."""
        if not self.judge:
            return
        name = self.judge.removeprefix("-")
        if name == "eval/reward_mean":
            raise ConfigError(
                f"config.stop.judge={self.judge!r} is the reward that trains: name a metric that watches it, see "
                "docs/watch.md"
            )
        if self.judge.startswith("eval/drift"):
            raise ConfigError(f"config.stop.judge={self.judge!r}: less drift is better, so expected '-{self.judge}'")
        if not name.startswith("eval/"):
            raise ConfigError(
                f"config.stop.judge={self.judge!r}: expected a metric of the evaluation: 'eval/judge_NAME' of one of "
                "config.eval.judges, 'eval/checker_rate', 'eval/diversity' or '-eval/drift'"
            )
        judges = [f"eval/judge_{one}" for one in config.eval.get("judges", {})]
        if name.startswith("eval/judge_") and name not in judges:
            raise ConfigError(
                f"config.stop.judge={self.judge!r} is not in config.eval.judges ({', '.join(judges) or 'empty'})"
                f"{did_you_mean(name, judges)}"
            )


class Profile(Section, path="profile"):
    """A trace for TensorBoard's profiler."""

    steps: int = field(0, at_least=0)  # > 0 traces that many steps, after the first two, into WORKDIR/profile


RUN_SECTIONS = (Run, Mesh, Optimizer, Checkpoint, Evaluation, Stop, Profile)
