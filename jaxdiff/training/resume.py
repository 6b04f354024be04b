"""Changing the number of steps of a resumed run, as its learning-rate schedule allows.

`steps` may change between starts. A constant rate allows any number. A rate that has not started to decay
(`optimizer.StableDecay`) may decay earlier, later or not at all. After it has decayed to 0, more steps are an error.
The warmup may change once it is over: its default may depend on the number of steps.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxdiff.core.settings import difference, qualified_name
from jaxdiff.training.optimizer import Decay, OptimizerConfig, Optimizers, StableDecay


class RunFinishedError(ValueError):
    """More steps were requested of a run whose learning rate has decayed to 0.

    step: the run's step. asked: the requested steps. out: the run's folder.
    """

    def __init__(self, step: int, asked: int, out: Path) -> None:
        super().__init__(
            f"{out}: this run is finished: by step {step} its learning rate has fallen to 0, so {asked} steps would "
            "change nothing; start a new run, in another folder"
        )
        self.step, self.asked, self.out = step, asked, out

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.step, self.asked, self.out)


def comparable(optimizer: Optimizers) -> Optimizers:
    """The settings that must be equal when a run resumes: without `total` for a constant rate."""
    if isinstance(optimizer, OptimizerConfig):
        return _comparable(optimizer)
    return {label: _comparable(each) for label, each in optimizer.items()}


def _comparable(config: OptimizerConfig) -> OptimizerConfig:
    return replace(config, total=OptimizerConfig.total) if config.decay is Decay.CONSTANT else config


def adapted(
    step: int, saved: Mapping[str, Any], given: Mapping[str, Any], optimizer: Optimizers, steps: int, out: Path
) -> Mapping[str, Any]:
    """The settings saved at `step` (flat, like `given`), with the given `steps`, and with those given schedules that
    agree with the saved ones up to that step.

    Raises RunFinishedError if more steps are requested of a complete run whose rates have decayed to 0. Other
    differences are left for the caller's comparison.
    """
    asked_before, saved = saved.get("steps", step), {**saved, "steps": steps}
    configs = _named(optimizer)
    before = {name: schedule for name in configs if (schedule := _saved_schedule(saved, name)) is not None}
    if len(before) < len(configs):
        return saved
    alike = difference(_with_schedules(saved, given, configs), given) is None
    if alike and max(schedule.end for schedule in before.values()) <= step < steps and step >= asked_before:
        raise RunFinishedError(step, steps, out)
    same = [name for name, config in configs.items() if _agree(before[name], config, step)]
    return _with_schedules(saved, given, same)


def _agree(before: OptimizerConfig, after: OptimizerConfig, step: int) -> bool:
    """Whether both schedules have the same rates from `step` on to the first decay, and `step` lies before it."""
    warm = before.warmup == after.warmup or step >= max(before.warmup, after.warmup)
    return warm and step <= min(before.stable_until, after.stable_until)


def _named(optimizer: Optimizers) -> dict[str, OptimizerConfig]:
    """Each optimizer by its name in the flat settings."""
    if isinstance(optimizer, OptimizerConfig):
        return {"optimizer": optimizer}
    return {f"optimizer.{label}": each for label, each in optimizer.items()}


def _with_schedules(saved: Mapping[str, Any], given: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The saved settings with the given schedules for the optimizers `names`."""
    merged = dict(saved)
    for name in names:
        merged = {key: value for key, value in merged.items() if not _of_schedule(key, name)}
        merged |= {key: value for key, value in given.items() if _of_schedule(key, name)}
    return merged


def _of_schedule(key: str, name: str) -> bool:
    """Whether a flat setting belongs to the warmup or decay of the optimizer `name`."""
    return key in (f"{name}.warmup", f"{name}.total", f"{name}.decay") or key.startswith(f"{name}.decay.")


def _saved_schedule(saved: Mapping[str, Any], name: str) -> OptimizerConfig | None:
    """The schedule in the saved settings; None if this version does not support it."""
    kinds: dict[Any, Any] = {f"{qualified_name(Decay)}.{decay.name}": decay for decay in Decay}
    try:
        if saved[f"{name}.decay"] == qualified_name(StableDecay):
            decay = StableDecay(saved[f"{name}.decay.fraction"])
        else:
            decay = kinds[saved[f"{name}.decay"]]
        rates = {each: saved[f"{name}.{each}"] for each in ("learning_rate", "warmup", "total")}
        return OptimizerConfig(decay=decay, **rates)
    except (KeyError, TypeError, ValueError):
        return None
