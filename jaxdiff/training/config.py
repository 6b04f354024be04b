"""Settings of a training run."""

from dataclasses import dataclass, field

from jaxdiff.training.optimizer import OptimizerConfig, Optimizers


@dataclass(frozen=True)
class TrainConfig:
    """Settings of the training loop.

    Raises ValueError for an invalid setting; the message begins with the name of the field.
    """

    optimizer: Optimizers = field(default_factory=OptimizerConfig)  # one for all arrays, or one per label
    steps: int = 2_500_000
    accumulate: int = 1  # microbatches per batch
    ema_decay: float = 0.9999  # a convention; the paper gives no value
    ema_warmup: bool = True  # decay min(ema_decay, (1 + n) / (10 + n)) after n updates
    log_every: int = 100
    sample_every: int = 0  # steps between calls of `Hooks.sample`; 0: never
    evaluate_every: int = 0  # steps between evaluations of `Hooks.held_out`; 0: never
    save_every: int = 1000
    keep: int = 3  # checkpoints
    seed: int = 0
    stall: float = 0.0  # seconds without progress before a report with stacks; 0: never
    stall_exit: float = 0.0  # seconds before the process, and with it the run, ends; 0: never
    progress: bool = True  # whether a bar is shown
    description: str = ""  # of the bar
    unit: str = "images"  # name of the examples, in the plural: pairs, captions

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: must be at least 1")
        for name in ("stall", "stall_exit"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name)}: must be 0 (never) or more")
        for name in ("sample_every", "evaluate_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name)}: must be 0 (never) or more")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed {self.seed}: must be at least 0 and below 2**32")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay {self.ema_decay}: must be at least 0 and below 1")
        if not self.unit.isidentifier():
            raise ValueError(f"unit {self.unit!r}: must be a word, such as images: metrics are named after it")
