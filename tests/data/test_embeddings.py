"""Stored text embeddings: what is stored, going on after a kill, and every way in which they may not fit."""

import dataclasses
import json
import pickle
import resource
import socket
import subprocess
import sys
import tracemalloc
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.data import embeddings, parts
from jaxdiff.data.array_records import new_records
from jaxdiff.data.embeddings import RowEncoder, Shard, StoreProgress, open_embeddings, store_embeddings, store_rows
from jaxdiff.data.pipeline import DataConfig, image_batches

LENGTH, WIDTH = 6, 5
CAPTIONS = [f"{'word ' * (i % 7)}{i}" for i in range(23)]


class Encoder:
    """Words to rows that tell the word and its place; counts its calls and can fail at one of them."""

    def __init__(self, fail_at: int | None = None):
        self.calls, self.fail_at = 0, fail_at

    def __call__(self, captions):
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        self.calls += 1
        words = [caption.split()[:LENGTH] for caption in captions]
        mask = np.arange(LENGTH) < np.array([len(row) for row in words])[:, None]
        text = np.full((len(captions), LENGTH, WIDTH), 99.0, np.float32)  # padding is not stored, whatever it holds
        for i, row in enumerate(words):
            for j, word in enumerate(row):
                text[i, j] = len(word) + 10 * j + (int(word) if word.isdigit() else 0) + np.arange(WIDTH)
        return TextEmbedding(jnp.asarray(text), jnp.asarray(mask))


def store(path, captions=CAPTIONS, encoder=None, name="t5", **settings):
    return store_embeddings(captions, encoder or Encoder(), path, encoder=name, **{"batch": 4, "part": 8, **settings})


def rows(captions):
    """The same without padding."""
    text = jax.tree.map(np.asarray, Encoder()(captions))
    return [row[kept] for row, kept in zip(text.tokens, text.mask)], LENGTH


def unused(captions):
    raise AssertionError(f"{len(captions)} captions are encoded again")


def store_shard(path, index, count, captions=CAPTIONS, encoder=rows, name="t5", window=4096, **settings):
    made = RowEncoder(encoder, name, window=window)
    return store_rows(captions, made, path, shard=Shard(index, count), **{"part": 4, **settings})


