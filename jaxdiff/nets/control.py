"""ControlNet (arXiv 2302.05543) of a latent U-Net: a second down path that reads an image, the hint.

Its outputs, one per skip connection and one for the middle, are added to those of the U-Net (`add_residuals`). Each
passes a 1×1 convolution that is zero at initialization, so that training starts from the unchanged U-Net.
"""

from dataclasses import dataclass

import flax.linen as nn
from jaxtyping import Array, Float

from jaxdiff.nets.conditioning import UNCONDITIONED, Conditioning
from jaxdiff.nets.execution import ExecutionConfig
from jaxdiff.nets.latent_unet import LatentDownPath, LatentUNetConfig


@dataclass(frozen=True)
class ControlNetConfig:
    """Settings of a ControlNet.

    unet: of its down path and middle; widths and numbers of blocks must be those of the U-Net that it controls.
    inputs: channels that it reads: those of the latents, or those and the conditioning's `concat`.
    hint_channels: of the hint. hint_widths: of the hint encoder's levels; each level after the first halves the sides.
    """

    unet: LatentUNetConfig = LatentUNetConfig()
    inputs: int = 4
    hint_channels: int = 3
    hint_widths: tuple[int, ...] = (16, 32, 96, 256)

    def __post_init__(self):
        if not self.hint_widths:
            raise ValueError("hint_widths: the hint encoder needs at least one level")

    def module(self) -> "ControlNet":
        return ControlNet(self.unet, self.inputs, self.hint_widths)

    @property
    def hint_stride(self) -> int:
        """Pixels of the hint per latent."""
        return 2 ** (len(self.hint_widths) - 1)


class ControlNet(LatentDownPath):
    """The ControlNet: the residuals of a noised latent and a hint."""

    inputs: int
    hint_widths: tuple[int, ...]

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        time: Float[Array, " b"],
        hint: Float[Array, "b h2 w2 c2"],
        conditioning: Conditioning = UNCONDITIONED,
    ) -> tuple[Array, ...]:
        """Feature maps for the skips, in the order of the down path, and for the middle. time: in 0…1000. hint: in
        [0, 1], with `hint_stride` times the sides of x. ValueError for a hint of another size, or other channels."""
        conditioning = self.read(x, conditioning)
        embedding, tokens = self.condition(time, conditioning)
        sides = tuple(2 ** (len(self.hint_widths) - 1) * side for side in x.shape[1:3])
        if hint.shape[1:3] != sides:
            raise ValueError(f"a hint of {_times(hint.shape[1:3])} pixels: this input needs {_times(sides)}")
        encoded = HintEncoder(self.config.channels, self.hint_widths, self.config.execution, name="hint")(hint)
        x, skips = self.down(self.stem(x, conditioning) + encoded, embedding, tokens)
        x = self.middle(x, embedding, tokens)
        return *(self.zero(skip, f"zero_{i}") for i, skip in enumerate(skips)), self.zero(x, "zero_middle")

    def read(self, x: Array, conditioning: Conditioning) -> Conditioning:
        """The conditioning without what this network does not read beside the latents."""
        beside = 0 if conditioning.concat is None else conditioning.concat.shape[-1]
        if self.inputs == x.shape[-1]:
            return conditioning._replace(concat=None)
        if self.inputs != x.shape[-1] + beside:
            raise ValueError(f"a ControlNet of {self.inputs} channels, for {x.shape[-1]} and {beside} beside them")
        return conditioning

    def zero(self, x: Array, name: str) -> Array:
        dtype, init = self.config.execution.dtype, nn.initializers.zeros
        return self.split(nn.Conv(x.shape[-1], (1, 1), dtype=dtype, kernel_init=init, name=name)(x))


class HintEncoder(nn.Module):
    """3×3 convolutions with swish between them, two per level, the second with stride 2 to the next level's width. The
    last, to the width of the U-Net, is zero at initialization."""

    features: int
    widths: tuple[int, ...]
    execution: ExecutionConfig

    @nn.compact
    def __call__(self, hint: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        x = self.conv(hint.astype(self.execution.dtype), self.widths[0], "in")
        for level, width in enumerate(self.widths[1:]):
            x = self.conv(x, x.shape[-1], f"block_{2 * level}")
            x = self.conv(x, width, f"block_{2 * level + 1}", 2)
        init = nn.initializers.zeros
        return nn.Conv(self.features, (3, 3), dtype=self.execution.dtype, kernel_init=init, name="out")(x)

    def conv(self, x: Array, width: int, name: str, stride: int = 1) -> Array:
        x = nn.silu(nn.Conv(width, (3, 3), stride, 1, dtype=self.execution.dtype, name=name)(x))
        return self.execution.sharding.images(x)


def _times(sides: tuple[int, ...]) -> str:
    return "×".join(map(str, sides))
