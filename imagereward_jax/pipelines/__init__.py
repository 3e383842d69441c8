"""Text-to-image models, one module a family, behind one set of methods."""

from imagereward_jax.weights import diffusers
from imagereward_jax.weights.files import read_json


def load_pipeline(name_or_path, *, variant=None, **options):
    """Opens a text-to-image model of any family that is implemented.

    Args:
        name_or_path: a diffusers folder, a built-in model, or a name on the hub.
        variant: which weight files, e.g. "fp16".
        options: `dtype`, `vae_dtype`, `remat` and `prediction_type`, see `TextToImage.load`.

    Returns:
        (pipeline, params).

    Raises:
        FileNotFoundError: there is no such model, or a file of it is absent.
        ValueError: the family, or a setting of it, is not implemented.
    """
    from imagereward_jax.pipelines.sd1 import StableDiffusion1
    from imagereward_jax.pipelines.sdxl import StableDiffusionXL

    families = {
        "StableDiffusionPipeline": StableDiffusion1,
        "FlaxStableDiffusionPipeline": StableDiffusion1,
        "StableDiffusionXLPipeline": StableDiffusionXL,
        "FlaxStableDiffusionXLPipeline": StableDiffusionXL,
    }
    folder = diffusers.resolve_pipeline(name_or_path, variant=variant)
    index = folder / diffusers.INDEX
    if not index.is_file():
        raise FileNotFoundError(f"{folder}: no {diffusers.INDEX}; expected a folder that diffusers saved")
    name = read_json(index).get("_class_name")
    if name not in families:
        raise ValueError(f"{index}: _class_name={name!r} is not implemented, only {', '.join(families)}")
    return families[name].load(folder, variant=variant, **options)
