"""GPUs that are not here: their figures against one another, their description, and the compiler that may be missing.

The compiler itself is tried where it is installed (`pytest -m slow`, with `.[cuda]`).
"""

import importlib
import importlib.util
import math
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxdiff.nets.attention import attention
from jaxdiff.training import chips, gpu_targets
from jaxdiff.training.compilation_cache import without_compilation_cache
from jaxdiff.training.mesh import make_mesh
from jaxdiff.training.plan import compiled_costs, roofline

CARDS = {chip.name: chip for chip in chips.GPUS}


def fields(text):
    """Names and values of a description that is one level deep, the capability's with it."""
    assert text.count("{") == text.count("}") == 2
    return dict(re.findall(r'(\w+): ("[^"]*"|[\w.]+)', text))


def described(chip):
    return fields(gpu_targets.target_text(chip.card, chip.memory, chip.bandwidth))


@pytest.mark.parametrize("name", CARDS)
def test_the_peak_follows_from_the_card(name):
    """SMs × FLOPs of each in a cycle × clock: the boost clock, but on Hopper and Blackwell a lower one, 1.83 and
    about 1.86 GHz."""
    chip = CARDS[name]
    card = chip.card
    clock = {9: 1.83, 10: 1.86}.get(card.capability[0], card.clock)
    assert chip.peak == pytest.approx(card.sms * card.tensor * clock * 1e9, rel=0.01)


@pytest.mark.parametrize("name", CARDS)
def test_a_description_has_all_that_the_compiler_needs(name):
    """Without some of them the compiler divides by zero and the process is gone."""
    chip, found = CARDS[name], described(CARDS[name])
    assert (found["threads_per_warp"], found["block_dim_limit_x"]) == ("32", "2147483647")
    numbers = {key: float(value) for key, value in found.items() if value[0].isdigit()}
    assert len(numbers) == 22 and all(value > 0 for key, value in numbers.items() if key != "minor")
    assert (numbers["device_memory_size"], numbers["memory_bandwidth"]) == (chip.memory, chip.bandwidth)
    assert (numbers["major"], numbers["minor"]) == chip.card.capability
    assert found["feature_extension"] == ("ACCELERATED_FEATURES" if numbers["major"] >= 9 else "NONE")
    assert found["device_description_str"] == f'"{chip.card.name}"' and found["platform_name"] == '"CUDA"'
    assert numbers["shared_memory_per_core"] - numbers["shared_memory_per_block_optin"] == 1024
    # A whole block's threads and registers fit into an SM.
    assert numbers["threads_per_block_limit"] <= numbers["threads_per_core_limit"]
    # What JAX calls the card is found among the published peaks.
    assert next(peak for part, peak in chips.PEAK_TFLOPS.items() if part in chip.card.name) * 1e12 == chip.peak


def test_two_cards_differ_in_what_is_said_of_them():
    texts = {gpu_targets.target_text(chip.card, chip.memory, chip.bandwidth) for chip in chips.GPUS}
    assert len(texts) == len(chips.GPUS) == 7


@pytest.mark.parametrize("text", ["h100:8", "h200:8", "b200:8", "a100:8", "l4:1", "rtx4090:1", "rtx3090:2"])
def test_topologies_of_gpus(text):
    topology = chips.parse(text)
    assert str(topology) == text and not topology.is_tpu
    assert topology.devices == topology.chips == int(text.rpartition(":")[2])


@pytest.mark.parametrize("text", ["rtx4090", "rtx4090:0", "rtx4090:2x2", "rtx5090:1"])
def test_other_gpus_are_refused(text):
    with pytest.raises(ValueError, match=r"write the chip and its shape.*rtx4090, rtx3090"):
        chips.parse(text)
    with pytest.raises(ValueError, match="plans for GPUs are of one host, which has at most 8"):
        chips.parse("l4:16")


def test_without_the_compiler_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for text, extra in (("rtx4090:1", "cuda"), ("v5e:2x2", "tpu")):
        reason = chips.missing_compiler(chips.parse(text))
        assert f"compiler is not installed: pip install -e '.[{extra}]'" in reason and "\n" not in reason
    with pytest.raises(OSError, match=r"CUDA compiler is not installed: pip install -e '\.\[cuda\]'"):
        chips.described(chips.parse("rtx4090:1"))


def test_a_compiler_that_refuses_is_one_line(monkeypatch):
    def refuse(*args, **options):
        raise RuntimeError("INVALID_ARGUMENT: no such field\nsecond line")

    monkeypatch.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", refuse)
    assert chips.missing_compiler(chips.parse("h100:8")) is None
    with pytest.raises(OSError) as error:
        chips.described(chips.parse("h100:8"))
    assert str(error.value).endswith("no GPUs here: INVALID_ARGUMENT: no such field") and "\n" not in str(error.value)


