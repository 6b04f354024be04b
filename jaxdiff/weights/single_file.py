"""Single files of Stable Diffusion (all components in one safetensors file) ⇄ components in the layout of diffusers.

The family is recognised by names and shapes (`single_file_kinds.py`), its configurations are in the package
(`single_file_families.py`), and names are translated by rules (`single_file_names.py`). Nothing is downloaded, no
metadata is needed, and no tensor is read before it is asked for.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxdiff.diffusion.parameterization import Prediction
from jaxdiff.weights import lazy, sizes, tree
from jaxdiff.weights import single_file_families as families
from jaxdiff.weights import single_file_kinds as kinds
from jaxdiff.weights import single_file_names as names
from jaxdiff.weights.single_file_families import Family, TextEncoder, TextLayout
from jaxdiff.weights.tree import Unread

Tensors = dict[str, Unread]


@dataclass(frozen=True)
class SingleFile:
    """An opened file. components: tensors with the names of diffusers and transformers, by diffusers' folder names
    ("unet", "vae", "text_encoder", "text_encoder_2"). ignored: names of the file's tensors that are not in them."""

    path: Path
    family: Family
    components: dict[str, Tensors]
    ignored: tuple[str, ...]

    def component(self, name: str) -> Tensors:
        """The tensors of a component. ValueError if the file has none of that name."""
        if name in self.components:
            return self.components[name]
        if name == "vae":
            raise kinds.missing("autoencoder", kinds.VAE[0], str(self.path))
        encoder = self.family.text_encoders.get(name)
        if encoder is None:
            raise ValueError(f"{self.family.title} has no {name}")
        raise kinds.missing("text encoder", encoder.prefix, str(self.path))


def open_file(
    path: str | Path,
    *,
    prediction: Prediction | None = None,
    ema: bool = False,
    vae: str | Path | None = None,
    among: tuple[Family, ...] = families.FAMILIES,
) -> SingleFile:
    """Recognise the family of a file and split it into components.

    prediction: what the U-Net predicts, if the file does not say and it is not the default (`kinds.family_of`).
    ema: take the averaged weights of the U-Net where a file holds both. vae: a file with the autoencoder, with or
    without a model around it, in either layout; it replaces the one of `path`.
    Raises FileNotFoundError, or ValueError that says what the file is, or which component lacks tensors.
    """
    path = Path(path)
    tensors, metadata = tree.read_header(path)
    family = kinds.family_of(tensors, metadata, str(path), prediction, among)
    opened = split(tensors, family, path, ema=ema)
    return opened if vae is None else _with_vae(opened, Path(vae))


def split(tensors: Mapping[str, Unread], family: Family, path: Path, *, ema: bool = False) -> SingleFile:
    """The components of a single file of a known `family`. path: for messages. Components may be missing."""
    where, components, taken = str(path), {}, set()
    unet = _inside(tensors, kinds.UNET)
    taken |= {kinds.UNET + name for name in unet}
    if ema:
        unet, averaged = _averaged(tensors, unet, where)
        taken = averaged
    taken |= set(kinds.markers(family))
    components["unet"] = names.renamed(unet, names.unet(family.unet), f"{where}: the U-Net")
    prefix = next((prefix for prefix in kinds.VAE if _inside(tensors, prefix)), None)
    if prefix is not None:
        inner = _autoencoder_only(_inside(tensors, prefix))
        taken |= {prefix + name for name in inner}
        components["vae"] = _from_autoencoder(inner, family, where)
    for name, encoder in family.text_encoders.items():
        inside = _inside(tensors, encoder.prefix)
        kept = {name: tensor for name, tensor in inside.items() if not _unused(name, encoder)}
        if kept:
            taken |= {encoder.prefix + name for name in kept}
            components[name] = _from_text_encoder(kept, encoder, where)
    return SingleFile(path, family, components, tuple(sorted(tensors.keys() - taken)))


