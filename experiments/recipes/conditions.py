"""What conditions of latent diffusion are worth on `shapes`: a semantic map, a ControlNet, a LoRA, each with a number.

    python -m experiments.train sd.autoencoder --data shapes --steps 4500 --batch 8 --out runs/autoencoder
    python -m experiments.train sd.unet --data shapes --autoencoder runs/autoencoder --out runs/unet
    python -m experiments.recipes.conditions --base runs/unet --out runs/conditions
    python -m experiments.recipes.conditions --base runs/unet --out runs/conditions --parts word

map: a model conditioned on a map of classes alone, the palette of `shapes`, is trained in the base's latents; the mean
intersection over union (IoU) of held-out maps and of the classes that its samples show. edges: a ControlNet of the
base, trained on edge maps; the IoU of the objects of held-out images and of samples of their captions, with and without
the hint. word: a LoRA of the base learns a colour that no training image had from 20 images, beside images of `shapes`;
the fraction of samples of other captions with the word that have the colour. The autoencoder limits map and word: the
scores that end in reconstructed are those of its reconstructions.

OUT/scores.json has the numbers; OUT/map.png, edges.png and word.png show samples.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from experiments import train
from experiments.cli import Command, run
from experiments.options.training import DataOptions, OptimizerOptions, RunOptions
from experiments.table import TASKS
from experiments.tasks.adapters import ControlSettings, LoRAOptions, LoRASettings
from experiments.tasks.fine_tuning import BaseOptions, hint_of
from experiments.tasks.latents import LatentOptions, Latents
from jaxdiff.core.files import write_json
from jaxdiff.data import grids, shapes, sources
from jaxdiff.data.images import to_uint8
from jaxdiff.data.latents import ExtendedBatches, LatentBatches
from jaxdiff.data.pipeline import DataConfig, image_batches
from jaxdiff.data.shapes_caption import caption
from jaxdiff.data.shapes_draw import coverage
from jaxdiff.data.shapes_scene import BACKGROUNDS, COLOURS, Scene, scene
from jaxdiff.diffusion.guidance import Guidance
from jaxdiff.models.autoencoder import TrainedAutoencoder
from jaxdiff.models.hints import HintImage
from jaxdiff.models.representations import SemanticMapConditioner
from jaxdiff.models.sampling import TrainedModel
from jaxdiff.systems.pipeline import Pipeline, SampleOptions
from jaxdiff.training.loop import TrainConfig
from jaxdiff.training.loop import train as fit
from jaxdiff.training.optimizer import Muon, OptimizerConfig
from jaxdiff.weights import pretrained
from jaxdiff.weights.adapters import LoRAFile, LoRAs

PALETTE = np.asarray([*BACKGROUNDS.values(), *COLOURS.values()], np.float32)
"""The classes of a semantic map."""
SHOWN = 8
"""Samples of a sheet."""


@dataclass(frozen=True)
class NewWord:
    """A colour that `shapes` does not have, and that an autoencoder of its eight colours reproduces all the same."""

    name: str = "rose"
    rgb: tuple[int, int, int] = (244, 50, 127)
    images: int = 20


@dataclass(frozen=True)
class Settings:
    """Base model, length of the trainings, size of the tests."""

    base: Path = Path("runs/unet")
    """Run of sd.unet."""
    out: Path = Path("runs/conditions")
    """Folder of the results."""
    parts: tuple[str, ...] = ("map", "edges", "word")
    """Parts to run."""
    steps: tuple[int, int, int] = (2500, 800, 1600)
    """Updates of the model of the map, of the ControlNet and of the LoRA."""
    n: int = 100
    """Held-out images of each test."""
    data_dir: Path = Path("runs/data")
    """Folder of prepared datasets."""


@dataclass(frozen=True)
class Recipe:
    """The base's pipeline and the held-out images, uint8 (n h w 3), with their captions and scenes."""

    settings: Settings
    pipeline: Pipeline
    images: np.ndarray
    captions: list[str]
    scenes: list[Scene] = field(default_factory=list)

    @property
    def generator(self) -> TrainedModel:
        assert isinstance(self.pipeline.generator, TrainedModel)
        return self.pipeline.generator

    @property
    def decoder(self) -> TrainedAutoencoder:
        assert isinstance(self.pipeline.decoders[0], TrainedAutoencoder)
        return self.pipeline.decoders[0]

    def reconstructed(self, images: np.ndarray) -> np.ndarray:
        """By the autoencoder, uint8 (n h w 3)."""
        return to_uint8(np.asarray(self.decoder.decoded(self.decoder.encode(images / 127.5 - 1.0))))


