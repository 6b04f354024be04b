"""GPU report: the U-Net of DeepFloyd IF-I-M in diffusers, eager and compiled, and in jaxdiff, on the same card.

bfloat16, random parameters. `forward` is one evaluation in sampling; `gradient` is the gradient of the mean square of
the output, without an optimizer.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.recipes.gpu_section import Context, median_seconds
from jaxdiff.models.diffusion import DiffusionModel, executed
from jaxdiff.nets.conditioning import Conditioning, WholeText
from jaxdiff.nets.unet import AttentionConfig, ConditioningConfig, UNetConfig
from jaxdiff.systems.deepfloyd import IF_I_M, T5_XXL
from jaxdiff.weights.deepfloyd import Network, described

BATCH = 16


def main(context: Context) -> None:
    """Measure ours, then diffusers' eager and compiled network."""
    stage, batch, runs = executed(IF_I_M.reading(*T5_XXL), dtype="bfloat16"), BATCH, 20
    if context.tiny:
        stage, batch, runs = replace(IF_I_M, unet=_small(IF_I_M.unet), side=8).reading(T5_XXL[0], 32), 2, 2
    config, inputs = stage.unet, _inputs(stage, batch)
    # The values do not matter, but zeros would be faster than trained parameters.
    shapes = jax.eval_shape(stage.init, jax.random.key(0))[0]
    context.attempt("jaxdiff", partial(_ours, context, config, shapes, inputs, runs))
    network = Network(config, inputs[2].shape[-1], low_res=False)
    context.attempt("diffusers", partial(_diffusers, context, network, shapes, inputs, runs))


def _small(unet: UNetConfig) -> UNetConfig:
    """The same topology in a small size, for --tiny."""
    return replace(
        unet,
        channels=32,
        multipliers=(1, 2),
        blocks=(1, 1),
        attention=AttentionConfig((False, True), (False, False), head_channels=32, group_text=True),
        conditioning=ConditioningConfig(64, WholeText(64, pool_heads=4), frequencies=32),
    )


def _inputs(stage: DiffusionModel, batch: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    image = rng.standard_normal((batch, stage.side, stage.side, 3), np.float32)
    text = rng.standard_normal((batch, *stage.text.shape), np.float32)
    return image, np.full(batch, 500.0, np.float32), text


def _ours(context: Context, config: UNetConfig, shapes: Any, inputs: tuple, runs: int) -> None:
    image, time_, text = jax.device_put(inputs)
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.02, 1 << 16).astype(np.float32)
    cast = lambda leaf: jnp.bfloat16 if leaf.ndim > 1 and config.execution.dtype == "bfloat16" else jnp.float32  # noqa: E731
    params = jax.tree.map(lambda leaf: jax.device_put(np.resize(noise, leaf.shape).astype(cast(leaf))), shapes)

    def forward(params: Any) -> jax.Array:
        return config.module().apply({"params": params}, image, time_, Conditioning(tokens=text))

    step = jax.jit(jax.grad(lambda params: jnp.mean(jnp.square(forward(params)))))
    for what, function in (("forward", jax.jit(forward)), ("gradient", step)):
        begun = time.perf_counter()
        jax.block_until_ready(function(params))
        first = time.perf_counter() - begun
        seconds = median_seconds(partial(function, params), runs)
        _record(context, f"jaxdiff, jax {jax.__version__}", what, image.shape, seconds, first)


def _diffusers(context: Context, ours: Network, shapes: Any, inputs: tuple, runs: int) -> None:
    import diffusers
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if ours.unet.execution.dtype == "bfloat16" else torch.float32
    settings = {k: v for k, v in described(ours, shapes).items() if not k.startswith("_")}
    network = diffusers.UNet2DConditionModel.from_config(settings).to(device, dtype)
    image, time_, text = (torch.from_numpy(a).to(device, dtype) for a in inputs)
    image = image.permute(0, 3, 1, 2).contiguous()

    def timed(call: Callable[[], Any], name: str, what: str) -> None:
        def once() -> float:
            begun = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - begun

        first = once()
        seconds = statistics.median([once() for _ in range(runs + 2)][2:])
        version = f"diffusers {diffusers.__version__} {name}, torch {torch.__version__}"
        _record(context, version, what, inputs[0].shape, seconds, first)

    def forward(network: Any) -> Any:
        with torch.inference_mode():
            return network(image, time_, encoder_hidden_states=text).sample

    def gradient(network: Any) -> None:
        network(image, time_, encoder_hidden_states=text).sample.square().mean().backward()
        network.zero_grad(set_to_none=True)

    timed(partial(forward, network), "eager", "forward")
    timed(partial(gradient, network), "eager", "gradient")
    compiled = torch.compile(network, backend="eager" if context.tiny else "inductor")
    for what, call in (("forward", forward), ("gradient", gradient)):
        context.attempt(f"diffusers compiled {what}", partial(timed, partial(call, compiled), "compiled", what))


def _record(context: Context, name: str, what: str, shape: tuple, seconds: float, first: float) -> None:
    context.record(
        network=f"IF-I-M, {name}",
        what=what,
        batch=f"{shape[0]} × {shape[1]}²",
        ms=1e3 * seconds,
        images_per_second=shape[0] / seconds,
        first_call_s=round(first, 1),
    )