def join(components: Mapping[str, Mapping[str, Unread]], family: Family) -> Tensors:
    """The inverse of `split`: the tensors of a single file. ValueError unless all components of `family` are given.

    The names are those of diffusers and transformers; those of a CLIPTextModel may lack its prefix `text_model.`. The
    layer of OpenCLIP that Stable Diffusion 2 does not use is not written, as in files that diffusers converts.
    """
    wanted = {"unet", "vae", *family.text_encoders}
    if components.keys() != wanted:
        given, needed = ", ".join(sorted(components)) or "nothing", ", ".join(sorted(wanted))
        raise ValueError(f"a single file of {family.title} is made of {needed}, not of {given}")
    modules = names.inverse(names.unet(family.unet))
    result = _prefixed(kinds.UNET, names.renamed(components["unet"], modules, "the U-Net"))
    modules = names.inverse(names.autoencoder(family.vae))
    autoencoder = names.renamed(components["vae"], modules, "the autoencoder")
    result |= _prefixed(kinds.VAE[0], names.expand_attention(autoencoder))
    for name, encoder in family.text_encoders.items():
        tensors = _with_text_model(components[name])
        if encoder.layout is TextLayout.OPEN_CLIP:
            modules = names.inverse(names.open_clip(encoder.config))
            tensors = names.join_qkv(names.renamed(tensors, modules, f"the text encoder {name}"))
        result |= _prefixed(encoder.prefix, tensors)
    return result


def save(
    path: str | Path, components: Mapping[str, Mapping[str, Unread]], family: Family, dtype: str | None = None
) -> None:
    """Writes `join` to one file, atomically, with one tensor in memory at a time.

    dtype: "float32", "float16" or "bfloat16"; None keeps the types. The metadata names the architecture and the
    prediction. ValueError as in `join`, OSError if writing fails.
    """
    codes = {str(numpy): code for code, numpy in tree.FLOATS.items()}
    if dtype is not None and dtype not in codes:
        raise ValueError(f"dtype must be one of {', '.join(codes)}, not {dtype}")
    tensors = join(components, family)
    if dtype is not None:
        tensors = {name: lazy.cast(tensor, codes[dtype]) for name, tensor in tensors.items()}
    tensors |= {name: lazy.held(np.zeros(0, np.float32)) for name in kinds.markers(family)}
    tree.write_unread(Path(path), tensors, described(family))


def described(family: Family) -> dict[str, str]:
    """The metadata of a single file (ModelSpec 1.0)."""
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": family.architecture,
        "modelspec.resolution": f"{family.image_size}x{family.image_size}",
        "modelspec.prediction_type": family.prediction.value,
    }


def open_controlnet(path: str | Path, among: tuple[Family, ...] = families.FAMILIES) -> tuple[dict[str, Any], Tensors]:
    """The config.json and tensors of diffusers' ControlNetModel, of a file in the layout of single files or diffusers.

    The model is one of `among`, by the width of its text. Raises FileNotFoundError, or ValueError.
    """
    path = Path(path)
    tensors, _ = tree.read_header(path)
    inner = _inside(tensors, kinds.CONTROLNET) or dict(tensors)
    first = next((inner[name] for name in ("input_blocks.0.0.weight", "conv_in.weight") if name in inner), None)
    context = {tuple(inner[name].shape)[-1:] for name in inner if name.endswith("attn2.to_k.weight")}
    if first is None or not any("cond_embedding" in name or "input_hint_block" in name for name in inner):
        raise ValueError(f"{path} is not a ControlNet: it holds {kinds.describe(tensors)}")
    key = (tuple(first.shape)[:2], context)
    configs = (families.controlnet(family) for family in among)
    fits = (c for c in configs if ((c["block_out_channels"][0], 4), {(c["cross_attention_dim"],)}) == key)
    config = next(fits, None)
    if config is None:
        raise ValueError(f"{path} is a ControlNet of an unknown model: text of width {sorted(context)}")
    if "conv_in.weight" in inner:
        return config, inner
    return config, names.renamed(inner, names.controlnet(config), str(path))


