"""dalle-mini's form of captions."""

import pytest

from jaxdiff.text.simplified import simplified


@pytest.mark.parametrize(
    ("caption", "wanted"),
    [
        ("An avocado-armchair", " an avocado armchair"),
        ("Café, Paris!!! (at night)", " cafe, paris, at night"),
        ("the cat's 1,000 toys: 1.5 m", " the cat's 1000 toys, 1.5 m"),
        ("it’s “quoted”", ' it\'s " quoted "'),
        ("on 1/2/2020, and/or", " on 1/2/2020, and, or"),
        ("see https://a.b/c?d &amp; <b>bold</b> #tag", " see & bold tag"),
        ("wooooow VIII [3]", " wow viii"),
        ("...", ""),
        ("🎈", ""),
        ("", ""),
    ],
)
def test_captions(caption, wanted):
    assert simplified(caption) == wanted
    assert simplified(wanted) == wanted  # nothing changes twice
