"""Plans: rates and rooflines in closed form, counts against the compiler's own, TPU slices described without one."""

import importlib.util
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import SR, executed

from jaxdiff.training import chips, plan
from jaxdiff.training.mesh import check_processes, make_mesh
from jaxdiff.training.optimizer import OptimizerConfig
from jaxdiff.training.plan import Costs, estimated_costs, roofline
from jaxdiff.training.state import abstract_state, loss_inputs

LIBTPU = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


def test_a_roofline_is_three_divisions():
    moved = {"all-gather": {"count": 2, "bytes": 3e9}, "all-reduce": {"count": 1, "bytes": 3e9}}
    costs = Costs(0, 0, 0, flops=4.59e12, bytes_accessed=2.765e9, collectives=moved, seconds=0.02)
    costs = replace(costs, cycles={"dot": chips.V5P.clock * 0.03})
    v5p, useful = chips.parse("v5p:4x8x8"), 256 * 0.9 * 4.59e12
    found = roofline(costs, v5p, useful, {"data": 2, "fsdp": 4})
    # Gathers by 4 links of 100 GB/s; whether the sum is by them, too, or by the other 2 is not known.
    assert (found.compute, found.memory, found.fastest) == pytest.approx((0.01, 0.001, 3 / 400 + 3 / 400))
    assert found.slowest == pytest.approx(3 / 400 + 3 / 200)
    assert (found.overlapped, found.serial) == pytest.approx((0.015, 0.011 + 0.0225))
    assert (found.estimate, found.cycles, found.cycles_serial) == pytest.approx((0.02, 0.03, 0.03 + 0.0225))
    assert (found.optimistic, found.pessimistic) == pytest.approx((0.03, 0.0525))
    assert found.share(found.optimistic) == pytest.approx(0.9 * 0.01 / 0.03)
    # All cycles, where they are known, and not only the largest kinds.
    assert roofline(replace(costs, total_cycles=chips.V5P.clock), v5p, useful, {"fsdp": 4}).cycles == pytest.approx(1)
    without = roofline(replace(costs, seconds=None, cycles={}), v5p, useful, {"fsdp": 4})
    assert (without.estimate, without.cycles, without.cycles_serial) == (None, None, None)
    assert without.optimistic == without.overlapped and without.pessimistic == without.serial
    # A device of tpu7x is half a chip, and its clock is not known.
    pods = (chips.Topology(chip, (4, 4, 4)) for chip in (chips.TPU7X, replace(chips.TPU7X, devices=1)))
    half, whole = (roofline(costs, pod, 64e12 * pod.chip.devices, {"fsdp": 6}) for pod in pods)
    assert half.serial == pytest.approx(2 * whole.serial) and half.cycles is None
    assert half.share(half.serial) == pytest.approx(whole.share(whole.serial))
    # A switch has no axes.
    gpus = roofline(costs, chips.parse("h100:8"), 8e12, {})
    assert gpus.fastest == gpus.slowest == pytest.approx(6 / 450)


def test_no_link_is_used_inside_of_a_chip():
    costs = Costs(0, 0, 0, 1.0, 1.0, {"all-reduce": {"count": 1, "bytes": 6e9}})
    found = roofline(costs, chips.parse("tpu7x:2x2x1"), 1.0, {"data": 0, "fsdp": 2})
    assert found.fastest == found.slowest == pytest.approx(6e9 * 2 / 200e9)
    assert roofline(costs, chips.parse("tpu7x:1x1x1"), 1.0, {"data": 0}).slowest == 0


def test_clocks_follow_from_what_is_published():
    clocks = {chip.name: chip.clock and round(chip.clock / 1e9, 2) for chip in chips.TPUS}
    assert clocks == {"v4": 1.05, "v5e": 1.5, "v5p": 1.75, "v6e": None, "tpu7x": None}


@pytest.mark.parametrize(
    ("text", "places", "links"),
    [
        ("v5p:4x8x8", [(x, y, 0) for x in range(4) for y in range(8)], 4),  # two whole rings
        ("v5p:4x8x8", [(0, 0, z) for z in range(8)], 2),
        ("v5p:4x8x8", [(0, 0, z) for z in range(4)], 1),  # half of one
        ("v5p:4x4x4", [(0, 0, 0), (0, 0, 2)], 1),  # two groups on one ring
        ("v5e:16x16", [(0, y) for y in range(0, 16, 2)], 1),
        ("v5e:16x16", [(x, y) for x in range(16) for y in range(2)], 3),
        ("v5e:8x16", [(x, y) for x in range(8) for y in range(16)], 3),  # 8 is not closed
        ("v5e:4x8", [(0, 0), (0, 4)], 1 / 4),
        ("v5e:2x2", [(0, 0), (1, 1)], 1),  # across
        ("v4:2x2x1", [(x, y, 0) for x in range(2) for y in range(2)], 2),
        ("tpu7x:2x2x1", [(0, 0, 0), (0, 0, 0)], 0),  # the halves of a chip
    ],
)
def test_links_along_the_axes_of_a_group(text, places, links):
    topology = chips.parse(text)
    assert chips.links_of(np.array([places]), topology) == pytest.approx(links)
    least = np.array([places, [places[0]] * len(places)])
    assert chips.links_of(least, topology) == 0  # the group with the fewest links counts


