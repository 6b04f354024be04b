"""Hints of ControlNets: images that guide the composition, such as edge maps."""

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.options.init_image import read
from experiments.options.sampling import each, pixels_of
from jaxdiff.data.edges import edge_map
from jaxdiff.data.images import to_uint8
from jaxdiff.models.hints import HintImage
from jaxdiff.systems.pipeline import Pipeline


@dataclass(frozen=True)
class HintOptions:
    """Hints for the ControlNets of --control."""

    hint: tuple[Path, ...] = ()
    """An image for each ControlNet: an edge map, a pose, depth. It is resized to the sampled size."""
    edges: bool = False
    """The hints are ordinary images: compute their edge maps (Canny)."""
    control_weight: str = ""
    """Weight of each ControlNet, separated by commas; default: 1."""
    control_end: str = ""
    """Fraction of the steps after which each ControlNet is off; default: 1."""

    def check(self, controls: tuple[str, ...]) -> None:
        """ValueError for conflicting settings or unreadable images, before weights are read."""
        if len(self.hint) != len(controls):
            raise ValueError(
                f"{len(self.hint)} --hint for {len(controls)} --control: give one image for each ControlNet"
            )
        for name in ("edges", "control_weight", "control_end"):
            if getattr(self, name) and not controls:
                raise ValueError(f"--{name.replace('_', '-')} is for ControlNets: name one with --control")
        for path in self.hint:
            read(path)

    @property
    def shown(self) -> dict[str, object]:
        """The settings that are given, for metadata."""
        values = vars(self) | {"hint": [path.name for path in self.hint]}
        return {name: value for name, value in values.items() if value}

    def load(self, model: Pipeline, size: tuple[int, int] | None) -> tuple[HintImage, ...]:
        """The hints at the size of the sampled images. size: of the generator's product; None: its default."""
        if not self.hint:
            return ()
        weights = each("control-weight", self.control_weight, len(self.hint), float)
        ends = each("control-end", self.control_end, len(self.hint), float)
        sides = size or (model.generator.side,) * 2
        pixels = tuple(side * pixels_of(model) for side in sides)
        hints = []
        for path, weight, end in zip(self.hint, weights, ends):
            image = jax.image.resize(jnp.asarray(read(path)), (*pixels, 3), "cubic")
            image = np.clip(np.asarray(image), -1.0, 1.0)
            hint = edge_map(to_uint8(image), sigma=0.0) if self.edges else (image + 1.0) / 2.0
            hints.append(HintImage(hint, 1.0 if weight is None else weight, end=1.0 if end is None else end))
        return tuple(hints)
