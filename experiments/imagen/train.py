"""Train one stage of an Imagen cascade.

    python -m experiments.imagen.train --stage base64 --text runs/t5/encoder --data shapes --out runs/base64
    python -m experiments.imagen.train --stage sr256 --data shapes --out runs/sr256
    python -m experiments.imagen.train --stage sr1024 --data shapes --examples 2000 --out runs/sr1024 --init runs/sr256

Run again with the same folder, it goes on from its last checkpoint. The folder gets checkpoints/, metrics.jsonl,
tensorboard/, loss.png, samples/ (a grid now and then) and at the end model/, which `experiments.imagen.sample` reads as
part of a cascade. Costs of the shipped models are in jaxdiff/weights/tiny/README.md.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm import tqdm

from experiments.cli import run
from experiments.cores import use_cores
from experiments.imagen import presets
from experiments.imagen.samples import Samples, Spread
from jaxdiff.core.files import usable
from jaxdiff.core.trees import check_tree
from jaxdiff.data import sources
from jaxdiff.data.embeddings import Embeddings, open_embeddings, store_embeddings
from jaxdiff.data.example import Source, captions
from jaxdiff.data.pipeline import DataConfig, ReadAhead, image_batches
from jaxdiff.diffusion.losses import PowerSNR
from jaxdiff.diffusion.time_samplers import LogSNRRange, TimeSampler, UniformTimes
from jaxdiff.models.conditioners import LowResConditioner, TextConditioner
from jaxdiff.models.diffusion import DiffusionModel, check_crop
from jaxdiff.models.sampling import TrainedModel
from jaxdiff.nets.unet import Remat
from jaxdiff.text.encoder import TextEncoder
from jaxdiff.training import multihost
from jaxdiff.training.checkpoints import load_ema
from jaxdiff.training.distributed import Cluster, alike, check_shared, gathered, on_process_0, once, start
from jaxdiff.training.lock import locked
from jaxdiff.training.loop import Diverged, Layout, Loaded, TrainConfig, train
from jaxdiff.training.mesh import check_batch, check_processes, make_mesh, parse
from jaxdiff.training.optimizer import Adafactor, AdamW, Muon, OptimizerConfig
from jaxdiff.training.state import abstract_params, abstract_state
from jaxdiff.weights.imagen import SHIPPED, load_params, save_model
from jaxdiff.weights.t5 import load_text_encoder

OPTIMIZERS = {"adam": AdamW(b2=0.99), "adafactor": Adafactor(), "muon": Muon()}


@dataclasses.dataclass(frozen=True)
class Run:
    """The settings of one training run."""

    stage: Literal["base32", "base64", "sr256", "sr1024"]
    """Which stage."""
    out: Path
    """Folder of the run."""
    preset: str = "tiny"
    """Its size: quick | tiny | 300m | 500m | 2b for base64, micro | small | medium | tiny for base32, tiny | paper for
    the others."""
    data: str = "shapes"
    """shapes | emoji | rainbow | folder:PATH | tfds:NAME | records:PATH"""
    text: str | None = None
    """The frozen text encoder: a directory or hub id in the transformers layout; left out: the shipped tiny one, or
    whichever made EMBEDDINGS. Any width will do; the paper's is T5-XXL's, 4096 (google/flan-t5-xxl). `none`:
    super-resolution learns from pictures alone."""
    text_length: int | None = None
    """Tokens a caption; left out: 24 for the tiny presets, 128 for the others, or as many as EMBEDDINGS have."""
    text_dtype: Literal["float32", "bfloat16"] = "float32"
    """What the text encoder is kept and computed in; bfloat16 halves the memory of a large one."""
    embeddings: Path | None = None
    """A folder that experiments.text.embed wrote: no text encoder is loaded. Without it the captions are embedded once
    and stored below DATA_DIR."""
    init: Path | None = None
    """Begin with the averaged parameters of another run of the same network (its folder, finished or not, or the
    model/ in it), to fine-tune them."""
    logsnr: tuple[float, float] | None = None
    """Train at log-SNRs spread evenly over this range; left out: where the preset trains. A stage that draws well but
    does not do what its captions say learns it faster where that is decided: -5.5 to 0 for forms at 64 pixels."""
    logsnr_fraction: float = 1.0
    """Fraction of the training that is spent in that range; the rest is where the preset trains."""
    snr_power: float | None = None
    """Weight the x0 error by SNR to this power (0: the same at every noise level); left out: the preset's weights."""
    text_dropout: float | None = None
    """Share of captions left out, so that guidance has something to lead away from; left out: the preset's."""
    max_aug_level: float | None = None
    """Highest level of the noise put on super-resolution's input; left out: the preset's."""
    steps: int = 5000
    """Updates, over which the learning rate falls to 0: a finished run is not made longer, but another begins with
    `--init`."""
    batch: int = 32
    """Pictures per update, of all devices together."""
    accumulate: int = 1
    """Parts that a batch is taken in, one after the other, to save memory."""
    crop: int | None = None
    """Side of super-resolution's training crops in pixels; 0: whole pictures; left out: a quarter of the picture."""
    optimizer: Literal["adam", "adafactor", "muon"] = "adam"
    """Adam and Adafactor are the paper's; Muon learns more from each picture where pictures are dear."""
    learning_rate: float = 1e-3
    """At its peak."""
    warmup: int = 200
    """Updates from 0 to the peak; afterwards the rate falls to 0 along a cosine."""
    weight_decay: float = 0.0
    """Of all parameters, decoupled from the gradient."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    ema_decay: float = 0.999
    """Of the averaged parameters, which are what is kept."""
    seed: int = 0
    """Of the initial parameters, the order of the data and the noise."""
    log_every: int = 50
    """Steps between lines of metrics."""
    sample_every: int = 500
    """Steps between grids in samples/; 0: none."""
    save_every: int = 500
    """Steps between checkpoints."""
    keep: int = 3
    """Checkpoints kept."""
    examples: int = 20_000
    """How many pictures of shapes to draw."""
    held_out: int = 1_000
    """How many held-out ones to draw beside them."""
    limit: int = 0
    """Train on so many examples only, evenly spread over the set, to see whether they can be learned; 0: on all."""
    strict: bool = False
    """A picture that cannot be read or lacks its caption is an error, not a warning."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the network computes in; parameters and optimizer stay float32. bfloat16 on accelerators."""
    remat: Remat = "none"
    """What the backward pass computes again to save memory: none | outputs (norms, activations, attention) | blocks
    (all of them)."""
    scan: bool = False
    """Equal blocks in a row as one loop, which compiles faster (sr256 and sr1024)."""
    mesh: str = "data=-1"
    """Devices along each axis: copies, fsdp (parameters split), tensor (layers split), such as data=8,fsdp=32; -1: as
    many as the others leave."""
    rows: bool = False
    """The tensor axis splits the rows of pictures instead of layers: for whole pictures of 1024 pixels."""
    workers: int = 0
    """Processes that decode pictures; 0: threads alone."""
    data_dir: Path = Path("runs/data")
    """Where prepared data sets live."""
    cluster: Cluster = Cluster()


