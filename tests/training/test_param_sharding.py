"""Where shapes and rules put arrays, and what belongs to them."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from jaxdiff.models.single_optimizer import SingleOptimizer
from jaxdiff.nets.unet import AttentionConfig, EfficientUNetConfig, UNetConfig
from jaxdiff.systems import imagen as presets
from jaxdiff.training.mesh import make_mesh
from jaxdiff.training.optimizer import Adafactor, AdamW, Muon, OptimizerConfig
from jaxdiff.training.param_sharding import (
    ParamSharding,
    Rule,
    bytes_on_a_device,
    name_of,
    shardings,
    table,
    without_fsdp,
)
from jaxdiff.training.state import abstract_state

F32 = jnp.float32


def shapes(**given):
    return {name: jax.ShapeDtypeStruct(shape, F32) for name, shape in given.items()}


def specs(tree, mesh, placement):
    return {name: sharding.spec for name, sharding in shardings(tree, mesh, placement).items()}


def test_a_rule_comes_first_and_fsdp_takes_what_is_left():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    rules = (Rule("up/kernel", 1), Rule("down/kernel", -2))
    tree = shapes(**{"up/kernel": (256, 512), "down/kernel": (512, 256), "other": (256, 512)})
    found = specs(tree, mesh, ParamSharding(rules))
    assert found["up/kernel"] == PartitionSpec("fsdp", "tensor")
    assert found["down/kernel"] == PartitionSpec("tensor", "fsdp")
    assert found["other"] == PartitionSpec(None, "fsdp")
    # Without a tensor axis nothing is asked of the rules.
    assert specs(tree, make_mesh(fsdp=8), ParamSharding((Rule("absent", 0),)))["other"] == PartitionSpec(None, "fsdp")


def test_rules_that_do_not_fit_are_named():
    mesh = make_mesh(data=2, tensor=4)
    with pytest.raises(ValueError, match=r"placement rule 'absent' matches no array"):
        shardings(shapes(kernel=(8, 8)), mesh, ParamSharding((Rule("absent", 0),)))
    with pytest.raises(ValueError, match=r"tensor=4 does not divide axis 1 \(6\) of kernel, .* 'kernel'"):
        shardings(shapes(kernel=(8, 6)), mesh, ParamSharding((Rule("kernel", 1),)))
    with pytest.raises(ValueError, match=r"axis 2 \(none\) of kernel"):
        shardings(shapes(kernel=(8, 8)), mesh, ParamSharding((Rule("kernel", 2),)))


def like(path, tree):
    """The leaves of `tree` whose path ends with `path`, by what comes before it."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {name_of(p).removesuffix(path): leaf for p, leaf in leaves if name_of(p).endswith(path)}


class Square(SingleOptimizer):
    """A parameter of two equal large axes, one of two others, and a small one."""

    def init(self, key):
        return {
            "square": jnp.zeros((3, 256, 256)),
            "wide": {"kernel": jnp.zeros((256, 512))},
            "bias": jnp.zeros(512),
        }, ()

    def loss(self, params, extra, frozen, batch, key, step):
        return jnp.zeros(()), ({}, extra)

    def batch_spec(self, batch_size, side):
        return {}


@pytest.mark.parametrize("kind", [AdamW(), Muon()])
def test_moments_and_averages_lie_where_their_parameters_do(kind):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    rules = (Rule("wide/kernel", 1),)
    state = abstract_state(Square(), OptimizerConfig(kind=kind), mesh, ParamSharding(rules))
    found = like("wide/kernel", state)
    same = [leaf.sharding.spec for leaf in found.values() if leaf.shape == (256, 512)]
    assert len(same) >= 3  # the parameter, its average, its moments
    assert set(same) == {PartitionSpec("fsdp", "tensor")}
    assert {leaf.sharding.spec for leaf in like("bias", state).values()} == {PartitionSpec()}


