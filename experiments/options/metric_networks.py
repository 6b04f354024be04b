"""The networks that metrics look through."""

import dataclasses
from pathlib import Path
from typing import Literal, NamedTuple

from jaxdiff.evaluation import features
from jaxdiff.evaluation.features import Extractor
from jaxdiff.evaluation.resize import Resize
from jaxdiff.text.encoder import TextEncoder
from jaxdiff.weights import classifier, clip, inception
from jaxdiff.weights.imagen import SHIPPED


@dataclasses.dataclass(frozen=True)
class MetricNetworks:
    """The networks that metrics look through."""

    inception: Path | None = None
    """FID's Inception, of experiments.export inception: without it there is no FID, KID and IS of that name."""
    clip: str | None = str(SHIPPED / "clip")
    """A CLIP: OUT/model of experiments.train clip, or a directory or hub id in the transformers layout. Left out: the
    shipped one of `shapes`."""
    classifier: Path | None = SHIPPED / "classifier"
    """OUT/model of experiments.train classifier, for FD-<its name>. Left out: the shipped one of `shapes`."""
    resize: Literal["clean", "legacy", "pytorch"] = "clean"
    """How images come to Inception's size: antialiased bicubic (clean-fid), TensorFlow 1's bilinear, as published
    figures, or PyTorch's bilinear (pytorch-fid)."""
    dims: Literal[64, 192, 768, 2048] = 2048
    """Of Inception: FID is that of 2048 features; those of earlier layers, as pytorch-fid taps them, want fewer
    images and give numbers of another name."""
    prefix: str = ""
    """Stands before each caption for the CLIP score: the paper's code has "A photo depicts". Left out, none: Imagen's
    and Stable Diffusion's curves have none, and the shipped CLIP knows the words of `shapes` alone."""

    @property
    def before(self) -> str:
        """The prefix, with a blank behind it."""
        return self.prefix if not self.prefix or self.prefix.endswith(" ") else f"{self.prefix} "


class Networks(NamedTuple):
    """The networks, loaded; `text` embeds captions for `clip`."""

    inception: Extractor | None
    classifier: Extractor | None
    clip: Extractor | None
    text: TextEncoder | None

    @property
    def extractors(self) -> tuple[Extractor, ...]:
        return tuple(each for each in (self.inception, self.classifier, self.clip) if each is not None)


def loaded(options: MetricNetworks) -> Networks:
    """FileNotFoundError, or ValueError, for weights that are not there or none."""
    seeing, classifying, image, text = None, None, None, None
    if options.inception is not None:
        seeing = features.inception(inception.load(options.inception), Resize(options.resize), options.dims)
    if options.classifier is not None:
        classifying = features.classifier(*classifier.load(options.classifier))
    if options.clip is not None:
        text = clip.load_text_encoder(options.clip)
        image = features.clip_image(*clip.load_image(options.clip))
    networks = Networks(seeing, classifying, image, text)
    if not networks.extractors:
        raise ValueError("no networks: name --inception, --clip or --classifier")
    return networks