@pytest.mark.parametrize("text", ["v5e:16x16", "v4:4x8x8", "tpu7x:4x4x4", "h100:8"])
def test_topologies_are_read_as_they_are_written(text):
    topology = chips.parse(text)
    assert str(topology) == text
    assert topology.devices == topology.chips * (2 if text.startswith("tpu7x") else 1)
    assert topology.is_tpu == (not text.startswith("h100"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5p:100x100x100", "1,000,000 chips, and the largest slice of v5p has 8,960"),
        ("v4:16x16x20", "5,120 chips, and the largest slice of v4 has 4,096"),
        ("tpu7x:16x24x28", "10,752 chips, and the largest slice of tpu7x has 9,216"),
        ("v5e:16x17", "272 chips, and the largest slice of v5e has 256"),
        ("v6e:1x256", "sides of v6e are at most 16"),
        ("v5p:1x1x4096", "sides of v5p are 1, 2 or 4, or all of them multiples of 4"),
        ("v4:3x4x4", "sides of v4 are 1, 2 or 4"),
    ],
)
def test_slices_that_do_not_exist_are_refused(text, message):
    with pytest.raises(ValueError, match=rf"topology '{text}': {message}"):
        chips.parse(text)


def test_the_largest_slices_are_not_refused():
    for text in ("v4:16x16x16", "v5e:16x16", "v5p:16x20x28", "v6e:16x16", "tpu7x:16x24x24"):
        topology = chips.parse(text)
        assert topology.chips == topology.chip.largest


def test_no_slices_are_refused():
    for slices in (0, -1):
        with pytest.raises(ValueError, match=f"{slices} slices of v5e:2x2: at least 1"):
            chips.described(chips.parse("v5e:2x2"), slices)


@pytest.mark.parametrize("text", ["v5e", "v5e:4", "v5p:16x16", "v5litepod-256", "h100:2x4", "v9:2x2", "v5e:0x4", ""])
def test_other_topologies_are_refused(text):
    with pytest.raises(ValueError, match=r"topology .*: write the chip and its shape"):
        chips.parse(text)


def test_flops_by_shapes_are_those_that_the_compiler_counts():
    given = loss_inputs(SR, SR.batch_spec(4, 16))
    gradient = jax.grad(SR.loss, has_aux=True)
    flops, moved = plan._counted(jax.make_jaxpr(gradient)(*given).jaxpr)
    compiled = jax.jit(gradient).lower(*given).cost_analysis()
    # The compiler counts norms and activations too.
    assert 0.7 < flops / compiled["flops"] < 1
    assert moved > 4 * 4 * 16 * 16 * 3


