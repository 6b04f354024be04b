"""Settings that the training of every model shares, in groups; a model's own are in `experiments/tasks/`."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jax.sharding import Mesh

from jaxdiff.data import sources
from jaxdiff.training import multihost
from jaxdiff.training.config import TrainConfig
from jaxdiff.training.distributed import Cluster
from jaxdiff.training.mesh import check_batch, check_processes, make_mesh, parse
from jaxdiff.training.optimizer import Adafactor, AdamW, Decay, Muon, OptimizerConfig, StableDecay

Rule = AdamW | Adafactor | Muon
SCHEDULES = {"cosine": Decay.COSINE, "constant": Decay.CONSTANT, "stable": StableDecay()}


@dataclass(frozen=True)
class DataOptions:
    """What is trained on."""

    data: tuple[str, ...] = ("shapes",)
    """shapes | emoji | rainbow | folder:PATH | hf:PATH | tfds:NAME | records:PATH, or several of them, mixed."""
    data_weights: tuple[float, ...] = ()
    """How often each of several is used, such as 3 1; left out: by their numbers of examples."""
    image_column: str | None = None
    """Of hf:PATH, where its name is not a usual one."""
    caption_column: str | None = None
    """Of hf:PATH, where its name is not a usual one, or several could be meant; "": no captions."""
    examples: int = 20_000
    """Images of `shapes` to draw."""
    held_out: int = 1_000
    """Held-out images of `shapes` beside them."""
    limit: int = 0
    """Train on so many examples only, evenly spread over the dataset, to see whether they can be learned; 0: on all."""
    evaluate_data: str | None = None
    """What the held-out loss is measured on, as --data; left out: the held-out split of `shapes` and `rainbow`, and of
    other datasets nothing."""
    evaluate_n: int = 64
    """Held-out examples, evenly spread over them; of CLIP, whose loss belongs to a batch, whole batches."""
    strict: bool = False
    """An image that cannot be read or lacks its caption is an error, not a warning."""
    workers: int = 0
    """Processes that decode images; 0: threads alone."""
    data_dir: Path = Path("runs/data")
    """Where prepared datasets are kept."""

    def spec(self) -> sources.DataSpec:
        """The dataset. ValueError for one that is not known, or a number below 0."""
        for name in ("limit", "workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} {getattr(self, name)}: must be 0 or more")
        if self.evaluate_n < 1:
            raise ValueError(f"--evaluate-n {self.evaluate_n}: at least one example; --evaluate-every 0 measures none")
        spec = sources.parse_several(self.data, self.data_weights or None)
        return sources.changed(spec, self._told)

    def held_out_split(self) -> tuple[sources.DataSpec, str] | None:
        """The held-out dataset, and its split; None where there is none."""
        if self.evaluate_data is not None:
            return self._told(sources.parse(self.evaluate_data)), "train"
        spec = self.spec()
        splits: dict[type, str] = {sources.Shapes: "held_out", sources.Rainbow: "test"}
        return (spec, splits[type(spec)]) if type(spec) in splits else None

    @property
    def shown(self) -> str:
        """As it was told, in one line."""
        weights = " ".join(f"{weight:g}" for weight in self.data_weights)
        return " ".join(self.data) + (f" --data-weights {weights}" if weights else "")

    def _told(self, spec: sources.Single) -> sources.Single:
        """With the sizes and columns that the command line says."""
        if isinstance(spec, sources.Shapes):
            return sources.Shapes(self.examples, self.held_out)
        if isinstance(spec, sources.HuggingFace):
            return sources.HuggingFace(spec.path, self.image_column, self.caption_column)
        return spec


@dataclass(frozen=True)
class RunOptions:
    """How long, and what is kept."""

    steps: int = 5000
    """Updates. A run whose learning rate has not fallen to 0 (--schedule) may be given more of them; any other begins
    anew from its parameters with `--init`."""
    batch: int = 32
    """Examples per update, of all devices together."""
    accumulate: int = 1
    """Parts that a batch is taken in, one after the other, to save memory."""
    ema_decay: float = 0.999
    """Decay of the averaged parameters, which are what is kept."""
    seed: int = 0
    """Of the initial parameters, the order of the data and the noise."""
    init: Path | None = None
    """Begin with the averaged parameters of another run of the same network (its folder, finished or not), to
    fine-tune them."""
    log_every: int = 50
    """Steps between lines of metrics."""
    sample_every: int = 500
    """Steps between grids in samples/, where the model samples images; 0: none."""
    evaluate_every: int = 500
    """Steps between measurements of the held-out loss; 0: none."""
    save_every: int = 500
    """Steps between checkpoints."""
    keep: int = 3
    """Checkpoints kept."""


@dataclass(frozen=True)
class PresetOptimizer:
    """What a network of a certain size is trained with where the command line does not say."""

    optimizer: str = "adam"
    learning_rate: float = 1e-3


@dataclass(frozen=True)
class OptimizerOptions:
    """How parameters are updated."""

    optimizer: Literal["adam", "adafactor", "muon"] | None = None
    """Adam and Adafactor are the papers'; Muon learns more from each image where images are few. Left out: the
    preset's, or adam."""
    learning_rate: float | None = None
    """At its peak; left out: the preset's, or 1e-3. One for another optimizer than the preset's must be given."""
    warmup: int | None = None
    """Updates from 0 to the peak; left out: a tenth of the steps."""
    schedule: Literal["cosine", "constant", "stable"] = "cosine"
    """The learning rate after that: falls to 0 along a cosine; stays; stays, and falls to 0 over the last fifth of the
    steps. While it stays, more steps can be asked of a run."""
    weight_decay: float = 0.0
    """Decoupled from the gradient."""
    clip: float = 1.0
    """Largest norm of the gradient."""

    def config(self, rules: Mapping[str, Rule], steps: int, preset: PresetOptimizer) -> OptimizerConfig:
        """ValueError for an optimizer that is not among the model's, or one without its learning rate."""
        name, rate = self.optimizer or preset.optimizer, self.learning_rate
        if name not in rules:
            raise ValueError(f"--optimizer {name}: this model has {', '.join(rules)}")
        if rate is None:
            if name != preset.optimizer:
                raise ValueError(
                    f"--optimizer {name}: needs a --learning-rate; the preset's {preset.learning_rate:g} is for "
                    f"{preset.optimizer}"
                )
            rate = preset.learning_rate
        warmup = steps // 10 if self.warmup is None else self.warmup
        return OptimizerConfig(
            kind=dataclasses.replace(rules[name], weight_decay=self.weight_decay),
            learning_rate=rate,
            warmup=min(warmup, steps - 1),
            total=steps,
            decay=SCHEDULES[self.schedule],
            clip=self.clip,
        )


