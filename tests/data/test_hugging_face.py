"""Folders of the Hugging Face hub: imagefolders, Parquet files, splits, configurations, and what is ignored."""

import json
import warnings

import numpy as np
import pytest

pa = pytest.importorskip("pyarrow", reason="Parquet needs the parquet extra")
pq = pytest.importorskip("pyarrow.parquet")

from jaxdiff.core.messages import Note  # noqa: E402
from jaxdiff.data import convert, folder, hugging_face, images, records, sources  # noqa: E402
from jaxdiff.data.convert import Settings  # noqa: E402
from jaxdiff.data.pipeline import DataConfig, image_batches  # noqa: E402


def png(i):
    return images.encode_png(np.full((8, 8, 3), i, np.uint8))


def put(path, *numbers, suffix="png", prefix=""):
    path.mkdir(parents=True, exist_ok=True)
    for i in numbers:
        (path / f"{prefix}{i}.{suffix}").write_bytes(png(i))


def table(file, rows):
    """A metadata file in the format that its name says."""
    if file.suffix == ".jsonl":
        file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    elif file.suffix == ".csv":
        names = list(rows[0])
        cells = [["" if row[name] is None else f'"{row[name]}"' for name in names] for row in rows]
        file.write_text("\n".join(",".join(line) for line in [names, *cells]) + "\n")
    else:
        pq.write_table(pa.Table.from_pylist(rows), file)


def parquet(file, *numbers):
    file.parent.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": png(i), "path": None} for i in numbers]
    pq.write_table(pa.table({"image": cells, "caption": [f"image {i}" for i in numbers]}), file)


