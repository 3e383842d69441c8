"""report.html: what a run did, in one file that opens without a network."""

import base64
import html
import io
import json
import re
from pathlib import Path
from typing import Any

from imagereward_jax.storage.files import write_text
from imagereward_jax.training.metric_writers import METRICS, TEST, read_rows, rounded, rows_with

SAMPLE = re.compile(r"step_(\d+)(_\d+)?\.png")  # other images in samples/ are the user's
HIDDEN = ("step", "time")
# In this order in the figure of the watch, the judges after the reward.
WATCHED = (
    *("eval/reward_mean", "eval/checker_rate"),
    *("eval/diversity", "eval/diversity_pixels", "eval/drift", "eval/drift_pixels"),
)
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.3em .9em;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}.pair{display:flex;gap:1em;flex-wrap:wrap}.pair figure{margin:0;
flex:1 1 420px}
img,svg{max-width:100%;height:auto}figcaption{font-weight:600;margin-bottom:.4em}
pre{background:#f6f6f6;padding:1em;overflow:auto;font-size:12px}"""


def write_report(workdir: str | Path, ending: str = "") -> None:
    """Writes WORKDIR/report.html from metrics.jsonl, samples/ and config.json.

    The numbers at the first and the last evaluation, the reward and what watches it in one figure, the first and last
    samples side by side, and curves of every metric.

    Args:
        ending: how the run ended, if not by its last step.
    """
    workdir = Path(workdir)
    rows = read_rows(workdir / METRICS)
    samples = sorted(path for path in (workdir / "samples").glob("*.png") if SAMPLE.fullmatch(path.name))
    config = json.loads((workdir / "config.json").read_text())
    parts = [
        f"<h1>{html.escape(workdir.name)}</h1>",
        f"<p>{html.escape(config['method']['name'])}, step {rows[-1]['step'] if rows else 0} of {config['steps']}</p>",
        f"<p><strong>{html.escape(ending)}</strong></p>" if ending else "",
        _evaluations(rows),
        _watch(rows),
        _test(rows),
        _samples(samples, config),
        _curves(rows),
        f"<h2>Config</h2><pre>{html.escape(json.dumps(config, indent=2))}</pre>",
    ]
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(workdir.name)}</title><style>{STYLE}</style><body>{''.join(parts)}</body></html>"
    )
    write_text(workdir / "report.html", page)


def _evaluations(rows):
    rows = rows_with(rows, "eval/")
    if not rows:
        return "<p>No evaluation yet.</p>"
    first, last = rows[0], rows[-1]
    cells = [
        f"<tr><td>{html.escape(name)}</td><td>{rounded(first.get(name))}</td><td>{rounded(last[name])}</td></tr>"
        for name in last
        if name.startswith("eval/")
    ]
    return (
        "<h2>Evaluation on held-out data</h2><table><tr><th></th>"
        f"<th>step {first['step']}</th><th>step {last['step']}</th></tr>{''.join(cells)}</table>"
    )


def _test(rows):
    """The numbers of the test set, which are computed once."""
    tested = rows_with(rows, TEST)
    if not tested:
        return ""
    cells = [
        f"<tr><td>{html.escape(name)}</td><td>{rounded(value)}</td></tr>"
        for name, value in tested[-1].items()
        if name.startswith(TEST)
    ]
    return f"<h2>Test set, with what was exported</h2><table>{''.join(cells)}</table>"


def _samples(paths, config):
    if not paths:
        return ""
    shown = [paths[0], paths[-1]] if len(paths) > 1 else paths
    figures = "".join(
        f"<figure><figcaption>step {int(SAMPLE.fullmatch(path.name)[1])}</figcaption>"
        f'<img alt="samples" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"></figure>'
        for path in shown
    )
    return f'<h2>Samples: same prompts, same noise{_sampling(config)}</h2><div class="pair">{figures}</div>'


def _sampling(config):
    """How the samples were made, for methods that sample."""
    settings = config["eval"]
    if not settings.get("sampler"):
        return ""
    guidance = f"{settings['guidance_scale']:g}" if settings["guidance_scale"] > 1 else "none"
    return html.escape(f"; {settings['sampler']}, {settings['num_steps']} steps, guidance {guidance}")


def _watch(rows):
    """The reward and what watches it, if there is both."""
    names = [name for name in WATCHED if _points(rows, name)]
    names[1:1] = sorted({name for row in rows for name in row if name.startswith("eval/judge_")})
    if len(names) < 2 or names[0] != WATCHED[0]:
        return ""
    return "<h2>The reward, and what watches it</h2>" + plot_watch(rows, names)


def plot_watch(rows: list[dict[str, Any]], names: list[str]) -> str:
    """An SVG with a plot of each metric, one above the other over the same steps; a dashed line is its first value."""
    from matplotlib.figure import Figure

    height = 1.15 * len(names) + 0.45
    figure = Figure(figsize=(9, height))
    figure.subplots_adjust(0.2, 0.42 / height, 0.98, 1 - 0.08 / height, hspace=0.18)
    first = None
    for index, name in enumerate(names):
        axes = figure.add_subplot(len(names), 1, index + 1, sharex=first)
        first = first or axes
        steps, values = zip(*_points(rows, name))
        axes.plot(steps, values, marker="o", markersize=4, linewidth=1.8, color=_colour(name))
        axes.axhline(values[0], color="0.6", linewidth=1, linestyle="--")
        axes.set_ylabel(name.removeprefix("eval/"), fontsize=9, rotation=0, ha="right", va="center")
        axes.yaxis.set_label_coords(-0.07, 0.5)
        axes.tick_params(labelsize=8, labelbottom=index == len(names) - 1)
        axes.locator_params(axis="y", nbins=4)
        axes.margins(y=0.15)
        axes.grid(alpha=0.3)
    axes.set_xlabel("step", fontsize=9)
    return _svg(figure)


def _colour(name):
    """Of the reward, of judges, and of distances between images."""
    if name == WATCHED[0]:
        return "C0"
    return "C2" if name.startswith(("eval/diversity", "eval/drift")) else "C3"


def _points(rows, name):
    return [(row["step"], row[name]) for row in rows if row.get(name) is not None]


def _curves(rows):
    names = {name for row in rows for name in row if name not in HIDDEN and not name.startswith(TEST)}
    names = sorted(names, key=lambda name: (not name.startswith("eval/"), name))
    if not names:
        return ""
    return "<h2>Curves</h2>" + plot(rows, names)


def plot(rows, names):
    """An SVG with one small plot of each metric over the steps."""
    from matplotlib.figure import Figure

    columns = 3
    lines = -(-len(names) // columns)
    height = 2.4 * lines
    figure = Figure(figsize=(11, height))
    # margins in inches; a layout that measures every label takes as long again as drawing them
    figure.subplots_adjust(0.06, 0.3 / height, 0.99, 1 - 0.3 / height, wspace=0.22, hspace=0.35)
    for index, name in enumerate(names):
        axes = figure.add_subplot(lines, columns, index + 1)
        points = _points(rows, name)
        axes.plot(*zip(*points), marker="o" if len(points) < 12 else None, markersize=3, linewidth=1.5)
        axes.set_title(name, fontsize=10)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    return _svg(figure)


def _svg(figure):
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    return buffer.getvalue().partition("<svg")[1] + buffer.getvalue().partition("<svg")[2]
