"""Attention against a softmax written out in float64, and the choice of kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from jaxdiff.nets.attention import Kernel, attention, platform

B, T, S, N, H = 2, 5, 7, 3, 8


def exact(q, k, v, mask=None, bias=None, scale=None):
    """Softmax attention one query at a time, float64."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(q.shape[:3]):
        logits = (k[b, :, n] @ q[b, t, n]) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if bias is not None:
            logits = logits + np.broadcast_to(bias, (q.shape[0], N, T, S))[b, n, t]
        if mask is not None:
            logits = np.where(np.broadcast_to(mask, (q.shape[0], N, T, S))[b, n, t], logits, -np.inf)
        weights = np.exp(logits - logits.max())
        out[b, t, n] = (weights / weights.sum()) @ v[b, :, n]
    return out


@pytest.fixture(scope="module")
def qkv():
    rng = np.random.default_rng(0)
    return tuple(rng.normal(size=(B, length, N, H)).astype(np.float32) for length in (T, S, S))


PADDING = (np.arange(S) < np.array([3, S])[:, None])[:, None, None, :]
CAUSAL = np.broadcast_to(np.arange(S) <= np.arange(T)[:, None], (B, 1, T, S))
PER_HEAD = np.random.default_rng(1).random((B, N, T, S)) < 0.5
PER_HEAD[..., 0] = True
POSITIONS = np.random.default_rng(2).normal(size=(1, N, T, S)).astype(np.float32)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 1.0},
        {"mask": PADDING},
        {"mask": CAUSAL},
        {"mask": PER_HEAD},
        {"bias": POSITIONS, "scale": 1.0},
        {"bias": POSITIONS, "mask": PADDING},
    ],
    ids=lambda options: "+".join(options) or "plain",
)
def test_it_is_the_softmax(qkv, options):
    arrays = {name: value if name == "scale" else jnp.asarray(value) for name, value in options.items()}
    found = attention(*map(jnp.asarray, qkv), **arrays)
    np.testing.assert_allclose(found, exact(*qkv, **options), atol=2e-6)


def test_softmax_is_float32_in_half_precision(qkv):
    """Only the rounding of inputs and output remains; weights summed in bfloat16 would be off by several per cent."""
    q, k, v = (jnp.asarray(a, jnp.bfloat16) for a in qkv)
    k, v = (jnp.tile(a, (1, 300, 1, 1)) for a in (k, v))
    found = attention(q, k, v)
    assert found.dtype == jnp.bfloat16
    wanted = exact(*(np.asarray(a, np.float32) for a in (q, k, v)))
    np.testing.assert_allclose(np.asarray(found, np.float64), wanted, atol=0.01)


def test_large_logits_do_not_overflow(qkv):
    q, k, v = (jnp.asarray(a) for a in qkv)
    np.testing.assert_allclose(attention(1e4 * q, k, v), exact(1e4 * qkv[0], *qkv[1:]), atol=1e-5)


@pytest.fixture
def chosen(monkeypatch):
    """The implementation that attention asks jax for on a platform, and the shapes that it hands over."""

    def choose(platform, dtype=jnp.bfloat16, t=T, s=S, h=H, mask=None, bias=None):
        calls = []

        def record(q, k, v, bias=None, mask=None, scale=None, implementation=None):
            calls.append((implementation, k.shape, None if mask is None else mask.shape, scale))
            return q

        monkeypatch.setattr(jax, "default_backend", lambda: platform)
        monkeypatch.setattr(jax.nn, "dot_product_attention", record)
        q, kv = jnp.zeros((B, t, N, h), dtype), jnp.zeros((B, s, N, h), dtype)
        attention(q, kv, kv, mask=mask, bias=bias)
        return calls[0]

    return choose


def test_kernels_on_each_platform(chosen):
    assert chosen("cpu")[0] == "xla"
    assert chosen("tpu")[0] == "xla"  # too short for a flash kernel
    assert chosen("gpu", t=4)[0] == "cudnn"
    assert chosen("gpu", t=4, dtype=jnp.float32)[0] == "xla"
    assert chosen("gpu", t=4, h=12)[0] == "xla"  # not a multiple of 8
    assert chosen("gpu", t=4, h=136)[0] == "xla"


def mesh_of(platform):
    """A mesh of one device of a platform that need not be here."""
    return AbstractMesh((1,), ("data",), (AxisType.Auto,), abstract_device=AbstractDevice("a chip", None, platform))


