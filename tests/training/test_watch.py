"""The watch: when it fires, what a stopped run leaves, and that a resumed run decides the same."""

import contextlib
import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("grain")

from toy import assemble_toy, toy_config, train

from imagereward_jax.config import ConfigError
from imagereward_jax.methods.base import Evaluation
from imagereward_jax.recipes import default_config, judge, validate
from imagereward_jax.training.interruptions import Interrupted
from imagereward_jax.training.metric_writers import read_rows
from imagereward_jax.training.watch import Watch, check_measured

JUDGE = "eval/judge_one"
EVALUATIONS = [(1.0, 0.5), (1.1, 0.6), (1.2, 0.5), (1.3, 0.4), (1.4, 0.3), (1.5, 0.2)]  # (reward, judge)


def settings(**fields):
    stop = default_config("refl").stop
    stop.update({"judge": JUDGE, **fields})
    return stop


def fired(measured, error=0.0, **fields):
    """(evaluations with a warning, whether the run stops after each)."""
    watch, warned, stopped = Watch(settings(**fields)), [], []
    name = watch.settings.judge.removeprefix("-") or JUDGE
    for index, (reward, value) in enumerate(measured):
        lines = watch.update(index, {"eval/reward_mean": reward, name: value}, {name: error})
        warned += [index] * len(lines)
        stopped.append(bool(watch.stopped))
    return warned, stopped


def test_it_fires_after_that_many_evaluations_in_a_row():
    assert fired(EVALUATIONS) == ([4], [False] * 4 + [True] * 2)
    assert fired(EVALUATIONS, evaluations=2) == ([3], [False] * 3 + [True] * 3)


@pytest.mark.parametrize(
    "evaluations",
    {
        "the judge rises too": [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5)],
        "the reward falls too": [(5, 5), (4, 4), (3, 3), (2, 2), (1, 1)],
        "one of them recovers": [(1, 9), (2, 8), (3, 8), (4, 10), (5, 9), (6, 9), (7, 11)],
        "the judge has no verdict": [(1, float("nan")), (2, 9), (3, float("nan")), (4, 8), (5, 8)],
    }.values(),
)
def test_it_does_not_fire_if(evaluations):
    assert fired(evaluations) == ([], [False] * len(evaluations))


def test_a_fall_within_two_standard_errors_or_min_drop_does_not_count():
    """The judge stands 0.1, 0.2, 0.3, 0.4 below its best of 0.6."""
    assert fired(EVALUATIONS, error=0.049)[0] == [4]
    assert fired(EVALUATIONS, error=0.051)[0] == [5]
    assert fired(EVALUATIONS, error=0.051, min_drop=0.0)[0] == [4]
    assert fired(EVALUATIONS, min_drop=0.15)[0] == [5]


def test_a_judge_that_should_stay_small_has_a_minus():
    rising = [(reward, -value) for reward, value in EVALUATIONS]
    assert fired(rising, judge="-eval/drift") == ([4], [False] * 4 + [True] * 2)
    assert fired(EVALUATIONS, judge="-eval/drift")[0] == []


def test_without_a_judge_it_warns_and_stops_nothing():
    assert fired(EVALUATIONS, judge="") == ([4], [False] * 6)


