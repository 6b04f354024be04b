"""CSV and Parquet lists: quoting is never guessed, and every fault names the file and the line."""

import csv
import io
import os
import random
import signal

import numpy as np
import pytest

from experiments import convert as command
from experiments.cli import run
from jaxdiff.core.errors import ProcessLostError
from jaxdiff.data import convert, images, lists

COLUMNS = lists.Columns("path", "caption")


def rows(path, text, columns=COLUMNS):
    path.write_text(text, encoding="utf-8", newline="")
    return [(image and os.path.basename(image), caption) for image, caption in lists.rows(str(path), columns)]


GOOD = {
    "quoted line ends and commas": ('path,caption\na.png,"one\ntwo, three"\nb.png,x\n', ["one\ntwo, three", "x"]),
    "caption first": ('caption,path\n"one\r\ntwo",a.png\n', ["one\r\ntwo"]),
    "doubled quotes": ('path,caption\na.png," ""hi"" x, "\n', [' "hi" x, ']),
    "all quoted": ('"path","caption"\r\n"a.png","x"\r\n', ["x"]),
    "an inch mark": ('path,caption\na.png,a 5" disk\n', ['a 5" disk']),
    "blank lines": ("path,caption\n\na.png,x\n   \n\n", ["x"]),
    "old line ends": ("path,caption\ra.png,x\rb.png,y\r", ["x", "y"]),
    "no line end at the end": ("path,caption\na.png,x", ["x"]),
    "an empty caption": ('path,caption\na.png,""\nb.png,\n', [None, None]),
    "other columns": ("id,caption,id,path\n1,x,2,a.png\n", ["x"]),
    "several lines with an image's name in them": (
        'path,caption\na.png,"see b.png,\nand c.png too"\n',
        ["see b.png,\nand c.png too"],
    ),
    "lines that begin like no row": (
        'path,caption\nhttps://x/1,"one\nhttp, two\nsee https://x/2, three"\n',
        ["one\nhttp, two\nsee https://x/2, three"],
    ),
    "an image's name in the middle": (
        'path,caption\na.png,"a list:\nsee b.png,\nthe end"\n',
        ["a list:\nsee b.png,\nthe end"],
    ),
}


@pytest.mark.parametrize("text, captions", GOOD.values(), ids=GOOD)
def test_good_lists(tmp_path, text, captions):
    read = [caption for _, caption in rows(tmp_path / "list.csv", text)]
    assert read == captions


BAD = {
    "an unquoted comma": (
        "path,caption\na.png,a cat\nb.png,a cat, a dog\n",
        "line 3: the header has 2 fields, this row 3",
    ),
    "a comma at the end": ("path,caption\na.png,a cat,\n", "line 2: the header has 2 fields, this row 3"),
    "a comma in the first column": (
        "caption,path\na cat, a dog,a.png\n",
        "line 2: the header has 2 fields, this row 3",
    ),
    "too few fields": ("path,caption\na.png,x\n\nb.png\n", "line 4: the header has 2 fields, this row 1"),
    "an unclosed quote": (
        'path,caption\na.png,x\nb.png,"a cat\nc.png,two\nd.png,three\n',
        "line 3: unexpected end of data, in a row that goes on to line 5: a quote is perhaps not closed",
    ),
    "closed by a later row's": (
        'path,caption\na.png,"a cat\nb.png,x\nc.png,"a dog"\n',
        "line 2: ',' expected after '\"', in a row that goes on to line 4",
    ),
    "closed by a quote that begins a row": (
        'caption,path\n"a cat,a.png\n"a dog",b.png\n',
        "line 2: ',' expected after '\"', in a row that goes on to line 3",
    ),
    "closed by a stray one": (
        'path,caption\na.png,"a cat\nb.png,dog"\n',
        "line 2: a quote that begins there holds a whole row, b.png,dog",
    ),
    "of URLs without a suffix": (
        'path,caption\nhttps://x/1,"a cat\nhttps://x/2,dog"\n',
        "line 2: a quote that begins there holds a whole row, https://x/2,dog",
    ),
    "of other hosts": (
        'path,caption\nhttps://x/1,"a cat\nhttps://y/z/2?w=8,dog"\n',
        "line 2: a quote that begins there holds a whole row, https://y/z/2?w=8,dog",
    ),
    "of names in a folder": (
        'path,caption\nset/1,"a cat\nset/2,dog"\n',
        "line 2: a quote that begins there holds a whole row, set/2,dog",
    ),
    "of an unknown suffix": (
        'caption,path\n"a cat,1.HEIC\ndog,2.heic\n",3.heic\n',
        "line 2: a quote that begins there holds a whole row, a cat,1.HEIC",
    ),
    "of blank captions": (
        'path,caption\na.png,"\nb.png,\nc.png,"\n',
        "line 2: a quote that begins there holds a whole row, b.png,",
    ),
    "a line break in the image": ('path,caption\n"a.png\n",x\n', "line 2: a line break within the image's name"),
    "of two columns, closed in the image": (
        'caption,path\nx,"a.png\ny,b.png\nz,c.png"\n',
        "line 2: a line break within the image's name, 'a.png\\ny,b.png",
    ),
}

