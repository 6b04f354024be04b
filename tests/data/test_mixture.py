"""Mixtures: every example once as a sequence, sources by their weights as a stream; with embeddings and resumption."""

import dataclasses
import itertools
import json
import pickle
import warnings
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from jaxdiff.data import embeddings, mixture, sources
from jaxdiff.data.example import captions
from jaxdiff.data.mixture import MixtureSource, Spread, spread
from jaxdiff.data.orders import Blocks
from jaxdiff.data.pipeline import DataConfig, ReadAhead, image_batches
from jaxdiff.text.encoder import TextEmbedding


@dataclasses.dataclass(frozen=True)
class Flat:
    """Images of one value, named by their source and place."""

    name: str
    count: int
    blocks: Blocks | None = None

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        image = np.full((8, 8, 3), index, np.uint8)
        return {"image": image, "caption": f"{self.name}{index}", "name": f"{self.name}/{index}"}


@dataclasses.dataclass(frozen=True)
class Damaged(Flat):
    def __getitem__(self, index):
        return {**super().__getitem__(index), "image": b""}


SOURCES = (Flat("a", 5), Flat("b", 12), Flat("c", 3))


def taken(source, config, count, **options):
    """The captions of the next `count` batches."""
    return [batch["caption"].tolist() for batch in itertools.islice(image_batches(source, config, **options), count)]


def test_as_a_sequence_it_holds_every_example_once_evenly():
    mixed = MixtureSource(SOURCES, (1.0, 1.0, 8.0))
    names = [mixed[i]["caption"] for i in range(len(mixed))]
    assert sorted(names) == sorted(source[i]["caption"] for source in SOURCES for i in range(len(source)))
    assert [mixed.index(*mixed.where(i)) for i in range(20)] == list(range(20))
    for part, source in enumerate(SOURCES):
        assert [names[i] for i in mixed.indices(part)] == [source[i]["caption"] for i in range(len(source))]
    assert Counter(name[0] for name in names[:10]) in ({"a": 2, "b": 6, "c": 2}, {"a": 3, "b": 6, "c": 1})
    with pytest.raises(IndexError):
        mixed[20]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("weights, fractions", [((3, 1, 1), (0.6, 0.2, 0.2)), (None, (0.25, 0.6, 0.15))])
def test_an_epoch_goes_by_the_weights_and_each_source_through_its_own(shuffle, weights, fractions):
    mixed = MixtureSource(SOURCES, weights)
    config = DataConfig(8, 20, captions=True, shuffle=shuffle, seed=3)
    seen = list(itertools.chain(*taken(mixed, config, 12)))
    for source, fraction in zip(SOURCES, fractions):
        own = [name for name in seen if name[0] == source.name]
        assert abs(len(own) - 240 * fraction) <= 2
        passes = [own[i : i + len(source)] for i in range(0, len(own) - len(source) + 1, len(source))]
        assert passes and all(len(set(each)) == len(source) for each in passes)  # each once before any again
        if len(passes) > 3:
            assert (len(set(map(tuple, passes))) > 1) == shuffle
    for start in range(0, 240, 20):  # evenly: in any twenty
        part = Counter(name[0] for name in seen[start : start + 20])
        assert all(abs(part[source.name] - 20 * fraction) <= 3 for source, fraction in zip(SOURCES, fractions))


def test_one_epoch_has_as_many_as_the_sources_together():
    config = DataConfig(8, 6, captions=True, repeat=False)
    even = list(itertools.chain(*taken(MixtureSource(SOURCES), config, 100)))
    assert len(even) == 20 and len(set(even)) == 20
    weighted = Counter(name[0] for name in itertools.chain(*taken(MixtureSource(SOURCES, (3, 1, 1)), config, 100)))
    assert weighted == {"a": 12, "b": 4, "c": 4}


