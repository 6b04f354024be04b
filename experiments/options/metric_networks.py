"""The networks that compute features for metrics."""

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
    """The networks that compute features for metrics."""

    inception: Path | None = None
    """FID's Inception from experiments.export inception; without it there is no FID, KID or IS of that name."""
    clip: str | None = str(SHIPPED / "clip")
    """A CLIP: OUT/model of experiments.train clip, or a directory or hub id in the transformers layout. Default: the
    shipped CLIP of `shapes`."""
    classifier: Path | None = SHIPPED / "classifier"
    """OUT/model of experiments.train classifier, for FD-<its name>. Default: the shipped one of `shapes`."""
    resize: Literal["clean", "legacy", "pytorch"] = "clean"
    """Resize filter for Inception: antialiased bicubic (clean-fid), TensorFlow 1's bilinear (published figures), or
    PyTorch's bilinear (pytorch-fid)."""
    dims: Literal[64, 192, 768, 2048] = 2048
    """Inception features: FID uses 2048. Features of earlier layers (as in pytorch-fid) need fewer images and are
    reported under another name."""
    prefix: str = ""
    """Prepended to each caption for the CLIP score; the paper's code uses "A photo depicts". Default: none, as in the
    curves of Imagen and Stable Diffusion; the shipped CLIP knows only the words of `shapes`."""

    @property
    def before(self) -> str:
        """The prefix with a trailing space."""
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
    """Load the networks. FileNotFoundError for missing weights, ValueError for bad ones or if there are none."""
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
