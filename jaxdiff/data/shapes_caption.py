"""Captions of `shapes` in varied wording, with the attributes that each caption states.

A caption always names colour and kind; size, fill, position and background are included at random. `stated` holds the
included attributes in the scene's own words, whatever the synonym; None is unspecified. An image is correct if it
agrees with `stated` (evaluation/attributes.py).
"""

import dataclasses
from collections.abc import Iterable

import numpy as np

from jaxdiff.data.shapes_scene import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    POSITIONS,
    Object,
    Scene,
    Split,
    pick,
    scene,
    stream,
)

STATED = 0.6  # probability that an optional attribute of a single object is stated
STATED_OF_TWO = 0.35  # and of each of two objects, to keep the sentence short


@dataclasses.dataclass(frozen=True)
class StatedObject:
    """The attributes that a caption states of one object; None: not stated."""

    kind: str
    colour: str
    size: str | None = None
    fill: str | None = None
    position: str | None = None


@dataclasses.dataclass(frozen=True)
class Stated:
    """The attributes that a caption states. `relation`: position of the first of two objects relative to the second."""

    objects: tuple[StatedObject, ...]
    background: str | None = None
    relation: str | None = None

    def as_dict(self) -> dict:
        """In JSON's types."""
        return dataclasses.asdict(self) | {"objects": [dataclasses.asdict(o) for o in self.objects]}

    @staticmethod
    def from_dict(stated: dict) -> "Stated":
        return Stated(tuple(StatedObject(**o) for o in stated["objects"]), stated["background"], stated["relation"])


@dataclasses.dataclass(frozen=True)
class Caption:
    text: str
    stated: Stated


def caption(scene: Scene, split: Split, index: int, wording: int = 0) -> Caption:
    """A caption of a scene; each `wording` (0, 1, …) is an independent random choice of attributes and words."""
    rng = stream(split, index, 16 + wording)
    background = scene.background if rng.random() < STATED else None
    if len(scene.objects) == 1:
        stated = Stated((_stated(rng, scene.objects[0], STATED, rng.random() < STATED),), background)
        return Caption(_tidy(pick(rng, (_sentence, _sentence, _list))(rng, stated)), stated)
    objects = tuple(_stated(rng, o, STATED_OF_TWO, False) for o in scene.objects)
    stated = Stated(objects, background, scene.relation)
    return Caption(_tidy(_sentence_of_two(rng, stated)), stated)


def held_out_examples(n: int, objects: int = 1) -> list[tuple[Scene, Caption]]:
    """The first n held-out scenes with this many objects and distinct captions."""
    examples: dict[str, tuple[Scene, Caption]] = {}
    index = 0
    while len(examples) < n:
        s = scene("held_out", index, objects)
        c = caption(s, "held_out", index)
        examples.setdefault(c.text, (s, c))
        index += 1
    return list(examples.values())


def describes(stated: Stated, scene: Scene) -> bool:
    """Whether all stated attributes hold in a scene; the order of two objects does not matter."""
    if len(stated.objects) != len(scene.objects) or stated.background not in (None, scene.background):
        return False

    def agree(description: StatedObject, actual: Object) -> bool:
        names = (field.name for field in dataclasses.fields(description))
        return all(getattr(description, name) in (None, getattr(actual, name)) for name in names)

    if len(scene.objects) == 1:
        return agree(stated.objects[0], scene.objects[0])
    assert stated.relation is not None  # a caption of two objects states their relation
    orders = {stated.objects: stated.relation, stated.objects[::-1]: OPPOSITE[stated.relation]}
    return any(
        relation == scene.relation and all(map(agree, objects, scene.objects)) for objects, relation in orders.items()
    )


def distinct_examples(n: int, split: Split = "held_out", start: int = 0) -> list[tuple[Scene, Caption]]:
    """The first n examples from `start` such that no caption describes another one's image. Retrieval needs this, since
    "a red star" is true of many images."""
    chosen: list[tuple[Scene, Caption]] = []
    index = start
    while len(chosen) < n:
        s = scene(split, index)
        c = caption(s, split, index)
        if not any(describes(c.stated, other) or describes(other_caption.stated, s) for other, other_caption in chosen):
            chosen.append((s, c))
        index += 1
    return chosen


def held_out_captions(n: int, objects: int = 1) -> list[Caption]:
    """The captions of `held_out_examples`."""
    return [c for _, c in held_out_examples(n, objects)]


