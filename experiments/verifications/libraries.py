"""PyTorch and the library of the independent implementation, imported when a comparison starts. Runs on the CPU."""

import gc
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np

from jaxdiff.text.tokenizer import import_transformers
from jaxdiff.weights import hub, sizes
from jaxdiff.weights.tree import Unread

Against = Literal["diffusers", "transformers"]


@dataclass(frozen=True, eq=False)
class Libraries:
    """The imported modules, and the compute type. diffusers: None for a comparison with transformers."""

    torch: ModuleType
    transformers: ModuleType
    diffusers: ModuleType | None
    dtype: str

    @property
    def versions(self) -> dict[str, str]:
        modules = {name: getattr(self, name) for name in ("torch", "transformers", "diffusers")}
        return {name: module.__version__ for name, module in modules.items() if module is not None}

    def tensor(self, array: Any) -> Any:
        """In the compute type; integers and booleans keep theirs."""
        tensor = self.torch.from_numpy(np.array(array))
        return tensor.to(getattr(self.torch, self.dtype)) if tensor.is_floating_point() else tensor

    def images(self, array: Any) -> Any:
        """Images or feature maps: (b h w c) to PyTorch's (b c h w)."""
        return self.tensor(np.moveaxis(np.asarray(array), -1, 1))

    def loaded(self, kind: Any, folder: Path, variant: str | None) -> Any:
        """A network of diffusers or transformers from its folder, by their own readers; nothing is downloaded."""
        name = "dtype" if kind.__module__.startswith("transformers") else "torch_dtype"
        options = {name: getattr(self.torch, self.dtype), "variant": _variant(folder, variant)}
        return kind.from_pretrained(str(folder), local_files_only=True, **options).eval()

    def filled(self, network: Any, tensors: Mapping[str, Unread], where: str) -> Any:
        """The network with these tensors, read one at a time. ValueError, naming `where`, if names or shapes differ."""
        state = network.state_dict()
        if not any(name.startswith("text_model.") for name in state):  # transformers 5 has no such prefix
            tensors = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
        others = sorted(state.keys() ^ tensors.keys())
        others += sorted(name for name in state.keys() & tensors.keys() if state[name].shape != tensors[name].shape)
        if others:
            raise ValueError(
                f"{where}: {len(others)} tensors do not fit {type(network).__name__} ({sizes.names(others)})"
            )
        with self.torch.no_grad():
            for name, target in state.items():
                target.copy_(self.torch.from_numpy(tensors[name].read().astype(np.float32)))
        return network.to(getattr(self.torch, self.dtype)).eval()


def imported(against: Against, dtype: str) -> Libraries:
    """Import the libraries. ValueError, with the command that installs them, if one is missing."""
    missing, diffusers = [], None
    with warnings.catch_warnings(action="ignore"):
        try:
            import torch
        except ImportError:
            missing.append("torch")
        if against == "diffusers":
            try:
                import diffusers
            except ImportError:
                missing.append("diffusers")
        if missing:
            raise ValueError(f"not installed, and needed for this comparison: pip install {' '.join(missing)}")
        transformers = import_transformers()
    for library in filter(None, (transformers, diffusers)):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    return Libraries(torch, transformers, diffusers, dtype)


def to_numpy(tensor: Any) -> np.ndarray:
    return tensor.detach().float().numpy()


def to_images(tensor: Any) -> np.ndarray:
    """The inverse of `Libraries.images`."""
    return np.moveaxis(to_numpy(tensor), 1, -1)


def freed(compute: Callable[..., Any], *arguments: Any) -> Any:
    """What `compute` returns, after the memory of its networks is free again."""
    result = compute(*arguments)
    gc.collect()
    return result


@contextmanager
def noise_from(libraries: Libraries, draws: Mapping[Any, Iterator[Any]]) -> Iterator[None]:
    """Objects of diffusers draw given noise instead of their own. draws: (b h w c), by the object that draws."""
    replaced = []

    def drawing(source: Iterator[Any]) -> Callable[..., Any]:
        def randn_tensor(shape: Any, *_: Any, **__: Any) -> Any:
            drawn = libraries.images(next(source))
            if tuple(shape) != tuple(drawn.shape):
                raise ValueError(f"diffusers draws noise of {tuple(shape)}, jaxdiff of {tuple(drawn.shape)}")
            return drawn

        return randn_tensor

    try:
        for owner, source in draws.items():
            module = sys.modules[type(owner).__module__]
            if hasattr(module, "randn_tensor"):  # a scheduler without randomness has none
                replaced.append((module, module.randn_tensor))
                module.randn_tensor = drawing(source)  # type: ignore[attr-defined]
        yield
    finally:
        for module, real in reversed(replaced):
            module.randn_tensor = real


def _variant(folder: Path, variant: str | None) -> str | None:
    """The variant of the files that jaxdiff reads: a folder may have no others."""
    file = next(iter(hub.open_tensors(folder, variant).values())).file
    return variant or next((name for name in ("fp16", "bf16") if f".{name}" in file.name), None)
