"""What most models say of their parameters when they are trained."""

from typing import Any

import jax


class SingleOptimizer:
    """Defaults of a `training.state.Trainable`: one optimizer for all parameters, which the network takes as they are
    kept."""

    def labels(self, params: Any) -> Any:
        return jax.tree.map(lambda _: "all", params)

    def cast(self, params: Any) -> Any:
        return params
