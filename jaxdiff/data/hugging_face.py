"""Datasets in the layout of the Hugging Face hub, read from a local copy without `datasets` or network access.

photos/metadata.csv  photos/cat.jpg                     an imagefolder: metadata.csv, .jsonl or .parquet, with a column
photos/train/metadata.jsonl  photos/train/a/cat.jpg     file_name (or *_file_name) and one of captions; each lists the
                                                        images of its own folder and its subfolders
mine/data/train-00000-of-00001.parquet                  Parquet files that hold the images (`parquet_images.py`), in
mine/train/0000.parquet  mine/CONFIG/test-00000-…       the folder, in data/, or in folders of configurations

The split of a file is part of its name or of a folder's name (train, validation, test and their synonyms); files
without one are `train`. `configs` with `data_files` in README.md take precedence. `hf:PATH/CONFIG` selects one of
several configurations.
"""

import collections
import fnmatch
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import huggingface_hub

from jaxdiff.core.messages import Note, plain, quoted, reason
from jaxdiff.data import folder, metadata, parquet_columns, parquet_images
from jaxdiff.data.columns import GUESSED, ColumnNames
from jaxdiff.data.example import Source
from jaxdiff.data.folder import FolderSource, Walk, counted

_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_SHARD = re.compile(r"(?P<split>.+)-\d{5}-of-\d{5}.*")
_OTHER_FORMS = {
    ".arrow": "files of save_to_disk: load them with `datasets` and write Parquet (to_parquet)",
    ".tar": "tar shards: convert them (experiments.convert)",
    ".zip": "a zip: unpack it",
    ".tfrecord": "TFRecord files: a TFDS dataset is --data tfds:PATH",
}

Configs = Mapping[str, Mapping[str, tuple[str, ...]]]
"""The configurations of a README.md: file patterns by configuration and split."""


