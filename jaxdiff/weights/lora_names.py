"""The names of LoRA tensors in public files ⇄ the kernels of our networks.

A key is the name of a module, between a prefix for its network and an ending for its part: `unet.….to_q.lora_A.weight`,
`lora_te_…_q_proj.lora_down.weight`, `….processor.to_q_lora.up.weight`. Some formats replace the dots of module names by
underscores, which cannot be undone by a rule, since names have underscores too. Therefore all names that a module of
the given networks can have are listed, and looked up with underscores for dots.
"""

import enum
import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from jaxdiff.core import trees
from jaxdiff.models.diffusion_lora import TextTower
from jaxdiff.models.lora import MODEL, TEXT
from jaxdiff.nets.clip import CLIPConfig
from jaxdiff.weights import clip, latent_unet, single_file_names


class Networks(NamedTuple):
    """The networks that a LoRA may be of. text: the CLIP text towers; None for one that is not used, such as the first
    of the SDXL refiner."""

    unet: latent_unet.Network | None = None
    text: tuple[CLIPConfig | None, ...] = ()


@dataclass(frozen=True)
class Component:
    """A network: by the path of each kernel its shape (ours), the module's name in diffusers or transformers, and in
    single files; and the path of each name, with underscores for dots."""

    kernels: dict[str, tuple[int, ...]]
    modules: dict[str, str]
    single_file: dict[str, str]
    paths: dict[str, str]

    def path(self, module: str) -> str | None:
        """The kernel of a module, by any of its names, with dots or underscores."""
        return self.paths.get(module.replace(".", "_"))


@functools.lru_cache(maxsize=8)
def components(networks: Networks) -> Mapping[str, Component]:
    """By the names of `models.lora`. Cached, as tracing a large network takes seconds.

    ValueError if two modules of a network have the same name.
    """
    result = {}
    if networks.unet is not None:
        shapes = latent_unet.shapes_of(networks.unet)
        modules = _modules(latent_unet.key_map(networks.unet, shapes))
        single_file = _in_single_files(networks.unet, modules)
        aliases = {path: _unet_names(module) for path, module in modules.items()}
        for path, module in single_file.items():
            aliases[path].append(module)
        result[MODEL] = _component(shapes, modules, single_file, aliases)
    if len(networks.text) > len(TEXT):
        raise ValueError(f"{len(networks.text)} text towers: LoRA files have at most {len(TEXT)}")
    for name, config in zip(TEXT, networks.text):
        if config is not None:
            shapes = TextTower(config).shapes()
            modules = _modules(clip.key_map(shapes))
            aliases = {path: _text_names(module) for path, module in modules.items()}
            result[name] = _component(shapes, modules, {}, aliases)
    return result


class Part(enum.Enum):
    """What a tensor of a LoRA is."""

    DOWN = enum.auto()
    UP = enum.auto()
    ALPHA = enum.auto()


class Parsed(NamedTuple):
    """A key of a LoRA file. network: by the key's prefix; None without one. module: with dots or underscores."""

    network: str | None
    module: str
    part: Part


def parse(key: str) -> Parsed | None:
    """None if the key has no known ending."""
    for ending in _ENDINGS:
        match = ending.fullmatch(key)
        if match:
            network, module = _without_prefix(match["module"])
            return Parsed(network, module, _PARTS[match["part"]])
    return None


def unsupported(key: str) -> str | None:
    """The algorithm that a key belongs to, if it is one that is not supported."""
    return next((name for name, marks in UNSUPPORTED.items() if marks.search(key)), None)


