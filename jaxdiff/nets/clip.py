"""CLIP's text and image towers (arXiv 2103.00020), which embed captions and images in one space.

Both are pre-norm transformers. The text tower is causal and its embedding is read at the end token; the image tower is
a ViT (arXiv 2010.11929) whose embedding is read at a learned first token. Stable Diffusion and DALL·E 2 are
conditioned on them; CLIP score uses them.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxdiff.nets.attention import attention


@dataclass(frozen=True)
class TextTowerConfig:
    """The text tower. The defaults are those of ViT-B/32."""

    width: int = 512
    layers: int = 12
    heads: int = 8
    feed_forward: int = 2048
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    """OpenAI's models use x · sigmoid(1.702 x), OpenCLIP's the exact GELU."""
    eps: float = 1e-5
    vocab: int = 49408
    length: int = 77
    """Maximum tokens of a caption, start and end included."""
    eos_id: int | None = 49407
    """The embedding is read at the first token with this id. None: at the first token with the caption's largest id,
    which is equivalent for OpenAI's vocabulary (its last id is the end) and needed by its older configurations."""


@dataclass(frozen=True)
class ImageTowerConfig:
    """The image tower. The defaults are those of ViT-B/32."""

    width: int = 768
    layers: int = 12
    heads: int = 12
    feed_forward: int = 3072
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    eps: float = 1e-5
    resolution: int = 224
    patch: int = 32

    def __post_init__(self):
        if self.resolution % self.patch:
            raise ValueError(f"resolution {self.resolution} is not a multiple of the patches' {self.patch} pixels")


@dataclass(frozen=True)
class CLIPConfig:
    """Both towers and the width of their shared space; or one tower, with None for the other."""

    text: TextTowerConfig | None = TextTowerConfig()
    image: ImageTowerConfig | None = ImageTowerConfig()
    width: int | None = 512
    """None: a single tower without a projection, of which only the states are used."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type of the matrix products; the residual stream, norms and softmax stay float32."""
    remat: bool = False
    """Recompute each block in the backward pass to save memory."""

    def __post_init__(self):
        if self.text is None and self.image is None:
            raise ValueError("neither a text tower nor an image tower")
        if self.width is None and None not in (self.text, self.image):
            raise ValueError("two towers need the width of the space in which they are compared")


VIT_B_32 = CLIPConfig()
VIT_L_14 = CLIPConfig(
    TextTowerConfig(width=768, heads=12, feed_forward=3072),
    ImageTowerConfig(width=1024, layers=24, heads=16, feed_forward=4096, patch=14),
    width=768,
)
OPEN_VIT_H_14 = CLIPConfig(
    TextTowerConfig(width=1024, layers=24, heads=16, feed_forward=4096, activation="gelu"),
    ImageTowerConfig(width=1280, layers=32, heads=16, feed_forward=5120, activation="gelu", patch=14),
    width=1024,
)
OPEN_VIT_BIG_G_14 = CLIPConfig(
    TextTowerConfig(width=1280, layers=32, heads=20, feed_forward=5120, activation="gelu"),
    ImageTowerConfig(width=1664, layers=48, heads=16, feed_forward=8192, activation="gelu", patch=14),
    width=1280,
)
TINY = CLIPConfig(
    TextTowerConfig(width=128, layers=3, heads=4, feed_forward=512, vocab=512, length=24, eos_id=1),
    ImageTowerConfig(width=128, layers=4, heads=4, feed_forward=512, resolution=64, patch=8),
    width=128,
)
"""Trains in minutes on a CPU; set the vocabulary and the end token from the tokenizer."""


class TowerOutput(NamedTuple):
    """states: those of one block. pooled: the state of the summary token. embedding: the projection of `pooled`, not
    normalized; None without a projection."""

    states: Float[Array, "b n d"]
    pooled: Float[Array, "b d"]
    embedding: Float[Array, "b e"] | None


class CLIP(nn.Module):
    """Both towers and the temperature; or one tower, with only its `embed_` method available."""

    config: CLIPConfig

    def setup(self):
        if self.config.text is not None:
            self.text = TextTower(self.config)
        if self.config.image is not None:
            self.image = ImageTower(self.config)
        if None not in (self.config.text, self.config.image):
            # Initially log(1/0.07) (2.5).
            self.logit_scale = self.param("logit_scale", nn.initializers.constant(2.6592), (), jnp.float32)

    def __call__(self, ids: Int[Array, "b n"], image: Float[Array, "c h w 3"]) -> Float[Array, "b c"]:
        """Logits: cosine similarities of captions and images, divided by the temperature."""
        text, image = (l2_normalize(e.embedding) for e in (self.text(ids), self.image(image)))
        return jnp.exp(self.logit_scale) * text @ image.T

    def embed_text(self, ids: Int[Array, "b n"], skip_last: int = 0, final_norm: bool = True) -> TowerOutput:
        return self.text(ids, skip_last, final_norm)

    def embed_image(self, image: Float[Array, "b h w 3"]) -> TowerOutput:
        """image: at the tower's resolution, normalised by `models.clip.normalised`."""
        return self.image(image)