def opened(path, split="train", **columns):
    """(value of the pixels, caption) of each example; the lines of notes; those of warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        source = sources.open(sources.HuggingFace(path, **columns), 64, split, "")
    told = [[str(w.message) for w in caught if issubclass(w.category, Note) is note] for note in (True, False)]
    read = [(int(images.decode(source[i]["image"])[0, 0, 0]), source[i]["caption"]) for i in range(len(source))]
    return read, *told


ROWS = [{"file_name": f"{i}.png", "text": f"image {i}", "width": 8} for i in (3, 1, 2)]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_an_imagefolder(tmp_path, kind):
    put(tmp_path, 1, 2, 3)
    table(tmp_path / f"metadata.{kind}", ROWS)
    read, notes, warned = opened(tmp_path)
    assert read == [(3, "image 3"), (1, "image 1"), (2, "image 2")] and not warned
    assert notes == [f"hf:{tmp_path}/metadata.{kind}: images from 'file_name', captions from 'text'"]
    assert hugging_face.is_layout(tmp_path) == (kind != "jsonl")


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_captions_may_be_missing(tmp_path, kind):
    put(tmp_path, 1, 2, 3)
    (tmp_path / "2.txt").write_text("from a text file")
    table(
        tmp_path / f"metadata.{kind}",
        [{**row, "text": row["text"] if row["file_name"] == "3.png" else None} for row in ROWS],
    )
    assert opened(tmp_path)[0] == [(3, "image 3"), (1, None), (2, "from a text file")]


def test_lists_of_captions_in_metadata(tmp_path):
    put(tmp_path, 1, 2)
    rows = [{"file_name": "1.png", "captions": [" ", "one", "eins"]}, {"file_name": "2.png", "captions": []}]
    for kind in ("jsonl", "parquet"):
        table(tmp_path / f"metadata.{kind}", rows)
        assert opened(tmp_path)[0] == [(1, "one"), (2, None)]
        (tmp_path / f"metadata.{kind}").unlink()


def test_metadata_of_each_split(tmp_path):
    for split, numbers in (("train", (1, 2)), ("test", (3,)), ("validation", (4, 5))):
        put(tmp_path / split / "deep", *numbers)
        rows = [{"file_name": f"deep/{i}.png", "caption": f"{split} {i}"} for i in numbers]
        table(tmp_path / split / "metadata.jsonl", rows)
    read, notes, warned = opened(tmp_path)
    assert read == [(1, "train 1"), (2, "train 2")] and not warned
    splits = "test (1 file), train (2 files), validation (2 files)"
    assert notes[0] == f"hf:{tmp_path}: read the split train; there are {splits}"
    assert opened(tmp_path, "validation")[0] == opened(tmp_path, "val")[0] == [(4, "validation 4"), (5, "validation 5")]
    assert hugging_face.is_layout(tmp_path)
    with pytest.raises(ValueError, match="no split 'held_out', only test, train, validation"):
        opened(tmp_path, "held_out")


@pytest.mark.parametrize("name", ["dev", "photos-val", "my_validation", "valid.2"])
def test_what_splits_are_called(tmp_path, name):
    put(tmp_path / "training", 1)
    put(tmp_path / name, 2)
    table(tmp_path / "training" / "metadata.csv", [{"file_name": "1.png", "text": "one"}])
    table(tmp_path / name / "metadata.csv", [{"file_name": "2.png", "text": "two"}])
    assert opened(tmp_path)[0] == [(1, "one")]
    assert opened(tmp_path, "validation")[0] == [(2, "two")]


def test_splits_in_the_names_of_files(tmp_path):
    put(tmp_path, 1, 2, prefix="train_")
    put(tmp_path, 3, prefix="test-")
    rows = [{"file_name": name, "text": name} for name in ("train_1.png", "train_2.png", "test-3.png")]
    table(tmp_path / "metadata.csv", rows)
    assert opened(tmp_path)[0] == [(1, "train_1.png"), (2, "train_2.png")]
    assert opened(tmp_path, "test")[0] == [(3, "test-3.png")]


def test_an_image_of_a_train_is_no_split(tmp_path):
    put(tmp_path, 1, 2)
    (tmp_path / "train.png").write_bytes(png(7))
    table(tmp_path / "metadata.csv", [{"file_name": name, "text": name} for name in ("1.png", "2.png", "train.png")])
    assert len(opened(tmp_path)[0]) == 3


def test_the_nearest_metadata_lists_an_image(tmp_path):
    put(tmp_path, 1)
    put(tmp_path / "a", 2)
    put(tmp_path / "a" / "b", 3)
    table(
        tmp_path / "metadata.jsonl",
        [{"file_name": "1.png", "text": "top"}, {"file_name": "a/2.png", "text": "not this"}],
    )
    table(tmp_path / "a" / "metadata.csv", [{"file_name": f"{n}.png", "text": "inner"} for n in ("2", "b/3")])
    assert opened(tmp_path)[0] == [(2, "inner"), (3, "inner"), (1, "top")]


def test_without_metadata_captions_are_in_text_files(tmp_path):
    put(tmp_path / "train" / "cats", 1)
    put(tmp_path / "test", 2)
    (tmp_path / "train" / "cats" / "1.txt").write_text("a cat")
    read, notes, _ = opened(tmp_path)
    assert read == [(1, "a cat")] and "no metadata.csv, .jsonl or .parquet: captions from .txt files" in notes[-1]


def test_columns_of_files(tmp_path):
    put(tmp_path, 1, 2)
    rows = [{"mask_file_name": "2.png", "image_file_name": "1.png", "text": "one"}]
    table(tmp_path / "metadata.jsonl", rows)
    assert opened(tmp_path)[0] == [(1, "one")]
    assert (
        opened(tmp_path, image_column="mask")[0] == opened(tmp_path, image_column="mask_file_name")[0] == [(2, "one")]
    )
    table(tmp_path / "metadata.jsonl", [{"left_file_name": "2.png", "right_file_name": "1.png", "text": "one"}])
    with pytest.raises(ValueError, match="the columns left, right all hold images: say which with image_column"):
        opened(tmp_path)
    table(tmp_path / "metadata.jsonl", [{"name": "2.png", "text": "one"}])
    with pytest.raises(ValueError, match=r"metadata.jsonl: no column file_name or \*_file_name, only name, text"):
        opened(tmp_path)


def test_columns_of_captions(tmp_path):
    put(tmp_path, 1)
    table(tmp_path / "metadata.csv", [{"file_name": "1.png", "text": "a", "caption": "b", "width": 8}])
    with pytest.raises(ValueError, match=r"metadata.csv: the columns text, caption could all .* caption_column"):
        opened(tmp_path)
    assert opened(tmp_path, caption_column="caption")[0] == [(1, "b")]
    assert opened(tmp_path, caption_column="")[0] == [(1, None)]
    table(tmp_path / "metadata.csv", [{"file_name": "1.png", "width": 8, "height": None}])
    assert opened(tmp_path)[0] == [(1, None)]  # numbers are no captions


def test_all_that_is_ignored_is_counted_and_named(tmp_path):
    put(tmp_path, 1, 2, 3)
    put(tmp_path / ".cache", 9)
    (tmp_path / "clip.mp4").write_bytes(b"")
    (tmp_path / "list.csv").write_text("")
    table(tmp_path / "metadata.csv", [{"file_name": "1.png", "text": "one"}, {"file_name": None, "text": "none"}])
    read, _, warned = opened(tmp_path)
    assert read == [(1, "one")]
    where = f"hf:{tmp_path}: left out"
    assert warned == [
        f"{where} 1 hidden folder or image (.cache)",
        f"{where} 1 file of an unknown kind (1 .mp4)",
        f"{where} 1 table that is not named metadata (list.csv)",
        f"{where} 1 row without a file_name",
        f"{where} 2 images that no metadata lists (2.png, 3.png)",
    ]


def test_metadata_of_no_image_is_named(tmp_path):
    put(tmp_path / "a", 1)
    for name in ("a", "b", "test"):
        (tmp_path / name).mkdir(exist_ok=True)
        table(tmp_path / name / "metadata.csv", [{"file_name": "1.png", "text": "one"}])
    read, _, warned = opened(tmp_path)
    assert read == [(1, "one")]
    assert warned == [f"hf:{tmp_path}: left out 1 metadata file of no image (b/metadata.csv)"]


def test_listed_images_that_are_not_there_are_counted_when_asked_for(tmp_path):
    put(tmp_path / "train", 1)
    put(tmp_path / "test", 2)
    names = ("train/1.png", "train/gone.png", "test/2.png", "test/gone.png")
    table(tmp_path / "metadata.csv", [{"file_name": name, "text": name} for name in names])
    source = hugging_face.read(tmp_path)
    assert [name for name, _ in source.entries] == ["train/1.png", "train/gone.png"]
    stream = image_batches(source, DataConfig(8, 2, captions=True, repeat=False))
    with pytest.warns(UserWarning, match=r"gone\.png"):
        assert [len(batch["image"]) for batch in stream] == [1]
    assert stream.skipped.reasons == {"unreadable": 1}


@pytest.mark.parametrize(
    "kind, content, message",
    [
        ("csv", 'file_name,text\n1.png,a "quote\n2.png,"open\n', r"metadata\.csv, line 3: .*perhaps not closed"),
        ("csv", "file_name,text\n1.png,a,b\n", r"metadata\.csv, line 2: the header has 2 fields, this row 3"),
        ("jsonl", '{"file_name": "1.png"}\n{"file_name"\n', r"metadata\.jsonl:2: not a JSON object"),
        ("jsonl", '{"file_name": "1.png"}\n{"file_name": 7}\n', r"metadata\.jsonl:2: file_name is not a string but 7"),
        ("jsonl", '{"file_name": "1.png", "text": "a"}\n{"file_name": "1", "text": 7}', "jsonl:2: the caption is no"),
        ("parquet", "nothing", r"metadata\.parquet: not a Parquet file"),
    ],
)  # fmt: skip
def test_damaged_metadata_is_named_by_line(tmp_path, kind, content, message):
    put(tmp_path, 1, 2)
    (tmp_path / f"metadata.{kind}").write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        opened(tmp_path)
    assert "\n" not in str(error.value)


def test_two_metadata_files_in_a_folder(tmp_path):
    put(tmp_path, 1)
    for kind in ("csv", "jsonl"):
        table(tmp_path / f"metadata.{kind}", ROWS)
    with pytest.raises(ValueError, match=r"metadata.csv and metadata.jsonl in one folder: keep one of them"):
        opened(tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"),
        ("train-00000-of-00002-9a7.parquet", "train-00001-of-00002-11b.parquet", "test-00000-of-00001-cf.parquet"),
        ("train/0000.parquet", "train/0001.parquet", "test/0000.parquet"),
        ("set-train-00000-of-00002.parquet", "set-train-00001-of-00002.parquet", "set-test-00000-of-00001.parquet"),
        ("train1.parquet", "train2.parquet", "test.parquet"),
        ("data/train-1.parquet", "training/0000.parquet", "eval.parquet"),
    ],
)
def test_parquet_files_of_splits(tmp_path, names):
    for number, name in enumerate(names):
        parquet(tmp_path / name, 2 * number, 2 * number + 1)
    read, notes, warned = opened(tmp_path)
    assert read == [(i, f"image {i}") for i in range(4)] and not warned
    assert notes[-1] == f"hf:{tmp_path}: images from 'image', captions from 'caption'"
    assert opened(tmp_path, "test")[0] == [(4, "image 4"), (5, "image 5")]


def test_other_splits_and_none(tmp_path):
    parquet(tmp_path / "one" / "data" / "held_out-00000-of-00001.parquet", 1)
    assert opened(tmp_path / "one", "held_out")[0] == [(1, "image 1")]
    parquet(tmp_path / "three" / "photos-00000-of-00001.parquet", 1)
    assert opened(tmp_path / "three")[0] == [(1, "image 1")]
    parquet(tmp_path / "two" / "photos.parquet", 1)
    assert opened(tmp_path / "two")[0] == opened(tmp_path / "two" / "photos.parquet")[0] == [(1, "image 1")]
    parquet(tmp_path / "two" / "test.parquet", 2)
    with pytest.raises(ValueError, match="no split 'train', only test"):
        opened(tmp_path / "two")
    read, _, warned = opened(tmp_path / "two", "test")
    assert read == [(2, "image 2")] and "left out 1 file of no split (photos.parquet)" in warned[0]
    assert opened(tmp_path / "two" / "test.parquet", "test")[0] == opened(tmp_path / "two" / "test.parquet")[0] == read
    with pytest.raises(ValueError, match="a file of the split 'test', not of 'validation'"):
        opened(tmp_path / "two" / "test.parquet", "validation")


def test_folders_of_configurations(tmp_path):
    for number, config in enumerate(("small", "large")):
        parquet(tmp_path / config / "train-00000-of-00001.parquet", number)
    message = rf"configurations have the split 'train': large, small; name one, as in hf:{tmp_path}/large"
    with pytest.raises(ValueError, match=message):
        opened(tmp_path)
    assert opened(tmp_path / "large")[0] == [(1, "image 1")]


CARD = """---
license: mit
configs:
- config_name: small
  data_files:
  - split: train
    path: a/*.parquet
  - split: test
    path: [b/part-*, b/other.parquet]
- config_name: large
  data_dir: c
---
# A dataset
"""


def test_the_readme_decides(tmp_path):
    for number, name in enumerate(("a/x", "b/part-1", "b/other", "b/train", "c/d/y")):
        parquet(tmp_path / f"{name}.parquet", number)
    (tmp_path / "README.md").write_text(CARD)
    with pytest.raises(ValueError, match=rf"several configurations: small, large; name one, as in hf:{tmp_path}/small"):
        opened(tmp_path)
    assert opened(tmp_path / "small")[0] == [(0, "image 0")]
    assert opened(tmp_path / "small", "test")[0] == [(2, "image 2"), (1, "image 1")]
    assert opened(tmp_path / "large")[0] == [(4, "image 4")]
    parquet(tmp_path / "x.parquet", 9)
    (tmp_path / "README.md").write_text(CARD.replace("a/*.parquet", "'**/x.parquet'"))
    assert opened(tmp_path / "small")[0] == [(0, "image 0"), (9, "image 9")]
    (tmp_path / "x.parquet").unlink()
    for card in (
        CARD.replace("small", "default"),
        CARD.replace("config_name: small", "config_name: small\n  default: true"),
    ):
        (tmp_path / "README.md").write_text(card)
        assert opened(tmp_path)[0] == [(0, "image 0")]
    (tmp_path / "README.md").write_text(CARD.replace("a/*.parquet", "z/*.parquet").replace("small", "default"))
    with pytest.raises(FileNotFoundError, match=r"no file is there of what README.md lists for the split 'train'"):
        opened(tmp_path)
    (tmp_path / "README.md").write_text("---\n: [\n---\n")
    parquet(tmp_path / "train.parquet", 8)
    with pytest.raises(ValueError, match="configurations"):
        opened(tmp_path)


