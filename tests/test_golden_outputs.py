"""What a rewrite must not move: outputs with the shipped weights and with small random ones, as they were stored.

Whole cascades and training compile for minutes: `pytest -m slow tests/test_golden_outputs.py`.
"""

import golden_outputs
import numpy as np
import pytest


@pytest.fixture(scope="module")
def stored():
    return dict(np.load(golden_outputs.STORED))


LONG = golden_outputs.of_cascades, golden_outputs.of_training


@pytest.mark.parametrize(
    "group",
    [pytest.param(group, marks=[pytest.mark.slow] * (group in LONG)) for group in golden_outputs.GROUPS],
    ids=lambda group: group.__name__,
)
def test_outputs_are_those_of_before(group, stored):
    far = {}
    for name, found in group().items():
        difference = golden_outputs.difference(found, stored[name])
        if not difference < golden_outputs.tolerance(name):
            far[name] = difference
    assert not far


def test_every_stored_output_is_compared(stored):
    assert {name.split()[0] for name in stored} == {
        *("t5", "clip", "classifier", "network", "sample", "training", "curves")
    }
    assert all(np.isfinite(value).all() for value in stored.values())
