"""Train a CLIP from scratch on captioned pictures.

    python -m experiments.clip.train --optimizer muon --learning-rate 4e-3 --weight-decay 0.05 --warmup 50 --steps 1400
    python -m experiments.clip.train --loss sigmoid --out runs/clip-sigmoid
    python -m experiments.clip.evaluate --weights runs/clip/model

The first takes half an hour on 2 CPU cores and finds 70 of 100 held-out pictures by their captions, 81 captions by
their pictures; how the shipped one went on from there is in jaxdiff/weights/tiny/README.md. Run again with the same
folder, it goes on from its last checkpoint. OUT/model holds config.json, model.safetensors and the tokenizer as
transformers' CLIPModel opens them, and is what `--clip` of other scripts reads; OUT/tokenizer the words, from before
the first step on.
"""

import dataclasses
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from experiments.cli import run
from experiments.cores import use_cores
from experiments.text.pretrain import captions_of, save_tokenizer
from jaxdiff.data import sources
from jaxdiff.data.pipeline import Batches, DataConfig, ReadAhead, image_batches
from jaxdiff.models.clip import CLIPTraining, ContrastiveLoss, SigmoidLoss, finished
from jaxdiff.nets import clip as nets
from jaxdiff.nets.clip import CLIPConfig
from jaxdiff.text.tokenizer import PreTrainedTokenizerBase, load_tokenizer, tokenize, train_tokenizer
from jaxdiff.training.distributed import Cluster, alike, gathered, on_process_0, once, start
from jaxdiff.training.lock import locked
from jaxdiff.training.loop import Diverged, Layout, Loaded, TrainConfig, train
from jaxdiff.training.mesh import BATCH_AXES, check_batch, check_processes, make_mesh, parse
from jaxdiff.training.optimizer import AdamW, Muon, OptimizerConfig
from jaxdiff.weights import clip as weights

PRESETS = {"tiny": nets.TINY, "b32": nets.VIT_B_32, "l14": nets.VIT_L_14, "h14": nets.OPEN_VIT_H_14}
NO_MATRICES = ("embedding", "positions", "first", "patches", "projection")
OPTIMIZERS = {
    "adam": lambda decay: AdamW(b2=0.98, eps=1e-6, weight_decay=decay, decay_all=False),
    "muon": lambda decay: Muon(weight_decay=decay, adam_for=NO_MATRICES, decay_all=False),
}
LOSSES = {"contrastive": ContrastiveLoss(), "sigmoid": SigmoidLoss()}


@dataclasses.dataclass(frozen=True)
class Run:
    """The settings of one training run."""

    out: Path = Path("runs/clip")
    """Folder of the run."""
    data: str = "shapes"
    """shapes | emoji | rainbow | folder:PATH | tfds:NAME | records:PATH"""
    preset: Literal["tiny", "b32", "l14", "h14"] = "tiny"
    """Size of both towers."""
    resolution: int | None = None
    """Side of the pictures that it sees; left out: the preset's."""
    patch: int | None = None
    """Side of the image tower's patches in pixels; left out: the preset's."""
    init: Path | None = None
    """Begin with the parameters of a finished run of the same size (its folder), and its tokenizer."""
    tokenizer: str = "trained"
    """`trained` (a new one, from these captions), or a directory or hub id."""
    vocab: int = 512
    """Number of ids of a newly trained tokenizer."""
    loss: Literal["contrastive", "sigmoid"] = "contrastive"
    """CLIP's, or SigLIP's."""
    chunk: int = 1024
    """Columns of logits that are made at a time."""
    steps: int = 1200
    """Updates."""
    batch: int = 128
    """Pairs per update, of all devices together, each compared with all others."""
    optimizer: Literal["adam", "muon"] = "adam"
    """Adam is the paper's; Muon learns more from each picture where pictures are dear."""
    learning_rate: float = 1e-3
    """At its peak."""
    warmup: int = 100
    """Updates from 0 to the peak; afterwards the rate falls to 0 along a cosine."""
    weight_decay: float = 0.2
    """Of kernels and tables, or with muon of the kernels that it updates itself; gains and biases have none."""
    ema_decay: float = 0.99
    """Of the averaged parameters, which are what is kept."""
    seed: int = 0
    """Of the initial parameters and the order of the data."""
    log_every: int = 50
    """Steps between lines of metrics."""
    save_every: int = 200
    """Steps between checkpoints."""
    examples: int = 20_000
    """How many pictures of shapes to draw."""
    held_out: int = 1_000
    """How many held-out ones beside them."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the towers compute in; bfloat16 on accelerators."""
    remat: bool = False
    """Compute blocks again in the backward pass, to save memory."""
    mesh: str = "data=-1"
    """Devices along each axis: copies, fsdp (parameters split), such as data=8,fsdp=4; -1: as many as are left."""
    workers: int = 0
    """Processes that decode pictures; 0: threads alone."""
    data_dir: Path = Path("runs/data")
    """Where prepared data sets live."""
    cluster: Cluster = Cluster()


def main(settings: Run) -> None:
    """Train a CLIP from scratch and write it to OUT/model."""
    processes = start(settings.cluster)
    alike(vars(settings))
    with locked(settings.out):
        train_clip(settings, processes)