def main(settings: Settings) -> None:
    """Train and measure the parts."""
    known = {"map": semantic_map, "edges": edges, "word": word}
    if wrong := [part for part in settings.parts if part not in known]:
        raise ValueError(f"--parts {wrong[0]}: choose from {', '.join(known)}")
    pipeline = pretrained.load(settings.base)
    side = pipeline.decoders[0].side
    held_out = [scene("held_out", index, objects=1) for index in range(settings.n)]
    images = np.stack([shapes.draw(each, side) for each in held_out])
    captions = [caption(each, "held_out", index).text for index, each in enumerate(held_out)]
    recipe = Recipe(settings, pipeline, images, captions, held_out)
    path = settings.out / "scores.json"
    scores = json.loads(path.read_text()) if path.is_file() else {}
    for part in settings.parts:
        scores |= known[part](recipe)
        write_json(path, scores)
    print("\n".join(f"{name:28} {value:.3f}" for name, value in scores.items()))


def semantic_map(recipe: Recipe) -> dict[str, float]:
    """A model that reads a map and no text."""
    settings, base, trained = recipe.settings, recipe.generator.model, recipe.decoder
    unet = dataclasses.replace(
        base.unet, transformer_layers=(0,) * len(base.unet.blocks), middle_layers=0
    )  # no text to attend to
    factor = trained.factor
    model = dataclasses.replace(
        base, unet=unet, conditioners=(SemanticMapConditioner(len(PALETTE), factor, detail=factor),)
    )
    space = Latents(model, trained, LatentOptions(str(settings.base)))
    source = sources.open(sources.Shapes(), space.side, "train", settings.data_dir)
    stream = image_batches(source, DataConfig(space.side, 32, captions=True, caption_optional=True))
    mapped = ExtendedBatches(stream, lambda batch: {"semantic_map": classes_of(to_uint8(batch["image"]))})
    batches = LatentBatches(mapped, space.encoded_once(source, settings.data_dir / "latents"))
    steps = settings.steps[0]
    optimizer = OptimizerConfig(Muon(), learning_rate=2e-3, warmup=min(50, steps - 1), total=steps)
    config = TrainConfig(optimizer, steps, ema_decay=0.99, save_every=500, description="semantic map")
    state = fit(model, batches, config, settings.out / "map", data=space.data)
    # A map leaves nothing to guess that guidance could sharpen.
    sampling = dataclasses.replace(recipe.generator.sampling, guidance=Guidance())
    generator = TrainedModel(model, jax.device_get(state.ema), sampling)
    wanted = classes_of(recipe.images)
    options = SampleOptions(last=1, given={"semantic_map": wanted})
    _, samples = Pipeline(None, generator, (trained,)).sample([" "] * len(wanted), options)
    show(settings.out / "map.png", {"map": recipe.images, "sample": to_uint8(samples)})
    limit = mean_iou(wanted, classes_of(recipe.reconstructed(recipe.images)))
    return {"map_iou": mean_iou(wanted, classes_of(to_uint8(samples))), "map_iou_reconstructed": limit}


def edges(recipe: Recipe) -> dict[str, float]:
    """A ControlNet of edge maps."""
    settings = recipe.settings
    out = settings.out / "edges"
    task = TASKS["sd.controlnet"]
    run_options = RunOptions(settings.steps[1], 32, ema_decay=0.99, evaluate_every=0, sample_every=0, save_every=500)
    train.main(
        "sd.controlnet",
        task,
        ControlSettings(
            out,
            run=run_options,
            dataset=DataOptions(data_dir=settings.data_dir),
            optimization=OptimizerOptions(learning_rate=5e-4),
            base=BaseOptions(str(settings.base)),
        ),
    )
    controlled = pretrained.load(settings.base, pretrained.LoadOptions(controls=(out / "model",)))
    hint = HintImage(hint_of(recipe.images / np.float32(127.5) - 1.0))
    results = {}
    for name, pipeline, hints in (("with", controlled, (hint,)), ("without", recipe.pipeline, ())):
        results[name] = to_uint8(pipeline.sample(recipe.captions, SampleOptions(hints=hints))[-1])
    show(settings.out / "edges.png", {"image": recipe.images, **results})
    true = objects_of(recipe.images)
    return {f"edges_iou_{name}": iou(true, objects_of(images)) for name, images in results.items()}