def main(settings: Run) -> None:
    """Train one stage of an Imagen cascade and write its averaged parameters to OUT/model."""
    processes = start(settings.cluster)  # before anything touches a device
    alike(vars(settings))
    with locked(settings.out):
        train_stage(settings, processes)


def train_stage(settings: Run, processes: int) -> None:
    """All of it, in a folder that is this run's alone."""
    use_cores(settings.batch // max(1, settings.accumulate * processes))
    # What is wrong is said before anything is drawn, embedded or written.
    stage, sampling, config = stage_of(settings), presets.sampling(settings.stage, settings.preset), config_of(settings)
    mesh = make_mesh(*parse(settings.mesh).sizes)
    check_batch(settings.batch, mesh, settings.accumulate)
    check_processes(mesh)
    encoder, embeddings = text_of(settings, stage)
    stage = reading(settings, stage, encoder or embeddings)
    initial = initial_of(settings, stage, mesh)
    if processes > 1 or settings.out.is_file():
        check_shared(usable(settings.out))
    source = once(settings.data_dir, lambda: open_source(settings, stage))
    if encoder is not None:
        embeddings = once(settings.data_dir, lambda: stored_embeddings(settings, source, encoder))
    del encoder  # what is stored is enough, and a T5-XXL beside the training would take 19 GB
    stream = batches(settings, stage, source, embeddings)
    state = train(
        presets.split(stage, settings.remat, settings.scan, settings.rows),
        stream,
        config,
        settings.out,
        data=data_of(settings, stage, source, embeddings),
        layout=Layout(mesh, presets.placement(stage, settings.rows)),
        loaded=Loaded(initial),
        sample_hook=Samples(stage, sampling, source, embeddings, settings.out / "samples"),
    )
    # How it was computed in training is no part of what was learned.
    stage = presets.executed(stage, dtype="float32")
    made_by = None if embeddings is None else embeddings.encoder
    params = gathered(state.ema)

    def finish() -> None:
        save_model(TrainedModel(stage, params, sampling, made_by), settings.out / "model")
        if summary := stream.skipped.summary(len(source)):
            share = f" (in the share of process 0 of {processes})" if processes > 1 else ""
            print(f"{summary}{share}")
        print(f"{settings.out / 'model'}: the averaged parameters of step {settings.steps}")

    on_process_0(finish)


def stage_of(settings: Run) -> DiffusionModel:
    """The preset with what the command line changes of it."""
    stage = presets.executed(presets.stage(settings.stage, settings.preset), dtype=settings.dtype)
    for option, conditioner, lacks in (
        ("text_dropout", stage.text, "reads no text"),
        ("max_aug_level", stage.low_res, "enlarges nothing"),
    ):
        if getattr(settings, option) is not None and conditioner is None:
            flag = f"--{option.replace('_', '-')}"
            raise ValueError(f"{flag} {getattr(settings, option)}: {settings.stage} {settings.preset} {lacks}")
    changes: dict[str, Any] = {"conditioners": tuple(_conditioner(each, settings) for each in stage.conditioners)}
    if settings.logsnr is not None:
        changes["time_sampler"] = time_sampler(stage, *settings.logsnr, settings.logsnr_fraction)
    if settings.snr_power is not None:
        power = stage.weighting if isinstance(stage.weighting, PowerSNR) else PowerSNR()
        changes["weighting"] = dataclasses.replace(power, power=settings.snr_power)
    stage = dataclasses.replace(stage, **changes)
    if crop := crop_of(settings, stage):
        check_crop(stage, crop)
    return stage


def _conditioner(
    conditioner: TextConditioner | LowResConditioner, settings: Run
) -> TextConditioner | LowResConditioner:
    """With what the command line changes of it."""
    if isinstance(conditioner, TextConditioner):
        changed = {"dropout": settings.text_dropout}
    else:
        changed = {"max_level": settings.max_aug_level}
    return dataclasses.replace(conditioner, **{name: value for name, value in changed.items() if value is not None})


def config_of(settings: Run) -> TrainConfig:
    if settings.steps < 1 or settings.batch < 1:
        raise ValueError(f"steps {settings.steps}, batch {settings.batch}: both must be at least 1")
    if settings.batch % multihost.count():
        raise ValueError(f"--batch {settings.batch}: does not divide over {multihost.count()} processes")
    for name in ("limit", "workers"):
        if getattr(settings, name) < 0:
            raise ValueError(f"{name} {getattr(settings, name)}: must be 0 or more")
    if settings.text_length is not None and settings.text_length < 1:
        raise ValueError(f"text_length {settings.text_length}: must be at least 1")
    return TrainConfig(
        optimizer=OptimizerConfig(
            kind=dataclasses.replace(OPTIMIZERS[settings.optimizer], weight_decay=settings.weight_decay),
            learning_rate=settings.learning_rate,
            warmup=min(settings.warmup, settings.steps - 1),
            total=settings.steps,
            clip=settings.clip,
        ),
        steps=settings.steps,
        accumulate=settings.accumulate,
        ema_decay=settings.ema_decay,
        log_every=settings.log_every,
        sample_every=settings.sample_every,
        save_every=settings.save_every,
        keep=settings.keep,
        seed=settings.seed,
        description=settings.stage,
        stall=settings.cluster.stall,
        stall_exit=settings.cluster.stall_exit,
    )


def data_of(settings: Run, stage: DiffusionModel, source: Source, embeddings: Embeddings | None) -> dict[str, Any]:
    """What a run's batches are made of: run again with something else, it would not be the same run."""
    made_of = {name: getattr(settings, name) for name in ("data", "batch", "workers")}
    whole = source.source if isinstance(source, Spread) else source
    made_of |= {"crop": crop_of(settings, stage), "examples": len(source), "of": len(whole)}
    return made_of | {"text": None if embeddings is None else embeddings.encoder}


def initial_of(settings: Run, stage: DiffusionModel, mesh: Mesh | None = None) -> dict | None:
    """The parameters to begin with, on the host, where INIT gives them; a run that goes on has its own."""
    if settings.init is None or any(path.name.isdigit() for path in (settings.out / "checkpoints").glob("*")):
        return None
    checkpoints = settings.init / "checkpoints"
    if checkpoints.is_dir() and multihost.count() > 1:  # all of them read it together
        parts = load_ema(checkpoints, abstract_state(stage, config_of(settings).optimizer, mesh).ema)
        return jax.tree.map(lambda leaf: multihost_utils.process_allgather(leaf, tiled=True), parts)
    if checkpoints.is_dir():
        params = load_ema(checkpoints)
        check_tree(params, abstract_params(stage), str(checkpoints))
    else:
        params = load_params(stage, settings.init / "model.safetensors")
    return jax.tree.map(np.asarray, params)


def time_sampler(stage: DiffusionModel, low: float, high: float, fraction: float) -> LogSNRRange:
    """A fraction of the training in another range, the rest where the stage has it. ValueError where its schedule has
    no such log-SNRs."""
    lowest, highest = float(stage.schedule.logsnr(1.0)), float(stage.schedule.logsnr(0.0))
    if not (low < highest and high > lowest):
        raise ValueError(f"--logsnr {low:g} {high:g}: the schedule's lie between {lowest:.3g} and {highest:.3g}")
    rest: TimeSampler = UniformTimes() if fraction == 1.0 else stage.time_sampler
    return LogSNRRange(low, high, fraction, rest)


def open_source(settings: Run, stage: DiffusionModel, split: str = "train") -> Source:
    """The pictures, at the stage's resolution where the set is drawn."""
    spec = sources.parse(settings.data)
    if isinstance(spec, sources.Shapes):
        spec = sources.Shapes(settings.examples, settings.held_out)
    source = sources.open(spec, stage.side, split, settings.data_dir)
    return Spread(source, settings.limit) if 0 < settings.limit < len(source) else source


def text_of(settings: Run, stage: DiffusionModel) -> tuple[TextEncoder | None, Embeddings | None]:
    """The encoder, where captions are still to be embedded, or the embeddings that EMBEDDINGS names; without text
    neither. ValueError for embeddings of another length than is asked for, or that TEXT has not made."""
    if stage.text is None:
        return None, None
    if settings.text == "none":
        if stage.low_res is None:
            raise ValueError("--text none: only super-resolution can do without text")
        return None, None
    if settings.embeddings is None:
        length = settings.text_length or presets.READS[settings.preset][0]
        return load_text_encoder(settings.text or str(SHIPPED / "text"), length, settings.text_dtype), None
    embeddings = open_embeddings(settings.embeddings)
    if settings.text_length not in (None, embeddings.length):
        raise ValueError(
            f"{embeddings.path}: embeddings of {embeddings.length} tokens a caption, not of --text-length "
            f"{settings.text_length}: store them again with that length"
        )
    if settings.text is not None:
        encoder = load_text_encoder(settings.text, embeddings.length, settings.text_dtype, place=np.asarray)
        embeddings = open_embeddings(settings.embeddings, encoder.fingerprint)
    return None, embeddings


def reading(settings: Run, stage: DiffusionModel, text: TextEncoder | Embeddings | None) -> DiffusionModel:
    """The stage for the text embeddings that it is trained on; without any, for those that its preset is meant for."""
    length, width = presets.READS[settings.preset] if text is None else (text.length, text.width)
    return stage.reading(length, width)


def stored_embeddings(settings: Run, source: Source, encoder: TextEncoder) -> Embeddings:
    """The stored embeddings of the source's captions, computed now where they are not there yet."""
    made_by = encoder.fingerprint
    name = "".join(c if c.isalnum() else "-" for c in settings.data)
    limited = f"-of-{len(source.source)}" if isinstance(source, Spread) else ""
    path = settings.data_dir / "embeddings" / f"{name}-{len(source)}{limited}-{made_by}"
    if (path / "embeddings.json").is_file():
        try:
            return open_embeddings(path, made_by)
        except (ValueError, FileNotFoundError):  # begun and not finished, or without a part that was damaged: go on
            pass
    with tqdm(total=len(source), desc="embed captions", unit="caption") as bar:
        return store_embeddings(captions(source), encoder.encode, path, encoder=made_by, progress=bar.update)


def batches(settings: Run, stage: DiffusionModel, source: Source, embeddings: Embeddings | None):
    """This process's share of the batches; super-resolution on crops of a quarter of the picture's side by default."""
    config = DataConfig(
        stage.side,
        settings.batch // jax.process_count(),
        low_resolution=stage.side // stage.factor if stage.low_res is not None else None,
        crop=crop_of(settings, stage),
        seed=settings.seed,
        caption_optional=stage.low_res is not None,
        strict=settings.strict,
    )
    return image_batches(
        source,
        config,
        embeddings,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        read_ahead=ReadAhead(workers=settings.workers),
    )


def crop_of(settings: Run, stage: DiffusionModel) -> int | None:
    if stage.low_res is None:
        return None
    return stage.side // 4 if settings.crop is None else settings.crop or None


if __name__ == "__main__":
    run(main, stopped_by=(Diverged,))
