"""Parquet files with the images in them: what is in a cell, lazily and at random, by row groups that are kept."""

import itertools
import json
import os
import pickle
import sys
import threading
import warnings

import numpy as np
import pytest

pa = pytest.importorskip("pyarrow", reason="Parquet needs the parquet extra")
pq = pytest.importorskip("pyarrow.parquet")

from jaxdiff.core.messages import Note  # noqa: E402
from jaxdiff.data import convert, images, parquet_images, records  # noqa: E402
from jaxdiff.data.columns import ColumnNames  # noqa: E402
from jaxdiff.data.convert import Settings  # noqa: E402
from jaxdiff.data.mixture import MixtureSource  # noqa: E402
from jaxdiff.data.orders import Blocks, Order  # noqa: E402
from jaxdiff.data.pipeline import DataConfig, image_batches  # noqa: E402


def png(i, size=8):
    return images.encode_png(np.full((size, size, 3), i % 256, np.uint8))


def write(file, count=10, first=0, rows=4, struct=True, captions=None, **columns):
    """`count` images from number `first`, in row groups of `rows`."""
    numbers = range(first, first + count)
    cells = [{"bytes": png(i), "path": f"{i}.png"} for i in numbers] if struct else [png(i) for i in numbers]
    captions = [f"image {i}" for i in numbers] if captions is None else captions
    table = pa.table({"image": cells, "text": captions, **columns})
    pq.write_table(table, file, row_group_size=rows)
    return file


def quiet(files, named=ColumnNames()):  # noqa: B008
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Note)
        return parquet_images.read(files, named)


def read_all(source):
    return [(int(images.decode(source[i]["image"])[0, 0, 0]), source[i]["caption"]) for i in range(len(source))]


@pytest.mark.parametrize("struct", [True, False])
@pytest.mark.parametrize("large", [True, False])
def test_images_and_captions_of_several_files(tmp_path, struct, large):
    files = [write(tmp_path / "a.parquet", 10, struct=struct), write(tmp_path / "b.parquet", 3, 10, struct=struct)]
    if large:
        for file in files:
            table = pq.read_table(file)
            kinds = {"text": pa.large_string()} | ({} if struct else {"image": pa.large_binary()})
            for name, kind in kinds.items():
                place = table.schema.get_field_index(name)
                table = table.set_column(place, name, table.column(name).cast(kind))
            pq.write_table(table, file, row_group_size=4)
    source = quiet(files)
    assert read_all(source) == [(i, f"image {i}") for i in range(13)]
    assert source[11]["name"] == f"{files[1]}, row 1" and source.blocks.sizes == (4, 4, 2, 3)
    copy = pickle.loads(pickle.dumps(source))
    assert read_all(copy) == read_all(source)
    with pytest.raises(IndexError):
        source[13]


def test_the_choice_of_columns_is_said_once(tmp_path):
    file = write(tmp_path / "a.parquet", id=list("abcdefghij"))
    with pytest.warns(Note) as caught:
        parquet_images.read([file, file], where="hf:mine")
    assert [str(each.message) for each in caught] == ["hf:mine: images from 'image', captions from 'text'"]


def test_ambiguous_columns_name_the_setting(tmp_path):
    file = write(tmp_path / "a.parquet", caption=["other"] * 10, mask=[png(0)] * 10)
    with pytest.raises(ValueError, match=r"text, caption could all .* caption_column"):
        quiet([file])
    assert quiet([file], ColumnNames(caption="caption"))[3]["caption"] == "other"
    assert quiet([file], ColumnNames("mask", ""))[3] | {"name": ""} == {
        "image": png(0), "caption": None, "name": "", "caption_fault": None
    }  # fmt: skip


