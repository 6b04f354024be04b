"""The image and caption columns of Parquet files, and their cells. pyarrow is an optional dependency."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxdiff.core.messages import quoted, reason
from jaxdiff.data import captions, columns, remote
from jaxdiff.data.columns import ColumnNames


def chosen_columns(where: str, schema: Any, named: ColumnNames) -> tuple[str, str | None]:
    """The image and caption columns of an Arrow schema. ValueError if none or several match."""
    there, kinds = schema.names, features(schema)
    images = [name for name in there if holds_images(schema.field(name).type, kinds.get(name))]
    texts = text_columns(schema)
    classes = [name for name in there if class_names(kinds.get(name))]
    lists = [name for name in there if is_list(kind := schema.field(name).type) and holds_images(kind.value_type, None)]
    if lists and not images:
        raise ValueError(f"{where}: column {lists[0]!r} holds a list of images in each row; one image a row is read")
    image = columns.image_column(where, images, named.image, there)
    texts = [name for name in [*texts, *(classes if named.caption else [])] if name != image]
    return image, columns.caption_column(where, texts, named.caption, there)


def has_images(schema: Any) -> bool:
    """Whether a column of an Arrow schema may hold images rather than paths."""
    kinds = features(schema)
    return any(holds_images(schema.field(name).type, kinds.get(name)) for name in schema.names)


def image_of(name: str, value: Any, file: Path | str) -> bytes:
    """The image bytes of a cell of `file`. OSError if it has none."""
    content, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if content is not None:
        return content
    if not isinstance(path, str) or not path:
        raise OSError(f"{name}: no image in this row")
    return remote.read_bytes(remote.beside(str(file), path))


def text_of(name: str, value: Any, classes: Sequence[str] = ()) -> str | None:
    """The caption of a cell: text, the first non-blank text of a list, or a class name. ValueError for anything
    else."""
    if isinstance(value, list):
        texts = (text_of(name, each, classes) for each in value)
        return next((text for text in texts if captions.present(text) is not None), None)
    if isinstance(value, bytes):
        return captions.decode(value)
    if isinstance(value, int) and 0 <= value < len(classes):
        return classes[value]
    if value is None or isinstance(value, str) or (isinstance(value, int) and classes):
        return value if isinstance(value, str) else None  # -1: no class
    raise ValueError(f"{name}: the caption is no text but {quoted(value)}")


def text_columns(schema: Any) -> list[str]:
    """The columns of an Arrow schema that hold text, or lists of it."""
    return [name for name in schema.names if _holds_text(schema.field(name).type)]


def text_rows(file: Path, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rows of text columns, to be read with `text_of`; the first column is decoded."""
    with opened(file) as table:
        batches = table.iter_batches(columns=list(names), use_threads=False)
        while True:
            with readable(file):
                batch = next(batches, None)
            if batch is None:
                return
            cells = [as_bytes(batch.column(name)).to_pylist() for name in names]
            for first, *rest in zip(*cells):
                text = captions.decode(first) if isinstance(first, bytes) else first
                yield dict(zip(names, [text, *rest]))


@contextlib.contextmanager
def opened(file: Path | str) -> Iterator[Any]:
    """Open a Parquet file, local or in a bucket. ValueError if it is not one, or pyarrow is missing."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{file}: reading Parquet needs pyarrow: pip install 'jaxdiff[parquet]'") from error
    with remote.open_binary(str(file)) if remote.is_url(str(file)) else contextlib.nullcontext(file) as place:
        with readable(file, what="not a Parquet file"):
            table = pyarrow.parquet.ParquetFile(place, memory_map=place is file)
        with table:
            yield table


@contextlib.contextmanager
def readable(file: Path | str, part: str = "", what: str = "damaged, or cannot be read") -> Iterator[None]:
    """Turn Arrow's errors, OSError for damaged pages included, into ValueErrors that name the file."""
    import pyarrow

    try:
        yield
    except FileNotFoundError:
        raise
    except (pyarrow.ArrowException, OSError) as error:
        place = f", {part}" if part else ""
        raise ValueError(f"{file}{place}: {what} ({reason(error)})") from error


def features(schema: Any) -> dict[str, Any]:
    """The features that `datasets` stored in the schema; empty for files of other writers."""
    try:
        info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = info["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    return features if isinstance(features, dict) else {}


def class_names(feature: Any) -> tuple[str, ...]:
    names = feature.get("names") if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" else None
    return tuple(map(str, names)) if isinstance(names, list) else ()


def holds_images(kind: Any, feature: Any) -> bool:
    import pyarrow

    if isinstance(feature, dict) and feature.get("_type") in ("Audio", "Video", "Pdf", "Nifti"):
        return False
    if pyarrow.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _is_binary(kind.field("bytes").type)
    return _is_binary(kind)


def _is_binary(kind: Any) -> bool:
    import pyarrow

    return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind) or pyarrow.types.is_binary_view(kind)


def _holds_text(kind: Any) -> bool:
    import pyarrow

    types = pyarrow.types
    if types.is_dictionary(kind) or is_list(kind):
        return _holds_text(kind.value_type)
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def is_list(kind: Any) -> bool:
    import pyarrow

    return pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)


def as_bytes(column: Any) -> Any:
    """Text columns as bytes, because Arrow fails on invalid UTF-8."""
    import pyarrow

    kind = column.type
    if pyarrow.types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    if is_list(kind) and not is_list(kind.value_type):
        return column.cast(pyarrow.large_list(pyarrow.large_binary()))
    return column.cast(pyarrow.large_binary()) if _holds_text(kind) else column
