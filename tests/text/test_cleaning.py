"""Cleaning of captions: equal to diffusers' DeepFloyd IF, every rule of it needed, plain English left alone."""

import random
import warnings

import pytest

from jaxdiff.text import cleaning
from jaxdiff.text.cleaning import clean_caption

NASTY = [
    "",
    " \t\n ",
    ".",
    "-",
    "'\"",
    "+",
    "A Photo of <person> in Paris",
    "<person>, <PERSON> and <persons>",
    "see https://www.example.com/a/b-c?d=e#f for more",
    "see http://EXAMPLE.org/ and https:///x",
    "https:%2F%2Fexample.net%2Fcat",
    "mail me at someone@example.com, or me@example.co.uk",
    "www.cats.ru/best_cats/, www:cats and www:/cats.gov",
    "a.https://com that comes together",
    "a.www:/com that comes together later",
    "cats.com.",
    "cats.comical and it.italy",
    "a%20red%20circle+on+white",
    "100% cotton + wool %zz",
    "<p>A <b>red</b> circle<br/>on <i>white</i></p>",
    "<a href='http://example.com/x.png'>a link</a> <img src=x alt='a cat'>",
    "a < b and b > c, i <3 you",
    "<!-- a comment -->cat<script>var x = 1;</script><style>p {}</style>",
    "<unclosed tag",
    "Tom &amp; Jerry",
    "Tom &amp;amp; Jerry &amp;amp;amp; Spike",
    "&quot;quoted&quot; &amp;quot;twice&amp;quot; &amp;quot thrice",
    "&ampquot;&amp;quo&ampt;",
    "&lt;b&gt;bold&lt;/b&gt; &amp;lt;i&amp;gt;",
    "&#65;BC &#x42;c &amp;#67; &amp;amp;eacute; &nbsp;x",
    "&copy 2020 &reg; &eacute;t&eacute;",
    "photo by @some_nick, @ÜBER1 and @ nobody",
    "㇀㇯ strokes ㇰㇿ phonetic ㉐ enclosed ㍐ compatibility",
    "㐀䶿 extension ䷀䷿ hexagrams 一鿿 ideographs",
    "㆟ before and ꀀ after, ひらがな カタカナ 한국어",
    "red—white – blue ‐ ― − ゠ 〰 〜 - ﹘ － ᠆ ⸺",
    "well-known, half--hearted, long---winded",
    "`back´ «guillemets» “curly” ¨dots¨ ‘single’ it’s",
    '"all of it is quoted"',
    "'single', she said'",
    '"\'heaps\'\'\' of """quotes""""',
    "the server 192.168.10.255 and 1.2.3.4.5 or 1234.1.1.12345",
    "an article 12:34 <br>",
    "at 3:45 sharp",
    "one\\ntwo\nthree\r\nfour",
    "#1 #12 #123 #1234 #12345 #123456789 #12a ##7 #1#23456",
    "call 123456, 12345 or 1234567890 a1234567",
    "img_2019.jpg photo.final.PNG a/b/c.jpeg x.webp,y.pdf.z .mp4 my cat.bmp",
    "wait... what.. . no",
    "a dot . alone .  .  twice",
    "***AUSVERKAUFT*** #sold ~now~ (really) [yes] {no} a|b a/b a\\b",
    "½ price, ¾ of it ® ™ © § º · • ¿que? ¡hola!",
    "the cat’’",
    "this-is-my-cute-cat",
    "this_is_my_cute_cat, one-two",
    "one-two-three_four",
    "rock-n-roll",
    "mojibake: schÃ¶n, cafÃ© â€œquotedâ€\x9d itâ€™s Ã—",
    "Ã¢â‚¬Å“twiceÃ¢â‚¬\x9d ï¬\x81ne",
    "ﬁne ﬂower ＦＵＬＬ ｗｉｄｔｈ",
    "dress jc6640 blue, jc6640vc red, 6640vc231 green, abcd1234",
    "part j2d1a2a, 1a2b3c4d5, a1b2, x1y, 4k, 3d, mp3, b2b4c",
    "Worldwide Free Shipping! free shipping, worldwide  shipping, reshipping",
    "free download, download free, Free Download Free, downloads",
    "click for more, click on this, double-click for fun, click  for x",
    "png images, jpg image, eps, pdfs, a webpage in apk",
    "page 12, page  3 of 4, pages 5, homepage 6",
    "wallpaper 1920x1080, 10х15 cm, 3×4, 2.5x3.5 m, 1x 2, x264, 1.x2.",
    "title : subtitle :end : :",
    "one,two.three/four 1,000.5 a.b,c",
    "many    spaces\u00a0\u2003\u3000and\u2028lines",
    "- leading dash",
    ": leading colon:",
    "_under_score_",
    ";semi;",
    "trailing plus+",
    "trailing comma,",
    "'-' and '",
    ".jpg-like",
    ".hidden",
    "İstanbul, STRASSE and Straße, ΣΊΣΥΦΟΣ",
    "emoji 😀 and \u200bzero\ufeffwidth\x00 \x07bell",
    "١٢٣٤٥٦ arabic digits ٣x٤ #١٢٣ page ٣",
    "shipping",
    "cat.png",
    "https://",
    "/usr/share/cats",
    "c:\\cats\\cat",
]

