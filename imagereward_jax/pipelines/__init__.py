"""Text-to-image models, one module per family, behind one set of methods."""

from imagereward_jax.pipelines.families import UnknownModel, load_pipeline, open_pipeline

__all__ = ["UnknownModel", "load_pipeline", "open_pipeline"]
