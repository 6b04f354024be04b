"""GPU report: every network has the same output on the accelerator as on the CPU.

The error is the RMS of the difference over the RMS of the CPU's float32 output. Float32 is measured with exact products
and with the accelerator's default, which on NVIDIA GPUs rounds their inputs to TF32 (10 bits).
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.recipes.gpu_section import Context, random_params
from jaxdiff.data.shapes_caption import caption
from jaxdiff.data.shapes_draw import draw
from jaxdiff.data.shapes_scene import scene
from jaxdiff.diffusion.parameterization import noised
from jaxdiff.models.conditioners import LowResConditioner, TextConditioner
from jaxdiff.models.diffusion import DiffusionModel, executed
from jaxdiff.nets.attention import Kernel, attention
from jaxdiff.nets.classifier import Classifier
from jaxdiff.nets.clip import CLIP
from jaxdiff.nets.conditioning import Conditioning, MaskedText, WholeText
from jaxdiff.nets.inception import SIDE, Inception
from jaxdiff.nets.t5 import T5Encoder
from jaxdiff.nets.unet import AttentionConfig, ConditioningConfig, EfficientUNetConfig, UNetConfig
from jaxdiff.systems.deepfloyd import IF_I_M, IF_II_M
from jaxdiff.weights import classifier, clip, t5
from jaxdiff.weights.imagen import SHIPPED
from jaxdiff.weights.stages import load_model

LIMITS = {"float32 exact": 2e-5, "float32": 1e-2, "bfloat16": 6e-2}
"""Maximum relative errors, for rounding to 24, 11 and 8 bits through all layers of these networks."""

LENGTHS = ((64, 77), (64, 64), (256, 333), (49, 77), (1, 25))
"""Lengths of queries and keys for the attention kernels, even and odd."""

_RUNNING = threading.Lock()

# (folder of a cascade, compute type) → function, parameters and inputs, on the host.
Build = Callable[[Path, str], tuple[Callable[..., Any], Any, tuple]]


def main(context: Context) -> None:
    """Compare networks, their gradients and attention kernels."""
    accelerator, cpu = jax.devices()[0], jax.devices("cpu")[0]
    context.record(device=accelerator.device_kind, jax=jax.__version__, platform=accelerator.platform)
    # In threads, as nearly all the time is compilation.
    with ThreadPoolExecutor(1 if context.tiny else min(8, os.cpu_count() or 1)) as pool:
        for name, build in list(NETWORKS.items())[: 1 if context.tiny else None]:
            pool.submit(context.attempt, name, partial(_compare, context, name, build, cpu, accelerator))
        for lengths in LENGTHS[: 1 if context.tiny else None]:
            for masked in (False, True):
                measure = partial(_compare_attention, context, lengths, masked, accelerator)
                pool.submit(context.attempt, f"attention {lengths}", measure)


def _compare(context: Context, name: str, build: Build, cpu: Any, accelerator: Any) -> None:
    errors = {}
    reference = None
    for label, dtype, precision in (
        ("float32 exact", "float32", "highest"),
        ("float32", "float32", None),
        ("bfloat16", "bfloat16", None),
    ):
        function, params, inputs = build(context.weights, dtype)
        if reference is None:
            reference = _output(function, params, inputs, cpu, "highest")
        errors[label] = _error(_output(function, params, inputs, accelerator, precision), reference)
    right = all(errors[label] < limit for label, limit in LIMITS.items())
    context.record(network=name, **errors, within_limits=right)


def _output(function: Callable, params: Any, inputs: tuple, device: Any, precision: str | None) -> list[np.ndarray]:
    params, inputs = jax.device_put((params, inputs), device)
    with jax.default_device(device), jax.default_matmul_precision(precision or "default"):
        program = jax.jit(function).lower(params, *inputs).compile()
        return _run(program, params, *inputs)


def _run(program: Any, *inputs: Any) -> list[np.ndarray]:
    """The outputs in float32. One program at a time, as another thread's would disturb the capture of a CUDA graph."""
    with _RUNNING:
        return [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(program(*inputs))]


def _error(outputs: list[np.ndarray], reference: list[np.ndarray]) -> float:
    """The largest relative error of several outputs; NaN if one contains NaN."""
    square = lambda x: float(np.mean(np.square(x, dtype=np.float64)))  # noqa: E731
    return float(np.max([(square(f - r) / square(r)) ** 0.5 for f, r in zip(outputs, reference, strict=True)]))