def test_lists_of_images_are_named(tmp_path):
    pq.write_table(pa.table({"images": [[{"bytes": png(0), "path": None}]], "text": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="column 'images' holds a list of images in each row"):
        quiet([tmp_path / "a.parquet"])


def test_lists_of_captions_missing_ones_and_bytes_that_are_no_text(tmp_path):
    captions = [["first", "second"], [None, " ", "third"], [], None]
    pq.write_table(pa.table({"image": [png(i) for i in range(4)], "captions": captions}), tmp_path / "a.parquet")
    with pytest.warns(Note, match="of several captions the first is taken"):
        source = parquet_images.read([tmp_path / "a.parquet"])
    assert [source[i]["caption"] for i in range(4)] == ["first", "third", None, None]
    buffers = [None, pa.py_buffer(np.int32([0, 3]).tobytes()), pa.py_buffer(b"a\xff!")]
    broken = pa.Array.from_buffers(pa.string(), 1, buffers)
    pq.write_table(pa.table({"image": [png(0)], "text": broken}), tmp_path / "b.parquet")
    example = quiet([tmp_path / "b.parquet"])[0]
    assert example["caption"] == "a\ufffd!" and "undecodable bytes" in example["caption_fault"]
    repeated = pa.array(["x", "y", "x"]).dictionary_encode()
    pq.write_table(pa.table({"image": [png(i) for i in range(3)], "text": repeated}), tmp_path / "c.parquet")
    assert [caption for _, caption in read_all(quiet([tmp_path / "c.parquet"]))] == ["x", "y", "x"]


def test_the_names_of_classes_are_captions_where_they_are_asked_for(tmp_path):
    label = {"names": ["cat", "dog"], "_type": "ClassLabel"}
    features = {"info": {"features": {"label": label, "image": {"_type": "Image"}, "sound": {"_type": "Audio"}}}}
    cells = {"image": [{"bytes": png(i), "path": None} for i in range(3)], "label": [1, 0, -1]}
    table = pa.table({**cells, "sound": [{"bytes": b"", "path": None}] * 3})
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), tmp_path / "a.parquet")
    source = quiet([tmp_path / "a.parquet"], ColumnNames(caption="label"))
    assert [source[i]["caption"] for i in range(3)] == ["dog", "cat", None]
    assert quiet([tmp_path / "a.parquet"])[0]["caption"] is None


def test_a_row_without_an_image_is_skipped_and_one_beside_is_read(tmp_path):
    (tmp_path / "beside.png").write_bytes(png(9))
    cells = [
        {"bytes": png(1), "path": None},
        {"bytes": None, "path": "beside.png"},
        {"bytes": None, "path": None},
        None,
        {"bytes": None, "path": "gone.png"},
    ]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    table = pa.table({"image": pa.array(cells, kind), "text": list("abcde")})
    pq.write_table(table, tmp_path / "a.parquet")
    source = quiet([tmp_path / "a.parquet"])
    stream = image_batches(source, DataConfig(8, 2, captions=True, shuffle=False, repeat=False))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (batch,) = stream
    assert batch["caption"].tolist() == ["a", "b"] and stream.skipped.reasons == {"unreadable": 3}
    assert any("row 3: no image in this row" in str(each.message) for each in caught)
    index = convert.convert([str(tmp_path / "a.parquet")], tmp_path / "out")
    assert index["images"] == 2 and index["skipped"] == {"no image": 3}


def counted_groups(source):
    """Reads of row groups of a source, as they happen."""
    reads, real = [], source._kept._read

    def read(table, number):
        reads.append(number)
        return real(table, number)

    source._kept._read = read
    return reads


def test_in_the_pipelines_order_each_row_group_is_read_about_once_an_epoch(tmp_path, monkeypatch):
    """Of twenty groups four are kept: in an order without blocks most examples would read one."""
    source = quiet([write(tmp_path / "a.parquet", 200, rows=10)])
    monkeypatch.setattr(parquet_images, "KEPT", 4 * max(source.tables[0].sizes))
    assert source.blocks == Blocks((10,) * 20, 2)
    reads = counted_groups(source)
    stream = image_batches(source, DataConfig(8, 10, captions=True))
    seen = [caption for batch in itertools.islice(stream, 20) for caption in batch["caption"].tolist()]
    assert sorted(seen) == sorted(f"image {i}" for i in range(200)) and seen != sorted(seen)
    assert 20 <= len(reads) <= 28  # some of the next epoch is read ahead
    reads.clear()
    at_random = Order(200, 0, True)
    for position in range(100):
        source[at_random.place(position)]
    assert len(reads) > 50


def test_opening_reads_no_rows_and_row_groups_are_let_go(tmp_path, monkeypatch):
    source = quiet([write(tmp_path / "a.parquet", 30, rows=3)])
    assert not len(source._kept)
    reads = counted_groups(source)
    monkeypatch.setattr(parquet_images, "KEPT", sum(source.tables[0].sizes[:2]))
    for i in (0, 1, 2, 3, 0, 6, 0, 3):  # of the groups 0, 0, 0, 1, 0, 2, 0, 1: the one used last before is let go
        source[i]
    assert reads == [0, 1, 2, 1] and len(source._kept) == 2


