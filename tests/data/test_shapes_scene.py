"""The scenes: reproducible, split by combination, and never ambiguous."""

import itertools

import pytest

from jaxdiff.data.shapes_scene import (
    COLOURS,
    COMBINATIONS,
    FILLS,
    KINDS,
    POSITIONS,
    REACH,
    SIZES,
    Object,
    held_out,
    position,
    relation,
    scene,
)


def scenes(split, count=600, objects=None):
    return [scene(split, i, objects) for i in range(count)]


def test_a_scene_depends_on_split_and_index_alone():
    assert scenes("train", 30) == [scene("train", i) for i in reversed(range(30))][::-1]
    assert len({repr(s) for s in scenes("train") + scenes("held_out")}) == 1200


def test_the_sequence_never_changes():
    """Golden: records written by one release are the scenes of the next."""
    (a,), (b,) = scene("train", 0).objects, scene("held_out", 1).objects
    assert (a.kind, a.colour, a.size, a.fill) == ("square", "cyan", "medium", "striped")
    assert (a.x, a.y, a.radius) == pytest.approx((0.2975924, 0.3095307, 0.1658195), abs=1e-6)
    assert (b.kind, b.colour, b.size, b.fill) == ("square", "green", "medium", "solid")
    assert (b.x, b.y, b.radius) == pytest.approx((0.4825282, 0.2725029, 0.1811924), abs=1e-6)


def test_training_never_shows_a_held_out_combination():
    assert not any(held_out(o) for s in scenes("train", 2000) for o in s.objects)
    assert all(held_out(s.objects[0]) for s in scenes("held_out"))


def test_a_tenth_of_the_combinations_is_held_out_and_every_pair_of_values_is_trained():
    every = list(itertools.product(KINDS, COLOURS, FILLS, SIZES))
    assert sorted(COMBINATIONS["train"] + COMBINATIONS["held_out"]) == sorted(every)
    assert 0.07 < len(COMBINATIONS["held_out"]) / len(every) < 0.13
    for a, b in itertools.combinations(range(4), 2):
        assert {(c[a], c[b]) for c in COMBINATIONS["train"]} == {(c[a], c[b]) for c in every}


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_every_value_occurs(split):
    objects = [o for s in scenes(split) for o in s.objects]
    for name, values in (
        ("kind", KINDS),
        ("colour", COLOURS),
        ("size", SIZES),
        ("fill", FILLS),
        ("position", POSITIONS),
    ):
        assert {getattr(o, name) for o in objects} == set(values)


def test_sizes_do_not_overlap_and_radii_are_inside_them():
    ranges = sorted(SIZES.values())
    assert all(b[0] / a[1] > 1.2 for a, b in itertools.pairwise(ranges))
    for s in scenes("train"):
        for o in s.objects:
            assert SIZES[o.size][0] <= o.radius <= SIZES[o.size][1]


def test_objects_stay_inside_and_single_ones_clear_of_the_grid_lines():
    for s in scenes("train") + scenes("held_out"):
        for o in s.objects:
            for c in (o.x, o.y):
                assert REACH * o.radius <= c <= 1 - REACH * o.radius
                if len(s.objects) == 1:
                    assert min(abs(c - 0.385), abs(c - 0.615)) > 0.06


def test_two_objects_differ_keep_apart_and_stand_as_the_relation_says():
    for s in scenes("train", 300, objects=2):
        a, b = s.objects
        assert (a.kind, a.colour) != (b.kind, b.colour)
        dx, dy = a.x - b.x, a.y - b.y
        expected = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}
        assert expected[s.relation] - REACH * (a.radius + b.radius) > 0.04
        assert expected[s.relation] > 4 * min(abs(dx), abs(dy))


def test_positions_and_relations_by_hand():
    assert position(0.3, 0.3) == "top left" and position(0.5, 0.7) == "bottom"
    assert position(0.5, 0.5) == "center" and position(0.7, 0.5) == "right"
    assert Object("star", "red", "small", "solid", 0.3, 0.5, 0.12).position == "left"
    assert relation((0.2, 0.5), (0.8, 0.6)) == "left of" and relation((0.5, 0.7), (0.6, 0.2)) == "below"


def test_bad_requests_name_the_culprit():
    with pytest.raises(ValueError, match="3"):
        scene("train", 0, objects=3)
    with pytest.raises(ValueError, match="-1 is negative"):
        scene("train", -1)