def test_images_and_tables_beside_parquet_files_are_counted(tmp_path):
    parquet(tmp_path / "data" / "train-00000-of-00001.parquet", 1)
    put(tmp_path / "assets", 5)
    pq.write_table(pa.table({"x": [1]}), tmp_path / "numbers.parquet")
    read, _, warned = opened(tmp_path)
    assert read == [(1, "image 1")]
    assert [line.partition("left out ")[2] for line in warned] == [
        "1 image beside Parquet files (assets/5.png)",
        "1 table without images (numbers.parquet)",
    ]


@pytest.mark.parametrize(
    "name, hint",
    [
        ("data-00000-of-00001.arrow", "save_to_disk"),
        ("000.tar", "convert them"),
        ("all.zip", "unpack"),
        ("numbers.parquet", "its Parquet files hold no column of images"),
        ("notes.md", None),
    ],
)
def test_other_forms_are_named(tmp_path, name, hint):
    if name.endswith(".parquet"):
        pq.write_table(pa.table({"x": [1]}), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="no images there, and no Parquet files with images") as error:
        opened(tmp_path)
    assert hint is None or hint in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_not_there(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"no such folder$"):
        opened(tmp_path / "none")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="download it first: hf download --repo-type dataset someone/photos"):
        sources.open(sources.parse("hf:someone/photos"), 64, "train", "")
    (tmp_path / "x.csv").write_text("")
    with pytest.raises(ValueError, match=r"neither a folder nor a \.parquet file"):
        opened(tmp_path / "x.csv")