def _compare_attention(context: Context, lengths: tuple[int, int], masked: bool, accelerator: Any) -> None:
    """Compare output and gradients of the kernel selected for bfloat16 with XLA's in float32."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, n, 4, 64), np.float32) for n in (lengths[0], lengths[1], lengths[1]))
    mask = np.broadcast_to(np.arange(lengths[1]) < np.array([[lengths[1] - 5], [lengths[1]]]), (2, lengths[1]))
    mask = mask[:, None, None] if masked else None
    inputs = jax.device_put((q, k, v), accelerator)

    def loss(kernel: Kernel, dtype: str, q: Any, k: Any, v: Any) -> Any:
        output = attention(q.astype(dtype), k.astype(dtype), v.astype(dtype), mask=mask, kernel=kernel)
        return (output.astype(jnp.float32) * jnp.asarray(q)).sum(), output

    def both(kernel: Kernel, dtype: str) -> list[np.ndarray]:
        function = jax.value_and_grad(partial(loss, kernel, dtype), argnums=(0, 1, 2), has_aux=True)
        outputs = lambda *inputs: (lambda value, grads: (value[1], grads))(*function(*inputs))  # noqa: E731
        return _run(jax.jit(outputs).lower(*inputs).compile(), *inputs)

    with jax.default_matmul_precision("highest"):
        reference = both(Kernel.XLA, "float32")
    error = _error(both(Kernel.AUTO, "bfloat16"), reference)
    context.record(attention=f"{lengths[0]}×{lengths[1]}", masked=masked, bfloat16=error, within_limits=error < 2e-2)


def _shipped_stage(name: str, side: int) -> Build:
    def build(weights: Path, dtype: str):
        model = load_model(weights / name)
        return _stage(model.model, model.params, _examples(weights, model.model, side), dtype)

    return build


def _random_stage(stage: DiffusionModel, side: int) -> Build:
    def build(weights: Path, dtype: str):
        params = random_params(jax.eval_shape(stage.init, jax.random.key(0))[0])
        rng = np.random.default_rng(0)
        batch = {n: rng.standard_normal(s.shape).astype(np.float32) for n, s in stage.batch_spec(2, side).items()}
        batch |= {"text_mask": np.arange(batch["text"].shape[1]) < np.array([[5], [batch["text"].shape[1]]])}
        return _stage(stage, params, batch, dtype)

    return build


def _shipped_gradient(name: str) -> Build:
    def build(weights: Path, dtype: str):
        model = load_model(weights / name)
        return _gradient(model.model, model.params, dtype)

    return build


def _random_gradient(stage: DiffusionModel) -> Build:
    def build(weights: Path, dtype: str):
        return _gradient(stage, random_params(jax.eval_shape(stage.init, jax.random.key(0))[0]), dtype)

    return build


def _gradient(stage: DiffusionModel, params: Any, dtype: str):
    """The gradient of the training loss for a fixed batch and noise."""
    stage = executed(stage, dtype=dtype)
    rng = np.random.default_rng(0)
    batch = {n: rng.standard_normal(s.shape).astype(s.dtype) for n, s in stage.batch_spec(4, stage.side).items()}
    batch |= {"text_mask": np.ones_like(batch["text_mask"]), "image": np.tanh(batch["image"])}
    batch |= {"null_text": batch["text"][0]}  # used if the null text is the empty caption
    key, step = jax.random.key(0), jnp.int32(0)
    grad = jax.grad(lambda params, batch: stage.loss(params, (), (), batch, key, step)[0])
    flat = lambda params, batch: jnp.concatenate([g.ravel() for g in jax.tree.leaves(grad(params, batch))])  # noqa: E731
    return flat, params, (batch,)


def _examples(weights: Path, stage: DiffusionModel, side: int) -> dict[str, np.ndarray]:
    """Two images of `shapes` and their captions. For pure noise a trained network's output is nearly 0, which makes the
    relative error meaningless."""
    scenes = [scene("train", index) for index in range(2)]
    batch = {"image": np.stack([draw(each, side) for each in scenes]).astype(np.float32) / 127.5 - 1.0}
    if stage.text is not None:
        encoder = t5.load_text_encoder(weights / "text", stage.text.shape[0])
        embedded = encoder.encode([caption(each, "train", index).text for index, each in enumerate(scenes)])
        batch |= {"text": np.asarray(embedded.tokens), "text_mask": np.asarray(embedded.mask)}
    return batch


def _stage(stage: DiffusionModel, params: Any, batch: dict[str, np.ndarray], dtype: str):
    """One evaluation of two images at different times."""
    stage = executed(stage, dtype=dtype)
    image, t = batch["image"], np.array([0.3, 0.8], np.float32)
    noise = np.random.default_rng(1).standard_normal(image.shape, np.float32)
    x = np.asarray(noised(image, noise, stage.schedule.alpha(t), stage.schedule.sigma(t)))
    given = Conditioning()
    if stage.text is not None:
        given = given._replace(tokens=batch["text"], token_mask=batch["text_mask"].astype(bool))
    if stage.low_res is not None:
        given = given._replace(concat=image, aug_level=np.array([0.1, 0.3], np.float32))
    inputs = x, np.asarray(stage.schedule.network_time(t)), given
    return lambda params, *inputs: stage.unet.module().apply({"params": params}, *inputs), params, inputs


def _t5(weights: Path, dtype: str):
    encoder = t5.load_text_encoder(weights / "text", 24, dtype)
    ids = np.random.default_rng(0).integers(1, encoder.config.vocab, (4, 24)).astype(np.int32)
    mask = np.arange(24) < np.array([[3], [11], [24], [17]])
    # Masked tokens are never read.
    apply = lambda p, i, m: jnp.where(m[..., None], T5Encoder(encoder.config).apply({"params": p}, i, m), 0)  # noqa: E731
    return apply, encoder.params, (ids, mask)


def _clip(weights: Path, dtype: str):
    config, params = clip.load(SHIPPED / "clip", dtype)
    rng = np.random.default_rng(0)
    ids = rng.integers(1, config.text.vocab, (4, config.text.length)).astype(np.int32)
    ids[:, -1] = config.text.eos_id if config.text.eos_id is not None else config.text.vocab - 1
    image = np.tanh(rng.standard_normal((4, config.image.resolution, config.image.resolution, 3), np.float32))

    def embed(params: Any, ids: Any, image: Any) -> Any:
        towers = CLIP(config)
        text = towers.apply({"params": params}, ids, method="embed_text").embedding
        return text, towers.apply({"params": params}, image, method="embed_image").embedding

    return embed, params, (ids, image)


def _classifier(weights: Path, dtype: str):
    _, config, params = classifier.load(SHIPPED / "classifier")
    image = np.tanh(np.random.default_rng(0).standard_normal((4, config.side, config.side, 3), np.float32))
    cast = lambda tree: jax.tree.map(lambda leaf: leaf.astype(dtype), tree)  # noqa: E731
    return lambda params, image: Classifier(config).apply({"params": cast(params)}, cast(image))[0], params, (image,)


def _inception(weights: Path, dtype: str):
    shape = (1, SIDE, SIDE, 3)
    shapes = jax.eval_shape(Inception().init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))
    image = np.tanh(np.random.default_rng(0).standard_normal(shape, np.float32))
    cast = lambda tree: jax.tree.map(lambda leaf: leaf.astype(dtype), tree)  # noqa: E731
    apply = lambda variables, image: Inception().apply(cast(variables), cast(image)).features  # noqa: E731
    return apply, random_params(shapes), (image,)


_NARROW = {
    "channels": 64,
    "multipliers": (1, 2, 3),
    "blocks": (1, 2, 2),
    "conditioning": ConditioningConfig(256, MaskedText(128)),
}
_TEXT = TextConditioner(width=96, length=77)
_PAPER_BASE = DiffusionModel(
    UNetConfig(attention=AttentionConfig((False, True, True), (False, False, False)), **_NARROW), conditioners=(_TEXT,)
)
_PAPER_SR = DiffusionModel(
    EfficientUNetConfig(
        attention=AttentionConfig((False, False, True), (False, True, False), heads=8, feed_forward=2), **_NARROW
    ),
    side=256,
    conditioners=(_TEXT, LowResConditioner()),
)


def _small_if(stage: DiffusionModel) -> DiffusionModel:
    """The layout of a stage of DeepFloyd IF with narrow levels."""
    conditioning = replace(stage.unet.conditioning, width=256, text=WholeText(256, pool_heads=8))
    return replace(stage, unet=replace(stage.unet, channels=64, conditioning=conditioning)).reading(77, 128)


NETWORKS: dict[str, Build] = {
    "base64, shipped": _shipped_stage("base64", 64),
    "sr256, shipped": _shipped_stage("sr256", 128),
    "base64, shipped: gradient": _shipped_gradient("base64"),
    "U-Net of the paper, narrow, 77 tokens": _random_stage(_PAPER_BASE, 32),
    "Efficient U-Net of the paper, narrow, 77 tokens": _random_stage(_PAPER_SR, 64),
    "DeepFloyd IF-I, narrow": _random_stage(_small_if(IF_I_M), 32),
    "DeepFloyd IF-I, narrow: gradient": _random_gradient(replace(_small_if(IF_I_M), side=32)),
    "DeepFloyd IF-II, narrow": _random_stage(_small_if(IF_II_M), 64),
    "T5 encoder, shipped": _t5,
    "CLIP, shipped": _clip,
    "classifier, shipped": _classifier,
    "Inception, random": _inception,
}
