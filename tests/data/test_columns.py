"""Guessed columns: the usual names, and an error that names the columns and the setting where that is not enough."""

import pytest

from jaxdiff.data.columns import caption_column, chosen, image_column

USUAL = ("text", "caption", "captions", "prompt", "label text", "sentence", "title", "TEXT")


@pytest.mark.parametrize(
    "images, named, expected",
    [
        (["image"], None, "image"),
        (["IMG", "mask"], None, "IMG"),
        (["jpg", "seg"], None, "jpg"),
        (["anything"], None, "anything"),
        (["image", "mask"], "mask", "mask"),
    ],
)
def test_images(images, named, expected):
    assert image_column("hf:x", images, named, [*images, "text"]) == expected


@pytest.mark.parametrize(
    "images, named, message",
    [
        ([], None, "hf:x: no column holds images, only text, url"),
        (["image", "jpg"], None, "the columns image, jpg all hold images: say which with image_column"),
        (["left", "right"], None, "the columns left, right all hold images: say which with image_column"),
        (["image"], "text", "image_column 'text' holds no images; with images: image"),
        (["image"], "pixels", "image_column 'pixels' is no column; with images: image"),
    ],
)
def test_images_that_are_not_clear(images, named, message):
    with pytest.raises(ValueError, match=message) as error:
        image_column("hf:x", images, named, [*images, "text", "url"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "texts, named, expected",
    [
        *(
            ([name], None, name)
            for name in ("text", "caption", "captions", "prompt", "label text", "sentence", "title", "TEXT")
        ),
        (["id", "url", "Caption"], None, "Caption"),
        (["id", "blip_caption"], None, "blip_caption"),
        (["caption_id", "promptEn", "prompt_hash"], None, "promptEn"),
        (["text", "my_caption"], None, "text"),
        (["text", "caption"], "caption", "caption"),
        (["id"], "id", "id"),
        (["text", "caption"], "", None),
        ([], None, None),
    ],
)
def test_captions(texts, named, expected):
    assert caption_column("hf:x", texts, named, ["image", *texts]) == expected


@pytest.mark.parametrize(
    "texts, named, message",
    [
        (
            ["text", "caption", "id"],
            None,
            "columns text, caption could all hold the captions: say which with caption_column",
        ),
        (["caption_1", "caption_2"], None, "the columns caption_1, caption_2 could all"),
        (["id", "url"], None, r"say with caption_column which of id, url it is, or that it is '' \(none\)"),
        (["text"], "prompt", "caption_column 'prompt' is no column; with text: text"),
        (["text"], "image", "caption_column 'image' holds no text; with text: text"),
    ],
)
def test_captions_that_are_not_clear(texts, named, message):
    with pytest.raises(ValueError, match=message) as error:
        caption_column("hf:x", texts, named, ["image", *texts])
    assert "\n" not in str(error.value)


def test_a_guess_is_said_in_a_line():
    assert chosen("hf:x", "image", "text") == "hf:x: images from 'image', captions from 'text'"
    assert chosen("hf:x", "image", None, "; rest") == "hf:x: images from 'image', no captions; rest"