@pytest.mark.parametrize(
    ("left", "right", "options"),
    [
        ((2, 9, 8, 3), (3, 3, 3, 5), {"padding": "SAME"}),
        ((2, 9, 8, 3), (3, 3, 3, 5), {"padding": "SAME", "window_strides": (2, 2)}),
        ((2, 9, 8, 3), (2, 3, 3, 5), {"padding": [(2, 0), (1, 3)], "rhs_dilation": (1, 2)}),
        ((2, 5, 4, 3), (3, 3, 3, 5), {"padding": [(1, 2), (1, 2)], "lhs_dilation": (2, 2)}),
        ((2, 9, 8, 6), (3, 3, 3, 4), {"padding": "SAME", "feature_group_count": 2}),
    ],
)
def test_convolutions_count_no_borders(left, right, options):
    """As XLA's own count has it."""
    options = {"window_strides": (1, 1)} | options | {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    shapes = jax.ShapeDtypeStruct(left, jnp.float32), jax.ShapeDtypeStruct(right, jnp.float32)

    def convolve(x, k):
        return jax.lax.conv_general_dilated(x, k, **options)

    assert plan.network_flops(convolve, *shapes) == jax.jit(convolve).lower(*shapes).cost_analysis()["flops"]


def test_what_is_computed_again_is_not_useful():
    """The loss three times is the gradient, and remat, loops and placement change nothing of the network."""
    shapes = loss_inputs(SR, SR.batch_spec(4, 16))
    once = plan.network_flops(SR.loss, *shapes)
    backward = lambda stage: jax.grad(lambda *given: stage.loss(*given)[0])  # noqa: E731
    assert plan.network_flops(backward(SR), *shapes) == pytest.approx(3 * once, rel=0.1)
    again = replace(SR, unet=executed(SR.unet, remat="blocks"))
    assert plan.network_flops(again.loss, *shapes) == once
    assert plan.network_flops(backward(again), *shapes) > 1.1 * plan.network_flops(backward(SR), *shapes)


def test_loops_and_recomputation_are_counted_by_shapes_too():
    def chain(kernels, x):
        return jax.lax.scan(jax.checkpoint(lambda x, k: (jnp.sin(x @ k), None)), x, kernels)[0].sum()

    shapes = jax.ShapeDtypeStruct((5, 16, 16), jnp.float32), jax.ShapeDtypeStruct((8, 16), jnp.float32)
    once = 2 * 8 * 16 * 16
    assert plan._counted(jax.make_jaxpr(chain)(*shapes).jaxpr)[0] == 5 * once
    # Forward, again in the backward pass, and the gradients of the kernel and of what it multiplies.
    assert plan._counted(jax.make_jaxpr(jax.grad(chain))(*shapes).jaxpr)[0] == 5 * 4 * once


def test_an_estimate_counts_what_is_kept_for_the_backward_pass():
    mesh = make_mesh(data=2, fsdp=4)
    state = abstract_state(SR, OptimizerConfig(), mesh)
    size = sum(leaf.size * 4 for leaf in jax.tree.leaves(state.params))

    def of(rows, remat="none", **options):
        stage = replace(SR, unet=executed(SR.unet, remat=remat))
        return estimated_costs(stage, state, stage.batch_spec(rows, 16), **options)

    small, large = of(2), of(8)
    assert large.flops == pytest.approx(4 * small.flops, rel=0.05)
    assert 2 * size < small.temporary_bytes < large.temporary_bytes < 4 * small.temporary_bytes
    assert of(8, "blocks").temporary_bytes < of(8, "outputs").temporary_bytes < large.temporary_bytes
    assert of(8, "blocks").flops > large.flops
    assert large.collectives["all-gather"]["bytes"] == pytest.approx(size * 3 / 4)
    assert large.collectives["all-reduce"]["bytes"] == pytest.approx(size / 4)
    parts = of(2, accumulate=4)
    assert parts.flops == pytest.approx(large.flops, rel=0.05) and parts.temporary_bytes == small.temporary_bytes
    assert parts.collectives["all-gather"]["bytes"] == pytest.approx(4 * size * 3 / 4)
    assert large.peak_bytes == large.argument_bytes + large.temporary_bytes


@LIBTPU
@pytest.mark.parametrize(("text", "slices"), [("v5e:4x4", 1), ("v4:2x2x1", 1), ("tpu7x:2x2x1", 1), ("v5e:2x4", 2)])
def test_slices_are_described_without_a_tpu(text, slices):
    topology = chips.parse(text)
    devices = chips.described(topology, slices)
    assert len(devices) == slices * topology.devices
    mesh = make_mesh(data=2, fsdp=-1, devices=devices)
    assert dict(mesh.shape) == {"data": 2, "fsdp": len(devices) // 2, "tensor": 1}
    if slices == 2:  # copies lie in different slices, so that parameters are gathered inside one
        assert [{device.slice_index for device in copy.flat} for copy in mesh.devices] == [{0}, {1}]
        assert len({device.slice_index for device in make_mesh(data=1, fsdp=16, devices=devices).devices.flat}) == 2
        with pytest.raises(ValueError, match="does not fit 2 slices"):
            make_mesh(data=1, fsdp=1, tensor=16, devices=devices)


@LIBTPU
@pytest.mark.parametrize(
    ("text", "slices", "sizes"),
    [("v5e:4x4", 1, (4, 1, 4)), ("v5p:4x4x4", 1, (4, 4, 4)), ("tpu7x:2x2x2", 1, (2, 1, 8)), ("v5e:4x4", 2, (2, 4, 4))],
)
def test_what_one_process_reads_is_computed_by_it(text, slices, sizes):
    """A host has four chips; `tensor` along an axis of the torus would leave it."""
    mesh = make_mesh(*sizes, devices=chips.described(chips.parse(text), slices))
    assert len({device.id for device in mesh.devices.flat}) == mesh.size
    groups = mesh.devices.reshape(-1, sizes[-1])
    assert {len({device.process_index for device in group}) for group in groups} == {1}
    check_processes(mesh)


@LIBTPU
def test_layers_split_over_processes_are_refused():
    with pytest.raises(ValueError, match=r"tensor=16 does not divide the \d+ devices of a process"):
        check_processes(make_mesh(tensor=16, devices=chips.described(chips.parse("v5e:4x4"))))


@LIBTPU
@pytest.mark.parametrize(
    ("text", "sizes", "links"),
    [
        ("v5p:4x8x8", (8, 32, 1), [2, 4, 0]),
        ("v5e:16x16", (8, 32, 1), [1, 3, 0]),
        ("tpu7x:4x4x4", (2, 64, 1), [0, 6, 0]),
    ],
)
def test_links_of_the_axes_of_a_mesh(text, sizes, links):
    topology = chips.parse(text)
    assert chips.links(make_mesh(*sizes, devices=chips.described(topology)).devices, topology) == links


@LIBTPU
def test_a_topology_that_libtpu_refuses():
    with pytest.raises(OSError, match=r"cannot describe v5e:3x5"):
        chips.described(chips.parse("v5e:3x5"))
