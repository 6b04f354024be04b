"""The captions: true of their scene, and saying exactly what `stated` records."""

import json

from jaxdiff.data.shapes_caption import Stated, caption, held_out_captions, held_out_examples
from jaxdiff.data.shapes_scene import COLOURS, FILLS, KINDS, RELATIONS, SIZES, held_out, scene

# An independent reading of the words (longest first, so that "to the left of" is gone before "left" is looked for).
WORDS = {
    "relation": {
        "to the left of": "left of",
        "to the right of": "right of",
        "left of": "left of",
        "right of": "right of",
    }
    | {"above": "above", "over": "above", "below": "below", "under": "below"},
    "position": {f"{r} {c}": f"{r} {c}" for r in ("top", "bottom") for c in ("left", "right")}
    | {w: w for w in ("top", "bottom", "left", "right", "center")}
    | {"middle": "center"},
    "background": {f"{b} background": b for b in ("white", "grey", "black")}
    | {f"on {b}": b for b in ("white", "grey", "black")},
    "size": {"little": "small", "big": "large", "medium-sized": "medium"} | {s: s for s in SIZES},
    "fill": {"filled": "solid", "hollow": "outlined", "with stripes": "striped"} | {f: f for f in FILLS},
    "colour": {c: c for c in COLOURS},
    "kind": {k: k for k in KINDS},
}


def find(attribute, text):
    """The one value of an attribute that a text names, and the text without it."""
    for words in sorted(WORDS[attribute], key=len, reverse=True):
        if f" {words} " in text:
            return WORDS[attribute][words], text.replace(f" {words} ", "  ", 1)
    return None, text


def understood(text):
    text = f" {text.replace(',', ' ')} "
    relation = next((w for w in sorted(WORDS["relation"], key=len, reverse=True) if f" {w} " in text), None)
    background, text = find("background", text)
    objects = []
    for part in text.split(f" {relation} ") if relation else [text]:
        said, part = {}, f" {part} "
        for attribute in ("fill", "size", "colour", "kind", "position"):
            said[attribute], part = find(attribute, part)
        objects.append(said)
    return {"background": background, "relation": WORDS["relation"].get(relation), "objects": objects}


def test_the_words_say_what_is_stated():
    for split in ("train", "held_out"):
        for index in range(500):
            c = caption(scene(split, index), split, index)
            assert understood(c.text) == c.stated.as_dict(), c.text


def test_what_is_stated_is_true():
    for index in range(500):
        s = scene("train", index)
        stated = caption(s, "train", index).stated
        assert stated.background in (None, s.background) and stated.relation == s.relation
        for said, o in zip(stated.objects, s.objects, strict=True):
            assert (said.kind, said.colour) == (o.kind, o.colour)
            for name in ("size", "fill", "position"):
                assert getattr(said, name) in (None, getattr(o, name))


def test_every_optional_attribute_is_said_and_left_out_often():
    stated = [caption(scene("train", i, 1), "train", i).stated for i in range(500)]
    for name in ("size", "fill", "position"):
        assert 0.5 < sum(getattr(s.objects[0], name) is not None for s in stated) / 500 < 0.7
    assert 0.5 < sum(s.background is not None for s in stated) / 500 < 0.7
    assert {scene("train", i, 2).relation for i in range(50)} == set(RELATIONS)


def test_wordings_differ_and_repeat_exactly():
    s = scene("train", 2)
    texts = [caption(s, "train", 2, wording).text for wording in range(20)]
    assert len(set(texts)) > 5
    assert texts == [caption(s, "train", 2, wording).text for wording in range(20)]


def test_texts_are_tidy():
    for index in range(300):
        text = caption(scene("train", index), "train", index).text
        assert text == " ".join(text.split()) and " ," not in text and len(text.split()) <= 24
        for vowel in ("orange", "outlined"):
            assert f" a {vowel}" not in f" {text}"


def test_held_out_captions_are_distinct_and_held_out():
    for objects in (1, 2):
        examples = held_out_examples(60, objects)
        assert [c for _, c in examples] == held_out_captions(60, objects)
        assert len({c.text for _, c in examples}) == 60
        assert all(held_out(s.objects[0]) and len(s.objects) == objects for s, _ in examples)


def test_stated_survives_json():
    for index in range(20):
        stated = caption(scene("train", index), "train", index).stated
        assert Stated.from_dict(json.loads(json.dumps(stated.as_dict()))) == stated
