"""LoRA of a diffusion model and, if wanted, of the CLIP text towers that it reads."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxdiff.models.conditioners import NullText, TextConditioner
from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.models.lora import TEXT, TEXT_ATTENTION, LoRAModel, Targets, init, labelled, merged
from jaxdiff.nets.clip import CLIP, CLIPConfig, TowerOutput
from jaxdiff.text.clip import Pooling


@dataclass(frozen=True)
class TextTower:
    """A CLIP text tower inside the loss, with a LoRA. skip_last, final_norm, pooling: as in `CLIPTextEncoder`.

    empty: the token ids of the empty caption, needed if the model's null text is the empty caption.
    """

    config: CLIPConfig
    skip_last: int = 0
    final_norm: bool = True
    pooling: Pooling = Pooling.NONE
    targets: Targets = TEXT_ATTENTION
    empty: tuple[int, ...] = ()

    def __post_init__(self):
        if self.config.text is None:
            raise ValueError("this CLIP has no text tower")

    def shapes(self) -> dict:
        """The shapes of the tower's parameters: {"text": …}."""
        network, ids = CLIP(self.config), jnp.zeros((1, 1), jnp.int32)
        params = jax.eval_shape(lambda: network.init(jax.random.key(0), ids, method="embed_text"))["params"]
        return {"text": params["text"]}

    def embed(self, params: dict, ids: Int[Array, "b n"]) -> tuple[Float[Array, "b n d"], Float[Array, "b e"] | None]:
        """Tokens and pooled vectors."""
        arguments = {"params": params}, ids, self.skip_last, self.final_norm
        output = cast(TowerOutput, CLIP(self.config).apply(*arguments, method="embed_text"))
        if self.pooling is Pooling.NONE:
            return output.states, None
        state = self.pooling is Pooling.STATE or output.embedding is None
        return output.states, output.pooled if state else output.embedding


@dataclass(frozen=True)
class DiffusionLoRA(LoRAModel):
    """`LoRAModel` of a diffusion model, with its held-out losses.

    towers: text towers trained with a LoRA too. Then batches have token ids instead of embeddings (`ids` (b n), and
    `ids_2` for a second tower), parameters are {"model", "text", "text_2"}, and `frozen` also has the towers'
    parameters under these names. As in `text.combined`, embeddings of two towers are concatenated along the features.
    """

    base: DiffusionModel = DiffusionModel()
    towers: tuple[TextTower, ...] = ()

    def __post_init__(self):
        if not self.towers:
            return
        if len(self.towers) > len(TEXT):
            raise ValueError(f"{len(self.towers)} text towers: at most {len(TEXT)}")
        width = sum(tower.config.text.width for tower in self.towers if tower.config.text is not None)
        if self._text.width not in (None, width):
            raise ValueError(f"a model that reads text of width {self._text.width}, but towers of width {width}")
        if self._text.null is NullText.EMPTY and self._text.dropout:
            lengths = {len(tower.empty) for tower in self.towers}
            if lengths != {self._text.shape[0]}:
                raise ValueError("the null text is the empty caption: each text tower needs its token ids in `empty`")

    def init(self, key: Key[Array, ""]) -> tuple[dict, Any]:
        """LoRAs that change nothing yet, and the base's extra."""
        params, extra = super().init(key)
        for number, (name, tower) in enumerate(self._named.items(), 1):
            own = jax.random.fold_in(key, 2**31 + number)  # smaller ones are those of the model's kernels
            params[name] = init(tower.shapes(), tower.targets, self.rank, own, self.alpha)
        return params, extra

    def loss(
        self, params: dict, extra: Any, frozen: dict, batch: Mapping, key: Key[Array, ""], step: Int[Array, ""]
    ) -> tuple[Array, tuple[dict, Any]]:
        """The base's loss with merged parameters; with towers, of the captions that they embed."""
        return super().loss(params, extra, frozen, self.embedded(params, frozen, batch), key, step)

    def held_out_losses(
        self, params: dict, extra: Any, frozen: dict, batch: Mapping, numbers: Int[Array, " b"], key: Key[Array, ""]
    ) -> dict[str, tuple[Array, Array]]:
        """`DiffusionModel.held_out_losses` with merged parameters."""
        batch, others = self.embedded(params, frozen, batch), frozen.get("frozen", ())
        return self.base.held_out_losses(self.adapted(params, frozen), extra, others, batch, numbers, key)

    def embedded(self, params: dict, frozen: dict, batch: Mapping) -> Mapping:
        """The batch with embeddings instead of token ids. ValueError if ids are missing."""
        if not self.towers:
            return batch
        result = {name: value for name, value in batch.items() if name not in self._ids}
        towers = {name: merged(frozen[name], [(params[name], 1.0)]) for name in self._named}
        missing = [ids for ids in self._ids if ids not in batch]
        if missing:
            raise ValueError(f"a batch of a model with text towers needs {missing[0]}, the token ids of the captions")
        tokens, pooled = self._joined(towers, [batch[ids] for ids in self._ids])
        result |= {"text": tokens, "text_mask": jnp.ones(tokens.shape[:2], bool)}
        if pooled is not None:
            result["text_pooled"] = pooled
        if self._text.null is NullText.EMPTY and self._text.dropout:
            tokens, pooled = self._joined(towers, [jnp.asarray([tower.empty]) for tower in self.towers])
            result |= {"null_text": tokens[0]} | ({} if pooled is None else {"null_pooled": pooled[0]})
        return result

    def labels(self, params: dict) -> dict:
        """The base's label of each kernel, "all" for the towers; "none" for alpha."""
        towers = {name: labelled(params[name], lambda path: "all") for name in self._named}
        return super().labels(params) | towers

    def batch_spec(self, batch_size: int, side: int) -> dict[str, jax.ShapeDtypeStruct]:
        shapes = self.base.batch_spec(batch_size, side)
        if not self.towers:
            return shapes
        ids = jax.ShapeDtypeStruct((batch_size, self._text.shape[0]), jnp.int32)
        embedded = "text", "text_mask", "text_pooled", "null_text", "null_pooled"
        others = {name: shape for name, shape in shapes.items() if name not in embedded}
        return others | dict.fromkeys(self._ids, ids)

    @property
    def _text(self) -> TextConditioner:
        if self.base.text is None:
            raise ValueError("text towers need a model that reads text")
        return self.base.text

    @property
    def _named(self) -> dict[str, TextTower]:
        return dict(zip(TEXT, self.towers))

    @property
    def _ids(self) -> list[str]:
        return [name.replace("text", "ids") for name in self._named]

    def _joined(self, params: dict[str, dict], ids: list[Array]) -> tuple[Array, Array | None]:
        """Tokens and pooled vectors of all towers, along the features."""
        each = [tower.embed(params[name], i) for (name, tower), i in zip(self._named.items(), ids)]
        pooled = [vector for _, vector in each if vector is not None]
        return jnp.concatenate([tokens for tokens, _ in each], -1), jnp.concatenate(pooled, -1) if pooled else None
