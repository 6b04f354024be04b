"""LoRAs and ControlNets, applied to a latent diffusion model while it is loaded."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp

from jaxdiff.models.control import with_controls
from jaxdiff.models.lora import merged
from jaxdiff.models.sampling import TrainedModel
from jaxdiff.weights import control, hub, latent_unet, lora, single_file
from jaxdiff.weights.lora_names import Networks


class LoRAFile(NamedTuple):
    """A LoRA (a file, a folder or a hub id) and its weight."""

    path: str | Path
    weight: float = 1.0


class LoRAs(NamedTuple):
    """LoRAs to be merged into a model. strict: tensors that fit no network are a ValueError, not a warning."""

    files: tuple[LoRAFile, ...] = ()
    strict: bool = False

    def merged_into(self, params: dict, name: str, networks: Networks) -> dict:
        """The parameters of the network `name` ("model", "text", "text_2") with all LoRAs of it added.

        networks: all of the system, so that no tensor of a file counts as unknown. Only "model" warns of those.
        """
        if not self.files:
            return params
        given = []
        for file in self.files:
            with warnings.catch_warnings(action="default" if name == "model" else "ignore"):
                trees = lora.load(file.path, networks, strict=self.strict)
            if name in trees:
                given.append((trees[name], file.weight))
        return merged(params, given) if given else params


def with_adapters(
    generator: TrainedModel,
    loras: LoRAs,
    controls: Sequence[str | Path],
    dtype: str = "float32",
    place: hub.Place = jnp.asarray,
) -> TrainedModel:
    """A latent diffusion model with these LoRAs of its U-Net, merged, and these ControlNets."""
    if loras.files:
        networks = Networks(latent_unet.network_of(generator.model))
        generator = replace(generator, params=loras.merged_into(generator.params, "model", networks))
    return with_controlnets(generator, controls, dtype, place)


def with_controlnets(
    generator: TrainedModel, paths: Sequence[str | Path], dtype: str = "float32", place: hub.Place = jnp.asarray
) -> TrainedModel:
    """The model with these ControlNets: files in either layout, folders or hub ids. ValueError if one does not fit."""
    if not paths:
        return generator
    loaded = []
    for path in paths:
        if Path(path).is_file():
            config, tensors = single_file.open_controlnet(path)
            network = control.read_config(config, Path(path), dtype)
            params = control.load_tensors(network, tensors, dtype, place, str(path))
        else:
            folder = hub.directory_of(path, "ControlNet")
            network, params = control.load_control(folder, dtype, place=place)
        loaded.append((network.control, params))
    return with_controls(generator, loaded)
