"""Bounds of the numbers in settings files, our own and public ones, in one table.

All values are checked before anything is built. A value out of bounds is a mistake or an attack; unchecked, it could
cost hours or all memory, or cause an error that does not name it.
"""

import functools
import math
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

import jax

from jaxdiff.core import trees
from jaxdiff.core.messages import plain, quoted, reason
from jaxdiff.core.products import EmbeddingSpec, ImageSpec, LatentSpec, TokenSpec
from jaxdiff.diffusion import degradation, schedules, time_grid
from jaxdiff.models.autoregressive import AutoregressiveModel
from jaxdiff.models.conditioners import LowResConditioner, MaskConditioner, SizeConditioner, TextConditioner
from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.models.representations import ClassConditioner, EmbeddingConditioner, SemanticMapConditioner
from jaxdiff.models.sampling import SamplingConfig
from jaxdiff.models.tiles import Tiles
from jaxdiff.models.token_sampling import TokenSampling
from jaxdiff.nets.autoregressive import AutoregressiveConfig
from jaxdiff.nets.classifier import ClassifierConfig
from jaxdiff.nets.clip import CLIPConfig, ImageTowerConfig, TextTowerConfig
from jaxdiff.nets.conditioning import MaskedText, WholeText
from jaxdiff.nets.control import ControlNetConfig
from jaxdiff.nets.dvae import DVAEConfig
from jaxdiff.nets.encoder_decoder import EncoderDecoderConfig
from jaxdiff.nets.experts import ExpertsConfig
from jaxdiff.nets.image_readers import ImageTokens, TextWithImage
from jaxdiff.nets.latent_unet import LatentUNetConfig
from jaxdiff.nets.prior import PriorConfig
from jaxdiff.nets.t5 import T5Config
from jaxdiff.nets.unet import AttentionConfig, ConditioningConfig, EfficientUNetConfig, UNetConfig


class Bounds(NamedTuple):
    """Smallest and largest value of a setting."""

    least: int = 1
    most: int = 2**20


SIZE, DEPTH, STEPS, SIDE = Bounds(), Bounds(1, 256), Bounds(1, 2**16), Bounds(1, 2**14)
OPTIONAL, HEADS, FACTOR = Bounds(0), Bounds(0, 2**12), Bounds(0, 2**10)
LEVELS = 12
CHARACTERS = 200
"""Maximum length of a name."""
PARAMETERS = 2**40

_UNET = {
    "channels": SIZE,
    "multipliers": Bounds(1, 2**10),
    "blocks": Bounds(0, DEPTH.most),
    "patch": Bounds(1, 2**6),
    "norm_groups": OPTIONAL,
}
_PRODUCT = {"channels": SIZE, "stride": SIDE}
_READER = {"width": SIZE, "pool_heads": HEADS}
_TOWER = {"width": SIZE, "layers": DEPTH, "heads": SIZE, "feed_forward": SIZE}
BOUNDS: dict[type, dict[str, Bounds]] = {
    UNetConfig: _UNET,
    ExpertsConfig: _UNET,
    EfficientUNetConfig: _UNET | {"outer_blocks": Bounds(0, DEPTH.most)},
    PriorConfig: {
        **dict.fromkeys(("embedding", "text_width", "width", "heads"), SIZE),
        "text_length": STEPS,
        "layers": DEPTH,
        "feed_forward": Bounds(1, FACTOR.most),
    },
    LatentUNetConfig: {
        **{name: bounds for name, bounds in _UNET.items() if name != "patch"},
        "transformer_layers": Bounds(0, DEPTH.most),
        "middle_layers": Bounds(0, DEPTH.most),
        "heads": HEADS,
        "level_entries": OPTIONAL,
    },
    ControlNetConfig: {"inputs": SIZE, "hint_channels": SIZE, "hint_widths": SIZE},
    T5Config: {
        **dict.fromkeys(("vocab", "d_model", "d_kv", "d_ff", "heads"), SIZE),
        "layers": DEPTH,
        "decoder_layers": Bounds(0, DEPTH.most),
        "buckets": Bounds(4),
        "max_distance": SIZE,
        **dict.fromkeys(("pad_id", "eos_id", "decoder_start_id"), OPTIONAL),
    },
    TextTowerConfig: _TOWER | {"vocab": SIZE, "length": STEPS, "eos_id": OPTIONAL},
    ImageTowerConfig: _TOWER | {"resolution": SIDE, "patch": SIDE},
    CLIPConfig: {"width": SIZE},
    AutoregressiveConfig: {
        **dict.fromkeys(("vocab", "codes", "width", "heads"), SIZE),
        **dict.fromkeys(("text_length", "rows", "columns"), STEPS),
        "kernel": SIDE,
        "feed_forward": Bounds(1, FACTOR.most),
    },
    EncoderDecoderConfig: {
        **dict.fromkeys(("vocab", "codes", "entries", "width", "heads", "feed_forward"), SIZE),
        **dict.fromkeys(("text_length", "rows", "columns"), STEPS),
        **dict.fromkeys(("encoder_layers", "decoder_layers"), DEPTH),
        "start": OPTIONAL,
    },
    AutoregressiveModel: {"null": OPTIONAL},
    TokenSampling: {"top_k": OPTIONAL},
    EmbeddingSpec: {"width": SIZE},
    TokenSpec: {"classes": SIZE, "stride": SIDE},
    DVAEConfig: {
        **dict.fromkeys(("codes", "hidden", "code_width", "image_channels"), SIZE),
        "multipliers": Bounds(1, 2**10),
        "blocks": DEPTH,
    },
    ClassifierConfig: {"side": SIDE, "channels": SIZE, "features": SIZE, "classes": SIZE},
    AttentionConfig: {"head_channels": SIZE, "heads": HEADS, "feed_forward": FACTOR},
    ConditioningConfig: {"width": SIZE, "frequencies": OPTIONAL, "vector_tokens": Bounds(0, 2**10)},
    MaskedText: _READER,
    WholeText: _READER,
    TextWithImage: {"width": SIZE, "extra": STEPS},
    ImageTokens: {"width": SIZE, "count": STEPS},
    ImageSpec: _PRODUCT,
    LatentSpec: _PRODUCT,
    DiffusionModel: {"side": SIDE},
    TextConditioner: {"width": SIZE, "length": STEPS, "pooled": SIZE},
    SizeConditioner: {"frequencies": SIZE, "stride": SIDE},
    MaskConditioner: {"channels": SIZE},
    LowResConditioner: {"factor": SIDE, "channels": SIZE},
    degradation.GaussianBlur: {"kernel": Bounds(1, 2**8)},
    degradation.BSRDegradation: {"kernel": Bounds(1, 2**8)},
    ClassConditioner: {"classes": SIZE},
    EmbeddingConditioner: {"width": SIZE, "length": STEPS},
    SemanticMapConditioner: {"classes": SIZE, "stride": SIDE, "detail": SIDE},
    SamplingConfig: {"steps": STEPS},
    Tiles: {"side": SIDE, "overlap": SIDE},
    schedules.LinearBetaSchedule: {"steps": STEPS},
    time_grid.Leading: {"offset": Bounds(0, STEPS.most)},
    time_grid.Respaced: {"counts": STEPS, "offset": Bounds(0, STEPS.most)},
}
"""The bounds of every integer in settings, by class and field."""


