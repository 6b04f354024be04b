"""Which model a LoRA file is of, for messages and metadata: by its widths, its names, and what it says itself."""

import re
from collections.abc import Mapping

from jaxdiff.core.messages import plain
from jaxdiff.weights.lora_names import Networks, Part, parse
from jaxdiff.weights.tree import Stored

TEXT_WIDTHS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 1280: "the SDXL refiner", 2048: "SDXL"}
"""The width of the text that a U-Net reads."""
NAMES = {
    "Flux": r"double_blocks|single_blocks|single_transformer_blocks",
    "Stable Diffusion 3": r"joint_blocks|context_block",
    "a diffusion transformer": r"^(transformer\.|lora_transformer_|diffusion_model[._]layers)",
    "SDXL": r"^(lora_te2_|text_encoder_2\.)",
}
KOHYA = {768: "sd_v1", 1024: "sd_v2", 1280: "sdxl_refiner_v1-0", 2048: "sdxl_base_v1-0"}
"""By the width of the text: `ss_base_model_version`, by which some programs select the LoRAs that they show."""


def described(tensors: Mapping[str, Stored], metadata: Mapping[str, str]) -> str:
    """`; the file looks like …`, or "" if nothing is known."""
    family = _by_width(tensors) or _by_names(tensors)
    own = next((metadata[name] for name in ("modelspec.architecture", "ss_base_model_version") if name in metadata), "")
    if not family and not own:
        return ""
    described = f"a LoRA of {family}" if family else "that of another model"
    return f"; the file looks like {described}" + (f" ({plain(own)} in its metadata)" if own else "")


def _by_width(tensors: Mapping[str, Stored]) -> str | None:
    """By the inputs of cross-attention's keys and values."""
    for key, tensor in tensors.items():
        parsed = parse(key)
        if parsed is None or parsed.part is not Part.DOWN or len(tensor.shape) < 2:
            continue
        if re.search(r"attn2[._](processor[._])?to_[kv]$", parsed.module) and tensor.shape[1] in TEXT_WIDTHS:
            return TEXT_WIDTHS[tensor.shape[1]]
    return None


def _by_names(tensors: Mapping[str, Stored]) -> str | None:
    return next((name for name, marks in NAMES.items() if any(re.search(marks, key) for key in tensors)), None)


def kohya(networks: Networks) -> dict[str, str]:
    """The family in the metadata of kohya's scripts; empty if unknown."""
    width = None if networks.unet is None else networks.unet.text_width
    return {"ss_base_model_version": KOHYA[width], "ss_v2": str(width == 1024)} if width in KOHYA else {}
