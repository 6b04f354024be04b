"""The dVAE's networks against an independent PyTorch build of the published topology, and its likelihood."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxdiff.nets import dvae
from jaxdiff.nets.dvae import DVAEConfig

CONFIG = DVAEConfig(codes=48, hidden=16, code_width=12)
"""The published topology, sixteen times narrower."""
IMAGE = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 24, 32, 3)), jnp.float32)


def random_params(config, seed=0):
    """Of the published initialization's size, with biases."""
    shapes = jax.eval_shape(config.module().init, jax.random.key(0), jnp.zeros((1, config.stride, config.stride, 3)))
    rng, tree = np.random.default_rng(seed), {}
    for path, leaf in flatten_dict(shapes["params"]).items():
        scale = np.prod(leaf.shape[:-1]) ** -0.5 if path[-1] == "kernel" else 0.1
        tree[path] = jnp.asarray(scale * rng.normal(size=leaf.shape), jnp.float32)
    return unflatten_dict(tree)


PARAMS = random_params(CONFIG)


def run(params, x, method, config=CONFIG):
    return jax.jit(lambda x: config.module().apply({"params": params}, x, method=method))(x)


def torch_networks(params, config=CONFIG):
    """(encoder, decoder) as functions of NCHW tensors, written from the paper's appendix A.1."""
    torch = pytest.importorskip("torch", reason="an independent build in PyTorch")
    F = torch.nn.functional
    flat = {"/".join(path): np.array(leaf) for path, leaf in flatten_dict(params).items()}

    def conv(x, name):
        kernel = torch.tensor(flat[f"{name}/kernel"]).permute(3, 2, 0, 1)
        return F.conv2d(x, kernel, torch.tensor(flat[f"{name}/bias"]), padding=kernel.shape[-1] // 2)

    def block(x, name):
        y = x
        for number in range(1, 5):
            y = conv(torch.relu(y), f"{name}/conv_{number}")
        short = conv(x, f"{name}/shortcut") if f"{name}/shortcut/kernel" in flat else x
        return short + y / (len(config.multipliers) * config.blocks) ** 2

    def encoder(x):
        x = conv(x, "encoder/stem")
        for level in range(len(config.multipliers)):
            x = F.max_pool2d(x, 2) if level else x
            for i in range(config.blocks):
                x = block(x, f"encoder/level_{level}_{i}")
        return conv(torch.relu(x), "encoder/head")

    def decoder(x):
        x = conv(x, "decoder/stem")
        for level in reversed(range(len(config.multipliers))):
            for i in range(config.blocks):
                x = block(x, f"decoder/level_{level}_{i}")
            x = F.interpolate(x, scale_factor=2, mode="nearest") if level else x
        return conv(torch.relu(x), "decoder/head")

    return encoder, decoder


def test_parity():
    torch = pytest.importorskip("torch", reason="an independent build in PyTorch")
    encoder, decoder = torch_networks(PARAMS)
    with torch.no_grad():
        logits = encoder(torch.tensor(np.array(dvae.to_unit(IMAGE))).permute(0, 3, 1, 2))
        codes = torch.nn.functional.one_hot(logits.argmax(1), CONFIG.codes).permute(0, 3, 1, 2).float()
        stats, relaxed = decoder(codes), decoder(torch.softmax(logits, 1))
    wanted = [np.array(each.permute(0, 2, 3, 1)) for each in (logits, stats, relaxed)]
    found = run(PARAMS, dvae.to_unit(IMAGE), "encode")
    indices = found.argmax(-1)
    for ours, theirs in zip(
        (found, run(PARAMS, indices, "decode_indices"), run(PARAMS, jax.nn.softmax(found), "decode")), wanted
    ):
        assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()


def test_indices_are_one_hot_codes():
    indices = jnp.asarray(np.random.default_rng(1).integers(0, CONFIG.codes, (2, 3, 4)))
    one_hot = run(PARAMS, jax.nn.one_hot(indices, CONFIG.codes), "decode")
    np.testing.assert_allclose(run(PARAMS, indices, "decode_indices"), one_hot, atol=1e-5)


def test_published_shapes():
    """The published networks: 8192 codes of 8×8 pixels; the parameters are those of OpenAI's files."""
    config = DVAEConfig()
    shapes = jax.eval_shape(config.module().init, jax.random.key(0), jnp.zeros((1, 256, 256, 3)))["params"]
    count = {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in shapes.items()}
    assert config.stride == 8 and config.gain == 1 / 64
    assert shapes["encoder"]["stem"]["kernel"].shape == (7, 7, 3, 256)
    assert shapes["encoder"]["head"]["kernel"].shape == (1, 1, 2048, 8192)
    assert shapes["decoder"]["stem"]["kernel"].shape == (1, 1, 8192, 128)
    assert shapes["decoder"]["head"]["kernel"].shape == (1, 1, 256, 6)
    assert count == {"encoder": 53_786_240, "decoder": 43_829_766}


def test_rematerialized_and_half_precision():
    for change in ({"remat": True}, {"dtype": "bfloat16"}):
        config = DVAEConfig(codes=48, hidden=16, code_width=12, **change)
        logits = run(PARAMS, dvae.to_unit(IMAGE), "encode", config)
        wanted = run(PARAMS, dvae.to_unit(IMAGE), "encode")
        assert logits.dtype == jnp.float32
        assert np.abs(logits - wanted).max() < (1e-5 if "remat" in change else 0.05) * np.abs(wanted).max()


def test_the_likelihood_is_a_density():
    """Over the logits it integrates to 1; the mode of the logits is the mean."""
    logits = np.linspace(-60.0, 60.0, 200_001)
    mean, scale = 0.3, 0.5
    # Values outside of the image's range are in the support too: invert `to_unit` without clipping.
    pixels = 1.0 / (1.0 + np.exp(-logits))
    inside = (pixels > 1e-9) & (pixels < 1 - 1e-9)
    image = 2.0 * (pixels[inside] - dvae.MARGIN) / (1 - 2 * dvae.MARGIN) - 1
    with jax.enable_x64(True):
        stats = np.broadcast_to([mean, np.log(scale)], (1, 1, inside.sum(), 2))
        log_density = np.asarray(dvae.logit_laplace(jnp.asarray(stats), jnp.asarray(image[None, None, :, None])))[
            0, 0, :, 0
        ]
    x = pixels[inside]
    mass = np.trapezoid(np.exp(log_density), x)
    assert abs(mass - 1) < 1e-4
    density_of_logit = np.exp(log_density) * x * (1 - x)
    assert abs(logits[inside][density_of_logit.argmax()] - mean) < 1e-3


def test_the_smallest_scale():
    """A smaller one counts as it; larger ones are unchanged."""
    image = jnp.asarray([[[[0.3], [-0.4]]]])
    stats = jnp.asarray([[[[0.1, -9.0], [0.2, 0.7]]]])
    found = dvae.logit_laplace(stats, image, least_scale=0.25)
    np.testing.assert_allclose(found, dvae.logit_laplace(stats.at[0, 0, 0, 1].set(np.log(0.25)), image), rtol=1e-6)
    assert (found[0, 0, 0] > dvae.logit_laplace(stats, image)[0, 0, 0]).all()


def test_range():
    image = jnp.linspace(-1, 1, 7)
    np.testing.assert_allclose(dvae.from_unit(dvae.to_unit(image)), image, atol=1e-6)
    np.testing.assert_allclose(dvae.to_unit(image)[jnp.asarray([0, -1])], [0.1, 0.9], atol=1e-6)
    stats = jnp.asarray([[[[100.0, 0.0], [-100.0, 0.0], [0.0, 5.0]]]])
    np.testing.assert_allclose(dvae.reconstruction(stats).ravel(), [1.0, -1.0, 0.0], atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"), [({"multipliers": ()}, "one level"), ({"hidden": 6}, "multiple of 4")]
)
def test_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DVAEConfig(**settings)


def test_the_residual_gain():
    """As published it falls with the number of blocks; another one changes the networks."""
    assert dvae.DVAEConfig().gain == 1 / 64
    config = dvae.DVAEConfig(codes=5, hidden=8, multipliers=(1, 2), blocks=1, code_width=4, image_channels=1)
    image = jnp.linspace(0.1, 0.9, 16).reshape(1, 4, 4, 1)
    params = config.module().init(jax.random.key(0), image)
    other = dataclasses.replace(config, residual_gain=0.5)
    assert other.gain == 0.5 and config.gain == 0.25
    first, second = (each.module().apply(params, image) for each in (config, other))
    assert np.abs(first - second).max() > 1e-3
    assert 0.7 < float(jnp.std(params["params"]["decoder"]["stem"]["kernel"])) < 1.4  # codes begin apart