def read(path: Path | str, split: str = "train", named: ColumnNames = GUESSED) -> Source:
    """The examples of a split. Notes list the selected columns; warnings count skipped files.

    FileNotFoundError if there are no images; ValueError for a missing or ambiguous split or configuration, ambiguous
    columns (`columns.py`), and damaged files.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix.lower() != ".parquet":
            raise ValueError(f"hf:{path}: neither a folder nor a .parquet file")
        own = _split_of_file(path.name) or "train"
        if _SPLITS.get(split, split) not in (own, "train"):  # a file given by name is used for training in any case
            raise ValueError(f"hf:{path}: a file of the split {own!r}, not of {split!r}")
        return parquet_images.read([path], named, f"hf:{path}")
    root, config = _located(path)
    walk = folder.walk(root)
    tables = [name for name in walk.tables if name.endswith(".parquet") and not metadata.is_metadata(name)]
    with ThreadPoolExecutor(16) as threads:
        embedded = [name for name, has in zip(tables, threads.map(lambda n: _has_images(root / n), tables)) if has]
    configs = _configs(root, config)
    where = f"hf:{path}"
    if embedded:
        names = _of_split(where, embedded, split, configs, config, _split_of_file)
        _warn(where, _beside_parquet(walk, embedded))
        return parquet_images.read([root / name for name in names], named, where)
    if not walk.images:
        raise FileNotFoundError(_nothing(where, walk))
    names = _of_split(where, walk.images, split, configs, config, _split_of_image(walk.images))
    entries, left_out = _imagefolder(where, root, walk, names, named)
    _warn(where, [*walk.left_out(), *left_out])
    if not entries:
        raise FileNotFoundError(f"{where}: no image of the split {split!r} is listed")
    return FolderSource(root, tuple(entries))


def is_layout(path: Path) -> bool:
    """Whether a folder needs `read`; otherwise it is a plain folder of images with `.txt` files or a metadata.jsonl."""
    tables = folder.walk(path).tables
    nested = any(metadata.is_metadata(name) and name != folder.METADATA for name in tables)
    return nested or any(name.endswith(".parquet") for name in tables)


def _located(path: Path) -> tuple[Path, str | None]:
    """The folder and the configuration, which may be the last component of the path."""
    if path.is_dir():
        return path, None
    if path.parent.is_dir() and path.name in _configs(path.parent, None):
        return path.parent, path.name
    download = f"; download it first: hf download --repo-type dataset {path} --local-dir FOLDER"
    raise FileNotFoundError(f"hf:{path}: no such folder{download if _is_hub_name(path) else ''}")


def _is_hub_name(path: Path) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) is not None


def _has_images(file: Path) -> bool:
    with parquet_columns.opened(file) as table:
        return parquet_columns.has_images(table.schema_arrow)


def _of_split(
    where: str, names: Iterable[str], split: str, configs: Configs, config: str | None, split_of: Any
) -> list[str]:
    """The sorted files of a split, in the only or the named configuration."""
    names = list(names)
    if configs:
        patterns = _chosen_config(where, configs, config)
        by_split = {
            each: [name for name in names if any(_matches(name, pattern) for pattern in some)]
            for each, some in patterns.items()
        }
    else:
        by_split = _by_split(where, names, split_of)
    wanted = _SPLITS.get(split, split)
    selected = next((by_split[each] for each in (split, wanted) if each in by_split), None)
    there = ", ".join(sorted(by_split))
    if selected is None:
        raise ValueError(f"{where}: no split {split!r}, only {there}")
    if not selected:
        raise FileNotFoundError(f"{where}: no file is there of what README.md lists for the split {split!r}")
    if len(by_split) > 1:
        sizes = {each: f"{len(files)} file{'' if len(files) == 1 else 's'}" for each, files in by_split.items()}
        counts = ", ".join(f"{each} ({size})" for each, size in sorted(sizes.items()))
        warnings.warn(Note(f"{where}: read the split {wanted}; there are {counts}"), stacklevel=2)
    return sorted(selected)


def _by_split(where: str, names: list[str], split_of: Any) -> dict[str, list[str]]:
    splits: dict[str, list[str]] = {}
    without = []
    for name in names:
        split = split_of(name)
        if split is None:
            without.append(name)
        else:
            splits.setdefault(split, []).append(name)
    if not splits:
        splits = {"train": without}
    elif without:
        _warn(where, [counted(without, "file of no split|files of no split")])
    for split, files in splits.items():
        configs = sorted({_config_of(name) for name in files if name.endswith(".parquet")})
        if len(configs) > 1:
            shown = plain(", ".join(each or "." for each in configs), 400)
            raise ValueError(
                f"{where}: several configurations have the split {split!r}: {shown}; name one, as in "
                f"{where}/{next(filter(None, configs))}"
            )
    return splits


def _config_of(name: str) -> str:
    """The folder of a Parquet file, without components that name a split, and without data/."""
    kept = [part for part in PurePosixPath(name).parent.parts if part != "data" and part.lower() not in _SPLITS]
    return "/".join(kept)


def _split_of_file(name: str) -> str | None:
    """The split of a Parquet file: by its name, else by its folders, innermost first; in data/ any word is a split."""
    path = PurePosixPath(name)
    shard = _SHARD.fullmatch(path.name)
    own = _split_in(path.stem if shard is None else shard["split"]) or _split_of_folders(path)
    return shard["split"] if own is None and shard is not None and path.parent.name == "data" else own


def _split_of_folders(path: PurePosixPath) -> str | None:
    return next((split for part in reversed(path.parent.parts) if (split := _split_in(part))), None)


def _split_in(text: str) -> str | None:
    return next((_SPLITS[word] for word in re.split(r"[^a-z]+", text.lower()) if word in _SPLITS), None)


def _split_of_image(names: Iterable[str]) -> Any:
    """The split of an image: by its folders, or by its file name if all file names start with a split
    (`train_7.jpg`)."""
    paths = list(map(PurePosixPath, names))
    if any(_split_of_folders(path) for path in paths):
        return lambda name: _split_of_folders(PurePosixPath(name))
    begins = re.compile(rf"({'|'.join(sorted(_SPLITS, key=len, reverse=True))})[-_. ]?\d")
    if all(begins.match(path.name) for path in paths):
        return lambda name: _SPLITS[begins.match(PurePosixPath(name).name)[1]]  # type: ignore[index]  # all match
    return lambda name: None


def _imagefolder(
    where: str, root: Path, walk: Walk, names: list[str], named: ColumnNames
) -> tuple[list[tuple[str, str | None]], list[str]]:
    """Names and captions of the images of a split, and the lines about skipped files."""
    tables = metadata.by_folder(where, [name for name in walk.tables if metadata.is_metadata(name)])
    others = [name for name in walk.tables if not metadata.is_metadata(name)]
    left_out = []
    if others:
        left_out.append(counted(others, "table that is not named metadata|tables that are not named metadata"))
    nearest = {name: metadata.nearest(name, tables) for name in names}
    used = sorted({tables[folder] for folder in nearest.values() if folder is not None})
    splits = {_split_of_folders(PurePosixPath(name)) for name in names} | {None}
    unused = [name for name in tables.values() if name not in used and _split_of_folders(PurePosixPath(name)) in splits]
    if unused:
        left_out.append(counted(unused, "metadata file of no image|metadata files of no image"))
    if not used:
        warnings.warn(Note(f"{where}: no metadata.csv, .jsonl or .parquet: captions from .txt files"), stacklevel=2)
        return [(name, None) for name in names], left_out
    entries = []
    absent, present = 0, set(walk.images)
    for table in used:
        listed = metadata.read(root / table, named, f"{where}/{table}")
        absent += listed.without_name
        inside = os.path.dirname(table)
        for name, caption in listed.entries:
            place = os.path.normpath(os.path.join(inside, name))
            own = nearest[place] == inside if place in nearest else place not in present
            # A listed file that is missing is counted when it is read, in the split of its folder.
            if own and (place in nearest or _split_of_folders(PurePosixPath(place)) in splits):
                entries.append((place, caption))
    if absent:
        left_out.append(f"{absent} row{'' if absent == 1 else 's'} without a file_name")
    unlisted = sorted(set(names) - {name for name, _ in entries})
    if unlisted:
        left_out.append(counted(unlisted, "image that no metadata lists|images that no metadata lists"))
    return entries, left_out


def _beside_parquet(walk: Walk, embedded: list[str]) -> list[str]:
    lines = walk.left_out()
    if walk.images:
        lines.append(counted(walk.images, "image beside Parquet files|images beside Parquet files"))
    rest = sorted(set(walk.tables) - set(embedded))
    if rest:
        lines.append(counted(rest, "table without images|tables without images"))
    return lines


def _nothing(where: str, walk: Walk) -> str:
    kinds = [suffix for suffix, _ in walk.unknown]
    hint = next((text for suffix, text in _OTHER_FORMS.items() if suffix in kinds), None)
    if hint is None and any(name.endswith(".parquet") for name in walk.tables):
        hint = "its Parquet files hold no column of images"
    return f"{where}: no images there, and no Parquet files with images{f' ({hint})' if hint else ''}"


def _warn(where: str, lines: Iterable[str]) -> None:
    for line in lines:
        warnings.warn(f"{where}: left out {line}", stacklevel=3)


def _configs(root: Path, config: str | None) -> Configs:
    """The configurations in README.md; empty if it has none. ValueError if they are malformed."""
    card = root / "README.md"
    if not card.is_file():
        return {}
    try:
        entries = (huggingface_hub.metadata_load(card) or {}).get("configs")
    except Exception as error:  # YAML parsers raise many types
        warnings.warn(f"{card}: its metadata cannot be read ({reason(error)}): names of files decide", stacklevel=2)
        return {}
    configs = {}
    for each in entries if isinstance(entries, list) else []:
        if not isinstance(each, dict) or not isinstance(each.get("config_name"), str):
            raise ValueError(f"{card}: a config without a config_name: {quoted(each)}")
        patterns = _patterns(each.get("data_files"), str(each.get("data_dir") or ""), card)
        if patterns:
            configs[each["config_name"]] = patterns
            if each.get("default") is True:
                configs["default"] = patterns
    return configs


def _patterns(files: Any, inside: str, card: Path) -> dict[str, tuple[str, ...]]:
    """`data_files` in any of its forms, as patterns by split."""
    if files is None:
        return {"train": (os.path.join(inside, "**"),)} if inside else {}
    if isinstance(files, dict):
        files = [{"split": split, "path": path} for split, path in files.items()]
    if isinstance(files, str) or (isinstance(files, list) and all(isinstance(each, str) for each in files)):
        files = [{"split": "train", "path": files}]
    patterns: dict[str, list[str]] = collections.defaultdict(list)
    for each in files if isinstance(files, list) else [files]:
        path = each.get("path") if isinstance(each, dict) else None
        paths = [path] if isinstance(path, str) else path
        if not isinstance(paths, list) or not all(isinstance(one, str) for one in paths):
            raise ValueError(f"{card}: data_files without a path: {quoted(each)}")
        split = str(each.get("split", "train"))
        patterns[_SPLITS.get(split, split)] += [os.path.join(inside, one) for one in paths]
    return {split: tuple(some) for split, some in patterns.items()}


def _chosen_config(where: str, configs: Configs, config: str | None) -> Mapping[str, tuple[str, ...]]:
    if config is None:
        config = next(iter(configs)) if len(configs) == 1 else "default" if "default" in configs else None
    if config is None:
        shown = plain(", ".join(configs), 400)
        raise ValueError(f"{where}: several configurations: {shown}; name one, as in {where}/{next(iter(configs))}")
    return configs[config]


def _matches(name: str, pattern: str) -> bool:
    """Match a glob pattern of the hub: `**` is any number of folders, zero included."""
    pattern = pattern.removeprefix("./")
    return any(fnmatch.fnmatchcase(name, each) for each in (pattern, pattern.replace("**/", "")))