def test_adafactors_rows_and_columns_follow():
    mesh = make_mesh(fsdp=4, tensor=2)
    state = abstract_state(
        Square(), OptimizerConfig(kind=Adafactor()), mesh, ParamSharding((Rule("wide/kernel", 0), Rule("square", 2)))
    )
    assert state.params["wide"]["kernel"].sharding.spec == PartitionSpec("tensor", "fsdp")
    assert state.params["square"].sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    moments = {
        (name, leaf.shape): leaf.sharding.spec
        for path in ("wide/kernel", "square")
        for name, leaf in like(path, state.opt_state).items()
    }
    rows = {spec for (name, shape), spec in moments.items() if name.endswith("v_row/") and shape == (256,)}
    columns = {spec for (name, shape), spec in moments.items() if name.endswith("v_col/") and shape == (512,)}
    assert rows == {PartitionSpec("tensor")}  # the mean over the larger axis, which fsdp splits
    assert columns == {PartitionSpec("fsdp")}
    squares = {name: spec for (name, shape), spec in moments.items() if shape == (3, 256)}
    # Of equal axes optax takes the last for the larger.
    assert {spec for name, spec in squares.items() if name.endswith("v_row/")} == {PartitionSpec(None, "fsdp")}
    assert {spec for name, spec in squares.items() if name.endswith("v_col/")} == {PartitionSpec(None, "tensor")}
    ones = {spec for (_, shape), spec in moments.items() if shape == (1,)}
    assert ones <= {PartitionSpec()}


@functools.cache
def paper_params(name):
    model = getattr(presets, name).reading(*presets.T5_XXL)
    return model.unet.tensor_rules(), jax.eval_shape(model.init, jax.random.key(0))[0]


@pytest.mark.parametrize("name", ["BASE_64_2B", "BASE_64_500M", "SR_256", "SR_1024"])
@pytest.mark.parametrize("sizes", [(2, 4, 1), (1, 4, 2), (1, 1, 8)], ids=str)
def test_the_papers_stages_are_split_evenly(name, sizes):
    """All that is large is split; every rule of the networks finds its arrays."""
    (rules, params), mesh = paper_params(name), make_mesh(*sizes)
    rules = tuple(Rule(*rule) for rule in rules)
    placed = shardings(params, mesh, ParamSharding(rules))
    held = bytes_on_a_device(jax.tree.map(lambda leaf, place: leaf.update(sharding=place), params, placed))
    whole = 4 * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    # What rules do not name is copied along tensor: embeddings, strided convolutions, conditioning.
    assert held < whole / (sizes[1] * sizes[2]) * (1.02 if sizes[2] == 1 else 1.4 if sizes[2] == 2 else 3.3)


def test_rules_of_networks_without_attention():
    config = UNetConfig(attention=AttentionConfig((False,) * 4))
    assert all("q" not in pattern for pattern, _ in config.tensor_rules())
    assert not any("up" in pattern for pattern, _ in UNetConfig().tensor_rules())  # no feed-forward
    assert any("up" in pattern for pattern, _ in EfficientUNetConfig().tensor_rules())


def test_whole_along_fsdp():
    mesh = make_mesh(fsdp=4, tensor=2)
    place = jax.NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor"))
    assert without_fsdp(place).spec == PartitionSpec(None, None, "tensor")
    assert without_fsdp(jax.NamedSharding(mesh, PartitionSpec("fsdp"))).spec == PartitionSpec()


def test_the_table_lists_every_array_and_their_sum():
    mesh = make_mesh(data=2, fsdp=4)
    tree = {"a": {"kernel": jax.ShapeDtypeStruct((256, 512), F32)}, "count": jax.ShapeDtypeStruct((), jnp.int32)}
    placed = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree, shardings(tree, mesh)
    )
    lines = table(placed).splitlines()
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    assert lines[1].split() == ["a/kernel", "256×512", "float32", "·,", "fsdp", "131,072"]
    assert lines[2].split() == ["count", "int32", "copied", "4"]
    assert lines[3].split() == ["all", "131,076"] and bytes_on_a_device(placed) == 131_076
