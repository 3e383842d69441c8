"""A page in the browser with a tuned model beside its base: `imagereward demo [MODEL]`.

    imagereward demo                    # the built-in tiny-shapes, on any machine
    imagereward demo runs/refl_tiny     # what a run exported, beside what it started from
    imagereward demo ADAPTER --base owner/model

A prompt gives images of both models from the same noise, with the scores of each --reward; another tab scores images
of your own. The page is on this machine alone, unless --host or --share says otherwise, and needs no network:
docs/demo.md.
"""

import argparse
import html
import os
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagereward_jax.command import command, explain
from imagereward_jax.compilation_cache import add_flag, use_compilation_cache
from imagereward_jax.terminal import Parser, program, say

if TYPE_CHECKING:
    import gradio

    from imagereward_jax.side_by_side import SideBySide

DEFAULT = "tiny-shapes"
UPLOADS, UPLOAD_SIZE = 16, "20mb"  # images at a time, and each one's size at most
WAITING = 16  # requests that may wait; then visitors are told to come again
SHOWN_SIDE = 256  # pixels to which small images are enlarged
EXAMPLES = (
    "a large red circle in the center",
    "a small blue square at the top left",
    "a large green triangle on the right",
)
# A table that has rows would else make the page wider than a phone.
CSS = (
    ".gradio-container {max-width: 1200px !important; margin: auto} footer {display: none !important} "
    "#scores {contain: inline-size}"
)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog=program("demo"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model", nargs="?", default=DEFAULT, help=f"a run's workdir, an export or any model ({DEFAULT})"
    )
    parser.add_argument(
        "--base", metavar="MODEL", help="that MODEL was tuned from; default: the one that its run names"
    )
    parser.add_argument(
        "--reward",
        action="append",
        metavar="NAME",
        help="as of `score --model`; may be given several times; default: the run's, or ImageReward-v1.0",
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the models")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for other machines")
    parser.add_argument("--port", type=int, default=7860, help="0 for any free one")
    parser.add_argument(
        "--share", action="store_true", help="also through a tunnel of Gradio's, for anyone with the link"
    )
    add_flag(parser)
    args = parser.parse_args(argv)
    if not 0 <= args.port < 65536:
        parser.error(f"--port {args.port} should be from 0 to 65535")
    return args


def told(function: Callable[..., Any]) -> Callable[..., Any]:
    """Shows an error of a request in the page, as the commands show theirs in the terminal."""
    import gradio

    def run(*inputs: Any) -> Any:
        try:
            return function(*inputs)
        except Exception as error:  # a page goes on
            _, text = explain(error)
            say(f"error: {text}", file=sys.stderr)
            raise gradio.Error(html.escape(text), duration=20, print_exception=False) from error

    return run


def build(models: "SideBySide") -> "gradio.Blocks":
    """The page."""
    import gradio

    with gradio.Blocks(title="ImageReward-JAX", analytics_enabled=False) as page:
        gradio.Markdown(f"# ImageReward-JAX\n{_headline(models)}")
        with gradio.Tab("Generate"):
            _generate_tab(gradio, models)
        with gradio.Tab("Score images"):
            _score_tab(gradio, models)
    return page


def _generate_tab(gradio, models):
    with gradio.Row():
        prompt = gradio.Textbox(label="Prompt", value=_first_prompt(models), lines=2, scale=4, elem_id="prompt")
        button = gradio.Button("Generate", variant="primary", scale=1, elem_id="generate")
    if _is_shapes(models):
        gradio.Examples([[text] for text in EXAMPLES], [prompt], cache_examples=False)
    with gradio.Accordion("Settings"):
        settings = _settings(gradio, models)
    names = ("base", "tuned") if models.compares else ("model",)
    with gradio.Row():
        galleries = [_gallery(gradio, models, name, name.capitalize()) for name in names]
    table = gradio.Dataframe(
        headers=["reward", "base", "tuned", "gain"] if models.compares else ["reward", "mean", "least", "most"],
        label="Scores, mean over the images",
        interactive=False,
        elem_id="scores",
    )
    button.click(told(generator(models)), [prompt, *settings], [*galleries, table], concurrency_id="device")


def _score_tab(gradio, models):
    with gradio.Row():
        prompt = gradio.Textbox(label="Prompt that the images were made for", lines=2, scale=4, elem_id="about")
        button = gradio.Button("Score", variant="primary", scale=1, elem_id="score")
    label = f"Images, up to {UPLOADS} of {UPLOAD_SIZE} each"
    files = gradio.File(label=label, file_count="multiple", type="filepath", elem_id="upload")
    ranked = _gallery(gradio, models, "ranked", "Best first", columns=4)
    button.click(told(scorer(models)), [prompt, files], [ranked], concurrency_id="device")


