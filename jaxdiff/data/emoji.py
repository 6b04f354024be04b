"""`emoji`: Noto's artwork with the names of emojibase, as a TFDS builder that rasterises the SVGs at any size.

The artwork (`@iconify-json/noto`, Apache-2.0) and the names (`emojibase-data`, MIT) come from two npm packages that
`experiments.recipes.emoji_data` downloads and unpacks; jaxdiff contains neither. Flags are excluded (a flag's name does
not describe its image), and so are skin-tone variants (the same name five times) and bare components.

    builder = prepare(64, "runs/data", packages="runs/data/npm")
    source = sources.open(sources.Emoji(), 64, "train", "runs/data")
"""

import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import resvg_py
import tensorflow_datasets as tfds
from tqdm import tqdm

from jaxdiff.core.json_files import parse
from jaxdiff.core.messages import quoted, reason
from jaxdiff.data import images
from jaxdiff.data.array_records import full_disk_is_an_os_error
from jaxdiff.data.tfds_sets import quiet

ARTWORK, NAMES = "noto", "emojibase"  # the folders of the two unpacked packages
FILES = {ARTWORK: ("icons.json", "chars.json", "package.json"), NAMES: ("en/data.json", "package.json")}
RESOLUTIONS = (64, 256, 1024)

# emojibase's groups: https://emojibase.dev/docs/datasets; letters without a group are halves of flags
_COMPONENT, _FLAGS = 2, 9


@dataclasses.dataclass(frozen=True)
class Emoji:
    """One emoji: its name (the caption), its emojibase tags, its code points and its SVG."""

    name: str
    tags: tuple[str, ...]
    hexcode: str
    svg: str


def prepare(
    resolution: int, data_dir: str | Path, packages: str | Path, *, progress: bool = True
) -> tfds.core.DatasetBuilder:
    """Prepare the TFDS dataset at `resolution` below `data_dir`, unless it exists.

    packages: the folder with the unpacked packages `noto` and `emojibase`. FileNotFoundError if they are missing.
    """
    with quiet():
        builder = _builder(resolution, data_dir, packages, progress)
        if not builder.is_prepared():
            read(packages)  # fails on bad packages before TFDS creates a folder
            with full_disk_is_an_os_error(data_dir):
                builder.download_and_prepare()
    return builder


def prepared(resolution: int, data_dir: str | Path) -> tfds.core.DatasetBuilder:
    """The dataset written by `prepare`; FileNotFoundError if it does not exist."""
    with quiet():
        builder = _builder(resolution, data_dir, "", False)
        ready = builder.is_prepared()
    if not ready:
        raise FileNotFoundError(
            f"no emoji at {resolution} pixels in {data_dir}; run "
            f"python -m experiments.recipes.emoji_data --data-dir {data_dir} --resolutions {resolution}"
        )
    return builder


def read(packages: str | Path) -> list[Emoji]:
    """The emoji with both a name and artwork, in the order of emojibase, without flags and skin tones."""
    artwork, characters, names = (
        _json(Path(packages) / file, kind)
        for file, kind in (
            (f"{ARTWORK}/icons.json", dict),
            (f"{ARTWORK}/chars.json", dict),
            (f"{NAMES}/en/data.json", list),
        )
    )
    try:
        pairs = _pairs(artwork, characters, names)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{packages}: the packages are not of the form that is read here ({reason(error)})") from error
    if not pairs:
        raise ValueError(f"{packages}: no emoji has both a name and artwork; are these the two packages?")
    return pairs