def join_controlnet(config: Mapping[str, Any], tensors: Mapping[str, Unread]) -> Tensors:
    """The tensors of a ControlNetModel under the names of a single file."""
    modules = names.inverse(names.controlnet(config))
    return _prefixed(kinds.CONTROLNET, names.renamed(tensors, modules, "the ControlNet"))


def open_autoencoder(path: str | Path, config: Mapping[str, Any]) -> Tensors:
    """The autoencoder of a file, alone or with a model, in either layout, under diffusers' names. config: its settings
    in diffusers' layout, of which the numbers of levels and blocks are used.

    Raises FileNotFoundError, or ValueError that says what the file is.
    """
    path = Path(path)
    tensors, _ = tree.read_header(path)
    prefix = next((prefix for prefix in kinds.VAE if _inside(tensors, prefix)), "")
    inner = _autoencoder_only(_inside(tensors, prefix))
    modules = names.autoencoder(config)
    if "encoder.conv_norm_out.weight" in inner:
        return dict(inner)
    if "decoder.conv_in.weight" not in inner or "decoder.norm_out.weight" not in inner:
        raise ValueError(f"{path} holds no autoencoder: it holds {kinds.describe(tensors)}")
    return names.renamed(names.squeeze_attention(inner), modules, f"{path}: the autoencoder")


def _with_vae(opened: SingleFile, path: Path) -> SingleFile:
    components = opened.components | {"vae": open_autoencoder(path, opened.family.vae)}
    return SingleFile(opened.path, opened.family, components, opened.ignored)


def _from_autoencoder(inner: Tensors, family: Family, where: str) -> Tensors:
    modules = names.autoencoder(family.vae)
    return names.renamed(names.squeeze_attention(inner), modules, f"{where}: the autoencoder")


def _autoencoder_only(tensors: Tensors) -> Tensors:
    """Without the discriminator and averages of training."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(("loss.", kinds.EMA))}


def _averaged(tensors: Mapping[str, Unread], unet: Tensors, where: str) -> tuple[Tensors, set[str]]:
    """The averaged weights under the names of `unet`, and their own names, which have no dots."""
    flat = {name: kinds.EMA + f"diffusion_model.{name}".replace(".", "") for name in unet}
    lost = sorted(name for name in flat.values() if name not in tensors)
    if lost:
        raise ValueError(f"{where} holds no averaged (EMA) weights for {len(lost)} tensors ({sizes.names(lost)})")
    return {name: tensors[key] for name, key in flat.items()}, set(flat.values())


def _from_text_encoder(inner: Tensors, encoder: TextEncoder, where: str) -> Tensors:
    if encoder.layout is TextLayout.TRANSFORMERS:
        return _with_text_model(inner)
    modules = names.open_clip(encoder.config)
    return names.renamed(names.split_qkv(inner), modules, f"{where}: the text encoder {encoder.prefix}")


def _unused(name: str, encoder: TextEncoder) -> bool:
    """Whether a text encoder's tensor is stored but not used."""
    if name in ("logit_scale", "attn_mask") or name.endswith("position_ids"):
        return True
    if not encoder.projected and name in ("text_projection", "text_projection.weight"):
        return True
    return encoder.drop_last and name.startswith(f"transformer.resblocks.{encoder.config['num_hidden_layers']}.")


def _with_text_model(tensors: Mapping[str, Unread]) -> Tensors:
    """CLIP's names with the prefix `text_model.`, which some versions of transformers leave out."""
    bare = ("embeddings.", "encoder.", "final_layer_norm.")
    return {f"text_model.{name}" if name.startswith(bare) else name: tensor for name, tensor in tensors.items()}


def _inside(tensors: Mapping[str, Unread], prefix: str) -> Tensors:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _prefixed(prefix: str, tensors: Mapping[str, Unread]) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}
