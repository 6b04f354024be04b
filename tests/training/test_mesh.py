"""Meshes, and where shapes are placed on them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxdiff.training.mesh import MeshShape, batch_devices, make_mesh, parse, to_devices
from jaxdiff.training.param_sharding import ParamSharding, shardings


def test_one_size_is_what_the_others_leave():
    assert dict(make_mesh().shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(make_mesh(fsdp=4).shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    assert dict(make_mesh(data=2, fsdp=-1, tensor=2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(make_mesh(devices=jax.devices()[:1]).shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    assert set(make_mesh().axis_types) == {AxisType.Auto}


def test_meshes_as_the_command_line_writes_them():
    assert parse("data=8,fsdp=32") == MeshShape(8, 32, 1)
    assert parse("fsdp=4") == MeshShape(-1, 4, 1)
    assert parse("fsdp=-1, tensor=2") == MeshShape(1, -1, 2)
    assert parse("") == MeshShape()
    assert str(parse("fsdp=-1").over(8)) == "data=1,fsdp=8,tensor=1"
    for text in ("8", "data=8;fsdp=2", "data=2,data=4", "model=2", "data=", "data=1.5"):
        with pytest.raises(ValueError, match=r"mesh '.*': write sizes of data, fsdp, tensor"):
            parse(text)


@pytest.mark.parametrize("sizes", [{"fsdp": 3}, {"data": 4}, {"data": -1, "fsdp": -1}, {"fsdp": 0}, {"fsdp": 16}])
def test_sizes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(ValueError, match="mesh data="):
        make_mesh(**sizes)


def test_the_largest_divisible_axis_is_split():
    mesh = make_mesh(data=2, fsdp=4)
    shapes = {"kernel": (3, 3, 64, 256), "odd": (257, 512), "square": (256, 256), "none": (257, 257), "small": (8, 8)}
    tree = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    specs = {name: sharding.spec for name, sharding in shardings(tree, mesh).items()}
    assert specs["kernel"] == PartitionSpec(None, None, None, "fsdp")
    assert specs["odd"] == PartitionSpec(None, "fsdp")
    assert specs["square"] == PartitionSpec(None, "fsdp")
    assert specs["none"] == PartitionSpec()
    assert specs["small"] == PartitionSpec()
    assert shardings(tree, mesh, ParamSharding(minimum=1))["small"].spec == PartitionSpec(None, "fsdp")


def test_without_fsdp_everything_is_copied():
    tree = {"kernel": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}
    assert shardings(tree, make_mesh())["kernel"].spec == PartitionSpec()


def test_a_batch_is_split_by_rows_and_keeps_captions_on_the_host():
    mesh = make_mesh(data=2, fsdp=4)
    batch = {"image": np.arange(32.0).reshape(16, 2), "caption": np.array(["a"] * 16), "list": np.array([b"x"] * 16)}
    placed = to_devices(batch, mesh)
    assert set(placed) == {"image"}
    assert batch_devices(mesh) == 8
    assert {shard.data.shape for shard in placed["image"].addressable_shards} == {(2, 2)}
    np.testing.assert_array_equal(placed["image"], batch["image"])