def test_sources_of_one_size_are_not_shuffled_alike():
    mixed = MixtureSource((Flat("a", 30), Flat("b", 30)), (1, 1))
    seen = list(itertools.chain(*taken(mixed, DataConfig(8, 60, captions=True), 1)))
    orders = [[int(name[1:]) for name in seen if name[0] == letter] for letter in "ab"]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(30)) and orders[0] != orders[1]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_saved_state_continues_exactly(workers):
    mixed = MixtureSource(SOURCES, (3, 2, 1))
    config = DataConfig(8, 4, captions=True, seed=2)
    expected = taken(mixed, config, 11)
    first = image_batches(mixed, config, read_ahead=ReadAhead(workers=workers))
    for wanted in expected[:6]:
        assert next(first)["caption"].tolist() == wanted
    second = image_batches(mixed, config, read_ahead=ReadAhead(workers=workers))
    second.set_state(json.loads(json.dumps(first.get_state())))
    assert [next(second)["caption"].tolist() for _ in range(5)] == expected[6:]


def test_a_rare_good_source_beside_a_damaged_one_is_enough():
    """Between two usable examples lie more places than there are examples."""
    mixed = MixtureSource((Damaged("x", 3), Flat("b", 2)), (200, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert {name for batch in taken(mixed, DataConfig(8, 2, captions=True), 3) for name in batch} == {"b0", "b1"}
        with pytest.raises(ValueError, match="not one of the 6 examples is usable"):
            taken(MixtureSource((Damaged("x", 3), Damaged("y", 3)), (200, 1)), DataConfig(8, 2, captions=True), 1)


def test_the_shares_together_are_the_one_process_stream():
    mixed = MixtureSource(SOURCES, (3, 2, 1))
    one = taken(mixed, DataConfig(8, 6, captions=True), 7)
    halves = [taken(mixed, DataConfig(8, 3, captions=True), 7, process_index=i, process_count=2) for i in range(2)]
    assert [a + b for a, b in zip(*halves)] == one


def test_stored_embeddings_are_those_of_the_mixture_whatever_its_weights(tmp_path):
    """Embedding i is of caption i: its first value is the caption's own number."""
    mixed = MixtureSource(SOURCES, (1, 1, 1))

    def encode(texts):
        values = [ord(text[0]) + int(text[1:] or 0) / 64 if text else 0.0 for text in texts]
        return TextEmbedding(np.asarray(values)[:, None, None] * np.ones((1, 2, 3)), np.ones((len(texts), 2), bool))

    stored = embeddings.store_embeddings(captions(mixed), encode, tmp_path, encoder="numbers", batch=4)
    assert stored.count == 20
    for weights in ((1, 1, 1), (5, 1, 2), None):
        again = MixtureSource(SOURCES, weights)
        batch = next(image_batches(again, DataConfig(8, 40, captions=True), stored))
        expected = [ord(caption[0]) + int(caption[1:]) / 64 for caption in batch["caption"]]
        np.testing.assert_allclose(batch["text"][:, 0, 0], expected, atol=1e-1)
        assert [mixed[i]["caption"] for i in batch["index"].tolist()] == batch["caption"].tolist()


def test_blocks_of_a_source_stay_together_in_a_mixture():
    blocks = Blocks((4,) * 8, together=1)
    mixed = MixtureSource((Flat("a", 32, blocks), Flat("b", 32)), (1, 1))
    seen = [name for batch in taken(mixed, DataConfig(8, 64, captions=True), 1) for name in batch]
    own = [int(name[1:]) // 4 for name in seen if name[0] == "a"]
    assert [len(set(own[i : i + 4])) for i in range(0, 32, 4)] == [1] * 8


def test_a_mixture_pickles():
    mixed = MixtureSource(SOURCES, (0.1, 0.3, 0.1))
    assert mixed.fractions == (Fraction(1, 5), Fraction(3, 5), Fraction(1, 5))
    assert pickle.loads(pickle.dumps(mixed)) == mixed


def test_fewer_examples_keep_the_weights():
    mixed = MixtureSource(SOURCES, (1, 1, 2))
    few = spread(mixed, 10)
    assert isinstance(few, MixtureSource) and few.weights == (1, 1, 2) and few.counts == (2, 6, 1)
    assert spread(MixtureSource(SOURCES), 10).weights == (5, 12, 3)
    assert spread(mixed, 100) is mixed
    assert spread(Flat("a", 10), 4) == Spread(Flat("a", 10), 4)
    assert [spread(Flat("a", 10), 4)[i]["caption"] for i in range(4)] == ["a0", "a2", "a5", "a7"]
    with pytest.raises(ValueError, match="at least 1"):
        spread(mixed, 0)


@pytest.mark.parametrize(
    "parts, weights, message",
    [
        ((), None, "needs sources"),
        ((Flat("a", 0),), None, "each of them an example"),
        ((MixtureSource(SOURCES),), None, "mixture of mixtures"),
        (SOURCES, (1, 2), r"weights 1 2: 2 for 3 sources; give one for each"),
        (SOURCES, (1, 2, 0), "weights 1 2 0: each must be a positive number"),
        (SOURCES, (1, 2, float("nan")), "each must be a positive number"),
        (SOURCES, (1, float("inf"), 1), "each must be a positive number"),
    ],
)
def test_bad_mixtures_are_one_line(parts, weights, message):
    with pytest.raises(ValueError, match=message) as error:
        MixtureSource(parts, weights)
    assert "\n" not in str(error.value)


def test_the_command_line_gives_a_spec():
    one = sources.parse_several(["hf:mine"])
    assert one == sources.parse("hf:mine")
    both = sources.parse_several(["hf:mine", "shapes"], [3, 1])
    assert both == sources.Mixture((one, sources.Shapes()), (3, 1))
    assert sources.describe(both) == "hf:mine shapes with weights 3 1"
    assert sources.describe(sources.parse_several(["hf:mine", "shapes"])) == "hf:mine shapes"
    smaller = sources.changed(both, lambda spec: sources.Shapes(7, 1) if isinstance(spec, sources.Shapes) else spec)
    assert smaller == sources.Mixture((one, sources.Shapes(7, 1)), (3, 1))
    assert sources.changed(one, lambda spec: sources.Shapes()) == sources.Shapes()


@pytest.mark.parametrize(
    "texts, weights, message",
    [
        ([], None, "--data names no source"),
        (["hf:mine", "shape"], None, "--data 'shape' is not one of"),
        (["shapes", "emoji", "shapes"], None, "shapes is named twice"),
        (["shapes", "emoji"], [1], "--data-weights: weights 1: 1 for 2 sources"),
        (["shapes"], [1, 2], "--data-weights: weights 1 2: 2 for 1 sources"),
        (["shapes", "emoji"], [1, -2], "--data-weights: weights 1 -2: each must be a positive number"),
    ],
)
def test_bad_words_on_the_command_line_are_one_line(texts, weights, message):
    with pytest.raises(ValueError, match=message) as error:
        sources.parse_several(texts, weights)
    assert "\n" not in str(error.value)


def test_a_mixture_opens_all_its_sources(tmp_path, source):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for i, example in enumerate(source.examples[:3]):
            (tmp_path / name / f"{i}.png").write_bytes(example["image"])
            (tmp_path / name / f"{i}.txt").write_text(f"{name} {i}")
    spec = sources.parse_several([f"folder:{tmp_path}/one", f"folder:{tmp_path}/two"], [2, 1])
    mixed = sources.open(spec, 64, "train", "")
    assert isinstance(mixed, mixture.MixtureSource) and mixed.weights == (2, 1) and len(mixed) == 6
    seen = Counter(
        caption.split()[0] for caption in next(image_batches(mixed, DataConfig(8, 30, captions=True)))["caption"]
    )
    assert seen == {"one": 20, "two": 10}
