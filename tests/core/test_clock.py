"""What cannot say how far it is shows how long it has taken."""

import re
import time

from jaxdiff.core.clock import clock, ticking


def test_it_ticks_until_it_is_left():
    seen = []
    with ticking(seen.append, every=0.01):
        deadline = time.monotonic() + 20
        while len(seen) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
    count = len(seen)
    assert seen[0] == 0.0 and count >= 4 and seen == sorted(seen)
    time.sleep(0.1)
    assert len(seen) == count


def test_a_failure_inside_stops_it():
    seen = []
    try:
        with ticking(seen.append, every=0.01):
            raise KeyError
    except KeyError:
        count = len(seen)
    time.sleep(0.1)
    assert len(seen) == count


def test_the_line_says_what_and_for_how_long(capsys):
    with clock("compiling base64"):
        time.sleep(1.2)
    shown = capsys.readouterr().err
    assert re.search(r"compiling base64: 00:01", shown.split("\r")[-1]) and shown.endswith("\n")