def _stated(rng: np.random.Generator, o: Object, chance: float, position: bool) -> StatedObject:
    size = o.size if rng.random() < chance else None
    fill = o.fill if rng.random() < chance else None
    return StatedObject(o.kind, o.colour, size, fill, o.position if position else None)


OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

# Words. A tuple lists the wordings of one attribute value.

SIZE_WORDS = {"small": ("small", "little"), "medium": ("medium", "medium-sized"), "large": ("large", "big")}
FILL_WORDS = {"solid": ("solid", "filled"), "outlined": ("outlined", "hollow"), "striped": ("striped",)}
RELATION_WORDS = {
    "left of": ("to the left of", "left of"),
    "right of": ("to the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
EDGE_WORDS = {"top": "at the top", "bottom": "at the bottom", "left": "on the left", "right": "on the right"}


def _sentence(rng: np.random.Generator, stated: Stated) -> str:
    """ "a large red striped circle in the top left corner on a black background" """
    (o,) = stated.objects
    noun, place, ground = _noun(rng, o, article=True), _place(rng, o.position), _ground(rng, stated.background)
    forms: tuple[str, ...] = (
        f"{noun} {place} {ground}",
        f"there is {noun} {place} {ground}",
        f"a picture of {noun} {place} {ground}",
    )
    if o.position:
        forms += (f"{place}, {noun} {ground}",)
    return pick(rng, forms)


def _list(rng: np.random.Generator, stated: Stated) -> str:
    """ "black background, outlined green star, large, right" """
    (o,) = stated.objects
    size = o.size if o.size is not None and rng.random() < 0.5 else None  # stated separately from the noun
    noun = _noun(rng, dataclasses.replace(o, size=None) if size else o, article=False)
    phrases = [noun, pick(rng, SIZE_WORDS[size]) if size else "", o.position or ""]
    ground = f"{stated.background} background" if stated.background else ""
    phrases = [ground, *phrases] if rng.random() < 0.5 else [*phrases, ground]
    return ", ".join(p for p in phrases if p)


def _sentence_of_two(rng: np.random.Generator, stated: Stated) -> str:
    """ "a blue heart to the left of a small green cross on white" """
    assert stated.relation is not None
    first, second = (_noun(rng, o, article=True) for o in stated.objects)
    between, ground = pick(rng, RELATION_WORDS[stated.relation]), _ground(rng, stated.background)
    phrase = f"{first} {between} {second}"
    return pick(rng, (f"{phrase} {ground}", f"there is {phrase} {ground}", f"a picture of {phrase} {ground}"))


def _noun(rng: np.random.Generator, o: StatedObject, article: bool) -> str:
    size = pick(rng, SIZE_WORDS[o.size]) if o.size else ""
    fill = pick(rng, FILL_WORDS[o.fill]) if o.fill else ""
    after = ""
    if o.fill == "striped" and rng.random() < 0.3:
        fill, after = "", "with stripes"
    middle = (fill, o.colour) if rng.random() < 0.5 else (o.colour, fill)
    words = " ".join(w for w in (size, *middle, o.kind, after) if w)
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}" if article else words


def _place(rng: np.random.Generator, position: str | None) -> str:
    if position is None:
        return ""
    if position == "center":
        return pick(rng, ("in the center", "in the middle"))
    return EDGE_WORDS.get(position) or pick(rng, (f"in the {position} corner", f"at the {position}"))


def _ground(rng: np.random.Generator, background: str | None) -> str:
    return pick(rng, (f"on a {background} background", f"on {background}")) if background else ""


def _tidy(text: str) -> str:
    return " ".join(text.split()).replace(" ,", ",")


def _vocabulary() -> frozenset[str]:
    """All words of the tables above and of the sentence templates."""
    tables = (*SIZE_WORDS.values(), *FILL_WORDS.values(), *RELATION_WORDS.values(), EDGE_WORDS.values())
    texts = [text for table in tables for text in table]
    texts += [*KINDS, *COLOURS, *BACKGROUNDS, *POSITIONS]
    texts += ["there is a picture of an", "in the center", "in the middle corner", "on a background", "with stripes"]
    return frozenset(word for text in texts for word in text.split())


WORDS = _vocabulary()
"""Every word of the captions, in lower case."""


def unknown_words(texts: Iterable[str]) -> list[str]:
    """The distinct words of these texts that occur in no caption, in order."""
    words = [word.strip(".,;:!?\"'()") for text in texts for word in text.lower().split()]
    return list(dict.fromkeys(word for word in words if word and word not in WORDS))
