"""Numeric settings of guidance and thresholding that may be traced, so that new values do not recompile."""

import dataclasses
from typing import Any, TypeGuard, TypeVar

import jax
from jaxtyping import Array, Float

Number = Float[Array, "..."] | float
Settings = TypeVar("Settings")


def is_plain(value: object) -> TypeGuard[float]:
    """Whether this is a Python number, whose value can be checked, not an array or a tracer."""
    return isinstance(value, int | float)


def pytree_of_numbers(cls: type[Settings]) -> type[Settings]:
    """Registers a frozen dataclass as a pytree with its fields as children.

    jax also builds pytrees from placeholders, so unflattening skips the class's checks. With
    `jax.tree_util.register_dataclass`, which runs them, the structures of two classes with the same fields compare
    equal (jax 0.10 to 0.12), so a program compiled for one could be run for the other.
    """
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]

    def flatten(settings: Any) -> tuple[list, None]:
        return [getattr(settings, name) for name in names], None

    def flatten_with_keys(settings: Any) -> tuple[list, None]:
        return [(jax.tree_util.GetAttrKey(name), getattr(settings, name)) for name in names], None

    def unflatten(_: None, children: Any) -> Any:
        settings = object.__new__(cls)
        for name, child in zip(names, children):
            object.__setattr__(settings, name, child)
        return settings

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls
