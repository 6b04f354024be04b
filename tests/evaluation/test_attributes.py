"""The reader: right on drawings, clean, noisy and soft, and never right on an image that contradicts the caption."""

import dataclasses

import numpy as np
import pytest
from scipy import ndimage

from jaxdiff.data.shapes_caption import Stated, StatedObject, caption
from jaxdiff.data.shapes_draw import draw
from jaxdiff.data.shapes_scene import BACKGROUNDS, COLOURS, FILLS, KINDS, POSITIONS, SIZES, Object, Scene, scene
from jaxdiff.evaluation.attributes import compare, matches, read


def everything(s: Scene) -> Stated:
    """All that a caption could state of a scene (of two objects, no position)."""
    single = len(s.objects) == 1
    objects = (StatedObject(o.kind, o.colour, o.size, o.fill, o.position if single else None) for o in s.objects)
    return Stated(tuple(objects), s.background, s.relation)


def picture(s: Scene, resolution: int, noise: float, blur: float, rng: np.random.Generator) -> np.ndarray:
    """In [-1, 1]; `blur`: the standard deviation in pixels of a 64-pixel image."""
    image = draw(s, resolution).astype(np.float32) / 127.5 - 1
    if blur:
        image = ndimage.gaussian_filter(image, (blur * resolution / 64,) * 2 + (0,))
    return (image + rng.normal(0, noise, image.shape).astype(np.float32)).clip(-1, 1)


def accuracy(resolution: int, count: int, noise: float = 0.0, blur: float = 0.0) -> float:
    """The share of scenes, half of them held out, of which every attribute is read back."""
    rng = np.random.default_rng(0)
    right = 0
    for i in range(count):
        s = scene(("train", "held_out")[i % 2], i)
        right += matches(picture(s, resolution, noise, blur, rng), everything(s)).right
    return right / count


@pytest.mark.parametrize(("resolution", "count"), [(64, 200), (100, 20), (256, 40), (1024, 12)])
def test_clean_drawings(resolution, count):
    assert accuracy(resolution, count) >= 0.995


@pytest.mark.parametrize(("resolution", "count"), [(64, 100), (256, 20), (1024, 4)])
def test_noise(resolution, count):
    assert accuracy(resolution, count, noise=0.05) >= 0.98


def test_soft_and_noisy_pictures_as_a_model_draws_them():
    assert accuracy(64, 50, noise=0.05, blur=1.0) >= 0.98


@pytest.mark.slow
@pytest.mark.parametrize(("resolution", "count"), [(64, 1000), (256, 500), (1024, 100)])
def test_the_stated_accuracy(resolution, count):
    assert accuracy(resolution, count) >= 0.995
    assert accuracy(resolution, count, noise=0.05) >= 0.98


def test_every_combination_of_kind_colour_fill_and_background():
    """Smallest size, 64 pixels: the hardest drawings."""
    for kind in KINDS:
        for i, colour in enumerate(COLOURS):
            for j, fill in enumerate(FILLS):
                background = list(BACKGROUNDS)[(i + j) % 3]
                s = Scene(background, (Object(kind, colour, "small", fill, 0.28, 0.71, SIZES["small"][0]),))
                verdict = matches(draw(s, 64), everything(s))
                assert verdict.right, (s, verdict)


def test_uint8_and_float_read_the_same():
    image = draw(scene("train", 3), 256)
    a, b = read(image), read(image.astype(np.float32) / 127.5 - 1)
    assert a.background == b.background and len(a.objects) == len(b.objects)
    for x, y in zip(a.objects, b.objects, strict=True):
        assert (x.kind, x.colour, x.size, x.fill, x.position) == (y.kind, y.colour, y.size, y.fill, y.position)
        assert (x.x, x.y, x.radius) == pytest.approx((y.x, y.y, y.radius), abs=2e-3)


