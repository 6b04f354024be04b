"""Stored text embeddings: what is stored, going on after a kill, and every way in which they may not fit."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.data import embeddings
from jaxdiff.data.embeddings import fingerprint, open_embeddings, store_embeddings
from jaxdiff.data.pipeline import images
from jaxdiff.nets.t5 import T5Config
from jaxdiff.text.t5 import TextEncoder
from jaxdiff.text.tokenizer import byte_tokenizer

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
        return jnp.asarray(text), jnp.asarray(mask)


def store(path, captions=CAPTIONS, encoder=None, name="t5", **settings):
    return store_embeddings(captions, encoder or Encoder(), path, encoder=name, **{"batch": 4, "part": 8, **settings})


def test_what_is_stored_comes_back(tmp_path):
    stored = store(tmp_path)
    text, mask = map(np.asarray, Encoder()(CAPTIONS))
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
        return np.zeros((len(captions), 3, 2)), np.tile([True, False, True], (len(captions), 1))

    def huge(captions):
        return np.full((len(captions), 3, 2), 1e6), np.ones((len(captions), 3), bool)

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
    with pytest.raises(ValueError, match="not a JSON file"):
        open_embeddings(tmp_path)


def test_the_sidecar_can_be_read_by_people(tmp_path):
    store(tmp_path)
    told = json.loads((tmp_path / "embeddings.json").read_text())
    assert (told["encoder"], told["length"], told["width"], told["count"]) == ("t5", LENGTH, WIDTH, 23)


def test_batches_join_each_picture_with_its_text(tmp_path, source):
    captions = [example["caption"] for example in source.examples]
    stored = store(tmp_path, captions=captions)
    batch = next(images(source, 32, 8, embeddings=stored, captions=True))
    assert batch["text"].shape == (8, LENGTH, WIDTH) and batch["text"].dtype == np.float16
    text, mask = map(np.asarray, Encoder()(batch["caption"].tolist()))
    np.testing.assert_array_equal(batch["text_mask"], mask)
    np.testing.assert_array_equal(batch["text"], np.where(mask[..., None], text, 0))


def test_embeddings_of_another_set_are_refused(tmp_path, source):
    captions = [example["caption"] for example in source.examples]
    with pytest.raises(ValueError, match="holds 10 embeddings for 11 examples"):
        images(source, 32, 2, embeddings=store(tmp_path / "short", captions=captions[:10]))
    swapped = store(tmp_path / "swapped", captions=[*captions[:9], captions[10], captions[9]])
    with pytest.raises(ValueError, match=r"embedding 9 was made from another caption than that of set/9\.png"):
        list(images(source, 32, 1, embeddings=swapped, shuffle=False, repeat=False))


def test_optional_captions_become_empty_text(tmp_path, source, listed):
    one = listed(({**source.examples[0], "caption": None},))
    stored = store(tmp_path, captions=[None])
    batch = next(images(one, 32, 1, embeddings=stored, caption_optional=True))
    assert not batch["text_mask"].any() and not batch["text"].any()


def test_the_fingerprint_tells_encoders_apart():
    config = T5Config(vocab=384, d_model=8, d_kv=4, d_ff=8, layers=1, heads=2)
    encoder = TextEncoder(config, {"shared": np.zeros((3, 2), np.float32)}, byte_tokenizer(), 16)
    told = {
        fingerprint(encoder),
        fingerprint(dataclasses.replace(encoder, length=32)),
        fingerprint(dataclasses.replace(encoder, config=dataclasses.replace(config, heads=4))),
        fingerprint(dataclasses.replace(encoder, params={"shared": np.ones((3, 2), np.float32)})),
        fingerprint(dataclasses.replace(encoder, params={"shared": jnp.zeros((3, 2), jnp.bfloat16)})),
        fingerprint(dataclasses.replace(encoder, params={"other": np.zeros((3, 2), np.float32)})),
    }
    assert len(told) == 6
    assert fingerprint(encoder) == fingerprint(dataclasses.replace(encoder, params={"shared": jnp.zeros((3, 2))}))
    without_decoder = dataclasses.replace(config, decoder_layers=0, remat=True)  # neither changes an embedding
    assert fingerprint(encoder) == fingerprint(dataclasses.replace(encoder, config=without_decoder))
