"""JSON of any origin: read as it is meant, or refused in one line that names the file."""

import json
import random

import pytest

from jaxdiff.core import json_files


def write(folder, content):
    path = folder / "config.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    "content",
    [
        '{"a": {"b": [1, 2.5, true, null, "é"]}}',
        b'\xef\xbb\xbf{"a": 1}',
        '{"a": "é"}'.encode("utf-16"),
        '{"a": 1, "a": 1}',  # twice, but the same
        "[" * 60 + "]" * 60,
    ],
)
def test_what_is_read(content, tmp_path):
    found = json_files.parse(write(tmp_path, content).read_bytes(), "x")
    assert found == json.loads(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 66 + "]" * 66, "nested more than 64 levels deep"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
        ('{"a":' * 70 + "1" + "}" * 70, "nested more than 64 levels deep"),
        ("[" * 10**6, "is not JSON"),
        ("[]", "it holds a list"),
        ('"text"', "it holds a str"),
        ("3", "it holds a int"),
        ("null", "it holds a NoneType"),
        ("", "Expecting value"),
        ('{"a": 1', "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b'{"a": "\xc3("}', "is not JSON"),
        ('{"a": ' + "9" * 10_000 + "}", "is not JSON"),
        ('{"a": 1, "a": 2}', "'a' occurs twice, with different values"),
        ('{"a": {"\\u001b[2J": 1, "\\u001b[2J": []}}', r"'\x1b[2J' occurs twice"),
        (b" " * (2**24 + 1), "larger than 16777216 bytes"),
    ],
    ids=range(17),
)
def test_what_is_refused(content, message, tmp_path):
    path = write(tmp_path, content)
    with pytest.raises(ValueError) as error:
        json_files.read_object(path)
    text = str(error.value)
    assert text.startswith(f"{path} is not JSON with settings: ") and message in text, text
    assert text.isprintable() and len(text) < 400 + len(str(path))


def test_mutated_files(tmp_path):
    """Any file is an object or a ValueError, whatever happens to its bytes."""
    rng, whole = random.Random(0), json.dumps({"a": [1, {"b": "c"}], "d": 2.5, "e": None}).encode()
    refused = 0
    for _ in range(2000):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(content))
            content[place : place + rng.randint(0, 2)] = (
                rng.randbytes(rng.randint(0, 2)) + b'[{"\\'[: rng.randint(0, 4)]
            )
        try:
            assert isinstance(json_files.read_object(write(tmp_path, bytes(content))), dict)
        except ValueError as error:
            assert str(error).isprintable()
            refused += 1
    assert 1000 < refused < 2000
