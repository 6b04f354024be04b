"""Autoencoders of the published topologies and very small, and diffusers' beside them."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.core import trees
from jaxdiff.nets import autoencoder as nets
from jaxdiff.nets.autoencoder import AutoencoderConfig, KLBottleneck, VQBottleneck

KL8 = AutoencoderConfig(channels=(8, 8, 16, 16), norm_groups=4)
KL4 = AutoencoderConfig(channels=(8, 8, 16), norm_groups=4)
VQ4 = AutoencoderConfig(channels=(8, 8, 16), norm_groups=4, latent_channels=3, bottleneck=VQBottleneck(40, 3))
VQ8 = AutoencoderConfig(
    channels=(8, 8, 16, 16),
    norm_groups=4,
    attention_levels=(3,),
    bottleneck=VQBottleneck(50, 5),
)
"""With attention at the lowest level, as the paper's VQ-f8."""
NETWORKS = {"KL f8": KL8, "KL f4": KL4, "VQ f4": VQ4, "VQ f8": VQ8}


def random_params(config: AutoencoderConfig, seed: int = 0) -> dict:
    """Parameters none of which is 0 or its initial value; drawn by numpy, since compiling `init` takes long."""
    rng, drawn = np.random.default_rng(seed), {}
    shapes = jax.eval_shape(lambda: nets.init(config, jax.random.key(0)))
    for path, leaf in trees.flatten(shapes).items():
        x = rng.normal(size=leaf.shape)
        if path.endswith("kernel"):
            x *= np.prod(leaf.shape[:-1]) ** -0.5
        drawn[path] = np.asarray(1 + 0.1 * x if path.endswith("scale") else x if x.ndim > 1 else 0.1 * x, "f4")
    return jax.tree.map(jnp.asarray, trees.unflatten(drawn))


def diffusers_settings(config: AutoencoderConfig) -> dict:
    """The arguments of diffusers' class for the same network, written here independently of jaxdiff's export."""
    attends = [level in config.attention_levels for level in range(len(config.channels))]
    settings = {
        "in_channels": config.image_channels,
        "out_channels": config.image_channels,
        "down_block_types": [("Attn" if attend else "") + "DownEncoderBlock2D" for attend in attends],
        "up_block_types": [("Attn" if attend else "") + "UpDecoderBlock2D" for attend in attends[::-1]],
        "block_out_channels": list(config.channels),
        "layers_per_block": config.blocks,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.norm_groups,
        "mid_block_add_attention": config.middle_attention,
    }
    if isinstance(config.bottleneck, KLBottleneck):
        return settings | {"use_quant_conv": config.quant_conv, "use_post_quant_conv": config.post_quant_conv}
    return settings | {"num_vq_embeddings": config.bottleneck.codes, "vq_embed_dim": config.bottleneck.width}


def diffusers_model(config: AutoencoderConfig, **more):
    """diffusers' module with its initial parameters."""
    from diffusers import AutoencoderKL, VQModel

    kind = AutoencoderKL if isinstance(config.bottleneck, KLBottleneck) else VQModel
    return kind(**diffusers_settings(config), **more).eval()


def image(height: int, width: int, count: int = 2, seed: int = 1) -> np.ndarray:
    """Smooth random images with some noise, in [-1, 1]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / 32
    phases = rng.uniform(0, 6, (count, 1, 1, 3))
    waves = np.sin(y[None, :, :, None] * rng.uniform(1, 3, 3) + phases) * np.cos(x[None, :, :, None] * 2 + phases)
    return np.clip(0.7 * waves + 0.2 * rng.normal(size=waves.shape), -1, 1).astype("f4")