def _pairs(artwork: dict, characters: dict, names: list) -> list[Emoji]:
    """Names with their artwork. AttributeError, KeyError or TypeError for values of other types."""
    drawings = {_plain(code): icon for code, icon in characters.items()}
    wanted = [entry for entry in names if entry.get("group") not in (None, _COMPONENT, _FLAGS)]
    pairs = []
    for entry in sorted(wanted, key=lambda entry: entry.get("order", 0)):
        icon = _icon(artwork, drawings.get(_plain(entry["hexcode"])))
        if icon is not None:
            texts = (entry["label"], entry["hexcode"], icon["body"], *entry.get("tags", ()))
            if not all(isinstance(text, str) for text in texts):
                raise TypeError(f"{quoted(entry)} is not all text")
            pairs.append(Emoji(entry["label"], tuple(entry.get("tags", ())), entry["hexcode"], _svg(artwork, icon)))
    return pairs


def draw(svg: str, resolution: int) -> bytes:
    """Rasterise an SVG on white, `resolution` pixels a side, to the bytes of an RGB PNG."""
    png = resvg_py.svg_to_bytes(
        svg_string=svg, width=resolution, height=resolution, background="white", skip_system_fonts=True
    )
    return images.encode_png(images.decode(bytes(png)))


@dataclasses.dataclass(kw_only=True)
class NotoEmojiConfig(tfds.core.BuilderConfig):
    """`resolution`: pixels a side; `packages`: the folder of the npm packages, needed only for preparation."""

    name: str = ""  # from the resolution
    resolution: int = 64
    packages: str = ""
    progress: bool = True

    def __post_init__(self):
        if not 16 <= self.resolution <= 4096:
            raise ValueError(f"emoji: resolution {self.resolution} is outside 16 to 4096")
        self.name = f"{self.resolution}px"


class NotoEmoji(tfds.core.GeneratorBasedBuilder):
    """Noto's emoji on white with their names; `tags` are further words, separated by commas."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        side = self.builder_config.resolution
        features = {
            "image": tfds.features.Image(shape=(side, side, 3), encoding_format="png"),
            "caption": tfds.features.Text(),
            "tags": tfds.features.Text(),
            "hexcode": tfds.features.Text(),
        }
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
            description="Noto Emoji (Google, Apache-2.0) drawn from SVG, named by emojibase (MIT).",
            homepage="https://github.com/googlefonts/noto-emoji",
        )

    def _split_generators(self, dl_manager) -> dict:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict]]:
        config = self.builder_config
        emoji = tqdm(read(config.packages), f"emoji {config.resolution} px", unit="image", disable=not config.progress)
        for index, each in enumerate(emoji):
            png = io.BytesIO(draw(each.svg, config.resolution))
            yield (
                index,
                {"image": png, "caption": each.name, "tags": ", ".join(each.tags), "hexcode": each.hexcode},
            )


def _builder(resolution: int, data_dir: str | Path, packages: str | Path, progress: bool) -> NotoEmoji:
    config = NotoEmojiConfig(resolution=resolution, packages=str(packages), progress=progress)
    return NotoEmoji(config=config, data_dir=str(data_dir), file_format="array_record")


def _icon(artwork: dict, name: str | None) -> dict | None:
    """Artwork by its name or an alias."""
    alias = artwork.get("aliases", {}).get(name)
    return artwork["icons"].get(alias["parent"] if alias else name)


def _svg(artwork: dict, icon: dict) -> str:
    box = [icon.get(key, artwork.get(key, default)) for key, default in _BOX.items()]
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{" ".join(map(str, box))}">{icon["body"]}</svg>'
    )


_BOX = {"left": 0, "top": 0, "width": 16, "height": 16}  # Iconify's defaults


def _plain(hexcode: str) -> str:
    """Code points without the variation selector, which the two packages place differently."""
    return "-".join(point for point in hexcode.lower().split("-") if point != "fe0f")


def _json(file: Path, kind: type) -> Any:
    try:
        content = file.read_bytes()
    except FileNotFoundError as error:
        advice = "run python -m experiments.recipes.emoji_data to fetch it"
        raise FileNotFoundError(f"{file}: not there; {advice}") from error
    values = parse(content, str(file), "emoji", most=2**28)
    if not isinstance(values, kind):
        raise ValueError(f"{file} is not JSON with emoji: it holds a {type(values).__name__}, not a {kind.__name__}")
    return values