def test_places_are_read_to_a_hundredth():
    for i in range(20):
        (o,) = scene("train", i, 1).objects
        (found,) = read(draw(scene("train", i, 1), 64)).objects
        assert abs(found.x - o.x) < 0.012 and abs(found.y - o.y) < 0.012
        assert found.radius == pytest.approx(o.radius, rel=0.08)


@pytest.mark.parametrize(
    ("attribute", "values"),
    [("kind", KINDS), ("colour", COLOURS), ("size", SIZES), ("fill", FILLS), ("position", POSITIONS)],
)
def test_one_wrong_attribute_is_named_and_nothing_else(attribute, values):
    for i in range(12):
        s = scene("train", i, 1)
        reading, true = read(draw(s, 64)), everything(s)
        for value in values:
            (o,) = true.objects
            if value != getattr(o, attribute):
                wrong = dataclasses.replace(true, objects=(dataclasses.replace(o, **{attribute: value}),))
                checks = compare(reading, wrong).checks
                assert [name for name, right in checks.items() if not right] == [attribute]


def test_a_picture_that_contradicts_the_caption_is_never_right():
    captions = [caption(scene("held_out", i), "held_out", i).stated for i in range(60)]
    refused = 0
    for i in range(60):
        s = scene("train", i)
        reading = read(draw(s, 64))
        for stated in captions:
            if contradicts(s, stated):
                refused += 1
                assert not compare(reading, stated).right, (s, stated)
    assert refused > 3000


def contradicts(s: Scene, stated: Stated) -> bool:
    """From the scenes alone: some statement is false of the scene, whichever object is meant by which words."""
    if len(s.objects) != len(stated.objects) or stated.background not in (None, s.background):
        return True
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above", None: None}

    def false_of(objects, relation):
        said = zip(stated.objects, objects, strict=True)
        attributes = ("kind", "colour", "size", "fill", "position")
        wrong = any(getattr(words, a) not in (None, getattr(o, a)) for words, o in said for a in attributes)
        return wrong or stated.relation != relation

    return false_of(s.objects, s.relation) and false_of(s.objects[::-1], opposite[s.relation])


def test_two_objects_may_be_found_in_either_order():
    a = Object("circle", "red", "small", "solid", 0.25, 0.5, 0.12)
    b = Object("square", "blue", "medium", "solid", 0.75, 0.5, 0.17)
    image = draw(Scene("white", (a, b), "left of"), 64)
    red, blue = StatedObject("circle", "red"), StatedObject("square", "blue")
    assert matches(image, Stated((red, blue), relation="left of")).right
    assert matches(image, Stated((blue, red), relation="right of")).right
    swapped = matches(image, Stated((blue, red), relation="left of"))
    assert swapped.checks == {"count": True, "kind": True, "colour": True, "relation": False}
    assert not matches(image, Stated((red,))).right


def test_an_empty_picture_has_no_objects():
    image = np.full((64, 64, 3), 255, np.uint8)
    assert read(image).objects == () and read(image).background == "white"
    assert matches(image, Stated((StatedObject("circle", "red"),))).checks == {
        "count": False,
        "kind": False,
        "colour": False,
    }


def test_strange_pixels_have_no_name():
    """A ragged blob has no kind, an off-palette colour and background none either; nothing raises."""
    image = np.full((64, 64, 3), (0, 90, 0), np.uint8)
    image[20:44:3, 10:50] = (90, 0, 90)
    image[20:44, 10:50:7] = (90, 0, 90)
    reading = read(image)
    assert reading.background is None
    assert {(o.kind, o.colour) for o in reading.objects} == {(None, None)}
    read(np.random.default_rng(0).uniform(-1, 1, (64, 64, 3)).astype(np.float32))


@pytest.mark.parametrize("shape", [(32, 32, 3), (64, 80, 3)])
def test_pictures_that_cannot_be_read_are_named(shape):
    with pytest.raises(ValueError, match=f"{shape[1]}x{shape[0]}"):
        read(np.zeros(shape, np.uint8))
