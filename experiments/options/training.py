"""Groups of training settings shared by all models; a model's own are in `experiments/tasks/`."""

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
    """The training and held-out data."""

    data: tuple[str, ...] = ("shapes",)
    """shapes | emoji | rainbow | folder:PATH | hf:PATH | tfds:NAME | records:PATH; several are mixed."""
    data_weights: tuple[float, ...] = ()
    """Sampling weights of several datasets, such as 3 1; default: by their sizes."""
    image_column: str | None = None
    """Image column of hf:PATH; default: found by its usual names."""
    caption_column: str | None = None
    """Caption column of hf:PATH; default: found by its usual names; "": no captions."""
    examples: int = 20_000
    """Training images of `shapes` to render."""
    held_out: int = 1_000
    """Held-out images of `shapes` to render."""
    limit: int = 0
    """Train on this many examples only, evenly spread over the dataset (an over-fitting test); 0: all."""
    evaluate_data: str | None = None
    """Dataset of the held-out loss, as --data; default: the held-out split of `shapes` or `rainbow`, none for other
    datasets."""
    evaluate_n: int = 64
    """Held-out examples, evenly spread over the dataset; for CLIP and the classifier, full batches of --batch."""
    strict: bool = False
    """Treat an unreadable image or a missing caption as an error instead of a warning."""
    workers: int = 0
    """Processes that decode images; 0: threads only."""
    data_dir: Path = Path("runs/data")
    """Folder of prepared datasets."""

    def spec(self) -> sources.DataSpec:
        """The dataset. ValueError for an unknown one, or a number below 0."""
        for name in ("limit", "workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} {getattr(self, name)}: must be 0 or more")
        if self.evaluate_n < 1:
            raise ValueError(f"--evaluate-n {self.evaluate_n}: at least one example; --evaluate-every 0 measures none")
        spec = sources.parse_several(self.data, self.data_weights or None)
        return sources.changed(spec, self._with_options)

    def held_out_split(self) -> tuple[sources.DataSpec, str] | None:
        """The held-out dataset and its split; None if absent."""
        if self.evaluate_data is not None:
            return self._with_options(sources.parse(self.evaluate_data)), "train"
        spec = self.spec()
        splits: dict[type, str] = {sources.Shapes: "held_out", sources.Rainbow: "test"}
        return (spec, splits[type(spec)]) if type(spec) in splits else None

    @property
    def shown(self) -> str:
        """The datasets as on the command line, in one line."""
        weights = " ".join(f"{weight:g}" for weight in self.data_weights)
        return " ".join(self.data) + (f" --data-weights {weights}" if weights else "")

    def _with_options(self, spec: sources.Single) -> sources.Single:
        """The spec with the sizes and columns of the command line."""
        if isinstance(spec, sources.Shapes):
            return sources.Shapes(self.examples, self.held_out)
        if isinstance(spec, sources.HuggingFace):
            return sources.HuggingFace(spec.path, self.image_column, self.caption_column)
        return spec


@dataclass(frozen=True)
class RunOptions:
    """Length of the run, logging and checkpoints."""

    steps: int = 5000
    """Updates. A run can be extended only if its learning rate has not decayed to 0 (--schedule); otherwise start a new
    run from its parameters with `--init`."""
    batch: int = 32
    """Global batch size: examples per update over all devices."""
    accumulate: int = 1
    """Gradient accumulation: micro-batches per update, to save memory."""
    ema_decay: float = 0.999
    """Decay of the EMA of the parameters, which becomes the model."""
    seed: int = 0
    """Seed of the initial parameters, the data order and the noise."""
    init: Path | None = None
    """Fine-tune: start from the EMA parameters of another run of the same network (its folder, finished or not)."""
    log_every: int = 50
    """Steps between logged metrics."""
    sample_every: int | None = None
    """Steps between sample grids in samples/, for models of images; 0: none. Default: a fifth of --steps, 50 to 500."""
    evaluate_every: int | None = None
    """Steps between evaluations of the held-out loss; 0: none. Default: as --sample-every."""
    save_every: int | None = None
    """Steps between checkpoints. Default: as --sample-every."""
    keep: int = 3
    """Checkpoints to keep."""

    def interval(self, given: int | None) -> int:
        """The given number of steps, or the default for the length of the run."""
        return min(500, max(50, self.steps // 5)) if given is None else given


@dataclass(frozen=True)
class PresetOptimizer:
    """Default optimizer and peak learning rate of a preset."""

    optimizer: str = "adam"
    learning_rate: float = 1e-3


@dataclass(frozen=True)
class OptimizerOptions:
    """Optimizer and learning-rate schedule."""

    optimizer: Literal["adam", "adafactor", "muon"] | None = None
    """Adam and Adafactor are used in the papers; Muon learns more per image from few images. Default: the preset's, or
    adam."""
    learning_rate: float | None = None
    """Peak learning rate; default: the preset's, or 1e-3. Required if --optimizer differs from the preset's."""
    warmup: int | None = None
    """Updates of linear warmup; default: a tenth of the steps."""
    schedule: Literal["cosine", "constant", "stable"] = "cosine"
    """Learning rate after the warmup: cosine decay to 0; constant; or constant with a decay to 0 over the last fifth of
    the steps. A run can be extended while the rate is constant."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    clip: float = 1.0
    """Maximum gradient norm."""

    def config(self, rules: Mapping[str, Rule], steps: int, preset: PresetOptimizer) -> OptimizerConfig:
        """ValueError for an optimizer that the model does not offer, or one that needs a learning rate."""
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
    """The device mesh."""

    mesh: str = "data=-1"
    """Devices along each axis: data (replicas), fsdp (sharded parameters), tensor (sharded layers), such as
    data=8,fsdp=32; -1: all remaining devices."""

    def make(self, batch: int, accumulate: int = 1) -> Mesh:
        """The mesh over all devices. ValueError if it is impossible or does not divide the batch."""
        mesh = make_mesh(*parse(self.mesh).sizes)
        check_batch(batch, mesh, accumulate)
        check_processes(mesh)
        return mesh


@dataclass(frozen=True)
class ComputeOptions:
    """Compute settings of a network, such as dtype and rematerialization; empty if it has none."""


@dataclass(frozen=True)
class TrainSettings:
    """Settings of every training run. Models add their own defaults and groups (`experiments/tasks/`)."""

    out: Path = Path("runs/model")
    """Folder of the run. Started again with the same folder, a run resumes from its last checkpoint."""
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
        """Settings of the training loop. ValueError naming the flag."""
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
            sample_every=run.interval(run.sample_every),
            evaluate_every=run.interval(run.evaluate_every),
            save_every=run.interval(run.save_every),
            keep=run.keep,
            seed=run.seed,
            description=description,
            unit=unit,
            stall=self.cluster.stall,
            stall_exit=self.cluster.stall_exit,
        )

    @property
    def resumes(self) -> bool:
        """Whether the folder has checkpoints to resume from."""
        return any(path.name.isdigit() for path in (self.out / "checkpoints").glob("*"))
