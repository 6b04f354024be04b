"""Numbers of guidance and thresholding, which jax may trace: other values then compile nothing anew."""

import dataclasses
from typing import Any, TypeGuard, TypeVar

import jax
from jaxtyping import Array, Float

Number = Float[Array, "..."] | float
Settings = TypeVar("Settings")


def is_plain(value: object) -> TypeGuard[float]:
    """Whether this is a number of Python, whose value is known and can be checked: no array and no tracer."""
    return isinstance(value, int | float)


def pytree_of_numbers(cls: type[Settings]) -> type[Settings]:
    """Registers a frozen dataclass as a pytree with its fields as children.

    jax builds pytrees from placeholders too, so they are put together without the class's checks. With
    `jax.tree_util.register_dataclass`, which calls those, the structures of two classes that have the same fields are
    equal (jax 0.10 to 0.12), and a compiled program of one could be run for the other.
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
