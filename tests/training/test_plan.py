"""Plans: rates and rooflines in closed form, counts against the compiler's own, TPU slices described without one."""

import importlib.util
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from small import SR

from jaxdiff.nets.placement import Axes
from jaxdiff.training import chips, plan
from jaxdiff.training.mesh import check_processes, make_mesh
from jaxdiff.training.optimizer import OptimizerConfig
from jaxdiff.training.plan import Costs, estimated_costs, roofline
from jaxdiff.training.state import abstract_state

LIBTPU = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


def test_a_roofline_is_three_divisions():
    moved = {"all-gather": {"count": 2, "bytes": 3e9}, "all-reduce": {"count": 1, "bytes": 3e9}}
    costs = Costs(0, 0, 0, flops=4.59e12, bytes_accessed=2.765e9, collectives=moved, seconds=0.02)
    slice_of = lambda chip, *shape: chips.Topology(chip, shape)  # noqa: E731
    found = roofline(costs, slice_of(chips.V5P, 4, 8, 8))
    assert (found.compute, found.memory, found.interconnect) == pytest.approx((0.01, 0.001, 0.01))
    assert (found.overlapped, found.serial) == pytest.approx((0.01, 0.021))
    assert (found.share_overlapped, found.share_serial) == pytest.approx((1.0, 10 / 21))
    assert found.share_compiler == pytest.approx(0.5)
    # A device of tpu7x is half a chip.
    half, whole = (roofline(costs, slice_of(chip, 4, 4, 4)) for chip in (chips.TPU7X, replace(chips.TPU7X, devices=1)))
    assert half.overlapped == pytest.approx(2 * whole.overlapped)
    assert roofline(replace(costs, seconds=None), slice_of(chips.V5P, 4, 4, 4)).share_compiler is None


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("v4:4x8x8", 1),
        ("v4:2x2x1", 2 / 6),
        ("v4:2x2x4", 3 / 6),
        ("v5e:16x16", 1),
        ("v5e:8x16", 3 / 4),
        ("v5e:2x2", 2 / 4),
    ],
)
def test_a_chip_hears_from_the_links_that_its_slice_has(text, share):
    topology = chips.parse(text)
    assert topology.interconnect == pytest.approx(share * topology.chip.interconnect)
    assert chips.parse("h100:8").interconnect == chips.H100.interconnect


@pytest.mark.parametrize("text", ["v5e:16x16", "v4:4x8x8", "tpu7x:4x4x4", "h100:8"])
def test_topologies_are_read_as_they_are_written(text):
    topology = chips.parse(text)
    assert str(topology) == text
    assert topology.devices == topology.chips * (2 if text.startswith("tpu7x") else 1)
    assert topology.is_tpu == (not text.startswith("h100"))


@pytest.mark.parametrize("text", ["v5e", "v5e:4", "v5p:16x16", "v5litepod-256", "h100:2x4", "v9:2x2", "v5e:0x4", ""])
def test_other_topologies_are_refused(text):
    with pytest.raises(ValueError, match=r"topology .*: write the chip and its shape"):
        chips.parse(text)


def test_flops_by_shapes_are_those_that_the_compiler_counts():
    params = jax.eval_shape(SR.init, jax.random.key(0))
    given = params, SR.batch(4, 16), jax.eval_shape(lambda: jax.random.key(0))
    gradient = jax.grad(SR.loss, has_aux=True)
    flops, moved = plan._counted(jax.make_jaxpr(gradient)(*given).jaxpr)
    compiled = jax.jit(gradient).lower(*given).cost_analysis()
    # The compiler counts norms and activations too, and leaves out what a convolution reads beyond the border.
    assert 0.7 < flops / compiled["flops"] < 1.3
    assert moved > 4 * 4 * 16 * 16 * 3


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
    params, key = jax.eval_shape(SR.init, jax.random.key(0)), jax.eval_shape(lambda: jax.random.key(0))
    size = sum(leaf.size * 4 for leaf in jax.tree.leaves(params))

    def of(rows, remat="none", **options):
        stage = replace(SR, unet=replace(SR.unet, remat=remat, axes=Axes()))
        return estimated_costs(stage.loss, state, params, stage.batch(rows, 16), key, parts=4, copies=2, **options)

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
def test_a_topology_that_libtpu_refuses():
    with pytest.raises(OSError, match=r"cannot describe v5e:3x5"):
        chips.described(chips.parse("v5e:3x5"))
