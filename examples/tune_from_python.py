"""Tunes the built-in tiny model by a function of one's own, from Python and with no config file.

    python examples/tune_from_python.py

Editors that know cells (`# %%`), and jupytext, open this file as a notebook. Run again, it continues the run in
runs/redness, or has nothing left to do.
"""

# %%
import random

import imagereward_jax as RM
from imagereward_jax.methods import ddpo

STEPS = 30


# %% Any function of images and prompts is a reward; DDPO asks for no gradient.
def redness(images, prompts):
    """images: uint8 [B, H, W, 3]. One number per image: how much more red it has than green and blue."""
    images = images.astype("float32") / 255
    return (images[..., 0] - images[..., 1:].mean(-1)).mean((1, 2))


def draw_prompt():
    """A prompt and what else is known of it; the run seeds the generator, so that it can be repeated."""
    size, shape = random.choice(["large", "small"]), random.choice(["circle", "square", "triangle"])
    return f"a {size} blue {shape} at the top left", {"shape": shape}


def show(samples, step, writers):
    """Called with the images of every step and every evaluation, and what they scored."""
    kind = "held-out" if samples.held_out else "training"
    print(f"step {step}: {len(samples.images)} {kind} images, mean reward {samples.rewards.mean():.3f}")


# %%
trainer = RM.Trainer(
    ddpo.Config(num_steps=5, height=32, width=32, guidance_scale=1.0, prompt_buffer=0),
    fields={
        "steps": STEPS,
        "batch_size": 16,
        "optimizer.learning_rate": 1e-4,
        "eval.num_steps": 5,
        "eval.guidance_scale": 1.0,
        "eval.eta": 1.0,
        "eval.every": STEPS,
        "log_every": 1,
        "writers": ("jsonl",),
    },
    pipeline="tiny-shapes",
    reward=redness,
    prompts=draw_prompt,
    eval_prompts=["a large red circle at the top left", "a small green square at the bottom right"],
    image_samples_hook=show,
    workdir="runs/redness",
)

# %% report.html, metrics.jsonl and samples are in runs/redness.
trainer.train()

# %% A diffusers folder with a model card; `trainer.push_to_hub("me/redness")` uploads the same.
trainer.save_pretrained("runs/redness_model", overwrite=True)