def test_kernels_are_those_of_what_is_compiled_for(chosen):
    """The devices of the mesh decide, and not those that JAX sees here."""
    for here, there in (("cpu", "gpu"), ("gpu", "cpu"), ("tpu", "gpu")):
        with use_abstract_mesh(mesh_of(there)):
            assert chosen(here, t=4)[0] == ("cudnn" if there == "gpu" else "xla")
    assert chosen("cpu", t=4)[0] == "xla" and chosen("gpu", t=4)[0] == "cudnn"


def test_a_program_is_traced_anew_for_another_platform():
    """One of equal shapes was traced for the CPU before, and must not be taken for the GPU's."""
    traced = []

    @jax.jit
    def function(x):
        traced.append(platform())
        return x

    shape = jax.ShapeDtypeStruct((2,), jnp.float32)
    for there in ("cpu", "gpu", "cpu"):
        with use_abstract_mesh(mesh_of(there)):
            function.trace(shape)
    function.trace(shape)
    assert traced[:2] == ["cpu", "gpu"] and traced[-1] == jax.default_backend()


def test_cudnn_is_asked_for_nothing_that_it_refuses(chosen):
    """A mask is a bias to cuDNN: it must cover every query. Its gradient needs even lengths: jax 0.11.2 on an H100
    refused 64 queries with 77 keys, and 1 with 78, without any mask."""
    mask = jnp.ones((B, 1, 1, S), bool)
    kernel, keys, shape, scale = chosen("gpu", t=4, mask=mask)
    assert (kernel, keys, shape) == ("cudnn", (B, S + 1, N, H), (B, 1, 4, S + 1))
    assert scale == pytest.approx(H**-0.5)
    for t in (1, 5, 49):
        assert chosen("gpu", t=t, mask=mask)[0] == "xla"
        assert chosen("gpu", t=t)[0] == "xla"
    assert chosen("gpu", t=4, mask=jnp.ones((B, 1, 4, S), bool))[0] == "xla"  # seen to be wrong
    assert chosen("gpu", t=4)[:3] == ("cudnn", (B, S + 1, N, H), (1, 1, 4, S + 1))
    assert chosen("gpu", t=4, s=6)[:3] == ("cudnn", (B, 6, N, H), None)
    assert chosen("gpu", t=4, s=S, bias=jnp.zeros((1, N, 4, S)))[0] == "xla"
    kernel, keys, shape, _ = chosen("gpu", t=4, s=6, bias=jnp.zeros((1, N, 4, 6)), mask=jnp.ones((B, 1, 1, 6), bool))
    assert (kernel, keys, shape) == ("cudnn", (B, 6, N, H), (B, 1, 4, 6))


@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize(("t", "s"), ((16, 21), (16, 16), (2, 77), (64, 1)))
def test_cudnn_traces_with_gradients(monkeypatch, t, s, masked):
    """jax's own checks of what cuDNN takes, which need no GPU; masked as in a U-Net (text before the pixels)."""
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    if not hasattr(fused, "check_cudnn_version"):
        pytest.skip("jax checks its cuDNN version elsewhere")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91100)
    q, kv = jnp.zeros((B, t, N, H), jnp.bfloat16), jnp.zeros((B, s, N, H), jnp.bfloat16)
    mask = jnp.ones((B, 1, 1, s), bool) if masked else None

    def total(q, kv):
        return attention(q, kv, kv, mask=mask, kernel=Kernel.CUDNN).astype(jnp.float32).sum()

    grads = jax.eval_shape(jax.grad(total, argnums=(0, 1)), q, kv)
    assert [g.shape for g in grads] == [q.shape, kv.shape]


@pytest.mark.parametrize("masked", (False, True))
def test_padding_of_the_keys_changes_nothing(qkv, monkeypatch, masked):
    """What cuDNN is handed for an odd number of keys says the same to XLA."""
    original = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *a, implementation, **o: original(*a, implementation="xla", **o)
    )
    options = {"mask": jnp.asarray(PADDING)} if masked else {}
    found = attention(*map(jnp.asarray, qkv), kernel=Kernel.CUDNN, **options)
    np.testing.assert_allclose(found, exact(*qkv, **({"mask": PADDING} if masked else {})), atol=2e-6)