def test_threads_read_a_row_group_once(tmp_path):
    source = quiet([write(tmp_path / "a.parquet", 40, rows=40)])
    reads, seen = counted_groups(source), []
    start = threading.Barrier(8)

    def read(first):
        start.wait()
        seen.extend(source[i]["caption"] for i in range(first, 40, 8))

    threads = [threading.Thread(target=read, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reads) == 1 and sorted(seen) == sorted(f"image {i}" for i in range(40))


def test_large_row_groups_are_warned_of(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_images, "LARGE", 100)
    with pytest.warns(UserWarning, match=r"row groups of up to 4 rows .* convert the files first"):
        quiet([write(tmp_path / "a.parquet")])


def test_a_state_and_a_mixture_of_parquet_files(tmp_path):
    source = quiet([write(tmp_path / "a.parquet", 30, rows=3)])
    mixed = MixtureSource((source, quiet([write(tmp_path / "b.parquet", 10, 100, rows=5)])), (1, 1))
    for each in (source, mixed):
        whole = image_batches(each, DataConfig(8, 4, captions=True))
        expected = [next(whole)["caption"].tolist() for _ in range(12)]
        second = image_batches(each, DataConfig(8, 4, captions=True))
        for _ in range(5):
            next(second)
        third = image_batches(each, DataConfig(8, 4, captions=True))
        third.set_state(second.get_state())
        assert [next(third)["caption"].tolist() for _ in range(7)] == expected[5:]


def test_damage_is_an_error_that_names_the_row_group(tmp_path):
    file = write(tmp_path / "a.parquet", 400, rows=200)
    source = quiet([file])
    content = bytearray(file.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 4000] = b"\xff" * 4000
    file.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"a\.parquet, row group \d: damaged") as error:
        read_all(source)
    assert "\n" not in str(error.value)
    file.write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: not a Parquet file"):
        quiet([file])


def test_files_that_do_not_fit_together_are_named(tmp_path):
    first, second = write(tmp_path / "a.parquet"), tmp_path / "b.parquet"
    pq.write_table(pa.table({"image": [png(0)], "caption": ["x"]}), second)
    with pytest.raises(ValueError, match=r"b\.parquet: no columns are named 'text', of image, caption"):
        quiet([first, second])
    pq.write_table(pa.table({"image": ["a.png"], "text": ["x"]}), second)
    with pytest.raises(ValueError, match=r"b\.parquet: column 'image' holds no images but string"):
        quiet([first, second])
    pq.write_table(pq.read_table(first).slice(0, 0), second)
    assert len(quiet([first, second])) == 10
    with pytest.raises(ValueError, match="no rows"):
        quiet([second])


def test_pyarrow_is_an_extra(tmp_path, monkeypatch):
    file = write(tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"a\.parquet: .* needs pyarrow: pip install 'jaxdiff\[parquet\]'"):
        parquet_images.read([file])


def test_conversion_reads_what_training_would(tmp_path):
    file = write(tmp_path / "a.parquet", 25, rows=4, id=[str(i) for i in range(25)])
    with pytest.warns(Note, match="images from 'image', captions from 'text'"):
        index = convert.convert([str(file)], tmp_path / "out", Settings(rows_per_file=10))
    assert read_all(records.read(tmp_path / "out")) == read_all(quiet([file]))
    assert [shard["images"] for shard in index["shards"]] == [12, 12, 1]
    before = {path.name for path in (tmp_path / "out").glob("*.array_record")}
    assert convert.convert([str(file)], tmp_path / "out", Settings(rows_per_file=10))["images"] == 25
    assert {path.name for path in (tmp_path / "out").glob("*.array_record")} == before
    other = convert.convert([str(file)], tmp_path / "ids", Settings(caption_column="id"))
    assert records.read(tmp_path / "ids")[7]["caption"] == "7" and other["images"] == 25
    with pytest.raises(ValueError, match="caption_column 'prompt' is no column"):
        convert.convert([str(file)], tmp_path / "no", Settings(caption_column="prompt"))


def test_a_list_of_paths_may_have_bytes_too(tmp_path):
    """It is the column of paths that is converted, where there is one; the other where it is named."""
    (tmp_path / "a.png").write_bytes(png(7))
    pq.write_table(pa.table({"path": ["a.png"], "caption": ["x"], "thumbnail": [png(1)]}), tmp_path / "list.parquet")
    convert.convert([str(tmp_path / "list.parquet")], tmp_path / "out")
    assert records.read(tmp_path / "out")[0]["image"] == png(7)
    convert.convert([str(tmp_path / "list.parquet")], tmp_path / "small", Settings(image_column="thumbnail"))
    assert records.read(tmp_path / "small")[0]["image"] == png(1)


def test_conversion_reads_buckets(tmp_path):
    fsspec = pytest.importorskip("fsspec", reason="bucket paths need the bucket extra")
    content = write(tmp_path / "a.parquet", 5).read_bytes()
    fsspec.filesystem("memory").pipe("/mine/a.parquet", content)
    assert convert.convert(["memory://mine/a.parquet"], tmp_path / "out")["images"] == 5
    assert records.read(tmp_path / "out")[4]["caption"] == "image 4"


