"""From captioned images to a sample in one file, with library functions only.

    python -m experiments.recipes.minimal

Trains a small 64×64 base model of Imagen on `shapes` and samples eight held-out captions. Takes four to five minutes on
2 CPU cores. runs/minimal/grid.png then shows blurred objects on the right background; about half of their colours and
places follow the captions (`experiments.quickstart --train` trains for 25 minutes). Started again, it resumes.
"""

import dataclasses
from pathlib import Path

import jax

from experiments.cli import run
from jaxdiff.data import grids, sources
from jaxdiff.data.embeddings import store_embeddings
from jaxdiff.data.example import captions
from jaxdiff.data.pipeline import DataConfig, image_batches
from jaxdiff.data.shapes_caption import held_out_captions
from jaxdiff.diffusion.losses import PowerSNR
from jaxdiff.diffusion.time_samplers import LogSNRRange
from jaxdiff.models.sampling import TrainedModel
from jaxdiff.systems import imagen_tiny
from jaxdiff.systems.imagen import imagen
from jaxdiff.systems.pipeline import SampleOptions
from jaxdiff.training.loop import TrainConfig, train
from jaxdiff.training.optimizer import Muon, OptimizerConfig
from jaxdiff.weights.imagen import SHIPPED
from jaxdiff.weights.pretrained import save_pretrained
from jaxdiff.weights.t5 import load_text_encoder


def main(out: Path = Path("runs/minimal"), steps: int = 450, examples: int = 4_000, batch: int = 32) -> None:
    """Train a small base model on `shapes` and sample from it.

    Args:
        out: folder of the run.
        steps: updates of the model.
        examples: images to train on.
        batch: images per update.
    """
    # 1. Data: a random-access sequence of captioned images. For your own folder: `sources.Folder(Path("photos"))`.
    data = sources.open(sources.Shapes(train=examples, held_out=1), 64, "train", out / "data")

    # 2. Text encoder: a frozen T5. Its embeddings of all captions are stored once.
    text_encoder = load_text_encoder(SHIPPED / "text", length=24)
    embeddings = store_embeddings(
        captions(data), text_encoder.encode, out / "embeddings", encoder=text_encoder.fingerprint
    )

    # 3. Generator: settings of a diffusion model for this text encoder; `model.init` creates the parameters. Half of
    # the training is at noise levels where only the caption decides a colour; otherwise few updates learn none.
    preset = imagen_tiny.BASE_64_QUICK.reading(text_encoder.length, text_encoder.width)
    times = LogSNRRange(-7.0, -2.0, 0.5, rest=preset.time_sampler)
    model = dataclasses.replace(preset, time_sampler=times, weighting=PowerSNR(0.1))

    # 4. Training: batches, an optimizer, a loop with checkpoints. It returns the last state; `ema` is a tree with the
    # moving average of the parameters.
    batches = image_batches(data, DataConfig(64, batch), embeddings)
    config = TrainConfig(
        optimizer=OptimizerConfig(Muon(), learning_rate=3e-3, warmup=min(30, steps - 1), total=steps),
        steps=steps,
        ema_decay=0.98,
        save_every=100,
        description="base64",
    )
    state = train(model, batches, config, out, data={"examples": examples, "batch": batch})
    trained = TrainedModel(model, jax.device_get(state.ema), imagen_tiny.SAMPLING_BASE_QUICK, text_encoder.fingerprint)

    # 5. Sampling: a pipeline of the text encoder and the generator; `imagen(text_encoder, base, sr256)` would add
    # super-resolution. Image i of seed s does not depend on the rest of the batch.
    pipeline = imagen(text_encoder, trained)
    prompts = [caption.text for caption in held_out_captions(8)]
    (images,) = pipeline.sample(prompts, SampleOptions(seed=0))

    # 6. Files: a sample grid, and a folder for `jaxdiff.from_pretrained`.
    grids.write(out / "grid.png", grids.grid(images, prompts, side=128, columns=4))
    save_pretrained(pipeline, out / "weights")
    print(f"{out / 'grid.png'}: {len(images)} held-out captions; weights/ beside it is for experiments.sample")


if __name__ == "__main__":
    run(main)
