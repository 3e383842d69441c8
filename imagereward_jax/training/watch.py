"""The watch against reward hacking: a judge that falls while the reward rises."""

import fnmatch
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from imagereward_jax.config import ConfigError, did_you_mean
from imagereward_jax.training.checkpoints import exports_best, goodness

REWARD = "eval/reward_mean"
JUDGES = ("eval/judge_", "eval/checker_rate")  # prefixes of the metrics that are warned about
STANDARD_ERRORS = 2.0  # a judge that falls by more has fallen, unless config.stop.min_drop is set


class Watch:
    """Follows the reward and its judges from evaluation to evaluation.

    A judge has fallen if it is more than config.stop.min_drop below its best so far and the reward is above what it was
    there. Its state is in every checkpoint, so that a resumed run decides the same.

    Args:
        settings: config.stop.
    """

    def __init__(self, settings: Any):
        self.settings = settings
        self._seen: dict[str, dict[str, float]] = {}

    def update(self, step: int, metrics: Mapping[str, float], errors: Mapping[str, float]) -> list[str]:
        """Takes in an evaluation; returns a line on each judge that has now fallen config.stop.evaluations in a row.

        Args:
            errors: standard errors of metrics.

        Raises:
            ConfigError: the evaluation lacks the reward or config.stop.judge.
        """
        self._check(metrics)
        found = []
        for name in self._watched(metrics):
            self._follow(name, step, metrics, errors)
            if self._seen[name]["fallen"] == self.settings.evaluations:
                found.append(self._line(name))
        return found

    @property
    def stopped(self) -> str:
        """Why the run ends, by config.stop.judge; "" if it does not."""
        judge = self.settings.judge
        fallen = self._seen.get(judge, {"fallen": 0})["fallen"] >= self.settings.evaluations
        return self._line(judge) if judge and fallen else ""

    def get_state(self) -> dict[str, Any]:
        """Copies the state for `set_state`; JSON holds it exactly."""
        return {name: dict(seen) for name, seen in self._seen.items()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Resumes from `get_state`."""
        self._seen = {name: dict(seen) for name, seen in state.items()}

    def _watched(self, metrics) -> Iterator[str]:
        names = [name for name in metrics if name.startswith(JUDGES) and "@" not in name]
        for name in dict.fromkeys([*names, self.settings.judge]):
            if name and REWARD in metrics and math.isfinite(goodness(metrics, name)):
                yield name

    def _follow(self, name, step, metrics, errors):
        now = {"step": step, "judge": goodness(metrics, name), "reward": metrics[REWARD]}
        seen = self._seen.get(name)
        if seen is None or now["judge"] > seen["best_judge"]:
            best = {f"best_{part}": value for part, value in now.items()}
            self._seen[name] = {**now, **best, "fallen": 0}
            return
        drop = self.settings.min_drop
        if drop is None:
            drop = STANDARD_ERRORS * errors.get(name.removeprefix("-"), 0.0)
        fallen = seen["best_judge"] - now["judge"] > drop and now["reward"] > seen["best_reward"]
        self._seen[name] = {**seen, **now, "fallen": seen["fallen"] + 1 if fallen else 0}

    def _line(self, name):
        seen, sign = self._seen[name], -1 if name.startswith("-") else 1
        before, after = sign * seen["best_judge"], sign * seen["judge"]
        return (
            f"{name.removeprefix('-')} went from {before:.4g} at step {seen['best_step']} to {after:.4g} at step "
            f"{seen['step']}, worse in {seen['fallen']} evaluation(s) in a row, while {REWARD} rose from "
            f"{seen['best_reward']:.4g} to {seen['reward']:.4g}"
        )

    def _check(self, metrics):
        if self.settings.judge:
            _check_given("config.stop.judge", self.settings.judge, (REWARD,), metrics)


def check_measured(config: Any, evaluators: Iterable[Any]) -> None:
    """Refuses a config.stop.judge or config.eval.best that no evaluation will measure, before anything is compiled.

    Args:
        evaluators: the method's. `measures` of one lists its metrics, with * for what a function names when it is
            called; if one of them has no such list, the first evaluation decides.

    Raises:
        ConfigError: naming the field and the metrics that there are.
    """
    known = [getattr(evaluator, "measures", None) for evaluator in evaluators]
    if None in known:
        return
    names = [name for some in known for name in some]
    if config.stop.judge:
        _check_given("config.stop.judge", config.stop.judge, (REWARD,), names)
    if config.eval.best and (names or exports_best(config)):  # a method without evaluators keeps its default
        check_best(config, names)


def check_best(config: Any, metrics: Iterable[str]) -> None:
    """Refuses to look for the best by a metric that is not there: ConfigError."""
    _check_given("config.eval.best", config.eval.best, (), metrics)


def _check_given(field, metric, others, there):
    name = metric.removeprefix("-")
    missing = [one for one in (name, *others) if not any(fnmatch.fnmatchcase(one, given) for given in there)]
    if not missing:
        return
    way_out = did_you_mean(missing[0], there)
    if name.startswith("eval/diversity") and not any(one.startswith("eval/diversity") for one in there):
        way_out = "; diversity needs a config.eval.images_per_prompt of at least 2"
    raise ConfigError(
        f"{field}={metric!r}: this run's evaluation gives no {' and no '.join(missing)}, but "
        f"{', '.join(sorted(there)) or 'nothing'}{way_out}"
    )
