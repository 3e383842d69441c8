"""report.html: what a run did, in one file that opens without a network."""

import json
import math
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from imagereward_jax.config import flat_fields
from imagereward_jax.methods.base import find_method
from imagereward_jax.pages import figures
from imagereward_jax.pages.figures import Line
from imagereward_jax.pages.page import escape, facts, folded, paragraph, slider, table, write_page
from imagereward_jax.pages.words import words
from imagereward_jax.training.metric_writers import METRICS, TEST, rounded, rows_with
from imagereward_jax.training.prompt_cards import (
    Side,
    card,
    cards,
    difference,
    ends_first,
    number,
    ordering_metric,
    positions,
    sampling,
    scores_table_rows,
    sheet,
    signed,
)
from imagereward_jax.training.record import REWARD, Run, read_run

GENERATOR = "imagereward_jax.train"
HIDDEN = ("step", "time", "images", "eval/reward_std")  # no curves: the axis, the cost, the band of another


def write_report(workdir: str | Path, ending: str = "") -> None:
    """Writes WORKDIR/report.html from config.json, metrics.jsonl and samples/, also of a run that goes on.

    Args:
        ending: how the run ended, if not by its last step.
    """
    run = read_run(workdir)
    parts = [_head(run, ending), _tiles(run), _samples(run), _watch(run), _evaluations(run), _test(run)]
    parts += [_facts(run), *_curves(run), _config(run)]
    write_page(Path(workdir) / "report.html", f"{run.name}: report", parts, generator=GENERATOR)


def _head(run, ending):
    steps, times = run.config["steps"], [row["time"] for row in run.rows if isinstance(row.get("time"), int | float)]
    state = "complete" if run.step >= steps else "stopped" if ending else "not complete"
    last = datetime.fromtimestamp(times[-1], UTC) if times else None
    when = f"; last written {last.day} {last:%B %Y, %H:%M} UTC" if last else ""
    model = run.config.get("model", {}).get("path")
    told = f"{run.config['method']['name']}{f' of {model}' if model else ''}: step {run.step} of {steps}, {state}{when}"
    return (
        f"<h1>{escape(run.name)}</h1>{paragraph(escape(told), 'soft')}"
        f"{paragraph(ending and f'<strong>{escape(ending)}</strong>', 'ending')}"
    )


def _tiles(run):
    """The metrics that matter first, at the last evaluation and at the first."""
    rows = run.evaluations
    if not rows and "jsonl" not in run.config.get("writers", ()):
        return f"<p>No numbers: config.writers has no 'jsonl', which writes {METRICS}.</p>"
    if not rows:
        return "<p>No evaluation yet.</p>"
    tiles = []
    for name in run.watched():
        first, last = ("no value" if row.get(name) is None else f"{row[name]:.3g}" for row in (rows[0], rows[-1]))
        before = f"from {first}" if len(rows) > 1 else f"at step {rows[0]['step']}"
        tiles.append(
            f'<div class="tile"><div class="small soft">{escape(words(name).title)}</div>'
            f'<div class="value">{last}</div><div class="small soft">{before}</div></div>'
        )
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _samples(run):
    """Each prompt's images of the first evaluation beside those of every other, or the contact sheets."""
    steps = positions(run)
    if not steps:
        return ""
    moved = len(steps) > 1
    sampled = "sampler" in run.config.get("eval", {})
    title = "Same prompts, same noise" if sampled else "Held-out images"
    head = f"<h2>{title}{', before and after' if moved else ''}</h2>"
    head += paragraph(escape(f"Held-out prompts; {sampling(run)}."), "soft") if sampled else ""
    if len(steps) > 2:
        labels = [f"step {step}{_value(run, step)}" for step in steps[1:]]
        head += slider(labels, "Evaluation")
    return head + (_prompts(run, steps) if run.samples else _sheets(run, steps))


def _value(run, step):
    for name in run.watched()[:1]:
        value = dict(run.points(name)).get(step)
        return "" if value is None else f": {words(name).title.lower()} {value:.3g}"
    return ""