BAD_IMAGES = {
    "one column": 'path\n"a.jpg\nb.jpg\nc.jpg"\n',
    "old line ends": 'path\r"a.jpg\rb.jpg"\r',
    "a second column": 'path,n\n"a.jpg\nb.jpg",1\n',
}


@pytest.mark.parametrize("text", BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_a_quote_around_several_images_is_not_one_image(tmp_path, text):
    with pytest.raises(ValueError, match=r"line 2: a line break within the image's name, 'a\.jpg.* not closed"):
        rows(tmp_path / "list.csv", text, lists.Columns("path", "caption", caption_required=False))


BAD |= {
    "the same, caption first": (
        'caption,path\n"a cat,a.png\ndog",b.png\n',
        "line 2: a quote that begins there holds a whole row, a cat,a.png",
    ),
    "an unclosed quote in a long file": (
        'path,caption\na.png,"' + "x\n" * 70_000,
        "line 2: field larger than field limit",
    ),
    "text behind a quote": ('path,caption\na.png,"ok"x\n', "line 2: ',' expected after '\"'"),
    "a quote behind a blank": ('path,caption\na.png, "a cat"\n', "line 2: a quote behind blanks"),
    "an unclosed header": ('path,"caption\na.png,x\n', "line 1: unexpected end of data"),
    "a NUL": ("path,caption\na.png,x\nb.png,x\0y\n", "line 3: a NUL byte"),
    "a column twice": ("path,caption,caption\na.png,x,y\n", "2 columns are named 'caption'"),
    "the image's twice": ("path,caption,path\na.png,x,y\n", "2 columns are named 'path'"),
    "another separator": ("path;caption\na.png;x\n", "no column 'path', only path;caption"),
    "an empty file": ("", "no column 'path', only none"),
    "no caption column": ("path,text\na.png,x\n", "no column 'caption', only path, text"),
}


@pytest.mark.parametrize("text, message", BAD.values(), ids=BAD)
def test_bad_lists_are_one_line_and_exit_code_2(tmp_path, capsys, text, message):
    (tmp_path / "list.csv").write_text(text, newline="")
    with pytest.raises(SystemExit) as ended:
        run(command.main, [str(tmp_path / "list.csv"), "--out", str(tmp_path / "out")])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    separator = ", " if message.startswith("line") else ": "
    assert ended.value.code == 2 and line.startswith(f"error: {tmp_path}/list.csv{separator}{message}")
    if message.startswith("line") and "NUL" not in message:
        assert line.endswith("needs quotes around it, and the quotes in it doubled")


def test_what_python_writes_is_read_back(tmp_path):
    rng = random.Random(0)
    for _ in range(200):
        texts = ["".join(rng.choices('ab ,"\n\r;é', k=rng.randrange(12))) + "." for _ in range(5)]
        file = io.StringIO(newline="")
        csv.writer(file).writerows([("path", "caption"), *((f"{i}.png", text) for i, text in enumerate(texts))])
        assert [caption for _, caption in rows(tmp_path / "list.csv", file.getvalue())] == texts


def test_an_open_quote_anywhere_is_never_silent(tmp_path):
    """One quote taken out of a good list: an error, in all places where it changes what is read."""
    good = 'path,caption\n"a.png","one, two"\nb.png,"three"\nc.png,"four\nfive"\n"d.png",six\n'
    expected = rows(tmp_path / "list.csv", good)
    for place in [place for place, character in enumerate(good) if character == '"']:
        try:
            read = rows(tmp_path / "list.csv", good[:place] + good[place + 1 :])
        except ValueError as error:
            assert "list.csv, line " in str(error)
        else:  # a closing quote alone is a character
            assert len(read) == len(expected), good[:place]


def test_cut_off_utf16_names_the_line(tmp_path):
    (tmp_path / "list.csv").write_bytes("path,caption\na.png,x\n".encode("utf-16")[:-1])
    with pytest.raises(ValueError, match=r"list\.csv, line \d: .*utf-16"):
        list(lists.rows(str(tmp_path / "list.csv"), COLUMNS))


def test_damaged_parquet_is_named(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet lists need the parquet extra")
    import pyarrow

    file = tmp_path / "list.parquet"
    names = [f"{i}-{'x' * (i % 37)}.png" for i in range(3000)]
    parquet.write_table(
        pyarrow.table({"path": names, "caption": names}), file, compression="zstd", use_dictionary=False
    )
    assert len(list(lists.rows(str(file), COLUMNS))) == 3000
    content = bytearray(file.read_bytes())
    content[4:40] = b"\xff" * 36
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"list\.parquet: damaged, or cannot be read"):
        list(lists.rows(str(file), COLUMNS))


def _killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_of_the_conversion_is_worth_another_start(tmp_path, monkeypatch):
    """Exit code 71; what is done is kept."""
    (tmp_path / "a.png").write_bytes(images.encode_png(np.zeros((4, 4, 3), np.uint8)))
    (tmp_path / "list.csv").write_text("path,caption\na.png,x\n")
    monkeypatch.setattr(convert, "convert_piece", _killed)
    with pytest.raises(ProcessLostError, match="a process of the conversion was killed"):
        convert.convert([str(tmp_path / "list.csv")], tmp_path / "out", processes=2)