UNSUPPORTED = {
    name: re.compile(marks)
    for name, marks in {
        "LoHa": r"[._]hada_",
        "LoKr": r"[._]lokr_",
        "DoRA": r"\.(dora_scale|lora_magnitude_vector)",
        "a Tucker decomposition (lora_mid)": r"\.lora_mid",
        "OFT": r"[._]oft_|\.oft",
        "GLoRA": r"\.[ab][12]\.weight$",
        "IA3": r"\.on_input$|\.ia3_l",
        "full differences": r"\.(diff|diff_b|set_weight)$",
        "trained norms": r"\.[wb]_norm$",
        "trained biases": r"\.lora_(A|B|up|down)(\.[^.]+)?\.bias$",
        "trained embeddings": r"\.lora_embedding_[AB]",
    }.items()
}
"""Other algorithms of the libraries that write these files (LyCORIS, PEFT), by their keys."""
_PARTS = {"down": Part.DOWN, "up": Part.UP, "A": Part.DOWN, "B": Part.UP, "alpha": Part.ALPHA}
_ENDINGS = tuple(
    re.compile(ending)
    for ending in (
        r"(?P<module>.+)\.lora_(?P<part>down|up)\.weight",
        r"(?P<module>.+)\.lora_(?P<part>A|B)(\.[^.]+)?\.weight",  # PEFT may name the adapter, "default"
        r"(?P<module>.+?)[._]lora(_linear_layer)?\.(?P<part>down|up)\.weight",
        r"(?P<module>.+?)([._]lora(_linear_layer)?)?\.(?P<part>alpha)",
    )
)
PREFIXES = {
    "lora_unet_": MODEL,
    "lora_te_": TEXT[0],
    "lora_te1_": TEXT[0],
    "lora_te2_": TEXT[1],
    "unet.": MODEL,
    "diffusion_model.": MODEL,
    "text_encoder.": TEXT[0],
    "text_encoder_2.": TEXT[1],
}
_NEUTRAL = ("base_model.model.", "lycoris_")


def _without_prefix(name: str) -> tuple[str | None, str]:
    """The network of a name, and the name without any prefixes: `unet.base_model.model.` and the reverse occur."""
    network = None
    while True:
        neutral = next((prefix for prefix in _NEUTRAL if name.startswith(prefix)), None)
        own = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None) if network is None else None
        if neutral is not None:
            name = name.removeprefix(neutral)
        elif own is not None:
            network, name = PREFIXES[own], name.removeprefix(own)
        else:
            return network, name


def _modules(named: Mapping[str, str]) -> dict[str, str]:
    """The module of each kernel, from a key map."""
    return {path: name.removesuffix(".weight") for path, name in named.items() if path.split("/")[-1] == "kernel"}


def _in_single_files(network: latent_unet.Network, modules: Mapping[str, str]) -> dict[str, str]:
    """The names of modules in single files; none for a network that such files cannot hold."""
    try:
        theirs = single_file_names.inverse(single_file_names.unet(latent_unet.hub_config(network)))
    except ValueError:
        return {}
    result = {}
    for path, module in modules.items():
        inside = next((name for name in _enclosing(module) if name in theirs), None)
        if inside is not None:
            result[path] = theirs[inside] + module[len(inside) :]
    return result


def _enclosing(module: str) -> Iterator[str]:
    """The module and those around it, innermost first."""
    while module:
        yield module
        module = module.rpartition(".")[0]


def _unet_names(module: str) -> list[str]:
    """The names of a U-Net's module. Older files have those of attention processors."""
    older = re.sub(r"(\.attn[12])\.(to_[qkv]|to_out)(\.0)?$", r"\1.processor.\2", module)
    return list(dict.fromkeys([module, re.sub(r"\.to_out\.0$", ".to_out", module), older]))


_PROCESSORS = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


def _text_names(module: str) -> list[str]:
    """The names of a text tower's module. transformers 5 has no `text_model`, older files have processors' names."""
    names = [module]
    before, _, last = module.rpartition(".")
    if last in _PROCESSORS:
        names.append(f"{before}.{_PROCESSORS[last]}")
    return names + [name.removeprefix("text_model.") for name in names if name.startswith("text_model.")]


def _component(
    shapes: dict, modules: dict[str, str], single_file: dict[str, str], aliases: Mapping[str, list[str]]
) -> Component:
    kernels = {path: tuple(leaf.shape) for path, leaf in trees.flatten(shapes).items() if path in modules}
    paths: dict[str, str] = {}
    for path, names in aliases.items():
        for name in names:
            if paths.setdefault(name.replace(".", "_"), path) != path:
                raise ValueError(f"{name} is the name of two modules, {path} and {paths[name.replace('.', '_')]}")
    return Component(kernels, modules, single_file, paths)
