"""Script for the Stable Diffusion web UI (AUTOMATIC1111, Forge, SD.Next): scores, filters and sorts generated images.

    python -m imagereward_jax.integrations webui PATH_OF_THE_WEB_UI

copies it with its client into the web UI's `extensions`; restart the web UI, and choose "ImageReward scores" under
Script. Nothing is installed into the web UI's environment: a server scores (docs/serve.md), which this script starts
from the environment of imagereward-jax if none runs. Images are saved after they are scored, with the score in their
parameters; those below the limit are neither shown nor saved. An image is scored for what its prompt draws last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import gradio as gr
from imagereward_client import DEFAULT_URL, LocalServer, installed_python
from imagereward_prompts import drawn_last
from modules import images, scripts
from modules.processing import process_images
from modules.shared import opts

LABEL = "ImageReward score"
MODEL = "ImageReward-v1.0"
DEVICES = ("default", "cpu")
ROW_FIELDS = ("all_prompts", "all_negative_prompts", "all_seeds", "all_subseeds")
server = LocalServer()  # both tabs of the web UI share it


def final_prompts(p: Any, prompts: Sequence[str]) -> list[str]:
    """What the images of a `StableDiffusionProcessing` show at the end, of its prompts: see `drawn_last`."""
    if getattr(p, "enable_hr", False):
        prompts = (getattr(p, "all_hr_prompts", None) or prompts)[: len(prompts)]
        return [drawn_last(prompt, p.hr_second_pass_steps or p.steps, first_steps=p.steps) for prompt in prompts]
    last = p.steps
    if hasattr(p, "init_images") and not opts.img2img_fix_steps:  # image to image makes a part of the steps
        last = min(last, int(p.denoising_strength * p.steps) + 1)
    return [drawn_last(prompt, p.steps, last=last) for prompt in prompts]


def with_score(infotext: str, score: float) -> str:
    """Appends the score to the image's parameters, where the web UI can still read them."""
    return f"{infotext}, {LABEL}: {score:.4f}" if infotext else f"{LABEL}: {score:.4f}"


def chosen(scores: Sequence[float], limit: float | None, sort: bool) -> list[int]:
    """Selects the indices of images to show: those of at least `limit` (None: all), best first if `sort`."""
    kept = [i for i, score in enumerate(scores) if limit is None or score >= limit]
    return sorted(kept, key=lambda i: math.inf if math.isnan(scores[i]) else -scores[i]) if sort else kept


class Script(scripts.Script):
    """Interface to the web UI; see `modules.scripts.Script`."""

    def title(self) -> str:
        """Name of the script."""
        return "ImageReward scores"

    def show(self, is_img2img: bool) -> bool:
        """Whether the script is available in a tab."""
        return True

    def ui(self, is_img2img: bool) -> list[Any]:
        """Builds the components."""
        with gr.Row():
            filter_low = gr.Checkbox(value=False, label="Leave out images below the limit")
            limit = gr.Number(value=0.0, label="Limit (a score of 0 is average, 1 is good)")
            sort = gr.Checkbox(value=True, label="Best first")
        with gr.Row():
            reward = gr.Textbox(value=MODEL, label="Reward: a name, ImageReward.pt, or a folder")
            url = gr.Textbox(value=DEFAULT_URL, label="Server")
        with gr.Row():
            python = gr.Textbox(value=installed_python(), label="Python of imagereward-jax, to start the server")
            device = gr.Dropdown(choices=list(DEVICES), value=DEVICES[0], label="Device of a server that is started")
        with gr.Row():
            stop = gr.Button(value="Stop the server, which frees its memory")
            status = gr.HTML(value="")
        stop.click(fn=server.stop, inputs=[], outputs=[status])
        return [filter_low, limit, sort, reward, url, python, device]

    def run(
        self,
        p: Any,
        filter_low: bool,
        limit: float | None,
        sort: bool,
        reward: str,
        url: str,
        python: str,
        device: str,
    ) -> Any:
        """Generates, scores and filters images.

        Args:
            p: `StableDiffusionProcessing`.
            filter_low, limit, sort, reward, url, python, device: values of the components of `ui`.

        Returns:
            The `Processed` of the generation, with images and their parameters filtered and sorted.
        """
        limit = self._limit(filter_low, limit)
        client = server.connect(url, reward, python=python, device=device)
        processed = _generate_unsaved(p)
        extras = _take_extras(processed)
        prompts = final_prompts(p, processed.all_prompts[: len(processed.images)])
        scores = client.score_images(processed.images, prompts)
        _add_scores(processed, scores)
        kept = chosen(scores, limit, sort)
        _keep(processed, kept)
        if len(kept) < len(scores):
            low = f"{len(scores) - len(kept)} of {len(scores)} images scored below {limit:g}"
            processed.comments = f"{processed.comments}{low} (the best {scores[chosen(scores, None, True)[0]]:.4f})\n"
        _save(p, processed)
        _add_grid(p, processed)
        processed.images += extras
        return processed

    def _limit(self, filter_low, limit):
        if not filter_low:
            return None
        if limit is None or not math.isfinite(limit):
            raise ValueError("ImageReward: the limit must be a number")
        return float(limit)


