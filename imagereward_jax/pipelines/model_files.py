"""A model as its files state it: with parts from other files, and completed by what the published models have."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from imagereward_jax.pipelines import published_settings
from imagereward_jax.pipelines.base import TextToImage
from imagereward_jax.weights import components, single_file
from imagereward_jax.weights.sources import MixedSource, SingleFileSource, Source


def config_of(family: type[TextToImage], name: str, place: single_file.Place) -> dict[str, Any]:
    """config.json of a network of a single file."""
    scale = published_settings.vae_scale(family.pipeline_class) if name == "vae" else {}
    return place.config | scale | components.label(family.components[name])


@dataclasses.dataclass
class ModelFiles:
    """What a pipeline is made of.

    Attributes:
        configs: config.json by component. scheduler: scheduler_config.json; without `_class_name` only what differs
            from the published model's. tokenizers: by their names in a diffusers folder.
        source: of the weights; None if there are none. options: further ones of the family.
    """

    family: type[TextToImage]
    configs: dict[str, dict]
    scheduler: dict[str, Any]
    tokenizers: dict[str, Any]
    source: Source | None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def where(self) -> str | Path:
        """How errors name the model."""
        return self.source.name_or_path if self.source else self.family.pipeline_class

    def replace_parts(self, parts: Mapping[str, Path]) -> None:
        """Takes networks and tokenizers from elsewhere, see `families.open_pipeline`.

        Raises:
            ValueError: a name is of no part, or a file holds no such network.
        """
        family, where = self.family, self.where
        known = [*family.components, *family.text_encoders.values()]
        if unknown := sorted(parts.keys() - set(known)):
            raise ValueError(f"parts: {unknown[0]!r} is no part of {where}; its parts are {', '.join(known)}")
        replaced = {}
        for name, path in parts.items():
            if name not in family.components:
                self.tokenizers[name] = path
                continue
            if path.is_dir():
                raise ValueError(f"parts: {name}={path} is a folder; expected the file of its weights")
            place = single_file.recognise_part(path, name, family.pipeline_class)
            replaced[name] = SingleFileSource(path, {name: place})
            own = self.configs.get(name, {})
            kept = {field: own[field] for field in published_settings.vae_scale(family.pipeline_class) if field in own}
            self.configs[name] = config_of(family, name, place) | kept
        if parts and self.source:
            self.source = MixedSource(self.source, replaced, ",".join(f"{name}={path}" for name, path in parts.items()))

    def complete(self, prediction_type: str | None, *, download: bool) -> None:
        """Fills in what single files lack: schedule, sizes of images, the VAE's scale, tokenizers.

        Raises:
            ValueError, FileNotFoundError: a network or tokenizer is absent that has to be given as a part.
        """
        family, where = self.family, self.where
        needed = [name for name in family.components if name not in self.configs and name not in family.optional]
        if needed:
            raise ValueError(
                f"{where}: holds no {' and no '.join(needed)}: give the files of them as parts of the model, "
                f"{','.join(f'{name}=FILE' for name in needed)} (config.model.parts, or --parts of generate)"
            )
        try:
            if "_class_name" not in self.scheduler and single_file.is_single_file(where):
                self.scheduler = published_settings.scheduler_of(
                    family.pipeline_class, self.configs, self.scheduler, prediction_type
                )
                self.configs[family.denoiser]["sample_size"] = published_settings.sample_size(
                    family.pipeline_class, prediction_type or self.scheduler.get("prediction_type")
                )
            for encoder, name in family.text_encoders.items():
                if encoder in self.configs and name not in self.tokenizers:
                    self.tokenizers[name] = published_settings.tokenizer(
                        family.pipeline_class, name, encoder, self.configs, download=download
                    )
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