def _prompts(run, steps):
    first, last = run.samples[steps[0]], run.samples[steps[-1]]
    keys = [key for key in first if key in last]
    if not keys:
        return paragraph("The first and the last evaluation have no prompt in common.")
    metric = ordering_metric(list(first[keys[0]].scores))
    moved = len(steps) > 1

    def gain(key):
        return difference(first[key].mean(metric), last[key].mean(metric)) if moved else first[key].mean(metric)

    def heading(key):
        if not (moved and metric):
            return ""
        before, after = first[key].mean(metric), last[key].mean(metric)
        return f'{signed(gain(key))} <span class="small soft">{number(before)} → {number(after)}</span>'

    def sides(key):
        before = Side(f"step {steps[0]}{_scored(first[key], metric)}", first[key].images)
        found = [
            Side(f"step {step}{_scored(run.samples[step][key], metric)}", run.samples[step][key].images, at)
            for at, step in enumerate(steps[1:])
            if key in run.samples[step]
        ]
        return [before, *found] if moved else [before]

    title = words(metric).title.lower() if metric else ""
    titles = (f"Most {title} gained", f"Least {title} gained, or most lost")
    shown = cards(
        ends_first(keys, gain), gain, sides, heading, titles if moved else (f"Highest {title}", f"Lowest {title}")
    )
    if not metric:
        return shown
    ranked = sorted(keys, key=lambda key: -(gain(key) if gain(key) is not None else -math.inf))
    columns = [first, last] if moved else [first]
    header = ["prompt", *(f"step {step}" for step in (steps[0], steps[-1])[: len(columns)])]
    scores = table(header, scores_table_rows(ranked, columns, metric))
    return shown + folded(f"{words(metric).title} of all {len(keys)} prompts", scores)


def _scored(samples, metric):
    return f": {number(samples.mean(metric))}" if metric else ""


def _sheets(run, steps):
    first, *others = [Side(f"step {step}", [sheet(run.sheets[step])]) for step in steps]
    columns = [first, *(side._replace(at=at) for at, side in enumerate(others))]
    return card("Contact sheet", "", columns, level=3, broad=True)


def _watch(run):
    """The reward and what watches it, over the same steps, with the spread over prompts."""
    rows = run.evaluations
    if len(rows) < 2:
        return ""
    steps, marks = (rows[0]["step"], rows[-1]["step"]), positions(run)[1:]
    panels, banded = [], False
    for name in run.watched():
        deviations, extremes = run.spread(name)
        colour = 2 if name.startswith(("eval/diversity", "eval/drift")) else 0 if name == run.watched()[0] else 1
        line = Line(run.points(name), colour=colour, band=deviations, clip=extremes)
        panels.append(figures.panel(*called(name), [line], steps, marks))
        banded |= bool(deviations)
    note = "The dashed line is the value at the first evaluation."
    note += " The band is one standard deviation over prompts, within the range of the prompts." if banded else ""
    title = "The reward, and what watches it" if run.watched()[0] == REWARD else "Evaluations"
    return (
        f'<h2>{title}</h2><figure class="watch">{"".join(panels)}'
        f"<figcaption>{note} The horizontal axis is the training step.</figcaption></figure>"
    )


def called(name: str, same: Iterable[str] = ()) -> tuple[str, str, str]:
    """(title, name, note) of a panel, text; same: other metrics of the same numbers."""
    title, meaning = words(name)
    note = meaning and f"{meaning[0].upper()}{meaning[1:]}."
    return title, name, " ".join([note, *(f"The same numbers as {other}." for other in same)]).strip()


def _evaluations(run):
    rows = run.evaluations
    names = [*run.watched(), *dict.fromkeys(name for row in rows for name in row if name.startswith("eval/"))]
    if not rows:
        return ""
    first, last = rows[0], rows[-1]
    cells = [[named(name), rounded(first.get(name)), rounded(last.get(name))] for name in dict.fromkeys(names)]
    header = ["metric", f"step {first['step']}", f"step {last['step']}"]
    if len(rows) == 1:
        header, cells = header[:2], [row[:2] for row in cells]
    return "<h2>Evaluation on held-out data</h2>" + table(header, cells)


def named(name: str) -> str:
    """A metric in words, and its name beside them: HTML."""
    return f'{escape(words(name).title)} <code class="soft">{escape(name)}</code>'


def _test(run):
    """The numbers of the test set, which are computed once."""
    tested = rows_with(run.rows, TEST)
    if not tested:
        return ""
    cells = [[named(name), rounded(value)] for name, value in tested[-1].items() if name.startswith(TEST)]
    return "<h2>Test set, with what was exported</h2>" + table(["metric", "value"], cells)