def word(recipe: Recipe) -> dict[str, float]:
    """A LoRA of a new colour."""
    settings, new = recipe.settings, NewWord()
    out, folder = settings.out / "word", settings.out / "word-images"
    folder.mkdir(parents=True, exist_ok=True)
    side = recipe.images.shape[1]
    for index in range(new.images):
        drawn = scene("train", index, objects=1)
        Image.fromarray(coloured(drawn, new.rgb, side)).save(folder / f"{index:02d}.png")
        (folder / f"{index:02d}.txt").write_text(renamed(caption(drawn, "train", index).text, drawn, new.name))
    train.main(
        "sd.lora",
        TASKS["sd.lora"],
        LoRASettings(
            out,
            run=RunOptions(settings.steps[2], 16, ema_decay=0.98, evaluate_every=0, sample_every=0, save_every=200),
            # Half of a batch keeps what the base knows (arXiv 2208.12242, 3.2): other colours, shapes, places.
            dataset=DataOptions((f"folder:{folder}", "shapes"), data_weights=(1.0, 1.0), data_dir=settings.data_dir),
            optimization=OptimizerOptions(learning_rate=1e-3),
            base=BaseOptions(str(settings.base)),
            lora=LoRAOptions(rank=8, targets="transformers"),
        ),
    )
    loras = LoRAs((LoRAFile(out / "lora.safetensors"),))
    adapted = pretrained.load(settings.base, pretrained.LoadOptions(loras=loras))
    texts = [renamed(text, each, new.name) for text, each in zip(recipe.captions, recipe.scenes)]
    right, results = {}, {}
    for name, pipeline in (("with", adapted), ("without", recipe.pipeline)):
        results[name] = to_uint8(pipeline.sample(texts, SampleOptions())[-1])
        right[f"word_{name}"] = fraction(results[name], new.rgb)
    drawn_anew = np.stack([coloured(each, new.rgb, side) for each in recipe.scenes])
    right["word_reconstructed"] = fraction(recipe.reconstructed(drawn_anew), new.rgb)
    kept = to_uint8(adapted.sample(recipe.captions, SampleOptions())[-1])
    colours = [COLOURS[each.objects[0].colour] for each in recipe.scenes]
    own = [is_colour(image, rgb) for image, rgb in zip(kept, colours)]
    show(settings.out / "word.png", {**results, "other colours": kept}, texts)
    return right | {"word_other_colours": float(np.mean(own))}


def renamed(text: str, drawn: Scene, name: str) -> str:
    """The caption with the name of the new colour."""
    return text.replace(drawn.objects[0].colour, name)


def coloured(drawn: Scene, rgb: tuple[int, int, int], side: int) -> np.ndarray:
    """The image of a scene of one object, in another colour: uint8 (h w 3)."""
    one, ground = drawn.objects[0], np.asarray(BACKGROUNDS[drawn.background], np.float32)
    whole = slice(0, side)
    alpha = coverage(one.kind, one.fill, one.x, one.y, one.radius, side, whole, whole)[..., None]
    return (ground + alpha * (np.asarray(rgb, np.float32) - ground) + 0.5).astype(np.uint8)


def classes_of(images: np.ndarray) -> np.ndarray:
    """The nearest colour of the palette at each pixel: int32 (n h w). images: uint8 (n h w 3)."""
    return nearest(images, PALETTE).astype(np.int32)


def nearest(images: np.ndarray, palette: np.ndarray) -> np.ndarray:
    return ((images[..., None, :].astype(np.float32) - palette) ** 2).sum(-1).argmin(-1)


def mean_iou(true: np.ndarray, seen: np.ndarray) -> float:
    """The mean over classes of intersection over union, of all images together."""
    return float(np.mean([iou(true == each, seen == each) for each in np.unique(true)]))


def iou(true: np.ndarray, seen: np.ndarray) -> float:
    return float((true & seen).sum() / (true | seen).sum())


def contrast(images: np.ndarray) -> np.ndarray:
    """How far each pixel is from the background, the median of the image's border: (n h w). A caption may leave the
    background open, so that it is each image's own."""
    border = np.concatenate([images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]], axis=1)
    ground = np.median(border.astype(np.float32), axis=1)[:, None, None]
    return np.abs(images.astype(np.float32) - ground).max(-1)


def objects_of(images: np.ndarray) -> np.ndarray:
    """The pixels that are not of the background: bool (n h w)."""
    return contrast(images) > 48


def is_colour(image: np.ndarray, rgb: tuple[int, int, int]) -> bool:
    """Whether the mean colour of the object is nearer to this one than to any of `shapes`."""
    strength = contrast(image[None])[0]
    if strength.max() < 48:
        return False
    mean = image[strength > 0.7 * strength.max()].astype(np.float32).mean(0)
    known = np.asarray([rgb, *(each for each in COLOURS.values() if each != rgb)], np.float32)
    return bool(nearest(mean, known) == 0)


def fraction(images: np.ndarray, rgb: tuple[int, int, int]) -> float:
    """Of the images that show an object of this colour."""
    return float(np.mean([is_colour(image, rgb) for image in images]))


def show(path: Path, rows: dict[str, np.ndarray], labels: list[str] | None = None) -> None:
    """A sheet with a row for each name."""
    tiles = [image / 127.5 - 1.0 for images in rows.values() for image in images[:SHOWN]]
    first = [f"{name}: {labels[i]}" if labels else name for name in list(rows)[:1] for i in range(SHOWN)]
    others = [name for name in list(rows)[1:] for _ in range(SHOWN)]
    grids.write(path, grids.grid(tiles, first + others, 128, SHOWN))


if __name__ == "__main__":
    run(Command(main, Settings(), "conditions of latent diffusion, measured on `shapes`"))