def test_the_line_says_what_happened():
    watch = Watch(settings())
    for index, (reward, value) in enumerate(EVALUATIONS[:5]):
        lines = watch.update(10 * index, {"eval/reward_mean": reward, JUDGE: value}, {})
    assert lines == [
        "eval/judge_one went from 0.6 at step 10 to 0.3 at step 40, worse in 3 evaluation(s) in a row, while "
        "eval/reward_mean rose from 1.1 to 1.4"
    ]
    again = Watch(settings())
    again.set_state(json.loads(json.dumps(watch.get_state())))
    assert again.stopped == watch.stopped == lines[0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("checker_rate", r"config.stop.judge='checker_rate': expected a metric of the evaluation"),
        ("-", "config.stop.judge='-': expected a metric of the evaluation"),
        ("eval/reward_mean", "config.stop.judge='eval/reward_mean' is the reward that trains"),
        ("eval/drift", "less drift is better, so expected '-eval/drift'"),
        ("eval/judge_tw", r"'eval/judge_tw' is not in config.eval.judges .*did you mean 'eval/judge_two'"),
    ],
)
def test_a_judge_that_cannot_be_is_refused_before_the_run(name, message):
    config = default_config("refl")
    config.model.path = config.reward.path = "tiny-shapes"
    config.data.prompts, config.eval.prompts = "shapes:train", "shapes:held_out"
    config.eval.judges = {"two": judge("tiny-shapes")}
    config.method.pretrain = "off"
    validate(config)
    config.stop.judge = name
    with pytest.raises(ConfigError, match=message):
        validate(config)
    config.stop.judge, config.eval.judges.two.path = "", ""
    with pytest.raises(ConfigError, match=r"config.eval.judges.two.path is empty"):
        validate(config)


def toy(evaluations, steps=(), **faults):
    """Evaluations of a toy run in turn, their judge being eval/checker_rate; `steps` collects the weights."""
    given = iter(evaluations)

    def assemble(config, mesh):
        run = assemble_toy(config, mesh, **faults)

        def evaluate(components):
            weights = np.asarray(components["net"]["w"])
            if isinstance(steps, list):
                steps.append(weights)
            reward, rate = next(given)
            unit = weights / np.linalg.norm(weights)
            return Evaluation(
                {"eval/reward_mean": reward, "eval/checker_rate": rate}, embeds={"eval/drift": unit[None]}
            )

        run.method = dataclasses.replace(run.method, evaluate={"samples": evaluate})
        return run

    return assemble


def stop_config(**changes):
    stop = {"stop.judge": "eval/checker_rate", "eval.best": "eval/reward_mean", "eval.every": 2, "checkpoint.every": 2}
    return toy_config(**{**stop, "checkpoint.keep": 1, "steps": 20, "ema_decay": 0.0, **changes})


def drifts(workdir):
    return {row["step"]: row["eval/drift"] for row in read_rows(workdir / "metrics.jsonl") if "eval/drift" in row}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """(workdir, weights at each evaluation): best by the judge at step 2, stopped at step 8."""
    workdir, weights = tmp_path_factory.mktemp("stopped") / "run", []
    train(stop_config(), toy(EVALUATIONS, weights), workdir)
    return workdir, weights


def test_a_stopped_run_exports_the_best_by_its_judge_and_says_why(stopped):
    workdir, weights = stopped
    assert len(weights) == 5
    np.testing.assert_array_equal(np.load(workdir / "export/w.npy"), weights[1])
    done = json.loads((workdir / "done.json").read_text())
    assert done["step"] == 8 and done["exported"] == 2 and "went from 0.6 at step 2 to 0.3 at step 8" in done["stopped"]
    page = (workdir / "report.html").read_text()
    assert done["stopped"] in page and "Exported is step 2, the best by eval/checker_rate" in page
    assert sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()) == [2, 8]


def test_a_stopped_run_is_complete_until_config_stop_changes(stopped, tmp_path):
    workdir = shutil.copytree(stopped[0], tmp_path / "run")
    assert not train(stop_config(), toy([]), workdir)
    going_on = iter([(2.0, 0.1)] * 6)
    assert train(stop_config(**{"stop.judge": ""}), toy(going_on), workdir)
    assert json.loads((workdir / "done.json").read_text()) == {"step": 20, "exported": 20}


def test_a_run_whose_judge_only_falls_exports_the_weights_of_before(tmp_path):
    weights = []
    train(stop_config(), toy(EVALUATIONS[1:], weights), tmp_path / "run")
    np.testing.assert_array_equal(np.load(tmp_path / "run/export/w.npy"), weights[0])
    assert (
        "Exported is step 0, the best by eval/checker_rate (before the first step)"
        in (tmp_path / "run/report.html").read_text()
    )


