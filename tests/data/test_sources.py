"""The five sources end in one pipeline; what is not there or not usable is said in one line."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from jaxdiff.data import convert, embeddings, images, shapes, sources, tfds_sets
from jaxdiff.data.pipeline import DataConfig, image_batches
from jaxdiff.text.encoder import TextEmbedding


@pytest.mark.parametrize(
    "text, spec",
    [
        ("shapes", sources.Shapes()),
        ("emoji", sources.Emoji()),
        ("rainbow", sources.Rainbow()),
        ("folder:/a:b", sources.Folder(Path("/a:b"))),
        ("tfds:coco_captions/2017:1.1.0", sources.Tfds("coco_captions/2017:1.1.0")),
        ("records:runs/x", sources.Records(Path("runs/x"))),
    ],
)
def test_parse(text, spec):
    assert sources.parse(text) == spec
    assert sources.describe(spec) == text


@pytest.mark.parametrize(
    "text", ["", "shape", "shapes:64", "emoji:", "folder", "folder:", "tfds:", "records", "http://x"]
)
def test_parse_names_the_choices(text):
    with pytest.raises(ValueError) as caught:
        sources.parse(text)
    assert repr(text) in str(caught.value) and sources.CHOICES in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


SHAPES = sources.Shapes(train=6, held_out=3)


@pytest.fixture(scope="module")
def shapes_dir(data_dir):
    """The folder of a prepared shapes set."""
    sources.open(SHAPES, 64, "train", data_dir)
    return next(data_dir.glob("shapes/*/*"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory, source):
    """A folder with captions in text files, one image a level deeper."""
    folder = tmp_path_factory.mktemp("photos")
    for i, example in enumerate(source.examples[:6]):
        file = folder / ("deep" if i == 2 else "") / f"{i}.PNG"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(example["image"])
        file.with_suffix(".txt").write_text(f" {example['caption']}\n")
    (folder / "notes.md").write_text("not an image")
    return folder


@pytest.fixture
def every_source(data_dir, shapes_dir, photos, tmp_path, fake_emoji):
    rows = "path,caption\n" + "".join(
        f"{photos}/{name}.PNG,a caption\n" for name in ("0", "1", "deep/2", "3", "4", "5")
    )
    (tmp_path / "list.csv").write_text(rows)
    convert.convert([str(tmp_path / "list.csv")], tmp_path / "records")
    return {
        "shapes": SHAPES,
        "emoji": sources.Emoji(),
        "folder": sources.Folder(photos),
        "tfds": sources.Tfds(str(shapes_dir)),
        "records": sources.Records(tmp_path / "records"),
    }


@pytest.mark.parametrize("kind", ["shapes", "emoji", "folder", "tfds", "records"])
def test_all_sources_end_in_the_same_pipeline(kind, every_source, data_dir, tmp_path):
    source = sources.open(every_source[kind], 64, "train", data_dir)
    count = 3 if kind == "emoji" else 6
    assert len(source) == count
    captions = [source[i]["caption"] for i in range(count)]
    assert all(isinstance(caption, str) and caption for caption in captions)
    stored = embeddings.store_embeddings(
        captions,
        lambda texts: TextEmbedding(np.ones((len(texts), 2, 3)), np.ones((len(texts), 2), bool)),
        tmp_path / "text",
        encoder="ones",
        batch=4,
    )
    config = DataConfig(64, 5, low_resolution=16, crop=32, captions=True, strict=True, shuffle=False)
    batch = next(image_batches(source, config, stored))
    shapes = {key: value.shape for key, value in batch.items()}
    assert shapes == {
        "image": (5, 32, 32, 3),
        "low_res": (5, 8, 8, 3),
        "text": (5, 2, 3),
        "text_mask": (5, 2),
        "caption": (5,),
        "index": (5,),
    }
    assert batch["caption"].tolist() == (captions * 2)[:5]
    assert -1 <= batch["image"].min() < batch["image"].max() <= 1


def test_shapes_have_two_splits(data_dir):
    assert len(sources.open(SHAPES, 64, "held_out", data_dir)) == 3
    with pytest.raises(ValueError, match="no split 'test', only train, held_out"):
        sources.open(SHAPES, 64, "test", data_dir)


def test_held_out_shapes_need_no_training_images(tmp_path, monkeypatch):
    """They are the same whether the whole dataset was prepared before or not."""
    rendered, real = [], shapes.example
    monkeypatch.setattr(shapes, "example", lambda split, *rest: rendered.append(split) or real(split, *rest))
    alone = sources.open(SHAPES, 64, "held_out", tmp_path)
    assert rendered.count("train") == 1 and rendered.count("held_out") == len(alone) == 3
    sources.open(SHAPES, 64, "train", tmp_path)
    before = len(rendered)
    whole = sources.open(SHAPES, 64, "held_out", tmp_path)
    assert len(rendered) == before
    for one, other in ((alone[i], whole[i]) for i in range(3)):
        np.testing.assert_array_equal(one["image"], other["image"])
        assert one["caption"] == other["caption"]


@pytest.mark.parametrize("spec", [sources.Emoji(), sources.Folder(Path("x")), sources.Records(Path("x"))])
def test_sources_without_splits_say_so(spec, data_dir):
    with pytest.raises(ValueError, match="has only the split 'train', not 'held_out'"):
        sources.open(spec, 64, "held_out", data_dir)


def test_a_folder_is_read_in_order(photos, source):
    read = sources.open(sources.Folder(photos), 64, "train", "")
    assert [Path(read[i]["name"]).name for i in range(6)] == ["0.PNG", "1.PNG", "3.PNG", "4.PNG", "5.PNG", "2.PNG"]
    assert read[5]["caption"] == "image number 2" and read[5]["image"] == source.examples[2]["image"]


def test_a_folder_with_metadata(tmp_path, source):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(source.examples[0]["image"])
    (tmp_path / "y.png").write_bytes(source.examples[1]["image"])
    (tmp_path / "unlisted.png").write_bytes(b"")
    rows = [{"file_name": "y.png", "text": "why"}, {"file_name": "a/x.png", "caption": "ex"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    read = sources.open(sources.Folder(tmp_path), 64, "train", "")
    assert [read[i]["caption"] for i in range(len(read))] == ["why", "ex"]
    (batch,) = image_batches(read, DataConfig(32, 2, captions=True, shuffle=False, repeat=False, strict=True))
    np.testing.assert_array_equal(images.to_uint8(batch["image"][1]), images.decode(source.examples[0]["image"]))


@pytest.mark.parametrize("line", ["{", "[]", '{"text": "no name"}', "3"])
def test_bad_metadata_is_named_by_line(tmp_path, line):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}\n' + line)
    with pytest.raises(ValueError, match=r"metadata.jsonl:2: not a JSON object with a file_name"):
        sources.open(sources.Folder(tmp_path), 64, "train", "")


def test_a_folder_without_a_caption_or_a_picture(tmp_path, source):
    (tmp_path / "a.png").write_bytes(source.examples[0]["image"])
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}\n{"file_name": "gone.png", "text": "gone"}\n')
    read = sources.open(sources.Folder(tmp_path), 64, "train", "")
    assert read[0]["caption"] is None
    batches = image_batches(read, DataConfig(32, 1, repeat=False))
    with pytest.warns(UserWarning, match=r"gone\.png"):
        assert len(list(batches)) == 1
    assert batches.skipped.count == 1


def test_what_is_not_there(tmp_path):
    (tmp_path / "empty").mkdir()
    for spec, message in [
        (sources.Folder(tmp_path / "no"), "no such folder"),
        (sources.Folder(tmp_path / "empty"), "no images there"),
        (sources.Records(tmp_path / "empty"), "no dataset.json there"),
        (sources.Emoji(), "run python -m experiments.recipes.emoji_data"),
    ]:
        with pytest.raises(FileNotFoundError, match=message):
            sources.open(spec, 64, "train", tmp_path)


def test_a_folder_without_its_kind(tmp_path):
    with pytest.raises(ValueError, match=f"for this folder: folder:{tmp_path}$"):
        sources.parse(str(tmp_path))


def test_a_missing_record_file_is_named(tmp_path, photos):
    (tmp_path / "list.csv").write_text(f"path,caption\n{photos}/0.PNG,x\n")
    convert.convert([str(tmp_path / "list.csv")], tmp_path / "records")
    shard = next((tmp_path / "records").glob("*.array_record"))
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        sources.open(sources.Records(tmp_path / "records"), 64, "train", "")


TEXT, IMAGE, LABEL = tfds.features.Text(), tfds.features.Image(shape=(4, 4, 3)), tfds.features.ClassLabel(num_classes=3)
SEVERAL = tfds.features.Sequence({"id": np.int64, "text": TEXT})


@pytest.mark.parametrize(
    "features, paths",
    [
        ({"image": IMAGE, "text": TEXT}, (("image",), ("text",))),
        ({"photo": IMAGE, "title": TEXT, "caption": TEXT}, (("photo",), ("caption",))),
        (
            {"image": IMAGE, "captions": tfds.features.Sequence({"id": np.int64, "text": TEXT})},
            (("image",), ("captions", "text")),
        ),
        ({"image": IMAGE, "texts": tfds.features.Sequence(TEXT)}, (("image",), ("texts",))),
    ],
)
def test_picture_and_caption_are_found_by_type(features, paths):
    assert tfds_sets.caption_features(tfds.features.FeaturesDict(features), "some_set") == paths


@pytest.mark.parametrize(
    "features, message",
    [
        (
            {"image": IMAGE, "label": tfds.features.ClassLabel(num_classes=3)},
            "no text among its features.*label .ClassLabel",
        ),
        ({"size": np.int64, "text": TEXT}, "no image among its features.*size .Tensor"),
    ],
)
def test_a_set_without_them_is_refused(features, message):
    with pytest.raises(ValueError, match=message):
        tfds_sets.caption_features(tfds.features.FeaturesDict(features), "some_set")


class SeveralCaptions(tfds.core.GeneratorBasedBuilder):
    """A set as people have them: shuffled, several captions an image, sometimes none."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        photo = tfds.features.Image(shape=(None, None, 3))
        features = tfds.features.FeaturesDict({"photo": photo, "captions": SEVERAL})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"validation": self._generate_examples()}

    def _generate_examples(self):
        for i in range(4):
            photo = io.BytesIO()
            Image.new("RGB", (60, 40), (0, 0, 80 * i)).save(photo, "PNG")
            photo.seek(0)
            yield str(i), {"photo": photo, "captions": [{"id": i, "text": f"{i}{n}"} for n in "abc"[:i]]}


