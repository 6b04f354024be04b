"""What the project computes, as numbers that a rewrite must not move.

    python tests/golden_outputs.py /tmp/before.npz              # at one commit
    python tests/golden_outputs.py /tmp/after.npz               # at another, on the same machine
    python tests/golden_outputs.py --compare /tmp/before.npz /tmp/after.npz

tests/golden_outputs.npz holds those of the commit that it came with; `test_golden_outputs.py` compares with it. Large
arrays are thinned out. Everything goes through public functions, with the shipped weights or small random ones.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

import small_if

from jaxdiff.diffusion import noise
from jaxdiff.diffusion.guidance import Guidance
from jaxdiff.diffusion.samplers import DPMSolverPP2M
from jaxdiff.diffusion.thresholding import DynamicThreshold
from jaxdiff.evaluation.clip_score import clip_score
from jaxdiff.evaluation.features import all_features, clip_image
from jaxdiff.evaluation.features import classifier as classifier_features
from jaxdiff.models.conditioners import NullText
from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.models.sampling import SampleRequest, SamplingConfig, TrainedModel
from jaxdiff.nets.conditioning import Conditioning
from jaxdiff.systems.pipeline import SampleOptions
from jaxdiff.training.mesh import make_mesh
from jaxdiff.training.optimizer import AdamW, OptimizerConfig
from jaxdiff.training.state import abstract_state, init_state, placements_of
from jaxdiff.training.step import make_step
from jaxdiff.weights import classifier, clip, imagen

STORED = Path(__file__).with_suffix(".npz")
CAPTIONS = ["a large red striped circle in the top left corner on a black background", "a small blue star"]

Outputs = dict[str, np.ndarray]


def of_text_encoders() -> Outputs:
    """T5's embeddings, CLIP's of captions and of images."""
    embedded = imagen.load_text().encode(CAPTIONS)
    tower = clip.load_text_encoder(imagen.SHIPPED / "clip")
    config, params = clip.load(imagen.SHIPPED / "clip")
    images = _uint8((2, 64, 64, 3))
    text = tower.encode(CAPTIONS)
    return {
        "t5": np.asarray(embedded.tokens)[:, :, ::4],
        "t5 mask": np.asarray(embedded.mask),
        "clip text": np.asarray(text.pooled),
        "clip text states": np.asarray(text.tokens)[:, :, ::8],
        "clip image": all_features(clip_image(config, params), images),
        "classifier": all_features(classifier_features("shapes", *_classifier()), images),
    }


def of_networks() -> Outputs:
    """One evaluation of each shipped stage, and of each stage of a small DeepFloyd IF."""
    shipped = imagen.load()
    base, sr256, sr1024 = shipped.boxes
    stages = {"base64": (base, 64), "sr256": (sr256, 128), "sr1024": (sr1024, 128)}
    small = small_if.cascade()
    stages |= {"if-1": (small.boxes[0], 16), "if-2": (small.boxes[1], 64)}
    return {f"network {name}": _evaluated(model, side) for name, (model, side) in stages.items()}


def of_cascades() -> Outputs:
    """Images of the shipped cascade and of a small DeepFloyd IF, at every resolution, with the models' own settings."""
    shipped, small = imagen.load(), small_if.cascade()
    images = shipped.sample(CAPTIONS, SampleOptions(seed=7, last=1))
    found = {"cascade": dict(zip(shipped.sides, images))}
    found["one"] = {1024: shipped.sample(CAPTIONS[:1], SampleOptions(seed=7))[2]}
    images = small.sample(small_if.CAPTIONS[:2], SampleOptions(seed=7, negative="a star"))
    found["if"] = dict(zip(small.sides, images))
    return {
        f"sample {name} {side}": images[:, :: max(1, side // 64), :: max(1, side // 64)]
        for name, drawn in found.items()
        for side, images in drawn.items()
    }


def of_training() -> Outputs:
    """Loss and gradient norm of ten training steps of each stage, on batches of noise."""
    shipped, small = imagen.load(), small_if.cascade()
    base, sr256, sr1024 = shipped.boxes
    stages = {"base64": (base, 64), "sr256": (sr256, 64), "sr1024": (sr1024, 64)}
    stages |= {"if-1": (small.boxes[0], 16), "if-2": (small.boxes[1], 32)}
    return {f"training {name}": _trained(model, side) for name, (model, side) in stages.items()}


def of_curves() -> Outputs:
    """One point of the curves: images of one guidance weight, and how the metrics see them."""
    model = imagen.load()
    captions = CAPTIONS * 2
    guidance = Guidance(4.0, interval=(-20.0, -1.0))
    sampling = SamplingConfig(DPMSolverPP2M(), 6, guidance=guidance, thresholding=DynamicThreshold())
    base = replace(model.boxes[0], sampling=sampling)
    keys = noise.fold(noise.sample_keys(jax.random.key(0), jnp.arange(4)), 0)
    images = base.generate(SampleRequest(keys, (64, 64), model.text_encoder.encode(captions)))
    seen = np.clip(np.rint((np.asarray(images) + 1) * 127.5), 0, 255).astype(np.uint8)
    config, params = clip.load(imagen.SHIPPED / "clip")
    said = clip.load_text_encoder(imagen.SHIPPED / "clip").encode(captions).pooled
    score = clip_score(np.asarray(said), all_features(clip_image(config, params), seen))
    return {
        "sample curves": np.asarray(images)[:, ::2, ::2],
        "curves cosine": np.asarray(score.cosine),
        "curves features": all_features(classifier_features("shapes", *_classifier()), seen).mean(0),
    }


GROUPS: tuple[Callable[[], Outputs], ...] = (of_text_encoders, of_networks, of_cascades, of_training, of_curves)


def tolerance(name: str) -> float:
    """The largest difference of an output, as a fraction of its largest value: twice what two compilers of jax 0.10 and
    0.12 differ by. On one machine and compiler there is none: `--compare`."""
    return {"network": 5e-5, "sample": 5e-4, "curves": 2e-4}.get(name.split()[0], 5e-6)


def difference(found: np.ndarray, wanted: np.ndarray) -> float:
    """Of the largest value of what is wanted."""
    if found.shape != wanted.shape:
        return float("inf")
    scale = float(np.abs(wanted).max()) or 1.0
    return float(np.abs(found.astype(np.float64) - wanted).max()) / scale


def _uint8(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def _classifier():
    _, config, params = classifier.load(imagen.SHIPPED / "classifier")
    return config, params


def _batch(model: DiffusionModel, count: int, side: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    spec = model.batch_spec(count, side)
    # Numbers are drawn for text that is not read, too, in the order in which the stored ones were.
    shapes = {"image": spec["image"].shape, "text": (count, 24, 128), "text_mask": (count, 24)}
    shapes |= {name: each.shape for name, each in spec.items()}
    length = shapes["text_mask"][1]
    values = {name: np.tanh(rng.normal(size=shape)) for name, shape in shapes.items()}
    values["text_mask"] = np.arange(length) < rng.integers(1, length, (count, 1))
    batch = {name: values[name].astype(each.dtype) for name, each in spec.items()}
    if model.text is not None and model.text.null is NullText.EMPTY:
        batch["null_text"] = np.zeros(batch["text"].shape[1:], np.float32)
    return batch


def _evaluated(trained: TrainedModel, side: int) -> np.ndarray:
    model, batch = trained.model, _batch(trained.model, 2, side, 1)
    given = Conditioning()
    if model.text is not None:
        given = Conditioning(jnp.asarray(batch["text"], jnp.float32), jnp.asarray(batch["text_mask"]))
    if model.low_res is not None:
        level = jnp.array([0.1, 0.3], jnp.float32)
        given = given._replace(concat=jnp.asarray(batch["image"][::-1]), aug_level=level)
    t = jnp.array([0.3, 0.8], jnp.float32)
    output = jax.jit(model.predict)(trained.params, jnp.asarray(batch["image"]), t, given)
    return np.asarray(output)[:, :: side // 16, :: side // 16]


def _trained(trained: TrainedModel, side: int) -> np.ndarray:
    model, optimizer = trained.model, OptimizerConfig(AdamW(), learning_rate=1e-4, warmup=2, total=20)
    mesh = make_mesh(devices=jax.devices()[:1])
    placements = placements_of(abstract_state(model, optimizer, mesh))
    losses = []
    with jax.set_mesh(mesh):
        state = init_state(model, optimizer, jax.random.key(0), mesh, jax.tree.map(np.asarray, trained.params))
        step = make_step(model, optimizer, placements)
        for number in range(10):
            state, metrics = step(state, _batch(model, 4, side, number), jax.random.key(3))
            losses.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    return np.array(losses)


def _compare(before: Path, after: Path) -> int:
    wanted, found = (dict(np.load(path)) for path in (before, after))
    for name in sorted(wanted.keys() | found.keys()):
        if name not in wanted or name not in found:
            print(f"{name}: only in {before if name in wanted else after}")
            continue
        same = np.array_equal(wanted[name], found[name])
        print(f"{name}: {'equal bit by bit' if same else f'{difference(found[name], wanted[name]):.2e}'}")
    return int(any(not np.array_equal(wanted.get(name), found.get(name)) for name in wanted.keys() | found.keys()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=STORED)
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("BEFORE", "AFTER"))
    options = parser.parse_args()
    if options.compare:
        sys.exit(_compare(*options.compare))
    outputs: Outputs = {}
    for group in GROUPS:
        outputs |= group()
    np.savez_compressed(options.out, **{name: value.astype(np.float32) for name, value in outputs.items()})