def test_a_plugin_that_jax_has_left_aside_is_told_again(monkeypatch):
    """Without a driver the plugin's first start fails where JAX was used before."""
    calls = []

    def describe(*args, **options):
        calls.append("describe")
        if "initialize" not in calls:
            raise NotImplementedError("topology not implemented for cuda")
        return type("Topology", (), {"devices": ["a"]})

    plugin = type("Plugin", (), {"initialize": lambda: calls.append("initialize")})
    monkeypatch.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", describe)
    monkeypatch.setattr(importlib, "import_module", {"jax_plugins.xla_cuda13": plugin}.__getitem__)
    assert chips.described(chips.parse("l4:1")) == ["a"]
    assert calls == ["describe", "initialize", "describe"]


def test_gpus_have_no_slices():
    with pytest.raises(ValueError, match="2 slices of h100:8: GPUs are planned for on one host"):
        chips.described(chips.parse("h100:8"), slices=2)


def test_what_the_compiler_is_asked_for(monkeypatch):
    asked = {}

    def answer(name, platform, **options):
        asked.update(options, name=name, platform=platform)
        return type("Topology", (), {"devices": ["a", "b"]})

    monkeypatch.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "")
    monkeypatch.delenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [])  # no card is here
    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", answer)
    assert chips.described(chips.parse("l4:2")) == ["a", "b"]
    assert os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] == "1"
    assert (asked["name"], asked["platform"], asked["topology"]) == ("", "cuda", "1x1x2")
    assert fields(asked["target_config"]) == described(chips.L4)


def test_tpus_are_compiled_for_without_options():
    assert chips.compiler_options(chips.parse("v5e:2x2")) == {} != chips.compiler_options(chips.parse("h100:8"))


def step(x, k, w, q, kv):
    """Gradients of a convolution, a matrix product and an attention, at shapes that stand in `FLOPS`."""

    def loss(x, k, w, q, kv):
        y = jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        y = jnp.tanh(y) @ w
        return (y.astype(jnp.float32) ** 2).sum() + (attention(q, kv, kv).astype(jnp.float32) ** 2).sum()

    return jax.grad(loss, argnums=(0, 1, 2, 3, 4))(x, k, w, q, kv)


SHAPES = (8, 32, 32, 64), (3, 3, 64, 96), (96, 128), (8, 64, 4, 64), (8, 78, 4, 64)
FLOPS = 3 * 2 * 8 * 32 * 32 * 9 * 64 * 96 + 3 * 2 * 8192 * 96 * 128 + 7 * 2 * 8 * 64 * 4 * 64 * 78


@pytest.mark.slow
def test_products_that_the_compilers_own_kernels_refuse():
    """The enlargement of super-resolution's input is a product of 24,576 rows by 64 columns, in float32."""
    pytest.importorskip("jax_cuda13_plugin")
    topology = chips.parse("rtx4090:1")
    mesh = make_mesh(devices=chips.described(topology))
    whole = NamedSharding(mesh, PartitionSpec())
    images = jax.ShapeDtypeStruct((32, 64, 64, 3), jnp.float32, sharding=whole)
    enlarged = jax.jit(lambda x: jax.image.resize(x, (32, 256, 256, 3), "cubic"))
    with jax.set_mesh(mesh), without_compilation_cache():
        compiled = enlarged.lower(images).compile(compiler_options=chips.compiler_options(topology))
    found = compiled_costs(compiled, 1)
    assert found.flops == pytest.approx(2 * 32 * 3 * 256 * 64 * (64 + 256))


@pytest.mark.slow
@pytest.mark.parametrize("text", ["h100:1", "rtx4090:1", "l4:2", "rtx3090:1", "a100:1", "h200:1", "b200:1"])
def test_a_program_is_compiled_for_a_gpu_that_is_not_there(text):
    """By the CUDA compiler, where it is installed: cuDNN's attention is in it, and its counts and sizes are right."""
    pytest.importorskip("jax_cuda13_plugin")
    topology = chips.parse(text)
    mesh = make_mesh(devices=chips.described(topology))
    split = [NamedSharding(mesh, PartitionSpec("data") if i in (0, 3, 4) else PartitionSpec()) for i in range(5)]
    given = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place) for shape, place in zip(SHAPES, split)]
    with jax.set_mesh(mesh), without_compilation_cache():
        compiled = jax.jit(step).lower(*given).compile(compiler_options=chips.compiler_options(topology))
    assert jax.default_backend() == "cpu"
    program = compiled.as_text()
    assert "__cudnn$fmhaSoftmax" in program and "__cudnn$fmhaSoftmaxBackward" in program
    costs = compiled_costs(compiled, topology.devices)
    assert costs.flops == pytest.approx(FLOPS / topology.devices)
    sizes = [math.prod(shape) * 2 / (topology.devices if i in (0, 3, 4) else 1) for i, shape in enumerate(SHAPES)]
    assert costs.argument_bytes == pytest.approx(sum(sizes), rel=0.01)
    workspace = 4 * 2**20  # of cuBLAS, which the compiler knows
    assert 2 * costs.argument_bytes + workspace < costs.peak_bytes < 8 * costs.argument_bytes + workspace
    assert costs.bytes_accessed > 3 * costs.argument_bytes
    assert ("all-reduce" in costs.collectives) == (topology.devices > 1)
    assert roofline(costs, topology, float(FLOPS), {}).serial > 0