def train_clip(settings: Run, processes: int) -> None:
    """All of it, in a folder that is this run's alone."""
    use_cores(settings.batch // processes)
    config, optimizing = preset_of(settings), config_of(settings)
    if settings.batch % processes:
        raise ValueError(f"--batch {settings.batch}: does not divide over {processes} processes")
    mesh = make_mesh(*parse(settings.mesh).sizes)
    check_batch(settings.batch, mesh)
    check_processes(mesh)
    spec, side = sources.parse(settings.data), config.image.resolution
    if isinstance(spec, sources.Shapes):
        spec = sources.Shapes(settings.examples, settings.held_out)
    initial = initial_of(settings)
    source = once(settings.data_dir, lambda: sources.open(spec, side, "train", settings.data_dir))
    words = words_of(settings, spec)
    config = dataclasses.replace(
        config, text=dataclasses.replace(config.text, vocab=len(words), eos_id=words.eos_token_id)
    )
    stream = image_batches(
        source,
        DataConfig(side, settings.batch // processes, seed=settings.seed, captions=True),
        process_index=jax.process_index(),
        process_count=processes,
        read_ahead=ReadAhead(workers=settings.workers),
    )
    stage = CLIPTraining(config, LOSSES[settings.loss], settings.chunk, axes=BATCH_AXES)
    made_of = {name: getattr(settings, name) for name in ("data", "batch", "workers", "tokenizer")}
    made_of |= {"examples": len(source)}
    pairs = Pairs(stream, words, config.text.length)
    if initial is not None and isinstance(stage.compare, SigmoidLoss):
        initial["logit_bias"] = np.float32(stage.compare.bias)
    state = train(stage, pairs, optimizing, settings.out, data=made_of, layout=Layout(mesh), loaded=Loaded(initial))
    params = gathered(state.ema)

    def finish() -> None:
        plain = dataclasses.replace(config, dtype="float32", remat=False)
        weights.export(plain, finished(stage, params), settings.out / "model")
        save_tokenizer(words, settings.out / "model")
        if summary := stream.skipped.summary(len(source)):
            print(summary)
        print(f"{settings.out / 'model'}: a CLIP of {side} pixels, {len(words)} ids")

    on_process_0(finish)


def preset_of(settings: Run) -> CLIPConfig:
    config = PRESETS[settings.preset]
    given = {name: value for name in ("resolution", "patch") if (value := getattr(settings, name)) is not None}
    image = dataclasses.replace(config.image, **given)
    return dataclasses.replace(config, image=image, dtype=settings.dtype, remat=settings.remat)


def initial_of(settings: Run) -> dict | None:
    """The parameters to begin with, on the host, where INIT gives them; a run that goes on has its own."""
    if settings.init is None or any(path.name.isdigit() for path in (settings.out / "checkpoints").glob("*")):
        return None
    return weights.load(settings.init / "model", place=np.asarray)[1]


def config_of(settings: Run) -> TrainConfig:
    if settings.steps < 1 or settings.batch < 2:
        raise ValueError(f"steps {settings.steps}, batch {settings.batch}: at least 1 and 2, as pairs are compared")
    return TrainConfig(
        optimizer=OptimizerConfig(
            kind=OPTIMIZERS[settings.optimizer](settings.weight_decay),
            learning_rate=settings.learning_rate,
            warmup=min(settings.warmup, settings.steps - 1),
            total=settings.steps,
        ),
        steps=settings.steps,
        ema_decay=settings.ema_decay,
        log_every=settings.log_every,
        save_every=settings.save_every,
        seed=settings.seed,
        description="clip",
        stall=settings.cluster.stall,
        stall_exit=settings.cluster.stall_exit,
    )


def words_of(settings: Run, spec: sources.DataSpec) -> PreTrainedTokenizerBase:
    """The tokenizer: trained or loaded once, and the same when the run goes on."""
    kept = settings.out / "tokenizer"

    def begin() -> PreTrainedTokenizerBase:
        if (kept / "tokenizer_config.json").is_file():
            return load_tokenizer(kept)
        if settings.init is not None:
            words = load_tokenizer(settings.init / "model")
        elif settings.tokenizer == "trained":
            words = train_tokenizer(captions_of(spec, settings.data_dir), settings.vocab)
        else:
            words = load_tokenizer(settings.tokenizer)
        if words.eos_token_id is None:
            raise ValueError(f"{settings.tokenizer}: a tokenizer without an end of captions, which CLIP reads")
        save_tokenizer(words, kept)
        return words

    return on_process_0(begin) or load_tokenizer(kept)


class Pairs:
    """Batches of pictures with the token ids of their captions."""

    def __init__(self, stream: Batches, words: PreTrainedTokenizerBase, length: int):
        self._stream, self._words, self._length = stream, words, length

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self._stream)
        return {"image": batch["image"], "ids": tokenize(self._words, list(batch["caption"]), self._length).ids}

    def get_state(self) -> dict:
        return self._stream.get_state()

    def set_state(self, state: dict) -> None:
        self._stream.set_state(state)


if __name__ == "__main__":
    run(main, stopped_by=(Diverged,))