def files(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_what_is_stored_comes_back(tmp_path):
    stored = store(tmp_path)
    text, mask, *_ = jax.tree.map(np.asarray, Encoder()(CAPTIONS))
    assert len(stored) == 23 and (stored.length, stored.width, stored.encoder) == (LENGTH, WIDTH, "t5")
    for i in (0, 7, 8, 22, 3):
        rows, kept, digest = stored[i]
        assert rows.dtype == np.float16 and digest == embeddings.digest(CAPTIONS[i])
        np.testing.assert_array_equal(kept, mask[i])
        np.testing.assert_array_equal(rows, np.where(mask[i][:, None], text[i], 0))


def test_every_batch_has_one_shape(tmp_path):
    sizes = set()
    encode = Encoder()
    store(tmp_path, encoder=lambda captions: sizes.add(len(captions)) or encode(captions))
    assert sizes == {4}


def test_missing_captions_have_no_tokens(tmp_path):
    stored = store(tmp_path, captions=["a cat", None, "", "  "])
    assert [int(stored[i][1].sum()) for i in range(4)] == [2, 0, 0, 0]


@pytest.mark.parametrize("fail_at", [0, 1, 2, 3, 5])
def test_a_killed_run_continues(tmp_path, fail_at):
    with pytest.raises(KeyboardInterrupt):
        store(tmp_path / "a", encoder=Encoder(fail_at))
    (tmp_path / "a" / "part-00002.array_record.host-1.part").write_bytes(b"what a SIGKILL leaves")
    if fail_at >= 2:  # one part was whole
        with pytest.raises(ValueError, match="run the same again"):
            open_embeddings(tmp_path / "a")
    second = Encoder()
    resumed, whole = store(tmp_path / "a", encoder=second), store(tmp_path / "b")
    assert second.calls == 6 - fail_at // 2 * 2  # two batches a part, six in all
    for i in range(23):
        for a, b in zip(resumed[i], whole[i]):
            np.testing.assert_array_equal(a, b)
    names = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert names == ["embeddings.json", *(f"part-0000{i}.array_record" for i in range(3))]


def test_a_finished_store_is_not_done_again(tmp_path):
    store(tmp_path)
    again = Encoder()
    assert len(store(tmp_path, encoder=again)) == 23 and again.calls == 0


def test_a_store_is_not_mixed(tmp_path):
    store(tmp_path)
    with pytest.raises(ValueError, match="made by the text encoder t5, not by other"):
        store(tmp_path, name="other")
    with pytest.raises(ValueError, match="caption 22 is not the one stored"):
        store(tmp_path, captions=[*CAPTIONS[:22], "changed"])
    with pytest.raises(ValueError, match="more now"):
        store(tmp_path, captions=[*CAPTIONS, "one more"])
    with pytest.raises(ValueError, match="caption 22 is not the one stored"):
        store(tmp_path, captions=CAPTIONS[:-1])
    assert len(open_embeddings(tmp_path)) == 23


def test_a_full_last_part_is_not_added_to(tmp_path):
    store(tmp_path, captions=CAPTIONS[:16])
    with pytest.raises(ValueError, match="more now"):
        store(tmp_path, captions=CAPTIONS)
    assert len(open_embeddings(tmp_path)) == 16


def test_an_encoder_that_cannot_be_stored_is_refused(tmp_path):
    def holes(captions):
        return TextEmbedding(np.zeros((len(captions), 3, 2)), np.tile([True, False, True], (len(captions), 1)))

    def huge(captions):
        return TextEmbedding(np.full((len(captions), 3, 2), 1e6), np.ones((len(captions), 3), bool))

    with pytest.raises(ValueError, match="holes"):
        store(tmp_path / "a", encoder=holes)
    with np.errstate(over="ignore"), pytest.raises(ValueError, match="float16"):
        store(tmp_path / "b", encoder=huge)
    assert not list(tmp_path.glob("*/*"))  # nothing half-written


def test_opening_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no embeddings\.json"):
        open_embeddings(tmp_path)
    store(tmp_path)
    with pytest.raises(ValueError, match="made by the text encoder t5, but the model needs clip"):
        open_embeddings(tmp_path, "clip")
    part = tmp_path / "part-00000.array_record"
    part.rename(tmp_path / "aside")
    with pytest.raises(FileNotFoundError, match=r"part-00000\.array_record: missing \(1 of "):
        open_embeddings(tmp_path)
    (tmp_path / "aside").rename(part)
    (tmp_path / "embeddings.json").write_text('{"count": 3}')
    with pytest.raises(ValueError, match="not the settings of stored embeddings"):
        open_embeddings(tmp_path)
    (tmp_path / "embeddings.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON with settings"):
        open_embeddings(tmp_path)


def test_the_sidecar_can_be_read_by_people(tmp_path):
    store(tmp_path)
    told = json.loads((tmp_path / "embeddings.json").read_text())
    assert (told["encoder"], told["length"], told["width"], told["count"]) == ("t5", LENGTH, WIDTH, 23)


def test_batches_join_each_picture_with_its_text(tmp_path, source):
    captions = [example["caption"] for example in source.examples]
    stored = store(tmp_path, captions=captions)
    batch = next(image_batches(source, DataConfig(32, 8, captions=True), stored))
    assert batch["text"].shape == (8, LENGTH, WIDTH) and batch["text"].dtype == np.float16
    text, mask, *_ = jax.tree.map(np.asarray, Encoder()(batch["caption"].tolist()))
    np.testing.assert_array_equal(batch["text_mask"], mask)
    np.testing.assert_array_equal(batch["text"], np.where(mask[..., None], text, 0))


def test_embeddings_of_another_set_are_refused(tmp_path, source):
    captions = [example["caption"] for example in source.examples]
    with pytest.raises(ValueError, match="holds 10 embeddings for 11 examples"):
        image_batches(source, DataConfig(32, 2), store(tmp_path / "short", captions=captions[:10]))
    swapped = store(tmp_path / "swapped", captions=[*captions[:9], captions[10], captions[9]])
    with pytest.raises(ValueError, match=r"embedding 9 was made from another caption than that of set/9\.png"):
        list(image_batches(source, DataConfig(32, 1, shuffle=False, repeat=False), swapped))


def test_optional_captions_become_empty_text(tmp_path, source, listed):
    one = listed(({**source.examples[0], "caption": None},))
    stored = store(tmp_path, captions=[None])
    batch = next(image_batches(one, DataConfig(32, 1, caption_optional=True), stored))
    assert not batch["text_mask"].any() and not batch["text"].any()


def test_shards_make_the_store_that_one_process_makes(tmp_path):
    whole = store_shard(tmp_path / "whole", 0, 1)
    assert len(whole) == 23 and len(whole.parts) == 6
    told = []
    for index in (2, 0, 1):
        assert not (tmp_path / "shards" / "part-00001.array_record").exists()
        progress = StoreProgress(lambda *both: told.append(both))
        found = store_shard(tmp_path / "shards", index, 3, window=3, progress=progress)
        if index != 1:
            assert found is None
            with pytest.raises(ValueError, match="parts, the rest is not stored"):
                open_embeddings(tmp_path / "shards")
    assert told == [(0, 7), (0, 8), (0, 8)]  # of six parts the last has three captions
    assert len(found) == 23 and files(tmp_path / "shards") == files(tmp_path / "whole")
    done = []
    progress = StoreProgress(lambda *both: done.append(both))
    again = store_shard(tmp_path / "shards", 2, 3, encoder=unused, progress=progress)
    assert len(again) == 23 and done == [(7, 7)]


def test_shards_without_a_part_and_shards_that_are_none(tmp_path):
    assert store_shard(tmp_path, 7, 8, encoder=unused) is None
    with pytest.raises(ValueError, match="shard 3/3"):
        Shard(3, 3)
    with pytest.raises(ValueError, match="shard -1/3"):
        Shard(-1, 3)


def test_shards_with_other_settings_are_refused(tmp_path):
    """Both had begun before either stored anything."""

    def other_first(captions):
        store_shard(tmp_path, 1, 2, name="first", part=2)
        return rows(captions)

    with pytest.raises(ValueError, match="another process stores embeddings there whose encoder is first, not second"):
        store_shard(tmp_path, 0, 2, encoder=other_first, name="second", part=2)
    assert not (tmp_path / "part-00000.array_record").exists()
    assert store_shard(tmp_path, 0, 2, name="first", part=8).part == 2  # the size that is there


def damage_of(path, change):
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)


