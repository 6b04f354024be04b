"""The latent U-Net in diffusers' layout: the same numbers, the same names, every setting read or refused."""

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_if
from small import executed
from small_stable_diffusion import PUBLIC, torch_unet

from jaxdiff.core import trees
from jaxdiff.nets.blocks import sinusoidal
from jaxdiff.nets.conditioning import Conditioning
from jaxdiff.nets.latent_unet import LatentUNetConfig
from jaxdiff.weights import hub, latent_unet

SMALL = {
    "SD 1": {"cross_attention_dim": 24},
    "SDXL": {
        "transformer_layers_per_block": [1, 2, 3],
        "attention_head_dim": [2, 4, 4],
        "cross_attention_dim": 40,
        "addition_time_embed_dim": 16,
        "projection_class_embeddings_input_dim": 20 + 6 * 16,
    },
    "upscaler": {"cross_attention_dim": 24, "num_class_embeds": 50},
    "SD 1, scale_shift": {"cross_attention_dim": 24, "resnet_time_scale_shift": "scale_shift"},
}
"""Of these the numbers are compared, at a small width."""


def small(name):
    public = PUBLIC[name.partition(",")[0]]
    widths = public.get("block_out_channels", [320, 640, 1280, 1280])
    return public | {"block_out_channels": [32, *[64] * (len(widths) - 1)]} | SMALL[name]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_and_shapes(name, tmp_path):
    """Of the whole public network: nothing left over on either side, and its settings come back."""
    theirs = torch_unet(PUBLIC[name], "meta")
    values = {key: value for key, value in theirs.config.items() if not key.startswith("_")}
    network = latent_unet.read_config(values, tmp_path / "config.json")
    shapes = latent_unet.shapes_of(network)
    named = latent_unet.key_map(network, shapes)
    ours = {named[path]: hub.theirs_shape(path, leaf.shape) for path, leaf in trees.flatten(shapes).items()}
    assert ours == {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    written = latent_unet.hub_config(network)
    assert latent_unet.read_config(written, tmp_path) == network
    unread = {"sample_size", "only_cross_attention", "transformer_layers_per_block"}  # written in another form
    for key in values.keys() - unread:
        assert written[key] == (list(values[key]) if isinstance(values[key], tuple) else values[key]), key


@pytest.fixture(scope="module", params=SMALL)
def case(request, tmp_path_factory):
    """A small network of diffusers and ours of its files, with the same inputs for both."""
    torch = pytest.importorskip("torch", reason="compared with diffusers' network")
    folder = tmp_path_factory.mktemp("unet")
    theirs = torch_unet(small(request.param))
    theirs.save_pretrained(folder)
    network, params = latent_unet.load_unet(folder)
    rng = np.random.default_rng(1)
    random = lambda *shape: rng.normal(size=shape).astype("f4")  # noqa: E731
    x, concat, tokens = random(2, 16, 8, network.channels), random(2, 16, 8, network.concat), random(2, 5, 0)
    tokens, time, extra = random(2, 5, network.text_width), np.asarray([3.0, 801.0], "f4"), {}
    given = Conditioning(tokens=jnp.asarray(tokens), concat=jnp.asarray(concat) if network.concat else None)
    if network.vector is not None:
        pooled, sizes = random(2, 20), np.asarray([[64, 48, 0, 5, 64, 32], [128, 64, 8, 0, 64, 64]], "f4")
        embedded = sinusoidal(jnp.asarray(sizes.reshape(-1)), network.vector.frequencies).reshape(2, -1)
        given = given._replace(vector=jnp.concatenate([jnp.asarray(pooled), embedded], -1))
        both = {"text_embeds": torch.tensor(pooled), "time_ids": torch.tensor(sizes)}
        extra = {"added_cond_kwargs": both}
    if network.unet.level_entries:
        given = given._replace(aug_level=jnp.asarray([0.02, 0.04]))
        extra = {"class_labels": torch.tensor([20, 40])}
    image = torch.tensor(np.concatenate([x, concat], -1).transpose(0, 3, 1, 2))
    with torch.no_grad():
        wanted = theirs(image, torch.tensor(time), torch.tensor(tokens), **extra).sample.numpy()
    run = jax.jit(lambda params, x, given: network.unet.module().apply({"params": params}, x, jnp.asarray(time), given))
    return SimpleNamespace(
        name=request.param, theirs=theirs, network=network, params=params, x=x, time=time, given=given, run=run,
        wanted=wanted.transpose(0, 2, 3, 1), folder=folder,
    )  # fmt: skip


def test_same_numbers(case):
    got = np.asarray(case.run(case.params, case.x, case.given))
    assert np.abs(got - case.wanted).max() < 2e-5 * np.abs(case.wanted).max()


def test_written_for_diffusers(case, tmp_path):
    import diffusers
    import torch

    latent_unet.export_unet(case.network, case.params, tmp_path)
    again = diffusers.UNet2DConditionModel.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    wanted = case.theirs.state_dict()
    for name, value in again.state_dict().items():
        assert torch.equal(value, wanted[name]), name


def test_each_condition_has_an_effect(case):
    fields = [name for name in ("tokens", "vector", "concat", "aug_level") if getattr(case.given, name) is not None]
    assert len(fields) == {"SD 1": 1, "SDXL": 2, "upscaler": 3}[case.name.partition(",")[0]]
    for name in fields:
        other = case.given._replace(**{name: getattr(case.given, name)[::-1]})
        assert np.abs(np.asarray(case.run(case.params, case.x, other)) - case.wanted).max() > 1e-3, name


TINY = LatentUNetConfig(
    channels=16, multipliers=(1, 2), blocks=(1, 1), transformer_layers=(0, 2), middle_layers=2, heads=(1, 2),
    cross_only=(False, False), norm_groups=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny():
    network = latent_unet.Network(TINY, 4, 0, 12)
    params = small_if.random_params(latent_unet.shapes_of(network))
    rng = np.random.default_rng(2)
    x, tokens = (jnp.asarray(rng.normal(size=shape), "f4") for shape in ((2, 8, 8, 4), (2, 3, 12)))
    return params, x, jnp.asarray([5.0, 700.0]), Conditioning(tokens=tokens)


@partial(jax.jit, static_argnums=0)
def forward(config, params, x, time, given):
    return config.module().apply({"params": params}, x, time, given)


@pytest.mark.slow
def test_scan_and_remat_change_nothing(tiny):
    wanted = forward(TINY, *tiny)
    np.testing.assert_allclose(forward(executed(TINY, scan=True), *tiny), wanted, atol=1e-5)

    @partial(jax.jit, static_argnums=0)
    def gradient(config, params):
        return jax.grad(lambda p: jnp.square(config.module().apply({"params": p}, *tiny[1:])).mean())(params)

    plain = gradient(TINY, tiny[0])
    for how in ({"remat": "blocks"}, {"remat": "outputs", "scan": True}):
        other = gradient(executed(TINY, **how), tiny[0])
        for name, leaf in trees.flatten(plain).items():
            np.testing.assert_allclose(trees.flatten(other)[name], leaf, atol=1e-5, err_msg=name)


def test_jvp(tiny):
    """Against the difference quotient, as distillation needs it, in the latents and the time."""
    params, x, time, given = tiny
    direction = jnp.flip(x, 1)
    f = lambda x, t: TINY.module().apply({"params": params}, x, t, given)  # noqa: E731
    out, slope = jax.jit(lambda: jax.jvp(f, (x, time), (direction, jnp.ones(2))))()
    h = 1e-2
    ahead, behind = (forward(TINY, params, x + s * h * direction, time + s * h, given) for s in (1, -1))
    np.testing.assert_allclose(slope, (ahead - behind) / (2 * h), atol=5e-3 * np.abs(slope).max())
    assert np.isfinite(out).all()


def test_residuals_and_bfloat16(tiny):
    params, x, time, given = tiny
    wanted = forward(TINY, *tiny)
    zero = tuple(jnp.zeros((2, side, side, width)) for side, width in ((8, 16), (8, 16), (4, 16), (4, 32), (4, 32)))
    np.testing.assert_allclose(forward(TINY, params, x, time, given._replace(residuals=zero)), wanted, atol=1e-6)
    some = (*zero[:-1], jnp.ones_like(zero[-1]))
    assert np.abs(forward(TINY, params, x, time, given._replace(residuals=some)) - wanted).max() > 1e-3
    with pytest.raises(ValueError, match="4 residuals for 4 skip connections and the middle"):
        forward(TINY, params, x, time, given._replace(residuals=zero[:-1]))
    half = forward(executed(TINY, dtype="bfloat16"), *tiny)
    assert half.dtype == jnp.float32 and np.abs(half - wanted).max() < 0.1 * np.abs(wanted).max()


def test_coordinates(tiny):
    """They are two more input channels, by which equal rows of the latents differ; diffusers has none."""
    config = replace(TINY, coordinates=True)
    params, x, time, given = tiny
    stem = params["stem"]["kernel"]
    wider = params | {"stem": params["stem"] | {"kernel": jnp.concatenate([stem, 0.0 * stem[:, :, :2]], axis=2)}}
    np.testing.assert_allclose(forward(config, wider, x, time, given), forward(TINY, *tiny), atol=1e-5)
    wider["stem"]["kernel"] = wider["stem"]["kernel"].at[:, :, 4:].set(1.0)
    assert np.abs(forward(config, wider, x, time, given) - forward(TINY, *tiny)).max() > 1e-3
    with pytest.raises(ValueError, match="no coordinates"):
        latent_unet.hub_config(latent_unet.Network(config, 4, 0, 12))


def test_text_is_needed(tiny):
    with pytest.raises(ValueError, match="reads text"):
        forward(TINY, *tiny[:3], Conditioning())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unheard_of": 1}, "unknown settings of UNet2DConditionModel: unheard_of"),
        ({"act_fn": "mish"}, "act_fn = 'mish' is not supported"),
        ({"attention_head_dim": [8, 8]}, "attention_head_dim = .* one for each level"),
        ({"attention_head_dim": 7}, "7 heads do not divide a width of 320 at level 0"),
        ({"block_out_channels": [320, 480, 1280, 1280]}, "block_out_channels .* multiples of the first"),
        ({"norm_num_groups": 48}, "48 groups do not divide a width of 320"),
        ({"up_block_types": ["CrossAttnUpBlock2D"] * 4}, "up_block_types .* mirror"),
        ({"only_cross_attention": [True]}, "only_cross_attention"),
        ({"in_channels": 3}, "in_channels = 3 .* at least out_channels, 4"),
        ({"addition_embed_type": "image"}, "addition_embed_type = 'image'"),
        ({"addition_embed_type": "text_time"}, "projection_class_embeddings_input_dim"),
        ({"class_embed_type": "simple_projection"}, "class_embed_type"),
        ({"transformer_layers_per_block": [[1, 2], 1, 1, 1]}, "transformer_layers_per_block"),
        ({"_class_name": "FluxTransformer2DModel"}, "_class_name"),
        ({"layers_per_block": 0}, "layers_per_block"),
    ],
)
def test_refused_settings(change, message, tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(ValueError, match=message) as error:
        latent_unet.read_config(PUBLIC["SD 1"] | change, path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_settings_of_the_network():
    for change, message in (
        ({"heads": (8, 8, 8)}, "one entry per level"),
        ({"heads": (7, 8, 8, 8)}, "7 heads do not divide"),
        ({"norm_groups": 0}, "0 groups do not divide"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(LatentUNetConfig(), **change)


def test_damaged_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="no U-Net"):
        latent_unet.load_unet(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(PUBLIC["SD 1"]))
    with pytest.raises(FileNotFoundError, match="no weights"):
        latent_unet.load_unet(tmp_path)
    network = latent_unet.Network(TINY, 4, 0, 12)
    with pytest.raises(ValueError, match="the U-Net to export"):
        latent_unet.export_unet(network, {"stem": {"kernel": np.zeros(3)}}, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match="no middle of 1 layers after a level of 2"):
        latent_unet.hub_config(network._replace(unet=replace(TINY, middle_layers=1)))
