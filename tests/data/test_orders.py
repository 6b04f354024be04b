"""Orders: each example once an epoch, by the seed and the position alone; blocks together; streams interleaved."""

import pickle
from collections import Counter
from itertools import pairwise

import pytest

from jaxdiff.data.orders import SMALL, Blocks, Order, interleaved, position_of

BLOCKS = Blocks((7, 10, 3, 10, 10, 5, 8), together=2)
COUNT = sum(BLOCKS.sizes)


@pytest.fixture(params=["small", "large", "blocks"])
def order(request):
    if request.param == "blocks":
        return Order(COUNT, 5, True, BLOCKS)
    return Order(COUNT if request.param == "small" else SMALL + 100, 5, True)


def places(order, epochs):
    return [[order.place(epoch * len(order) + i) for i in range(len(order))] for epoch in range(epochs)]


def test_every_epoch_has_each_once_in_a_new_order(order):
    epochs = places(order, 3)
    assert all(sorted(epoch) == list(range(len(order))) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3
    assert all(sorted(order.epoch(number).tolist()) == list(range(len(order))) for number in range(2))
    assert order.epoch(0).tolist() != order.epoch(1).tolist()


def test_an_order_is_a_function_of_its_settings(order):
    copy = pickle.loads(pickle.dumps(order))
    assert [copy.place(i) for i in range(0, 3 * len(order), 5)] == [order.place(i) for i in range(0, 3 * len(order), 5)]
    assert copy.epoch(2).tolist() == order.epoch(2).tolist()


def test_the_seed_decides(order):
    assert Order(COUNT, 5, True).epoch(0).tolist() != Order(COUNT, 6, True).epoch(0).tolist()


def test_without_shuffling_places_come_in_turn():
    order = Order(5, 0, False, Blocks((2, 3), 1))
    assert [order.place(i) for i in range(12)] == [0, 1, 2, 3, 4] * 2 + [0, 1]
    assert order.epoch(3).tolist() == [0, 1, 2, 3, 4]


def test_blocks_are_read_once_an_epoch_by_who_keeps_as_many():
    """In order, examples come from runs of two blocks, mixed within a run; the blocks of a run are not neighbours."""
    order = Order(COUNT, 1, True, BLOCKS)
    block_of = [number for number, size in enumerate(BLOCKS.sizes) for _ in range(size)]
    for epoch in places(order, 4):
        blocks = [block_of[place] for place in epoch]
        runs, kept = [], set()
        for block in blocks:
            if block not in kept and len(kept) == BLOCKS.together:
                runs.append(kept)
                kept = set()
            kept = kept | {block}
        runs.append(kept)
        assert sorted(block for run in runs for block in run) == list(range(7))
        assert sum(a != b for a, b in pairwise(blocks)) > 15  # mixed, where blocks in turn would change 6 times
    assert Order(COUNT, 1, True, Blocks(BLOCKS.sizes, 7)).epoch(0).tolist() == Order(COUNT, 1, True).epoch(0).tolist()


@pytest.mark.parametrize("weights", [(1,), (3, 1), (1, 1, 1), (7, 0, 2), (0, 5), (2, 9, 4, 1), (10**20, 3 * 10**20)])
def test_streams_are_interleaved_evenly(weights):
    total = sum(weights)
    count = 2 * total if total < 100 else 40
    found = [interleaved(position, weights) for position in range(count)]
    for stream, weight in enumerate(weights):
        numbers = [number for each, number in found if each == stream]
        assert numbers == list(range(len(numbers)))
        for n in range(count + 1):
            taken = sum(each == stream for each, _ in found[:n])
            assert abs(taken - n * weight / total) < len(weights)
    assert [position_of(*each, weights) for each in found] == list(range(count))
    if total < 100:
        assert Counter(each for each, _ in found[:total]) == {k: w for k, w in enumerate(weights) if w}