def test_a_tfds_name_is_prepared_and_read(tmp_path):
    source = sources.open(sources.Tfds("several_captions"), 64, "validation[:75%]", tmp_path)
    assert len(source) == 3 and (tmp_path / "several_captions").is_dir()
    whole = sources.open(sources.Tfds("several_captions:1.0.0"), 64, "validation", tmp_path)
    assert sorted(str(whole[i]["caption"]) for i in range(4)) == ["1a", "2a", "3a", "None"]
    batches = image_batches(whole, DataConfig(16, 4, captions=True, repeat=False))
    with pytest.warns(UserWarning, match=r"several_captions/validation\[\d\]: no caption"):
        (batch,) = batches
    for picture, caption in zip(images.to_uint8(batch["image"]), batch["caption"], strict=True):
        np.testing.assert_array_equal(picture, np.broadcast_to(np.uint8([0, 0, 80 * int(caption[0])]), (16, 16, 3)))


def test_an_unknown_tfds_name(tmp_path):
    with pytest.raises(ValueError, match="tfds:no_such_set: TFDS knows no dataset of that name"):
        sources.open(sources.Tfds("no_such_set"), 64, "train", tmp_path)


def test_files_without_random_access_are_refused(shapes_dir, tmp_path):
    copy = tmp_path / shapes_dir.parent.parent.name / shapes_dir.parent.name / shapes_dir.name
    shutil.copytree(shapes_dir, copy)
    told = copy / "dataset_info.json"
    told.write_text(told.read_text().replace("array_record", "tfrecord"))
    for file in copy.glob("*.array_record*"):
        file.rename(copy / file.name.replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match="no random access"):
        sources.open(sources.Tfds(str(copy)), 64, "train", "")


@pytest.mark.parametrize("caption", [["a cat", "cat"], 7, {"en": "cat"}])
def test_a_caption_that_is_no_string_is_named(tmp_path, caption):
    row = {"file_name": "a.png", "text": caption}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=r"metadata\.jsonl:1: the caption is not a string"):
        sources.open(sources.Folder(tmp_path), 64, "train", "")


def test_a_version_that_tfds_does_not_have_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"tfds:mnist:9\.9\.9: "):
        sources.open(sources.Tfds("mnist:9.9.9"), 64, "train", tmp_path)
