"""DreamBooth on the built-in tiny model: a ring, which it has never seen, under the rare word "zq".

    python convert/shapes_subject.py runs/shapes_subject --images 20
    python -m imagereward_jax.train --config configs/dreambooth_tiny.py
    python benchmarks/dreambooth_shapes.py tiny-shapes runs/dreambooth_tiny/export

The class are all captions of the shapes world but the held-out ones; the untouched model makes 256 images of them first,
each of another caption. The last command counts rings among images of "zq circle", also in colours and places that no
instance had, and what became of circles.

Hardware: 2 CPU cores, some four minutes. Result to expect, after 150 steps (one seed): a ring in 75 % of the images of
drawn captions and 60 % of those left out. Of large circles 62 % are right instead of 86 %, 12 % are rings; of images of
held-out captions 59 % instead of 75 %. method.prior_weight decides between the two: with 1 there are rings in 79 % and
65 %, and 42 % of the circles are right; with 5, and without method.train_text_encoder, 46 %, 38 % and 68 %.
"""

from imagereward_jax.recipes import default_config


def get_config():
    """The recipe."""
    config = default_config("dreambooth")
    config.steps = 150
    config.batch_size = 16
    config.model.path = "tiny-shapes"
    config.model.remat = "none"
    config.method.class_prompts = "shapes:train"
    config.method.num_class_images = 256
    config.method.prior_weight = 3.0
    config.method.train_text_encoder = True
    config.data.pairs = "runs/shapes_subject"
    config.data.image_size = 32
    config.optimizer.learning_rate = 2e-4
    config.optimizer.warmup_steps = 20
    config.ema_decay = 0.98
    config.eval.prompts = "shapes:held_out"
    config.eval.num_prompts = 64
    config.eval.images_per_prompt = 2
    config.eval.batch_size = 64
    config.eval.num_steps = 20
    config.eval.guidance_scale = 3.0
    config.eval.every = 75
    config.checkpoint.every = 75
    config.log_every = 10
    config.writers = ("jsonl", "tensorboard")
    return config
