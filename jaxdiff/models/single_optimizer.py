"""Defaults of trainable models."""

from typing import Any

import jax


class SingleOptimizer:
    """Defaults of a `training.state.Trainable`: one optimizer for all parameters, and no cast."""

    def labels(self, params: Any) -> Any:
        return jax.tree.map(lambda _: "all", params)

    def cast(self, params: Any) -> Any:
        return params
