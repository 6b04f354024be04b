"""FID's Inception against the same network written with PyTorch's functions, on random weights."""

import jax
import numpy as np
import pytest

from jaxdiff.core import trees
from jaxdiff.nets.inception import Inception
from jaxdiff.weights import inception, tree

torch = pytest.importorskip("torch", reason="parity tests need PyTorch")
F = torch.nn.functional


@pytest.fixture(scope="module")
def tensors():
    """Random weights by PyTorch's names; statistics as of a network whose activations neither vanish nor grow."""
    shapes = inception._shapes()
    rng = np.random.default_rng(0)
    found = {}
    for path, name in inception.names(shapes).items():
        shape = inception.hub.theirs_shape(path, trees.flatten(shapes)[path].shape)
        values = rng.normal(size=shape)
        if path.endswith("kernel"):
            values *= np.sqrt(2 / np.prod(shape[1:]))
        else:
            values = 1 + 0.2 * values if path.endswith(("scale", "var")) else 0.2 * values
        found[name] = torch.tensor(np.abs(values) if path.endswith("var") else values, dtype=torch.float32)
    return found


class Reference:
    def __init__(self, tensors):
        self.tensors = tensors

    def conv(self, x, name, stride=1, padding=0):
        get = lambda part: self.tensors[f"{name}.{part}"]  # noqa: E731
        x = F.conv2d(x, get("conv.weight"), stride=stride, padding=padding)
        statistics = get("bn.running_mean"), get("bn.running_var")
        return F.relu(F.batch_norm(x, *statistics, get("bn.weight"), get("bn.bias"), eps=0.001))

    def chain(self, x, name, *steps):
        for suffix, options in steps:
            x = self.conv(x, f"{name}{suffix}", **options)
        return x

    def average(self, x, name):
        pooled = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        return self.conv(pooled, f"{name}.branch_pool")

    def a(self, x, m):
        one = self.conv(x, f"{m}.branch1x1")
        five = self.chain(x, f"{m}.branch5x5", ("_1", {}), ("_2", {"padding": 2}))
        twice = self.chain(x, f"{m}.branch3x3dbl", ("_1", {}), ("_2", {"padding": 1}), ("_3", {"padding": 1}))
        return torch.cat([one, five, twice, self.average(x, m)], 1)

    def b(self, x, m):
        three = self.conv(x, f"{m}.branch3x3", stride=2)
        twice = self.chain(x, f"{m}.branch3x3dbl", ("_1", {}), ("_2", {"padding": 1}), ("_3", {"stride": 2}))
        return torch.cat([three, twice, F.max_pool2d(x, 3, 2)], 1)

    def c(self, x, m):
        row, column = {"padding": (0, 3)}, {"padding": (3, 0)}
        seven = self.chain(x, f"{m}.branch7x7", ("_1", {}), ("_2", row), ("_3", column))
        steps = ("_1", {}), ("_2", column), ("_3", row), ("_4", column), ("_5", row)
        twice = self.chain(x, f"{m}.branch7x7dbl", *steps)
        return torch.cat([self.conv(x, f"{m}.branch1x1"), seven, twice, self.average(x, m)], 1)

    def d(self, x, m):
        three = self.chain(x, f"{m}.branch3x3", ("_1", {}), ("_2", {"stride": 2}))
        steps = ("_1", {}), ("_2", {"padding": (0, 3)}), ("_3", {"padding": (3, 0)}), ("_4", {"stride": 2})
        return torch.cat([three, self.chain(x, f"{m}.branch7x7x3", *steps), F.max_pool2d(x, 3, 2)], 1)

    def e(self, x, m, maximum):
        both = lambda x, name: [  # noqa: E731
            self.conv(x, f"{name}a", padding=(0, 1)),
            self.conv(x, f"{name}b", padding=(1, 0)),
        ]
        three = both(self.conv(x, f"{m}.branch3x3_1"), f"{m}.branch3x3_2")
        twice = self.chain(x, f"{m}.branch3x3dbl", ("_1", {}), ("_2", {"padding": 1}))
        twice = both(twice, f"{m}.branch3x3dbl_3")
        pool = self.conv(F.max_pool2d(x, 3, 1, 1), f"{m}.branch_pool") if maximum else self.average(x, m)
        return torch.cat([self.conv(x, f"{m}.branch1x1"), *three, *twice, pool], 1)

    def __call__(self, x):
        x = self.conv(x, "Conv2d_1a_3x3", stride=2)
        x = self.conv(self.conv(x, "Conv2d_2a_3x3"), "Conv2d_2b_3x3", padding=1)
        x = F.max_pool2d(x, 3, 2)
        early = {64: x}
        x = self.conv(self.conv(x, "Conv2d_3b_1x1"), "Conv2d_4a_3x3")
        x = early[192] = F.max_pool2d(x, 3, 2)
        for kind, blocks in ((self.a, "5b 5c 5d"), (self.b, "6a"), (self.c, "6b 6c 6d 6e"), (self.d, "7a")):
            for block in blocks.split():
                x = kind(x, f"Mixed_{block}")
                if block == "6e":
                    early[768] = x
        x = self.e(self.e(x, "Mixed_7b", False), "Mixed_7c", True)
        features = x.mean((2, 3))
        pooled = {width: F.adaptive_avg_pool2d(each, (1, 1))[..., 0, 0] for width, each in early.items()}
        return features, features @ self.tensors["fc.weight"].T, pooled


def test_parity(tensors, tmp_path):
    file = tmp_path / "inception.safetensors"
    more = {"fc.bias": np.ones(1008, np.float32), "Conv2d_1a_3x3.bn.num_batches_tracked": np.array(0)}
    tree.write_safetensors(file, {name: value.numpy() for name, value in tensors.items()} | more, {})
    image = np.random.default_rng(1).uniform(-1, 1, (2, 299, 299, 3)).astype(np.float32)
    found = jax.jit(Inception().apply)({"params": inception.load(file)}, image)
    with torch.no_grad():
        wanted = Reference(tensors)(torch.tensor(image).permute(0, 3, 1, 2))
    assert set(found.early) == set(wanted[2]) == {64, 192, 768}
    pairs = [*zip(found[:2], wanted[:2]), *((found.early[width], wanted[2][width]) for width in found.early)]
    for ours, theirs in pairs:
        assert ours.shape == theirs.shape
        assert np.abs(ours - theirs.numpy()).max() <= 1e-4 * np.abs(theirs.numpy()).max()
    assert np.std(found.features) > 0.01


def test_parameters_are_those_of_the_public_file():
    shapes = trees.flatten(inception._shapes())
    assert len(shapes) == 94 * 5 + 1
    trained = [leaf.size for path, leaf in shapes.items() if not path.endswith(("mean", "var"))]
    assert sum(trained) == 21_785_568 + 2048 * 1008  # as published for the part before the classifier


def test_without_weights_it_is_said_how_to_get_them(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"download pt_inception-2015-12-05.* python -m experiments"):
        inception.load(tmp_path / "absent.safetensors")
