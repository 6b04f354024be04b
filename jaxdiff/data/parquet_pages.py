"""Offsets of single values in a Parquet file, for plain byte columns.

Recent versions of `datasets` write images this way (5.2 does): no compression, no dictionary, and each value as a
4-byte length followed by its bytes, in a few pages. One image can then be read without the rest of its row group, which
pyarrow cannot do. For everything else (other encodings, missing values, unexpected structure) `places` returns None,
and pyarrow is used.

Format: https://parquet.apache.org/docs/file-format/ ; page headers use Thrift's compact protocol.
"""

import os
import struct
from typing import Any

import numpy as np

_DATA, _DATA_V2 = 0, 3
_PLAIN = 0
_HEADER = 1 << 14
"""Bytes first read for a page header, which may hold statistics of any length."""
_LONGEST = 1 << 26


def is_plain(column: Any) -> bool:
    """Whether a column chunk (pyarrow's ColumnChunkMetaData) is plain: uncompressed and not encoded."""
    encodings = set(column.encodings)
    return (
        column.compression == "UNCOMPRESSED"
        and column.physical_type == "BYTE_ARRAY"
        and not column.has_dictionary_page
        and "PLAIN" in encodings
        and encodings <= {"PLAIN", "RLE", "BIT_PACKED"}
    )


def places(descriptor: int, column: Any, definition_levels: int) -> np.ndarray | None:
    """(offset, length) of each value of a plain column chunk, int64 (n 2); None if they cannot be determined.

    `definition_levels`: the column's maximum; the column does not repeat.
    """
    try:
        offsets = _places(descriptor, column, definition_levels)
    except (struct.error, IndexError, KeyError, ValueError, OverflowError):
        return None
    return offsets if len(offsets) == column.num_values else None  # fewer where values are missing


def _places(descriptor: int, column: Any, definition_levels: int) -> np.ndarray:
    position = column.data_page_offset
    end = position + column.total_compressed_size
    offsets: list[tuple[int, int]] = []
    while position < end:
        header, length = _page_header(descriptor, position)
        first = position + length
        position = first + header[3]
        if header[1] == _DATA_V2:
            page = header[8]
            encoding, first = page[4], first + page[5] + page[6]
        elif header[1] == _DATA:
            encoding = header[5][2]
            first += 4 + _length(descriptor, first) if definition_levels else 0
        else:
            raise ValueError("a page of another kind")
        if encoding != _PLAIN:
            raise ValueError("values that are encoded")
        while first < position:
            size = _length(descriptor, first)
            offsets.append((first + 4, size))
            first += 4 + size
        if first != position:
            raise ValueError("values that do not fill their page")
    if position != end:
        raise ValueError("pages that do not fill their chunk")
    return np.asarray(offsets, np.int64).reshape(-1, 2)


def _length(descriptor: int, position: int) -> int:
    return struct.unpack("<I", os.pread(descriptor, 4, position))[0]


def _page_header(descriptor: int, position: int) -> tuple[dict[int, Any], int]:
    """The fields of a page header by number, and its length."""
    size = _HEADER
    while True:
        content = os.pread(descriptor, size, position)
        try:
            return _struct(content, 0)
        except IndexError:
            if len(content) < size or size >= _LONGEST:
                raise
            size *= 8


def _struct(content: bytes, at: int) -> tuple[dict[int, Any], int]:
    """Parse a Thrift struct. IndexError if the content is too short."""
    fields: dict[int, Any] = {}
    number = 0
    while True:
        head = content[at]
        at += 1
        if head == 0:
            return fields, at
        if head >> 4:
            number += head >> 4
        else:
            number, at = _integer(content, at)
        fields[number], at = _value(content, at, head & 15)


def _value(content: bytes, at: int, kind: int) -> tuple[Any, int]:
    if kind in (1, 2):
        return kind == 1, at
    if kind == 3:
        return content[at], at + 1
    if kind in (4, 5, 6):
        return _integer(content, at)
    if kind == 7:
        return None, at + 8
    if kind == 8:
        size, at = _varint(content, at)
        if at + size > len(content):
            raise IndexError("the content ends first")
        return None, at + size
    if kind in (9, 10):
        head = content[at]
        count, at = (head >> 4, at + 1) if head >> 4 != 15 else _varint(content, at + 1)
        for _ in range(count):
            _, at = (None, at + 1) if head & 15 in (1, 2) else _value(content, at, head & 15)
        return None, at
    if kind == 12:
        return _struct(content, at)
    raise ValueError(f"a value of Thrift's kind {kind}")


def _integer(content: bytes, at: int) -> tuple[int, int]:
    value, at = _varint(content, at)
    return (value >> 1) ^ -(value & 1), at


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