def cut(content):
    del content[len(content) // 2 :]


def flip(content):
    content[content.index(embeddings.digest(CAPTIONS[15])) + 20] ^= 4


def empty(content):
    content.clear()


@pytest.mark.parametrize("change", [cut, flip, empty])
def test_a_damaged_part_is_named_and_made_again_alone(tmp_path, change):
    store(tmp_path)
    before = files(tmp_path)
    part = tmp_path / "part-00001.array_record"
    damage_of(part, change)
    told = r"part-00001\.array_record(, record 7)?: damaged .*delete the file and run"
    with pytest.raises(ValueError, match=told):
        store(tmp_path)
    stored = open_embeddings(tmp_path)
    with pytest.raises(ValueError, match=told):
        stored[15]
    assert stored[22][0].any()
    part.unlink()
    with pytest.raises(FileNotFoundError, match=r"part-00001\.array_record: missing \(1 of 3 parts\); run"):
        open_embeddings(tmp_path)
    again = Encoder()
    store(tmp_path, encoder=again)
    assert again.calls == 2 and files(tmp_path) == before


def test_verifying_reads_everything(tmp_path):
    store_shard(tmp_path, 0, 1)
    changed = [*CAPTIONS[:9], "changed", *CAPTIONS[10:]]
    assert store_shard(tmp_path, 0, 1, changed, encoder=unused)
    with pytest.raises(ValueError, match="caption 9 is not the one stored"):
        store_shard(tmp_path, 0, 1, changed, encoder=unused, verify=True)
    damage_of(
        tmp_path / "part-00003.array_record",
        lambda content: content.__setitem__(content.index(embeddings.digest(CAPTIONS[12])), 0),
    )
    assert store_shard(tmp_path, 0, 1, encoder=unused)
    with pytest.raises(ValueError, match=r"part-00003\.array_record: damaged"):
        store_shard(tmp_path, 0, 1, encoder=unused, verify=True)


def test_a_disk_that_is_full(tmp_path):
    store_shard(tmp_path, 0, 2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))  # ArrayRecord writes 64 KiB at a time
    try:
        with pytest.raises(OSError, match=r"part-00001\.array_record: cannot be written"):
            store_shard(tmp_path, 1, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(files(tmp_path)) == ["embeddings.json", *(f"part-0000{i}.array_record" for i in (0, 2, 4))]
    assert len(store_shard(tmp_path, 1, 2)) == 23


def store_of_before(path, count, complete):
    """As it was written when one process stored everything and listed each part when it was done."""
    path.mkdir()
    names = [f"part-{i:05d}.array_record" for i in range(-(-count // 8))]
    for i, name in enumerate(names):
        with new_records(path / name) as write:
            for caption in CAPTIONS[8 * i : min(8 * i + 8, count)]:
                write(embeddings.digest(caption) + rows([caption])[0][0].astype(np.float16).tobytes())
    told = {"encoder": "t5", "length": LENGTH, "width": WIDTH, "count": count, "part": 8, "parts": names}
    (path / "embeddings.json").write_text(json.dumps(told | {"complete": complete}))


def test_stores_of_before_are_read_and_continued(tmp_path):
    now = store(tmp_path / "now")
    store_of_before(tmp_path / "whole", 23, True)
    store_of_before(tmp_path / "half", 16, False)
    with pytest.raises(ValueError, match="only 2 parts"):
        open_embeddings(tmp_path / "half")
    again = Encoder()
    for before in (open_embeddings(tmp_path / "whole", "t5"), store(tmp_path / "half", encoder=again)):
        assert again.calls in (0, 2) and len(before) == 23
        for i in range(23):
            for a, b in zip(before[i], now[i]):
                np.testing.assert_array_equal(a, b)


def test_parts_that_nothing_tells_of_are_refused(tmp_path):
    store(tmp_path)
    (tmp_path / "embeddings.json").unlink()
    with pytest.raises(ValueError, match=r"holds parts, but no embeddings\.json"):
        store(tmp_path)


def test_what_the_dead_left_goes_first(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = socket.gethostname()
    kinds = {"dead": (host, dead.pid), "alive": (host, 1), "elsewhere": ("host", 1)}
    left = {kind: tmp_path / f"part-00001.array_record.{name}-{pid}.part" for kind, (name, pid) in kinds.items()}
    for file in left.values():
        file.write_bytes(b"half")
    store_shard(tmp_path, 0, 2)
    assert [kind for kind, file in left.items() if file.exists()] == ["alive", "elsewhere"]
    store_shard(tmp_path, 1, 2)
    assert not [kind for kind, file in left.items() if file.exists()]


def test_threads_share_a_store_and_it_pickles(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "OPEN", 2)
    stored = store_shard(tmp_path, 0, 1)
    places = np.random.default_rng(0).integers(0, 23, 400).tolist()
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(stored.__getitem__, places))
    assert [entry[2] for entry in found] == [embeddings.digest(CAPTIONS[i]) for i in places]
    assert len(stored._records._open) == 2
    copy = pickle.loads(pickle.dumps(stored))
    np.testing.assert_array_equal(copy[22][0], stored[22][0])
    with pytest.raises(IndexError):
        stored[23]


@dataclasses.dataclass(frozen=True)
class Synthetic(Sequence):
    """Captions that are made when they are asked for."""

    count: int

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index >= self.count:
            raise IndexError(index)
        return f"caption {index}"


def test_neither_memory_nor_the_settings_grow_with_the_set(tmp_path, monkeypatch):
    real, written, peaks = embeddings.write_json, [], []
    monkeypatch.setattr(embeddings, "write_json", lambda *both: written.append(both[0].name) or real(*both))

    def encode(captions):
        return [np.ones((20, WIDTH), np.float16) for _ in captions], 20

    for count in (100, 500, 2500):
        tracemalloc.start()
        try:
            store_shard(tmp_path / str(count), 0, 1, Synthetic(count), encode, part=50, window=25)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert written == ["embeddings.json"] * 6  # before the first part and after the last
    assert peaks[2] < peaks[1] + 2000 * 100  # embeddings that are kept would take 300 bytes each