class TextTower(nn.Module):
    """Maps token ids to embeddings. Padding needs no mask: it follows the end token, and the tower is causal.

    skip_last: return the states before this number of last blocks. final_norm: apply the last norm to the states.
    `pooled` and `embedding` always come from the last block, after the norm.
    """

    config: CLIPConfig

    @nn.compact
    def __call__(self, ids: Int[Array, "b n"], skip_last: int = 0, final_norm: bool = True) -> TowerOutput:
        config = self.config.text
        assert config is not None  # CLIP creates a tower only if it is configured
        if ids.shape[1] > config.length:
            raise ValueError(f"captions of {ids.shape[1]} tokens, but this tower reads {config.length}")
        x = nn.Embed(config.vocab, config.width, embedding_init=nn.initializers.normal(0.02), name="tokens")(ids)
        x = x.astype(jnp.float32) + _positions(self, config.length, config.width, 0.01)[: ids.shape[1]]
        causal = jnp.broadcast_to(jnp.tri(ids.shape[1], dtype=bool), (len(ids), 1, ids.shape[1], ids.shape[1]))
        states, norm = _blocks(self.config, config, x, causal), nn.LayerNorm(config.eps, name="norm")
        last, chosen = norm(states[-1]), states[-1 - skip_last]
        end = jnp.argmax(ids if config.eos_id is None else ids == config.eos_id, -1)
        pooled = jnp.take_along_axis(last, end[:, None, None], 1)[:, 0]
        if final_norm:
            chosen = norm(chosen) if skip_last else last
        return TowerOutput(chosen, pooled, _projected(self.config, pooled))


class ImageTower(nn.Module):
    """Maps images to embeddings: patches with a learned first token, whose last state is `pooled`."""

    config: CLIPConfig

    @nn.compact
    def __call__(self, image: Float[Array, "b h w 3"]) -> TowerOutput:
        config, dtype = self.config.image, self.config.dtype
        assert config is not None
        side = config.resolution
        if image.shape[1:3] != (side, side):
            raise ValueError(f"images of {image.shape[1]}x{image.shape[2]}, but this tower reads {side}x{side}")
        patches = nn.Conv(
            config.width,
            (config.patch, config.patch),
            strides=config.patch,
            padding="VALID",
            use_bias=False,
            dtype=dtype,
            name="patches",
        )(image)
        x = patches.reshape(len(patches), -1, config.width).astype(jnp.float32)
        first = self.param("first", nn.initializers.normal(config.width**-0.5), (config.width,), jnp.float32)
        x = jnp.concatenate([jnp.broadcast_to(first.astype(jnp.float32), (len(x), 1, config.width)), x], 1)
        x = x + _positions(self, x.shape[1], config.width, config.width**-0.5)
        x = nn.LayerNorm(config.eps, name="first_norm")(x)
        x = _blocks(self.config, config, x, None)[-1]
        pooled = nn.LayerNorm(config.eps, name="norm")(x[:, 0])
        return TowerOutput(x, pooled, _projected(self.config, pooled))


class Block(nn.Module):
    """Pre-norm residual block of either tower."""

    tower: TextTowerConfig | ImageTowerConfig
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], visible: Bool[Array, "b 1 n n"] | None) -> Float[Array, "b n d"]:
        tower = self.tower
        y = nn.LayerNorm(tower.eps, name="attention_norm")(x)
        shape = (*y.shape[:2], tower.heads, tower.width // tower.heads)
        q, k, v = (self._dense(tower.width, name)(y).reshape(shape) for name in ("q", "k", "v"))
        y = attention(q, k, v, mask=visible).reshape(y.shape)
        x = x + self._dense(tower.width, "o")(y).astype(jnp.float32)
        y = nn.LayerNorm(tower.eps, name="feed_forward_norm")(x)
        hidden = self._dense(tower.feed_forward, "wi")(y)
        if tower.activation == "quick_gelu":
            hidden = hidden * jax.nn.sigmoid(1.702 * hidden)
        else:
            hidden = nn.gelu(hidden, approximate=False)
        return x + self._dense(tower.width, "wo")(hidden).astype(jnp.float32)

    def _dense(self, width: int, name: str) -> nn.Dense:
        """CLIP's initialization: layers that write to the residual stream are scaled down with the tower's depth."""
        inner, into = self.tower.width**-0.5, self.tower.width**-0.5 * (2 * self.tower.layers) ** -0.5
        std = {"q": inner, "k": inner, "v": inner, "o": into, "wi": (2 * self.tower.width) ** -0.5, "wo": into}[name]
        return nn.Dense(width, dtype=self.dtype, kernel_init=nn.initializers.normal(std), name=name)


def _blocks(
    config: CLIPConfig, tower: TextTowerConfig | ImageTowerConfig, x: Array, visible: Array | None
) -> list[Array]:
    """The states before the first block and after each block."""
    block, states = nn.remat(Block) if config.remat else Block, [x]
    for i in range(tower.layers):
        states.append(block(tower, config.dtype, name=f"block_{i}")(states[-1], visible))
    return states


def _positions(module: nn.Module, count: int, width: int, std: float) -> Float[Array, "n d"]:
    table = module.param("positions", nn.initializers.normal(std), (count, width), jnp.float32)
    return table.astype(jnp.float32)


def _projected(config: CLIPConfig, pooled: Float[Array, "b d"]) -> Float[Array, "b e"] | None:
    if config.width is None:
        return None
    init = nn.initializers.normal(pooled.shape[-1] ** -0.5)
    return nn.Dense(config.width, use_bias=False, kernel_init=init, name="projection")(pooled)


def l2_normalize(x: Float[Array, "b e"]) -> Float[Array, "b e"]:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
