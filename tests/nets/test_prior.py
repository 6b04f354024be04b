"""The diffusion prior against diffusers', on random weights; causality and masks."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from jaxdiff.nets.conditioning import Conditioning
from jaxdiff.nets.execution import ExecutionConfig
from jaxdiff.nets.prior import PriorConfig

CONFIG = PriorConfig(embedding=12, text_width=12, text_length=5, width=16, layers=2, heads=4)
RNG = np.random.default_rng(0)
X, CAPTION, STATES = (jnp.asarray(RNG.normal(size=size), jnp.float32) for size in ((3, 12), (3, 12), (3, 5, 12)))
TIME, MASK = jnp.asarray([0.0, 250.0, 999.0]), jnp.arange(5) < jnp.asarray([5, 2, 0])[:, None]


def shapes_of(config):
    states, mask = jnp.zeros((1, config.text_length, config.text_width)), jnp.ones((1, config.text_length), bool)
    conditioning = Conditioning(states, mask, jnp.zeros((1, config.embedding)))
    x = jnp.zeros((1, 1, 1, config.embedding))
    return jax.eval_shape(config.module().init, jax.random.key(0), x, jnp.zeros(1), conditioning)["params"]


def random_params(config):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(0.4 * rng.normal(size=leaf.shape), jnp.float32), shapes_of(config))


PARAMS = random_params(CONFIG)


@partial(jax.jit, static_argnums=0)
def run(config, params, x, time, caption, states, mask):
    conditioning = Conditioning(states, mask, caption)
    return config.module().apply({"params": params}, x[:, None, None], time, conditioning)[:, 0, 0]


def diffusers_name(path):
    """Our path of a parameter → diffusers' name; written here independently of any loader."""
    *place, leaf = path
    if path == ("query",):
        return "prd_embedding"
    if path == ("position",):
        return "positional_embedding"
    leaf = {"kernel": "weight", "scale": "weight", "bias": "bias"}[leaf]
    top = {
        "states": "encoder_hidden_states_proj", "caption": "embedding_proj", "image": "proj_in", "norm": "norm_out",
        "head": "proj_to_clip_embeddings",
    }  # fmt: skip
    if place[0] in top:
        return f"{top[place[0]]}.{leaf}"
    if place[0] == "time":
        return f"time_embedding.linear_{int(place[1].removeprefix('Dense_')) + 1}.{leaf}"
    inner = {
        "attention_norm": "norm1", "feed_forward_norm": "norm3", "q": "attn1.to_q", "k": "attn1.to_k",
        "v": "attn1.to_v", "out": "attn1.to_out.0", "up": "ff.net.0.proj", "down": "ff.net.2",
    }[place[1]]  # fmt: skip
    return f"transformer_blocks.{place[0].removeprefix('layer_')}.{inner}.{leaf}"


def test_parity():
    torch = pytest.importorskip("torch", reason="diffusers' network")
    diffusers = pytest.importorskip("diffusers")
    network = diffusers.PriorTransformer(4, 4, 2, 12, num_embeddings=5, additional_embeddings=4).eval()
    state = {}
    for path, leaf in flatten_dict(PARAMS).items():
        value = np.asarray(leaf).T if path[-1] == "kernel" else np.asarray(leaf)
        name = diffusers_name(path)
        state[name] = torch.tensor(value.reshape(network.state_dict()[name].shape).copy())
    statistics = {name: torch.zeros(1, 12) for name in ("clip_mean", "clip_std")}
    network.load_state_dict(state | statistics)  # strict: nothing is missing or left over
    given = [torch.tensor(np.asarray(each)) for each in (X, TIME, CAPTION, STATES, MASK)]
    with torch.no_grad():
        wanted = network(*given).predicted_image_embedding.numpy()
    found = run(CONFIG, PARAMS, X, TIME, CAPTION, STATES, MASK)
    assert np.abs(found - wanted).max() <= 5e-4 * np.abs(wanted).max()


def test_published_shapes():
    """Karlo's prior: a billion parameters under diffusers' names."""
    torch = pytest.importorskip("torch", reason="diffusers' network")
    diffusers = pytest.importorskip("diffusers")
    shapes = shapes_of(PriorConfig())
    with torch.device("meta"):
        network = diffusers.PriorTransformer()
    theirs = {name: int(np.prod(value.shape)) for name, value in network.state_dict().items()}
    ours = {diffusers_name(path): int(np.prod(leaf.shape)) for path, leaf in flatten_dict(shapes).items()}
    assert ours | {"clip_mean": 768, "clip_std": 768} == theirs
    assert 1.0e9 < sum(ours.values()) < 1.1e9


def test_masked_states_are_not_read():
    """Neither by the query nor by the states after them; without any text the rest still decides."""
    changed = jnp.where(MASK[..., None], STATES, 7.0)
    before = run(CONFIG, PARAMS, X, TIME, CAPTION, STATES, MASK)
    np.testing.assert_array_equal(run(CONFIG, PARAMS, X, TIME, CAPTION, changed, MASK), before)
    other = run(CONFIG, PARAMS, X, TIME, CAPTION + 1.0, STATES, MASK)
    assert np.abs(other - before).max() > 1e-3


@pytest.mark.parametrize("execution", [ExecutionConfig("bfloat16"), ExecutionConfig(remat="blocks")])
def test_execution(execution):
    found = run(replace(CONFIG, execution=execution), PARAMS, X, TIME, CAPTION, STATES, MASK)
    wanted = run(CONFIG, PARAMS, X, TIME, CAPTION, STATES, MASK)
    assert found.dtype == jnp.float32
    assert np.abs(found - wanted).max() < (0.05 if execution.dtype == "bfloat16" else 1e-5) * np.abs(wanted).max()


def test_text_is_needed():
    with pytest.raises(ValueError, match="reads the text tower's states and the text embedding"):
        CONFIG.module().init(jax.random.key(0), X[:, None, None], TIME)


@pytest.mark.parametrize(
    ("change", "message"), [({"heads": 3}, "do not divide"), ({"layers": 0}, "at least one layer")]
)
def test_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)
