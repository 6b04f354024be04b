"""PEFT's settings of a LoRA: in a file's metadata, as diffusers writes them, or in adapter_config.json beside it."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxdiff.core import json_files
from jaxdiff.core.messages import plain, quoted
from jaxdiff.models.lora import MODEL, TEXT
from jaxdiff.weights import hub

KEY = "lora_adapter_metadata"
"""The name of the settings in the metadata: JSON, each name with the prefix of its network."""
NETWORKS = {"unet": MODEL, "text_encoder": TEXT[0], "text_encoder_2": TEXT[1]}
ALPHA = 8
"""PEFT's default."""


class Config(NamedTuple):
    """alpha of all modules but those in `patterns`, a pattern being the end of a module's name or, after "^", all of
    it. by_root: the scale is alpha / √r instead of alpha / r (rsLoRA, arXiv 2312.03732)."""

    default: float
    patterns: dict[str, float]
    by_root: bool

    def alpha(self, module: str, rank: int) -> float:
        """For a scale of alpha / rank."""
        names = module, module.removeprefix("text_model.")
        fits = (value for pattern, value in self.patterns.items() if any(_fits(pattern, name) for name in names))
        return next(fits, self.default) * (math.sqrt(rank) if self.by_root else 1.0)


def _fits(pattern: str, module: str) -> bool:
    if pattern.startswith("^"):
        return module == pattern[1:]
    return module == pattern or module.endswith(f".{pattern}")


def read(file: Path, metadata: Mapping[str, str]) -> dict[str, Config]:
    """The settings of each network that has some; empty without any. ValueError that names an unsupported one."""
    beside = file.parent / "adapter_config.json"
    if KEY in metadata:
        values = json_files.parse_object(metadata[KEY], str(file), KEY)
        groups: dict[str, dict[str, Any]] = {}
        for name, value in values.items():
            network, _, setting = name.partition(".")
            if network in NETWORKS:
                groups.setdefault(NETWORKS[network], {})[setting] = value
        return {network: _config(group, str(file)) for network, group in groups.items()}
    if file.name == "adapter_model.safetensors" and beside.is_file():
        return dict.fromkeys(NETWORKS.values(), _config(hub.read_json(beside, "LoRA"), str(beside)))
    return {}


def _config(group: Mapping[str, Any], where: str) -> Config:
    if group.get("use_dora"):
        raise ValueError(f"{where}: use_dora is set, only LoRA is supported, not DoRA")
    if group.get("peft_type", "LORA") not in ("LORA", None):
        raise ValueError(f"{where}: peft_type = {quoted(group['peft_type'])} is not supported, only LORA")
    patterns = group.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{where}: alpha_pattern = {quoted(patterns)} is not a group of numbers")
    default = group.get("lora_alpha", ALPHA)
    return Config(
        _number(ALPHA if default is None else default, "lora_alpha", where),
        {_pattern(name, where): _number(value, "alpha_pattern", where) for name, value in patterns.items()},
        group.get("use_rslora") is True,
    )


def _number(value: Any, name: str, where: str) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{where}: {name} = {quoted(value)} is not a number")
    return float(value)


def _pattern(name: str, where: str) -> str:
    """A pattern of a module's name. In general PEFT's are regular expressions; those of untrusted files can take
    forever."""
    literal = name.replace("\\.", ".").removesuffix("$")
    if not re.fullmatch(r"\^?[\w.-]+", literal):
        raise ValueError(f"{where}: alpha_pattern has {plain(name)}: only names of modules are supported")
    return literal


def values(modules: Mapping[str, tuple[int, float]], targets: list[str]) -> dict[str, Any]:
    """The arguments of PEFT's LoraConfig. modules: rank and alpha by pattern. targets: names of modules."""
    rank, alpha = (Counter(each[i] for each in modules.values()).most_common(1)[0][0] for i in (0, 1))
    return {
        "r": rank,
        "lora_alpha": _whole(alpha),
        "rank_pattern": {name: r for name, (r, _) in modules.items() if r != rank},
        "alpha_pattern": {name: _whole(a) for name, (_, a) in modules.items() if a != alpha},
        "target_modules": targets,
    }


def _whole(number: float) -> int | float:
    """Whole numbers as such: PEFT's type of alpha is int."""
    return int(number) if number == int(number) else number