def _settings(gradio, models):
    """The fields of a request behind its prompt, in the order of `check_request`."""
    from imagereward_jax.side_by_side import BOUNDS

    def slider(name, label, value, step=1, high=None):
        low, most = BOUNDS[name]
        return gradio.Slider(low, high or most, value, step=step, label=label, elem_id=name)

    usual, adapted = models.generation, models.shown.adapter is not None
    negative = gradio.Textbox(label="Negative prompt (guidance above 1)", elem_id="negative")
    with gradio.Row():
        rest = [
            slider("steps", "Steps", usual.num_inference_steps),
            slider("guidance_scale", "Guidance", usual.guidance_scale, 0.5, 20),
            slider("seed", "Seed", 0, high=9999),
            slider("count", "Images", 2),
        ]
    scale = slider("lora_scale", "LoRA scale", 1.0, 0.05) if adapted else gradio.State(1.0)
    return [negative, *rest, scale]


def _gallery(gradio, models, name, title, columns=2):
    """A gallery under its title; captions are scores in the order of the rewards."""
    with gradio.Column():
        gradio.Markdown(f"**{title}**, by {' · '.join(f'`{one}`' for one in models.rewards)}")
        return gradio.Gallery(
            label=name,
            show_label=False,
            columns=columns,
            fit_columns=False,
            height="max-content",
            object_fit="contain",
            format="png",
            elem_id=name,
        )


def _is_shapes(models):
    return DEFAULT in (models.shown.model, models.shown.base)


def _first_prompt(models):
    return EXAMPLES[0] if _is_shapes(models) else ""


def _headline(models):
    shown = models.shown
    if shown.adapter:
        text = f"Base: `{shown.model}`. Tuned: with the adapter `{shown.adapter}`."
    elif shown.base:
        text = f"Base: `{shown.base}`. Tuned: `{shown.model}`."
    else:
        text = f"Model: `{shown.model}`."
    same = " Both draw from the same noise." if models.compares else ""
    rewards = ", ".join(f"`{name}`" for name in models.rewards)
    return f"{text}{same} Rewards: {rewards}. Sampler: {models.generation.sampler}."


def generator(models: "SideBySide") -> Callable[..., list[Any]]:
    """The function behind the button: what the page sends, to galleries and table."""
    import gradio

    from imagereward_jax.side_by_side import captions, check_request, gains, spread

    def generate(*values: Any) -> list[Any]:
        request = check_request(*values)
        progress = gradio.Progress()
        images = models.draw(request, lambda done, what: progress(done, desc=what))
        scores = {name: models.score(request.prompt, list(some)) for name, some in images.items()}
        galleries = [
            [(enlarged(image), line) for image, line in zip(some, captions(scores[name]))]
            for name, some in images.items()
        ]
        table = gains(scores["base"], scores["tuned"]) if models.compares else spread(scores["model"])
        return [*galleries, table]

    return generate


def scorer(models: "SideBySide") -> Callable[..., list[Any]]:
    """The function of the other tab: a prompt and paths, to a gallery with the best by the first reward first."""
    import numpy as np

    from imagereward_jax.data.images import open_image
    from imagereward_jax.side_by_side import captions, check_prompt

    def score(prompt: Any, paths: Any) -> list[Any]:
        check_prompt(prompt)
        if not paths:
            raise ValueError("There is no image: choose some.")
        if len(paths) > UPLOADS:
            raise ValueError(f"{len(paths)} images: at most {UPLOADS} are scored at a time.")
        images = [open_image(Path(path).read_bytes(), os.path.basename(path)) for path in paths]  # names no folder
        scores = models.score(prompt, images)
        lines, first = captions(scores), next(iter(scores.values()))
        best = sorted(range(len(paths)), key=lambda index: -first[index])
        return [
            (enlarged(np.asarray(images[index])), f"{os.path.basename(paths[index])}: {lines[index]}") for index in best
        ]

    return score


def enlarged(image: Any) -> Any:
    """Repeats the pixels of a small image, which a browser would blur."""
    factor = max(1, SHOWN_SIDE // image.shape[1])
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Opens the models, serves the page until Ctrl-C; returns the exit status."""
    args = parse_args(argv)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before it is imported
    import gradio

    from imagereward_jax.side_by_side import SideBySide, default_rewards, find_shown

    use_compilation_cache(args.compilation_cache)
    shown = find_shown(args.model, args.base)
    say(f"opening {shown.adapter or shown.model}", file=sys.stderr)
    models = SideBySide(shown, args.reward or default_rewards(shown), dtype=args.dtype)
    fonts = {
        "font": ["system-ui", "sans-serif"],
        "font_mono": ["ui-monospace", "monospace"],
    }  # of the visitor's machine
    page = build(models)
    page.queue(max_size=WAITING)
    try:
        _, local, shared = page.launch(
            server_name=args.host,
            server_port=args.port or None,
            share=args.share,
            prevent_thread_lock=True,
            quiet=True,
            ssr_mode=False,
            max_file_size=UPLOAD_SIZE,
            theme=gradio.themes.Default(**fonts),
            css=CSS,
            footer_links=[],
        )
    except OSError as error:
        reason = str(error).partition(". ")[0]
        raise ValueError(
            f"--host {args.host} --port {args.port}: no page there ({reason}); choose another --port"
        ) from error
    say(f"the page is at {local}" + (f" and, for anyone, at {shared}" if shared else "") + "; Ctrl-C ends it")
    try:
        threading.Event().wait()
    finally:
        page.close(verbose=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
