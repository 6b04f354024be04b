"""ControlNet (arXiv 2302.05543): a diffusion model with one or several ControlNets, and the training of one.

    model = with_controls(trained, [(config, params)])  # a TrainedModel, for a pipeline
    model.generate(SampleRequest(keys, size, text, hints=(HintImage(edges, weight=0.8),)))

A `ControlledModel` is the base model with parameters {"base": …, "controls": (…)}, one tree for each ControlNet. Its
`HintConditioner` brings the hints; `predict` turns them into residuals for the base's network.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxdiff.core.trees import check_tree
from jaxdiff.models.conditioner import joined
from jaxdiff.models.conditioners import HintConditioner
from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.models.sampling import TrainedModel
from jaxdiff.models.single_optimizer import SingleOptimizer
from jaxdiff.nets.activation_sharding import ActivationSharding
from jaxdiff.nets.conditioning import Conditioning, Hint
from jaxdiff.nets.control import ControlNetConfig
from jaxdiff.nets.execution import ExecutionConfig


@dataclass(frozen=True)
class ControlledModel(DiffusionModel):
    """A diffusion model with ControlNets, from `controlled`. They are executed as the base's network is."""

    controls: tuple[ControlNetConfig, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        if _hint_conditioner(self, self.controls) not in self.conditioners:
            raise ValueError("a ControlledModel has the HintConditioner of its ControlNets: make it by `controlled`")
        for i, control in enumerate(self.controls):
            for name in ("channels", "multipliers", "blocks"):
                own, base = getattr(control.unet, name), getattr(self.unet, name)
                if own != base:
                    raise ValueError(f"ControlNet {i} has {name} {own}, the network that it controls {base}")
            if control.hint_stride != self.product.stride:
                raise ValueError(
                    f"ControlNet {i} reads hints of {control.hint_stride} pixels per latent, "
                    f"the model has {self.product.stride}"
                )

    def init(self, key: Key[Array, ""]) -> tuple[dict, tuple]:
        base, extra = super().init(key)
        controls = (self.init_control(i, jax.random.fold_in(key, i)) for i in range(len(self.controls)))
        return {"base": base, "controls": tuple(controls)}, extra

    def init_control(self, index: int, key: Key[Array, ""]) -> dict:
        """Initial float32 parameters of a ControlNet: of which all residuals are zero."""
        size = (self.unet.stride, self.unet.stride)
        given = joined([conditioner.example(size) for conditioner in self.conditioners])
        assert given.hints is not None  # of the HintConditioner
        plain = replace(self.unet.execution, sharding=ActivationSharding())  # one image cannot be sharded
        network, x = _executed(self.controls[index], plain).module(), jnp.zeros((1, *size, self.product.channels))
        return network.init(key, x, jnp.ones(1), given.hints[index].image, given)["params"]

    def predict(
        self, params: dict, x: Float[Array, "b h w c"], t: Float[Array, " b"], given: Conditioning
    ) -> Float[Array, "b h w o"]:
        """The base network's output with the weighted sum of the ControlNets' residuals."""
        if given.hints is None or len(given.hints) != len(self.controls):
            count = 0 if given.hints is None else len(given.hints)
            raise ValueError(f"{count} hints for {len(self.controls)} ControlNets")
        plain = given._replace(hints=None)
        each = [
            self._residuals(control, own, x, t, hint, plain)
            for control, own, hint in zip(self.controls, params["controls"], given.hints)
        ]
        total = tuple(sum(maps[1:], maps[0]) for maps in zip(*each))
        return super().predict(params["base"], x, t, plain._replace(residuals=total))

    def _residuals(
        self, control: ControlNetConfig, params: dict, x: Array, t: Array, hint: Hint, given: Conditioning
    ) -> tuple[Array, ...]:
        """Of one ControlNet, scaled. It is not evaluated at times at which it acts on no sample."""
        network, weight = _executed(control, self.unet.execution).module(), hint.weight
        if hint.times is not None:
            weight = jnp.where((hint.times[:, 0] <= t) & (t <= hint.times[:, 1]), weight, 0.0)

        def scaled() -> tuple[Array, ...]:
            time = self.schedule.network_time(t)
            maps = network.apply({"params": params}, x, time, hint.image, given)
            assert isinstance(maps, tuple)
            depths = jnp.linspace(1.0, 0.0, len(maps))
            scales = weight[:, None] * 10.0 ** (-hint.fade[:, None] * depths)
            return tuple(scales[:, i, None, None, None] * each for i, each in enumerate(maps))

        if hint.times is None:
            return scaled()
        shapes = jax.eval_shape(scaled)
        nothing = lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)  # noqa: E731
        return jax.lax.cond((weight != 0.0).any(), scaled, nothing)