@dataclass(frozen=True)
class MeshOptions:
    """How training is split over devices."""

    mesh: str = "data=-1"
    """Devices along each axis: data (copies), fsdp (parameters split), tensor (layers split), such as data=8,fsdp=32;
    -1: as many as the others leave."""

    def make(self, batch: int, accumulate: int = 1) -> Mesh:
        """The mesh over all devices. ValueError where it cannot be, or the batch does not divide over it."""
        mesh = make_mesh(*parse(self.mesh).sizes)
        check_batch(batch, mesh, accumulate)
        check_processes(mesh)
        return mesh


@dataclass(frozen=True)
class ComputeOptions:
    """How the network is computed, beside its own settings: empty for one that is computed in one way alone."""


@dataclass(frozen=True)
class TrainSettings:
    """What every training run is asked. Models have their own defaults, and further groups (`experiments/tasks/`)."""

    out: Path = Path("runs/model")
    """Folder of the run; run again with the same one, it goes on from its last checkpoint."""
    preset: str = "tiny"
    """Size of the network."""
    run: RunOptions = RunOptions()
    dataset: DataOptions = DataOptions()
    optimization: OptimizerOptions = OptimizerOptions()
    compute: ComputeOptions = ComputeOptions()
    devices: MeshOptions = MeshOptions()
    cluster: Cluster = Cluster()

    def config(
        self,
        rules: Mapping[str, Rule],
        description: str,
        unit: str = "images",
        preset: PresetOptimizer = PresetOptimizer(),
    ) -> TrainConfig:
        """For the loop. ValueError naming the flag."""
        run = self.run
        if run.steps < 1 or run.batch < 1:
            raise ValueError(f"--steps {run.steps}, --batch {run.batch}: both must be at least 1")
        if run.batch % multihost.count():
            raise ValueError(f"--batch {run.batch}: does not divide over {multihost.count()} processes")
        return TrainConfig(
            optimizer=self.optimization.config(rules, run.steps, preset),
            steps=run.steps,
            accumulate=run.accumulate,
            ema_decay=run.ema_decay,
            log_every=run.log_every,
            sample_every=run.sample_every,
            evaluate_every=run.evaluate_every,
            save_every=run.save_every,
            keep=run.keep,
            seed=run.seed,
            description=description,
            unit=unit,
            stall=self.cluster.stall,
            stall_exit=self.cluster.stall_exit,
        )

    @property
    def goes_on(self) -> bool:
        """Whether the folder has checkpoints, from which the run goes on."""
        return any(path.name.isdigit() for path in (self.out / "checkpoints").glob("*"))