def _facts(run):
    """What was tuned, what it cost, and the command."""
    pairs = [*tuned(run), *costs(run)]
    command = run.started.get("command")
    told = ""
    if command:
        told = f"<h2>The command that repeats it</h2><pre>{escape(command)}</pre>"
    elif run.started:
        told = paragraph("Started from Python; its config is at the end of this page.", "soft")
    return f"<h2>What was tuned, and what it cost</h2>{facts(pairs)}{told}"


def tuned(run: Run) -> list[tuple[str, str]]:
    """What was tuned and how: (name, HTML)."""
    config = run.config
    reward, lora, data = config.get("reward", {}), config.get("lora", {}), config.get("data", {})
    terms = " + ".join(f"{term['weight']:g} x {term['path']}" for term in reward.get("terms", {}).values())
    sizes = run.started.get("trained", {})
    total = sum(sizes.values())
    count = f"{total:,} of {total + run.started['frozen']:,} parameters" if sizes else ""
    kind = f"low-rank adapter (LoRA), rank {lora['rank']}" if lora.get("rank") else "all weights"
    pairs = {
        "method": config["method"]["name"],
        "model": config.get("model", {}).get("path") or "",
        "trains": "; ".join(filter(None, [f"{kind} of {' and '.join(sizes)}" if sizes else kind, count])),
        "reward": terms or reward.get("path", ""),
        "prompts": data.get("prompts", ""),
        "image-text pairs": data.get("pairs", ""),
        "batch": f"{config['batch_size']}, learning rate {config['optimizer']['learning_rate']:g}",
        "seed": str(config["seed"]),
        "devices": run.started.get("devices", ""),
    }
    return [(name, escape(value)) for name, value in pairs.items() if value]


def costs(run: Run) -> list[tuple[str, str]]:
    """What a run has cost: (name, HTML); what it did not record is left out."""
    cost = run.cost()
    pairs = {
        "images trained on": f"{cost.images:,.0f}" if cost.images else "",
        "images of evaluations": f"{cost.evaluated:,}" if cost.evaluated else "",
        "time in training steps": duration(cost.seconds),
        "speed of training": f"{cost.rate:.3g} images/s" if cost.rate else "",
        "elapsed, pauses included": duration(cost.elapsed),
    }
    return [(name, value) for name, value in pairs.items() if value]


def duration(seconds: float | None) -> str:
    """Seconds as people say them: "3 min 20 s"; "" for None."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _curves(run):
    """All other metrics, in groups; those that never change are told in a line."""
    names = list(dict.fromkeys(name for row in run.rows for name in row if name not in HIDDEN))
    names = [name for name in names if name not in run.watched() and not name.startswith(TEST)]
    groups, constant = {}, []
    for name in names:
        points = run.points(name)
        values = {value for _, value in points}
        if len(values) == 1:
            value = next(iter(values))
            constant.append(f"{named(name)}: {'no finite value' if value is None else rounded(value)}")
        elif len(run.evaluations) > 1 or not name.startswith("eval/"):
            same = groups.setdefault(name.rpartition("/")[0], {})
            same.setdefault(tuple(points), []).append(name)
    last = max(run.step, 1)
    order = {run.config["method"]["name"]: 0, "eval": 2, "": 3}
    parts = []
    for room, some in sorted(groups.items(), key=lambda item: order.get(item[0], 1)):
        panels = [
            figures.panel(*called(name, same), [Line(points)], (0, last)) for points, (name, *same) in some.items()
        ]
        parts.append(f'{_group(room)}<div class="curves">{"".join(panels)}</div>')
    if constant:
        parts.append(f'<p class="small"><strong>Never changed</strong>: {"; ".join(constant)}.</p>')
    return parts


def _group(room):
    """The heading of a group of curves, with a word on the phase."""
    if not room:
        return "<h2>Speed and updates</h2>"
    if room == "eval":
        return "<h2>Evaluation, further curves</h2>"
    try:
        said = " ".join((find_method(room).__doc__ or "").partition("\n\n")[0].split())
    except ValueError:  # a phase that is no method
        said = ""
    return f"<h2>Training: {escape(room)}</h2>{paragraph(escape(said), 'soft')}"


def _config(run):
    text = json.dumps(run.config, indent=2)
    fields = sum(1 for _ in flat_fields(run.config))
    return folded(f"The whole config: {fields} fields", f"<pre>{escape(text)}</pre>")
