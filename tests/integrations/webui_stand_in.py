"""Stand-ins for the modules of the Stable Diffusion web UI that the script imports.

Signatures, fields and order of events are those of AUTOMATIC1111/stable-diffusion-webui 1.10 and gradio 3.41; what
happens inside is the least that a script can see. Anything else that the script asks for raises AttributeError.
"""

import os
import types
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, PngImagePlugin


class Component:
    """A gradio component; everything but its first argument is by keyword."""

    def __init__(self, value=None, *, label=None, choices=None):
        self.value, self.label, self.choices, self.clicked = value, label, choices, None

    def click(self, fn, inputs=None, outputs=None):
        self.clicked = (fn, inputs, outputs)


class Row:
    """A layout context."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


def options(**changes):
    """`modules.shared.opts`, with the web UI's defaults for what the script may read."""
    defaults = {
        "samples_save": True,
        "samples_format": "png",
        "enable_pnginfo": True,
        "save_incomplete_images": False,
        "return_grid": True,
        "grid_save": True,
        "grid_format": "png",
        "grid_only_if_multiple": True,
        "grid_extended_filename": False,
        "img2img_fix_steps": False,
    }
    return types.SimpleNamespace(**{**defaults, **changes})


@dataclass
class Processing:
    """`StableDiffusionProcessing`: what a user asked for."""

    opts: object
    prompt: str = "a cat"
    negative_prompt: str = ""
    seed: int = 100
    steps: int = 20
    enable_hr: bool = False
    hr_second_pass_steps: int = 0
    denoising_strength: float = 0.75
    batch_size: int = 2
    n_iter: int = 2
    outpath_samples: str = ""
    outpath_grids: str = ""
    do_not_save_samples: bool = False
    do_not_save_grid: bool = False
    batch_index: int = 0
    all_prompts: list = field(default_factory=list)
    all_hr_prompts: list | None = None

    def save_samples(self) -> bool:
        return self.opts.samples_save and not self.do_not_save_samples


class Processed:
    """`modules.processing.Processed`."""

    def __init__(
        self,
        p,
        images_list,
        seed=-1,
        info="",
        subseed=None,
        all_prompts=None,
        all_negative_prompts=None,
        all_seeds=None,
        all_subseeds=None,
        index_of_first_image=0,
        infotexts=None,
        comments="",
    ):
        self.images, self.prompt, self.seed, self.info, self.subseed = images_list, p.prompt, seed, info, subseed
        self.all_prompts, self.all_negative_prompts = all_prompts, all_negative_prompts
        self.all_seeds, self.all_subseeds = all_seeds, all_subseeds
        self.index_of_first_image, self.infotexts, self.comments = index_of_first_image, infotexts or [info], comments


def make_image(seed):
    """What the stand-in "generates"."""
    coarse = (np.random.default_rng(seed).random((3, 3, 3)) * 255).astype(np.uint8)
    return Image.fromarray(coarse).resize((48, 48), Image.Resampling.BICUBIC)


def infotext(p, index):
    """`create_infotext`: the prompt, the negative prompt, and a line of parameters."""
    parameters = f"Steps: 20, Sampler: Euler, Seed: {p.seed + index}, Size: 48x48"
    return f"{p.all_prompts[index]}\nNegative prompt: blurry\n{parameters}"


def make_modules(opts):
    """{name: module}: gradio, modules and what is in it."""

    def save_image(
        image,
        path,
        basename,
        seed=None,
        prompt=None,
        extension="png",
        info=None,
        short_filename=False,
        no_prompt=False,
        grid=False,
        pnginfo_section_name="parameters",
        p=None,
        existing_info=None,
        forced_filename=None,
        suffix="",
        save_to_dirs=None,
    ):
        os.makedirs(path, exist_ok=True)
        chunks = PngImagePlugin.PngInfo()
        if opts.enable_pnginfo and info is not None:
            chunks.add_text(pnginfo_section_name, info)
        name = os.path.join(path, f"{basename}{len(os.listdir(path)):05}-{seed}.{extension}")
        image.save(name, pnginfo=chunks)
        return name, None

    def image_grid(imgs, batch_size=1, rows=None):
        grid = Image.new("RGB", (48 * len(imgs), 48))
        for i, image in enumerate(imgs):
            grid.paste(image, (48 * i, 0))
        return grid

    def process_images(p):
        count = p.batch_size * p.n_iter
        p.all_prompts = [p.prompt] * count
        output, texts = [], []
        for i in range(count):
            image, text = make_image(p.seed + i), infotext(p, i)
            if p.save_samples():
                save_image(image, p.outpath_samples, "", p.seed + i, p.prompt, opts.samples_format, info=text, p=p)
            if opts.enable_pnginfo:
                image.info["parameters"] = text
            output.append(image)
            texts.append(text)
        if (opts.return_grid or opts.grid_save) and not p.do_not_save_grid:
            output.insert(0, image_grid(output, p.batch_size))
            texts.insert(0, infotext(p, 0))
        seeds = [p.seed + i for i in range(count)]
        return Processed(
            p,
            images_list=output,
            seed=seeds[0],
            info=texts[0],
            subseed=7,
            all_prompts=list(p.all_prompts),
            all_negative_prompts=["blurry"] * count,
            all_seeds=seeds,
            all_subseeds=[7 + i for i in range(count)],
            infotexts=texts,
        )

    class Script:
        """`modules.scripts.Script`, as far as a script in the menu uses it."""

        def title(self):
            raise NotImplementedError

        def ui(self, is_img2img):
            pass

        def show(self, is_img2img):
            return True

        def run(self, p, *args):
            pass

    parts = {
        "images": {"save_image": save_image, "image_grid": image_grid},
        "scripts": {"Script": Script},
        "processing": {"process_images": process_images, "Processed": Processed},
        "shared": {"opts": opts},
    }
    package = types.ModuleType("modules")
    package.__path__ = []
    gradio = types.ModuleType("gradio")
    gradio.Row = Row
    for name in ("Checkbox", "Number", "Textbox", "Dropdown", "Button", "HTML"):
        setattr(gradio, name, Component)
    found = {"modules": package, "gradio": gradio}
    for name, contents in parts.items():
        module = types.ModuleType(f"modules.{name}")
        vars(module).update(contents)
        setattr(package, name, module)
        found[f"modules.{name}"] = module
    return found