GOLDEN = {
    "": "",
    "A Red Circle": "a red circle",
    "a photo of <person>, see https://example.com/a/b": "a photo of person, see",
    "<p>Tom &amp; <b>Jerry</b></p>": "tom jerry",
    "a cat by @nick — 一只猫 “soft”": 'a cat by - "soft"',
    "ï¬\x81ne â€¦": "fine …",
    "schÃ¶n": "schã¶n",  # lower case comes first, and spoils what could have been repaired
    "this_is_my_cute_cat.": "this is my cute cat.",
    "dress jc6640vc, size 10x15, #123, 1234567": "dress , size ,",
    "wallpaper 1920x1080 free download page 12": "wallpaper",
    "red%20circle+IMG_01.jpg": "red circle",
    '"all of it is quoted"': "all of it is quoted",
}

PLAIN = [
    "a red circle on a white background",
    "two small blue stars, left of a large green hexagon",
    "a well-known painter's house: it is old, and so is the garden.",
    "an oil painting of 3 cats in the year 1920",
]

PIECES = """<b> </b> <br> & ; # @ . .. , : - _ ' " / \\ \\n + % x × х 1 12 123 12345 1234567 a b com .ru amp quot
&quot &#65; free worldwide shipping download click for on page png images www: https:// 猫 — Ã© â€™"""
FRAGMENTS = [*PIECES.split(), *(piece for caption in NASTY for piece in caption.split()), *[" "] * 60, "\n", "\x85"]


@pytest.fixture(scope="module")
def reference():
    """IF's own cleaning, which needs nothing of the pipeline that it is a method of."""
    pytest.importorskip("torch", reason="diffusers' pipelines are PyTorch's")
    pytest.importorskip("diffusers", reason="IF's own cleaning is diffusers'")
    from diffusers.pipelines.deepfloyd_if.pipeline_if import IFPipeline

    pipeline = IFPipeline.__new__(IFPipeline)

    def clean(caption):
        with warnings.catch_warnings(action="ignore"):
            return pipeline._text_preprocessing(caption, clean_caption=True)[0]

    return clean


def test_the_same_as_in_diffusers(reference):
    wrong = [caption for caption in NASTY if clean_caption(caption) != reference(caption)]
    assert len(set(NASTY)) >= 60 and wrong == []


def test_the_same_as_in_diffusers_on_random_captions(reference):
    rng = random.Random(0)
    captions = ["".join(rng.choices(FRAGMENTS, k=rng.randint(2, 15))) for _ in range(500)]
    captions += [" ".join(rng.choices(FRAGMENTS, k=rng.randint(2, 15))) for _ in range(200)]
    wrong = [caption for caption in captions if clean_caption(caption) != reference(caption)]
    assert wrong == []


@pytest.mark.parametrize("caption", GOLDEN)
def test_golden(caption):
    assert clean_caption(caption) == GOLDEN[caption]


@pytest.mark.parametrize("caption", PLAIN)
def test_plain_english_stays(caption):
    assert clean_caption(caption) == caption


@pytest.mark.parametrize(
    ("table", "at"),
    [(table, at) for table in ("_ADDRESSES", "_MARKS", "_ADVERTS") for at in range(len(getattr(cleaning, table)))],
)
def test_every_step_is_seen_above(table, at, monkeypatch):
    """Without any one step some caption comes out otherwise, so that the comparisons cover all of them."""
    steps = getattr(cleaning, table)
    whole = [clean_caption(caption) for caption in NASTY]
    monkeypatch.setattr(cleaning, table, steps[:at] + steps[at + 1 :])
    assert [clean_caption(caption) for caption in NASTY] != whole, steps[at].why


def test_nothing_is_warned_about():
    with warnings.catch_warnings(action="error"):
        for caption in ["cat.png", "https://example.com", "/usr/share/cats", "c:\\cats\\cat.html", "a.txt"]:
            clean_caption(caption)


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [("<![never]]> a red circle", "a red circle"), ("a cat \ud83d", "a cat \ufffd"), ("\ud83d\ude00", "\U0001f600")],
)
def test_where_diffusers_fails(caption, cleaned):
    assert clean_caption(caption) == cleaned
