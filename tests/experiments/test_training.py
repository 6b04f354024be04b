"""Two steps of training on pictures and captions of one's own, and on emoji; on shapes, test_quickstart.py trains."""

import io
import json
import tarfile

import pytest
from PIL import Image

from experiments.data import convert, embed
from experiments.imagen import emoji as emoji_run
from experiments.imagen import train
from jaxdiff.data import emoji
from jaxdiff.weights.imagen import load_model

pytestmark = pytest.mark.usefixtures("small_presets")
SHORT = "--steps", 2, "--batch", 8, "--ema-decay", 0.995, "--sample-every", 0


def test_pictures_and_captions_of_ones_own(standin, tmp_path, command):
    """Tar shards, converted; their embeddings stored; a base trained on both."""
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        for i in range(9):
            picture = io.BytesIO()
            Image.new("RGB", (80, 64), (25 * i, 0, 0)).save(picture, "jpeg")
            for name, content in ((f"{i}.jpg", picture.getvalue()), (f"{i}.txt", f"red number {i}".encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    records, embeddings = tmp_path / "records", tmp_path / "embeddings"
    done = command(convert.main, tmp_path / "shard.tar", "--out", records)
    assert done.code == 0 and "9 pictures" in done.out, done.err
    source = "--data", f"records:{records}"
    text = "--text-encoder", standin / "text", "--length", 16
    done = command(embed.main, *source, *text, "--out", embeddings)
    assert done.code == 0 and "9 embeddings" in done.out, done.err
    arguments = (
        "--stage",
        "base64",
        *source,
        "--text",
        standin / "text",
        "--embeddings",
        embeddings,
        "--logsnr",
        -5.5,
        0,
    )
    done = command(train.main, *arguments, *SHORT, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    schedule = load_model(tmp_path / "run" / "model").stage.schedule
    assert (schedule.low, schedule.high) == (-5.5, 0.0)


def test_emoji(tmp_path, command):
    """The over-fitting experiment, on three made-up emoji."""
    squares = {"red square": "#ff0000", "green square": "#00ff00", "blue square": "#0000ff"}
    icons = {
        name.replace(" ", "-"): {"body": f'<path fill="{colour}" d="M16 16h96v96h-96z"/>'}
        for name, colour in squares.items()
    }
    codes = dict(zip(squares, ("1f7e5", "1f7e9", "1f7e6")))
    files = {
        f"{emoji.ARTWORK}/icons.json": {"width": 128, "height": 128, "icons": icons},
        f"{emoji.ARTWORK}/chars.json": {code: name.replace(" ", "-") for name, code in codes.items()},
        f"{emoji.ARTWORK}/package.json": {"version": "0"},
        f"{emoji.NAMES}/en/data.json": [
            {"label": name, "hexcode": code.upper(), "tags": [], "group": 8, "order": i}
            for i, (name, code) in enumerate(codes.items())
        ],
        f"{emoji.NAMES}/package.json": {"version": "0"},
    }
    for name, content in files.items():
        file = tmp_path / "data" / "npm" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
    short = "--steps", 2, "--text-steps", 2, "--batch", 8
    done = command(emoji_run.main, "--out", tmp_path / "out", "--data-dir", tmp_path / "data", *short)
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert 0 <= report["dominant_colour_accuracy"] <= 1
    assert {picture["name"]: picture["colour"] for picture in report["pictures"]} == {
        name: name.split()[0] for name in squares
    }
    assert (tmp_path / "out" / "grid.png").is_file()