def check(cls: type, field: str, value: Any, where: str) -> None:
    """Check a value before `cls` is constructed.

    ValueError, naming `where` and the field, for a value out of bounds, a non-finite number or an unprintable name.
    """
    bounds = BOUNDS.get(cls, {}).get(field)
    for item in value if isinstance(value, tuple) else (value,):
        wanted = ""
        if bounds is not None and item is not None and not (type(item) is int and bounds.least <= item <= bounds.most):
            wanted = f"whole numbers from {bounds.least} to {bounds.most}"
        elif isinstance(item, int | float) and not _finite(item):
            wanted = "finite numbers"
        elif isinstance(item, str) and not _is_name(item):
            wanted = f"names of up to {CHARACTERS} characters that can be printed"
        if wanted:
            raise ValueError(f"{where}: {field} of {cls.__name__} is {quoted(value)}, it takes only {wanted}")


def check_name(name: str, what: str, where: str) -> None:
    """ValueError for a name that is too long or not printable on one line."""
    if not _is_name(name):
        raise ValueError(f"{where}: {what} is {quoted(name)}, not up to {CHARACTERS} characters that can be printed")


def _is_name(name: str) -> bool:
    return len(name) <= CHARACTERS and name.isprintable()


def _finite(number: int | float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an integer beyond the float range
        return False


def check_network(config: UNetConfig, where: str) -> None:
    """ValueError for a U-Net with too many levels or blocks, or whose heads do not divide the width."""
    check_depth(config.blocks, where)
    for name, heads, width in _attentions(config):
        if width % heads:
            raise ValueError(f"{where}: {name}: {heads} heads do not divide a width of {width}")


def check_depth(blocks: tuple[int, ...], where: str) -> None:
    """ValueError for a U-Net with too many levels or blocks."""
    if not 1 <= len(blocks) <= LEVELS:
        raise ValueError(f"{where}: a network of {len(blocks)} levels: 1 to {LEVELS} are supported")
    if sum(blocks) > DEPTH.most:
        raise ValueError(f"{where}: {sum(blocks)} blocks in total: at most {DEPTH.most} are supported")


def _attentions(config: UNetConfig) -> Iterator[tuple[str, int, int]]:
    for level, attends in enumerate(zip(config.attention.self_attention, config.attention.cross_attention)):
        if any(attends):
            yield f"attention at level {level}", config.heads_at(level), config.width(level)
    text = config.conditioning.text
    if isinstance(text, MaskedText) and text.pool:
        yield "pool_heads", text.heads(text.width), text.width


def check_model(model: DiffusionModel, where: str) -> None:
    """ValueError if the heads of the text pooling do not divide the text's width."""
    if not isinstance(model.unet, UNetConfig):
        return
    reader, width = model.unet.conditioning.text, None if model.text is None else model.text.width
    if isinstance(reader, WholeText) and reader.pool and width is not None and width % reader.heads(width):
        raise ValueError(f"{where}: pool_heads: {reader.heads(width)} heads do not divide a width of {width}")


@functools.lru_cache(maxsize=32)
def shapes_of(init: Callable[[Any], dict], settings: Hashable) -> dict:
    """The shapes of `init(settings)`. Cached, since tracing a large network takes seconds."""
    return jax.eval_shape(lambda: init(settings))


def shapes(init: Callable[[Any], dict], settings: Hashable, where: str) -> dict:
    """`shapes_of`, with ValueError, naming `where`, if the settings are invalid or give too many parameters."""
    try:
        result = shapes_of(init, settings)
        leaves = trees.flatten(result).values()
    except Exception as error:  # jax and flax raise many types
        raise ValueError(f"{where}: these settings are invalid: {reason(error)}") from error
    count = sum(math.prod(leaf.shape) for leaf in leaves)
    if count > PARAMETERS:
        raise ValueError(f"{where}: these settings make a network of {count:.2g} parameters: {PARAMETERS:.2g} at most")
    return result


def names(listed: list[str]) -> str:
    """The first ten names, escaped for messages."""
    return ", ".join(map(plain, listed[:10])) + (", …" if len(listed) > 10 else "")