def test_parse():
    assert sources.parse("hf:/a/b") == sources.HuggingFace(hugging_face.Path("/a/b"))
    assert sources.describe(sources.HuggingFace(hugging_face.Path("/a/b"), "img")) == "hf:/a/b"
    for text in ("hf", "hf:"):
        with pytest.raises(ValueError, match="is not one of"):
            sources.parse(text)


def test_a_plain_folder_says_what_hf_would_read(tmp_path):
    put(tmp_path, 1)
    table(tmp_path / "metadata.csv", ROWS)
    with pytest.warns(UserWarning, match=r"left out 1 table that hf:PATH would read \(metadata.csv\)"):
        folder.read(tmp_path)


@pytest.mark.parametrize("form", ["txt", "jsonl", "csv", "splits", "parquet"])
def test_folders_are_converted_as_they_are_read(tmp_path, form):
    root = tmp_path / "photos"
    put(root / ("train" if form == "splits" else ""), 1, 2, 3)
    if form == "txt":
        for i in (1, 3):
            (root / f"{i}.txt").write_text(f"image {i}")
    elif form == "splits":
        table(root / "train" / "metadata.csv", ROWS[:2])
        put(root / "test", 9)
    elif form == "parquet":
        for i in (1, 2, 3):
            (root / f"{i}.png").unlink()
        parquet(root / "data" / "train-00000-of-00001.parquet", 3, 1)
        parquet(root / "data" / "test-00000-of-00001.parquet", 9)
    else:
        table(root / f"metadata.{form}", ROWS[:2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        index = convert.convert([str(root)], tmp_path / "out", Settings(rows_per_file=2))
    source = records.read(tmp_path / "out")
    found = [(int(images.decode(source[i]["image"])[0, 0, 0]), source[i]["caption"]) for i in range(len(source))]
    assert sorted(found) == [(1, "image 1"), (3, "image 3")]
    assert index["skipped"] == ({"no caption": 1} if form == "txt" else {})


def test_conversion_of_folders_takes_settings_and_is_done_again_when_a_caption_changes(tmp_path):
    root, out = tmp_path / "photos", tmp_path / "out"
    put(root / "train", 1)
    put(root / "test", 2)
    for split, i in (("train", 1), ("test", 2)):
        table(root / split / "metadata.jsonl", [{"file_name": f"{i}.png", "text": "a", "caption": f"{split}"}])
    with pytest.raises(ValueError, match="say which with caption_column"):
        convert.convert([str(root)], out)
    convert.convert([str(root)], out, Settings(caption_column="caption", split="test"))
    assert records.read(out)[0]["caption"] == "test"
    put(tmp_path / "plain", 1)
    (tmp_path / "plain" / "1.txt").write_text("before")
    convert.convert([str(tmp_path / "plain")], out)
    (tmp_path / "plain" / "1.txt").write_text("after")
    convert.convert([str(tmp_path / "plain")], out)
    assert [records.read(out)[i]["caption"] for i in range(len(records.read(out)))] == ["after"]
