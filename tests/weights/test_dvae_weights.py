"""The dVAE on disk, and OpenAI's names."""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from jaxdiff.models.dvae import DVAEModel, TrainedDVAE
from jaxdiff.nets.dvae import DVAEConfig
from jaxdiff.weights import dvae

CONFIG = DVAEConfig(codes=20, hidden=16, code_width=12)
"""The published topology, sixteen times narrower."""
IMAGE = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (1, 16, 24, 3)), jnp.float32)


@pytest.fixture(scope="module")
def trained():
    params = jax.jit(lambda key: DVAEModel(CONFIG, side=16).init(key)[0])(jax.random.key(0))
    return TrainedDVAE(CONFIG, params, 16)


def test_saved_and_loaded(trained, tmp_path):
    dvae.save(trained, tmp_path)
    again = dvae.load(tmp_path)
    assert (again.config, again.side) == (CONFIG, 16)
    jax.tree.map(np.testing.assert_array_equal, again.params, trained.params)


def published_names(config):
    """Names and shapes of OpenAI's modules, from the description of its two networks."""
    hidden, names = config.hidden, {}

    def conv(name, n_in, n_out, size):
        names[f"{name}.w"], names[f"{name}.b"] = (n_out, n_in, size, size), (n_out,)

    def groups(widths, sizes, begin, which):
        for group, width in enumerate(widths, 1):
            for block in (1, 2):
                n_in = begin if block == 1 else width
                place = f"{which}:blocks.group_{group}.block_{block}"
                if n_in != width:
                    conv(f"{place}.id_path", n_in, width, 1)
                for number, size in enumerate(sizes, 1):
                    inside = n_in if number == 1 else width // 4
                    conv(f"{place}.res_path.conv_{number}", inside, width if number == 4 else width // 4, size)
            begin = width

    conv("encoder:blocks.input", 3, hidden, 7)
    groups([hidden, 2 * hidden, 4 * hidden, 8 * hidden], (3, 3, 3, 1), hidden, "encoder")
    conv("encoder:blocks.output.conv", 8 * hidden, config.codes, 1)
    conv("decoder:blocks.input", config.codes, config.code_width, 1)
    groups([8 * hidden, 4 * hidden, 2 * hidden, hidden], (1, 3, 3, 3), config.code_width, "decoder")
    conv("decoder:blocks.output.conv", hidden, 6, 1)
    return names


@pytest.mark.parametrize("config", [CONFIG, DVAEConfig()])
def test_published_names(config):
    """Names and shapes of all parameters, with nothing left over."""
    ours = {}
    for path, leaf in flatten_dict(dvae._shapes(config)).items():
        shape = (leaf.shape[3], leaf.shape[2], *leaf.shape[:2]) if len(leaf.shape) == 4 else leaf.shape
        ours[f"{path[0]}:{dvae.openai_name(config, '/'.join(path))}"] = shape
    assert ours == published_names(config)


@pytest.fixture
def files(trained, tmp_path, monkeypatch):
    """encoder.pkl and decoder.pkl: pickled modules of a package `dall_e`, which is gone afterwards."""
    torch = pytest.importorskip("torch", reason="writes pickled modules")
    module = types.ModuleType("dall_e.encoder")
    module.Net = type("Net", (torch.nn.Module,), {"__module__": "dall_e.encoder", "__qualname__": "Net"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "dall_e", types.ModuleType("dall_e"))
        patch.setitem(sys.modules, "dall_e.encoder", module)
        for name in ("encoder", "decoder"):
            root = module.Net()
            for path, leaf in flatten_dict(trained.params[name]).items():
                *places, last = dvae.openai_name(CONFIG, "/".join((name, *path))).split(".")
                node = root
                for place in places:
                    if place not in dict(node.named_children()):
                        node.add_module(place, module.Net())
                    node = getattr(node, place)
                value = np.asarray(leaf).transpose(3, 2, 0, 1) if leaf.ndim == 4 else np.asarray(leaf)
                node.register_parameter(last, torch.nn.Parameter(torch.tensor(value.copy())))
            torch.save(root, tmp_path / f"{name}.pkl")
    return tmp_path / "encoder.pkl", tmp_path / "decoder.pkl"


def test_openais_pickles(trained, files):
    converted = dvae.from_openai(*files, CONFIG)
    jax.tree.map(np.testing.assert_array_equal, converted.params, trained.params)
    assert converted.side == 256
    np.testing.assert_array_equal(converted.encode(IMAGE), trained.encode(IMAGE))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda files: dvae.from_openai(files[1], files[0], CONFIG), "not the encoder of this dVAE"),
        (lambda files: dvae.from_openai(*files), "the shape"),
        (lambda files: dvae.from_openai(*files, DVAEConfig(codes=20, hidden=16, code_width=12, blocks=3)), "missing"),
        (lambda files: dvae.from_openai(*files, DVAEConfig(codes=20, hidden=16, code_width=12, blocks=1)), "unknown"),
    ],
)
def test_other_pickles(files, change, message):
    with pytest.raises(ValueError, match=message):
        change(files)


def test_refused(trained, tmp_path):
    with pytest.raises(FileNotFoundError, match="no dVAE here"):
        dvae.load(tmp_path)
    dvae.save(trained, tmp_path)
    settings = tmp_path / dvae.SETTINGS
    text = settings.read_text()
    for before, after, message in (
        ('"side": 16', '"side": 15', "not the settings"),
        ('"version": 2', '"version": 1', "version"),
        ('"hidden": 16', '"hidden": 32', "shape"),
        ('"hidden": 16', '"hidden": 1e9', "whole numbers"),
        ('"side"', '"sides"', "not the settings"),
    ):
        assert before in text
        settings.write_text(text.replace(before, after))
        with pytest.raises(ValueError, match=message):
            dvae.load(tmp_path)