def cells_of(file):
    return [row["bytes"] if isinstance(row, dict) else row for row in pq.read_table(file).column("image").to_pylist()]


PLAIN = {"compression": "none", "use_dictionary": False}


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("struct", [True, False])
@pytest.mark.parametrize("nullable", [True, False])
def test_images_that_are_stored_as_they_are_are_read_one_by_one(tmp_path, monkeypatch, version, struct, nullable):
    """From pages of all sizes, with checksums and statistics: the bytes that pyarrow reads, in any order."""
    rng = np.random.default_rng(0)
    contents = [rng.bytes(int(rng.integers(0, 5000))) for _ in range(60)]
    inner = pa.struct([pa.field("bytes", pa.binary(), nullable), pa.field("path", pa.string())])
    field = inner if struct else pa.binary()
    cells = [{"bytes": each, "path": None} for each in contents] if struct else contents
    schema = pa.schema([pa.field("text", pa.string()), pa.field("image", field, nullable)])
    table = pa.table([[str(i) for i in range(60)], cells], schema)
    more = {"data_page_version": version, "data_page_size": 9000, "write_batch_size": 2, "write_page_checksum": True}
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=25, write_statistics=True, **PLAIN, **more)
    source = quiet([tmp_path / "a.parquet"])
    assert source.tables[0].plain is not None and source.blocks is None
    asked, real = [], pq.ParquetFile.read_row_group

    def read_row_group(*arguments, columns, **options):
        asked.extend([columns] if arguments[0].metadata.num_rows == 60 else [])  # not what another test reads ahead
        return real(*arguments, columns=columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", read_row_group)
    order = rng.permutation(60).tolist()
    assert [source[i]["image"] for i in order] == [contents[i] for i in order]
    assert [source[i]["caption"] for i in order] == [str(i) for i in order]
    assert asked == [["text"]] * 3


def test_what_is_not_stored_as_it_is_is_read_by_row_groups(tmp_path):
    """Compressed, in a dictionary, or with missing values: the same images; with blocks, where that is known before."""
    contents = [png(i) for i in range(9)]
    table = pa.table({"image": contents, "text": list("abcdefghi")})
    for name, options in {"snappy": {"use_dictionary": False}, "dictionary": {"compression": "none"}}.items():
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=4, **options)
        source = quiet([tmp_path / f"{name}.parquet"])
        assert source.blocks.sizes == (4, 4, 1) and [source[i]["image"] for i in range(9)] == contents
    missing = pa.table({"image": [*contents[:6], None, *contents[7:]], "text": list("abcdefghi")})
    pq.write_table(missing, tmp_path / "missing.parquet", row_group_size=4, **PLAIN)
    source = quiet([tmp_path / "missing.parquet"])
    assert source.blocks is None and [source[i]["image"] for i in (0, 5, 7, 8)] == [contents[i] for i in (0, 5, 7, 8)]
    with pytest.raises(OSError, match="row 6: no image in this row"):
        source[6]
    both = quiet([tmp_path / "missing.parquet", tmp_path / "snappy.parquet"])
    assert both.blocks.sizes == (4, 4, 1) * 2 and both[17]["image"] == contents[8]


def test_many_files_are_not_all_open(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_images, "_OPEN", 2)
    files = []
    for number in range(6):
        pq.write_table(pa.table({"image": [png(number)], "text": ["x"]}), tmp_path / f"{number}.parquet", **PLAIN)
        files.append(tmp_path / f"{number}.parquet")
    source = quiet(files)
    for _ in range(2):
        assert [source[i]["image"] for i in range(6)] == [png(i) for i in range(6)]
    assert len(source._kept._files) == 2 and len(source._kept._footers) == 2


def test_a_plain_file_that_is_damaged_or_cut_off(tmp_path):
    """Where the pages make no sense pyarrow is asked, which says what is wrong."""
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [png(i) for i in range(400)], "text": ["x"] * 400}), file, **PLAIN)
    content = file.read_bytes()
    source = quiet([file])
    start = pq.ParquetFile(file).metadata.row_group(0).column(0).data_page_offset
    file.write_bytes(content[:start] + b"\xff" * 3000 + content[start + 3000 :])
    with pytest.raises(ValueError, match=r"a\.parquet, row group 0: damaged"):
        source[0]
    file.write_bytes(content)
    source = quiet([file])
    assert source[0]["image"] == png(0)
    os.truncate(file, start + 2000)
    with pytest.raises(ValueError, match="cut off since it was opened"):
        source[399]