def controlled(base: DiffusionModel, *controls: ControlNetConfig) -> ControlledModel:
    """The model with these ControlNets. ValueError if one does not fit."""
    if not controls:
        raise ValueError("no ControlNets")
    fields = {field.name: getattr(base, field.name) for field in dataclasses.fields(DiffusionModel)}
    fields["conditioners"] = *base.conditioners, _hint_conditioner(base, controls)
    return ControlledModel(**fields, controls=controls)


def with_controls(trained: TrainedModel, controls: Sequence[tuple[ControlNetConfig, dict]]) -> TrainedModel:
    """The trained model with ControlNets and their parameters. ValueError, naming the settings or parameters, if one
    does not fit."""
    model = controlled(trained.model, *(config for config, _ in controls))
    for i, (_, params) in enumerate(controls):
        shapes = jax.eval_shape(partial(model.init_control, i), jax.random.key(0))
        check_tree(params, shapes, f"ControlNet {i} for the {model.side} stage")
    return replace(trained, model=model, params={"base": trained.params, "controls": tuple(p for _, p in controls)})


@dataclass(frozen=True)
class ControlModel(SingleOptimizer):
    """The training of a ControlNet: its parameters, with those of the base as `frozen`.

    Training starts from `initial`, whose output is exactly the base's. The paper drops half of the captions
    (`TextConditioner.dropout`), so that the ControlNet learns to read the hint alone.
    """

    base: DiffusionModel
    control: ControlNetConfig

    def __post_init__(self):
        controlled(self.base, self.control)

    @property
    def model(self) -> ControlledModel:
        return controlled(self.base, self.control)

    def init(self, key: Key[Array, ""]) -> tuple[dict, tuple]:
        """Random initial parameters, no extra; see `initial`."""
        return self.model.init_control(0, key), ()

    def initial(self, key: Key[Array, ""], base: Mapping) -> dict:
        """Initial parameters with copies of the base's: its embeddings, stem, down path and middle. The hint encoder is
        random, and the last convolutions are zero. ValueError if the base has other settings than the ControlNet."""
        shapes = jax.eval_shape(partial(self.model.init_control, 0), key)
        own = jax.jit(lambda key: {name: tree for name, tree in self.init(key)[0].items() if name not in base})(key)
        copies = {name: jax.tree.map(_copied, base[name]) for name in shapes if name in base}
        # The stem may read fewer channels than the base's, of which the first are the latents.
        copies["stem"]["kernel"] = copies["stem"]["kernel"][:, :, : self.control.inputs]
        check_tree(own | copies, shapes, "the base's parameters for a ControlNet")
        return own | copies

    def loss(
        self, params: dict, extra: tuple, frozen: dict, batch: Mapping, key: Key[Array, ""], step: Int[Array, ""]
    ) -> tuple[Array, tuple[dict, tuple]]:
        """The base's loss with the residuals. frozen: the base's parameters. batch: of the base, with hint (b H W c) in
        [0, 1], H and W: the stride of the base's product times the size."""
        return self.model.loss(_both(params, frozen), extra, (), batch, key, step)

    def held_out_losses(
        self, params: dict, extra: tuple, frozen: dict, batch: Mapping, numbers: Int[Array, " b"], key: Key[Array, ""]
    ) -> dict[str, tuple[Array, Array]]:
        """As `DiffusionModel.held_out_losses`."""
        return self.model.held_out_losses(_both(params, frozen), extra, (), batch, numbers, key)

    def batch_spec(self, batch_size: int, side: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and types of a training batch. side: of the base's product."""
        return self.model.batch_spec(batch_size, side)

    def cast(self, params: dict) -> dict:
        return self.base.cast(params)


def _both(params: dict, frozen: dict) -> dict:
    return {"base": frozen, "controls": (params,)}


def _copied(leaf: Any) -> Array:
    """Never the same buffer, which a training step would donate."""
    return jnp.array(leaf, jnp.float32, copy=True)


def _hint_conditioner(base: DiffusionModel, controls: Sequence[ControlNetConfig]) -> HintConditioner:
    return HintConditioner(tuple(control.hint_channels for control in controls), base.product.stride)


def _executed(control: ControlNetConfig, execution: ExecutionConfig) -> ControlNetConfig:
    return replace(control, unet=replace(control.unet, execution=execution))
