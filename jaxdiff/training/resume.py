"""How long a run may become when it goes on: what its learning rate allows.

`steps` is no setting that must stay. A constant rate goes on for as long as is asked. A rate that has not begun to fall
(`optimizer.StableDecay`) may fall earlier, later or not at all. One that has fallen to 0 teaches nothing more.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxdiff.core.settings import difference, qualified_name
from jaxdiff.training.optimizer import Decay, OptimizerConfig, Optimizers, StableDecay


class RunFinishedError(ValueError):
    """More steps are asked of a run whose learning rate has fallen to 0.

    step: that it is at. asked: the steps that were asked for. out: its folder.
    """

    def __init__(self, step: int, asked: int, out: Path) -> None:
        super().__init__(
            f"{out}: this run is finished: by step {step} its learning rate has fallen to 0, and {asked} steps would "
            "teach it nothing; begin a new run, in another folder, from its averaged parameters"
        )
        self.step, self.asked, self.out = step, asked, out

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.step, self.asked, self.out)


def comparable(optimizer: Optimizers) -> Optimizers:
    """What of it must be the same where a run goes on: `total` says nothing of a constant rate."""
    if isinstance(optimizer, OptimizerConfig):
        return _comparable(optimizer)
    return {label: _comparable(each) for label, each in optimizer.items()}


def _comparable(config: OptimizerConfig) -> OptimizerConfig:
    return replace(config, total=OptimizerConfig.total) if config.decay is Decay.CONSTANT else config


def adapted(
    step: int, saved: Mapping[str, Any], given: Mapping[str, Any], optimizer: Optimizers, steps: int, out: Path
) -> Mapping[str, Any]:
    """The settings saved at `step` (flat, as `given`), with the given `steps`, and with the given schedule where up to
    that step it is the same.

    Raises RunFinishedError where more are asked of a run that has all its steps and whose rates have fallen to 0. What
    else differs is left to be compared.
    """
    asked_before, saved = saved.get("steps", step), {**saved, "steps": steps}
    configs = _named(optimizer)
    before = {name: known for name in configs if (known := _saved_schedule(saved, name)) is not None}
    if len(before) < len(configs):
        return saved
    alike = difference(_with_schedules(saved, given, configs), given) is None
    if alike and max(known.end for known in before.values()) <= step < steps and step >= asked_before:
        raise RunFinishedError(step, steps, out)
    same = [name for name in configs if step <= min(before[name].stable_until, configs[name].stable_until)]
    return _with_schedules(saved, given, same)


def _named(optimizer: Optimizers) -> dict[str, OptimizerConfig]:
    """Each optimizer by its name among the flat settings."""
    if isinstance(optimizer, OptimizerConfig):
        return {"optimizer": optimizer}
    return {f"optimizer.{label}": each for label, each in optimizer.items()}


def _with_schedules(saved: Mapping[str, Any], given: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The saved settings with the given schedules of the optimizers of these names."""
    taken = dict(saved)
    for name in names:
        taken = {key: value for key, value in taken.items() if not _of_schedule(key, name)}
        taken |= {key: value for key, value in given.items() if _of_schedule(key, name)}
    return taken


def _of_schedule(key: str, name: str) -> bool:
    """Whether a flat setting says how the rate of the optimizer of that name falls."""
    return key in (f"{name}.total", f"{name}.decay") or key.startswith(f"{name}.decay.")


def _saved_schedule(saved: Mapping[str, Any], name: str) -> OptimizerConfig | None:
    """What the saved settings say of a schedule; None where this version does not know it."""
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