def test_a_run_that_is_interrupted_while_the_judge_falls_stops_where_it_would_have(stopped, tmp_path):
    """Interrupted after two of three falls: the third decides, with the drift of an uninterrupted run to the bit."""
    workdir, weights = tmp_path / "run", []
    evaluations = iter(EVALUATIONS)
    with pytest.raises(Interrupted, match="at step 6"):
        train(stop_config(), toy(evaluations, weights, terminate_at=7), workdir)
    assert len(weights) == 4
    train(stop_config(), toy(evaluations, weights), workdir)
    whole, _ = stopped
    assert (workdir / "done.json").read_text() == (whole / "done.json").read_text()
    np.testing.assert_array_equal(weights[4], stopped[1][4])
    np.testing.assert_array_equal(np.load(workdir / "export/w.npy"), stopped[1][1])
    kept = drifts(whole)
    assert drifts(workdir) == kept and kept[0] == 0 and kept[8] > kept[2] > 0


def test_another_evaluation_measures_drift_from_the_first_weights_again(tmp_path):
    """After a change of config.eval the evaluation before the resumed step is given the initial weights."""
    workdir, weights, changed = tmp_path / "run", [], []
    rising = [(1.0 + index, 1.0 + index) for index in range(9)]
    with pytest.raises(Interrupted):
        train(stop_config(steps=6), toy(iter(rising), weights, terminate_at=4), workdir)
    train(stop_config(**{"steps": 6, "eval.num_images": 8}), toy(iter(rising), changed), workdir)
    np.testing.assert_array_equal(changed[0], weights[0])
    unit = [one.astype(np.float64) / np.linalg.norm(one) for one in (weights[0], changed[-1])]
    assert drifts(workdir)[6] == pytest.approx(1 - unit[0] @ unit[1], rel=1e-3)  # unit vectors in float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"stop.judge": "eval/diversity"},
            r"'eval/diversity': this run's evaluation gives no eval/diversity, but eval/ch",
        ),
        (
            {"eval.best": "eval/checker_rat", "checkpoint.export": "best"},
            r"config.eval.best='eval/checker_rat': this run.*did you mean 'eval/checker_rate'",
        ),
    ],
)
def test_a_metric_that_is_not_measured_is_refused_at_the_first_evaluation(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        train(stop_config(**changes), toy(EVALUATIONS), tmp_path / "run")


def test_a_watched_run_that_never_falls_is_not_stopped(tmp_path):
    rising = [(1.0 + index, 0.1 * index) for index in range(11)]
    train(stop_config(), toy(rising), tmp_path / "run")
    assert json.loads((tmp_path / "run/done.json").read_text()) == {"step": 20, "exported": 20}


@pytest.mark.parametrize(
    ("judge_", "best", "message"),
    [
        ("eval/cheker_rate", "", "config.stop.judge='eval/cheker_rate'.*did you mean 'eval/checker_rate'"),
        ("-eval/diversity", "", "gives no eval/diversity, .*; diversity needs a config.eval.images_per_prompt of at"),
        ("", "-eval/los", "config.eval.best='-eval/los': this run's evaluation gives no eval/los, but eval/checker"),
        ("eval/checker_rate", "eval/reward_light", ""),
    ],
)
def test_what_no_evaluation_will_measure_is_refused_before_it(judge_, best, message):
    """Names with * are of functions; an evaluator without a list is believed."""

    def evaluate(components):
        raise AssertionError("evaluated")

    config = stop_config(**{"stop.judge": judge_, "eval.best": best})
    check_measured(config, [evaluate])
    evaluate.measures = ["eval/checker_rate", "eval/reward_mean", "eval/reward_*"]
    with pytest.raises(ConfigError, match=message) if message else contextlib.nullcontext():
        check_measured(config, [evaluate])


def test_an_evaluation_without_a_reward_has_nothing_to_watch():
    with pytest.raises(ConfigError, match="gives no eval/reward_mean, but eval/checker_rate"):
        check_measured(stop_config(), [SimpleNamespace(measures=["eval/checker_rate"])])