def _generate_unsaved(p):
    """Calls `process_images` without saving files or a grid; both are made later, from the kept images."""
    before = p.do_not_save_samples, p.do_not_save_grid
    p.do_not_save_samples = p.do_not_save_grid = True
    try:
        return process_images(p)
    finally:
        p.do_not_save_samples, p.do_not_save_grid = before


def _take_extras(processed):
    """Removes and returns extras that other scripts append (maps, masks); they have no parameters and no score."""
    count = min(len(processed.images), len(processed.infotexts), len(processed.all_prompts))
    extras = processed.images[count:]
    processed.images = processed.images[:count]
    return extras


def _add_scores(processed, scores):
    processed.infotexts = [with_score(text, score) for text, score in zip(processed.infotexts, scores)]
    for image, text in zip(processed.images, processed.infotexts):
        if opts.enable_pnginfo:
            image.info["parameters"] = text


def _keep(processed, kept):
    """Keeps only the images `kept`, in that order. If there are none, the texts stay; the web UI shows the first."""
    processed.images = [processed.images[i] for i in kept]
    if not kept:
        return
    processed.infotexts = [processed.infotexts[i] for i in kept]
    for name in ROW_FIELDS:
        setattr(processed, name, [getattr(processed, name)[i] for i in kept])
    processed.info = processed.infotexts[0]
    processed.seed, processed.subseed = processed.all_seeds[0], processed.all_subseeds[0]


def _save(p, processed):
    """Saves the images, if the web UI is set to."""
    if not p.save_samples():
        return
    for i, image in enumerate(processed.images):
        p.batch_index = i
        images.save_image(
            image,
            p.outpath_samples,
            "",
            processed.all_seeds[i],
            processed.all_prompts[i],
            opts.samples_format,
            info=processed.infotexts[i],
            p=p,
        )


def _add_grid(p, processed):
    """Inserts a grid of the images before them and saves it, if the web UI is set to."""
    count = len(processed.images)
    if p.do_not_save_grid or count == 0 or (count < 2 and opts.grid_only_if_multiple):
        return
    if not (opts.return_grid or opts.grid_save):
        return
    grid, text = images.image_grid(processed.images, p.batch_size), processed.infotexts[0]
    if opts.grid_save:
        images.save_image(
            grid,
            p.outpath_grids,
            "grid",
            processed.all_seeds[0],
            processed.all_prompts[0],
            opts.grid_format,
            info=text,
            short_filename=not opts.grid_extended_filename,
            p=p,
            grid=True,
        )
    if opts.return_grid:
        if opts.enable_pnginfo:
            grid.info["parameters"] = text
        processed.images.insert(0, grid)
        processed.infotexts.insert(0, text)
        processed.index_of_first_image = 1
