"""The embeddings command with a real, tiny T5."""

import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from experiments import embed
from jaxdiff.data import images, sources
from jaxdiff.data.embeddings import Shard, open_embeddings
from jaxdiff.nets.t5 import T5Config, T5Encoder
from jaxdiff.text.tokenizer import byte_tokenizer
from jaxdiff.weights.t5 import export, load_text_encoder

ROOT = Path(__file__).parents[2]
COUNT = 150
PICTURE = images.encode_png(np.zeros((32, 32, 3), np.uint8))


@pytest.fixture
def encoder_dir(tmp_path):
    config = T5Config(vocab=384, d_model=16, d_kv=8, d_ff=16, layers=1, decoder_layers=0, heads=2)
    ids, rng = np.zeros((1, 8), np.int32), np.random.default_rng(0)
    shapes = jax.eval_shape(T5Encoder(config).init, jax.random.key(0), ids, ids == 0)["params"]
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)
    export(config, params, tmp_path / "t5")
    byte_tokenizer().save_pretrained(tmp_path / "t5")
    return tmp_path / "t5"


def test_the_command_stores_what_the_encoder_says(tmp_path, encoder_dir, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(3):
        (photos / f"{i}.png").write_bytes(PICTURE)
    (photos / "0.txt").write_text("a cat")
    (photos / "2.txt").write_text("two dogs")
    embed.main(embed.Settings(f"folder:{photos}", str(encoder_dir), tmp_path / "text", length=12, batch=2))
    assert "3 embeddings of 12 × 16" in capsys.readouterr().out
    encoder = load_text_encoder(encoder_dir, 12)
    stored = open_embeddings(tmp_path / "text", encoder.fingerprint)
    pairs = [encoder.encode(texts) for texts in (["a cat", ""], ["two dogs", ""])]  # the size compiled already
    expected = jax.tree.map(lambda *parts: np.concatenate(parts), *pairs)
    for i in range(len(sources.open(sources.Folder(photos), 64, "train", ""))):
        text, mask, _ = stored[i]
        np.testing.assert_array_equal(mask, expected.mask[i])
        np.testing.assert_allclose(text, expected.tokens[i], atol=2e-3, rtol=1e-3)
    with pytest.raises(ValueError, match="use a new path"):
        embed.main(embed.Settings(f"folder:{photos}", str(encoder_dir), tmp_path / "text", length=13))


@pytest.fixture
def photos(tmp_path):
    """So many captioned images, a caption a part, so that a kill comes between two of them or in one."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(COUNT):
        (folder / f"{i:03d}.png").write_bytes(PICTURE)
        if i % 10:
            (folder / f"{i:03d}.txt").write_text(f"{'o' * (i % 7)} {i}")
    return folder


def started(*arguments):
    arguments = [sys.executable, "-m", "experiments.embed", *map(str, arguments)]
    return subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def parts(folder, pattern="*"):
    return len(list(folder.glob(f"part-{pattern}.array_record")))


def killed_when_begun(process, folder, least, rng, pattern="*"):
    """At a random moment, once so many parts are there."""
    while parts(folder, pattern) < least and process.poll() is None:
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.02))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.stderr.read()


def test_a_kill_loses_and_doubles_nothing(tmp_path, photos, encoder_dir, command):
    """One of two processes is killed, then goes on; the store is that of one that nobody disturbed."""
    rng = random.Random(int(time.time()))
    arguments = "--data", f"folder:{photos}", "--text-encoder", encoder_dir, "--length", 12, "--part", 1
    out, even = tmp_path / "killed", "*[02468]"
    victim, other = (started(*arguments, "--out", out, "--shard", f"{i}/2") for i in (0, 1))
    killed_when_begun(victim, out, 10, rng, even)
    said, errors = other.communicate(timeout=300)
    assert other.returncode == 0, errors
    assert "shard 1/2 is stored, others are not yet" in said
    there = parts(out)
    assert COUNT // 2 + 10 <= there < COUNT
    done = command(embed.main, *arguments, "--out", out, "--shard", "0/2")
    assert done.code == 0, done.err
    assert f"{COUNT - there} captions to encode" in done.out and f"{COUNT} embeddings of 12 × 16" in done.out
    assert f"{COUNT // 2}/{COUNT // 2}" in done.err  # the bar, of this shard's captions
    assert command(embed.main, *arguments, "--out", tmp_path / "whole").code == 0
    assert files(out) == files(tmp_path / "whole") and len(files(out)) == COUNT + 1


@pytest.mark.slow
def test_many_kills(tmp_path, photos, encoder_dir, command):
    rng = random.Random(int(time.time()))
    arguments = "--data", f"folder:{photos}", "--text-encoder", encoder_dir, "--length", 12, "--part", 1
    out, kills = tmp_path / "killed", 0
    while (there := parts(out) if out.exists() else 0) < COUNT - 15:
        kills += 1
        killed_when_begun(started(*arguments, "--out", out), out, there + rng.randint(5, 20), rng)
        assert not list(out.glob("*.part")) or len(list(out.glob("*.part"))) == 1
    assert kills >= 5
    assert command(embed.main, *arguments, "--out", out).code == 0
    assert command(embed.main, *arguments, "--out", tmp_path / "whole").code == 0
    assert files(out) == files(tmp_path / "whole")


def test_bad_arguments_are_one_line(tmp_path, photos, encoder_dir, command):
    arguments = "--data", f"folder:{photos}", "--text-encoder", encoder_dir, "--length", 12, "--out", tmp_path / "out"
    for wrong, culprit in (
        (("--shard", "2"), "--shard 2: not of the form I/N"),
        (("--shard", "4/4"), "shard 4/4"),
        (("--part", 0), "part 0"),
        (("--batch", 0), "batch 0"),
        (("--lengths", 0), "lengths"),
        (("--fsdp", 3), "fsdp=3"),
        (("--text-encoder", "/absent"), "/absent"),
        (("--data", "folder:/absent"), "/absent"),
        (("--split", "test"), "'test'"),
    ):
        done = command(embed.main, *arguments, *wrong)
        assert done.code == 2 and done.err.count("\n") == 1, done.err
        assert done.err.startswith("error: ") and culprit in done.err, done.err
        assert not (tmp_path / "out").exists()


def test_processes_that_were_started_together_share_the_set(monkeypatch):
    assert embed._shard(None) == Shard(0, 1)
    monkeypatch.setattr(jax, "process_index", lambda: 3)
    monkeypatch.setattr(jax, "process_count", lambda: 8)
    assert embed._shard(None) == Shard(3, 8) and embed._shard("1/2") == Shard(1, 2)


def test_a_disk_that_is_too_small_is_told_of_before(tmp_path, photos, encoder_dir, command, monkeypatch):
    arguments = "--data", f"folder:{photos}", "--text-encoder", encoder_dir, "--length", 12, "--out", tmp_path / "out"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    done = command(embed.main, *arguments)
    assert done.code == 0
    tokens = sum(len(row) for row, _, _ in (embedding_of(tmp_path / "out", i) for i in range(COUNT)))
    told = re.search(r"150 captions to encode, of about ([\d.]+) tokens: about ([\d.]+)kB, 10.0kB are free", done.out)
    assert float(told[1]) == pytest.approx(tokens / COUNT, abs=0.01)
    assert float(told[2]) == pytest.approx(tokens * 32 / 1000, abs=0.1)
    assert f"{tokens} tokens encoded now" in done.out
    assert re.search(r"warning: .*out: about [\d.]+kB will be written and 10.0kB are free there", done.err)


def embedding_of(path, index):
    text, mask, digest = open_embeddings(path)[index]
    return text[mask], mask, digest


def test_the_encoder_may_be_split(tmp_path, photos, encoder_dir, command):
    arguments = "--data", f"folder:{photos}", "--text-encoder", encoder_dir, "--length", 12, "--part", 64
    for fsdp in (1, 8):
        assert command(embed.main, *arguments, "--out", tmp_path / str(fsdp), "--fsdp", fsdp).code == 0
    whole, split = (open_embeddings(tmp_path / str(fsdp)) for fsdp in (1, 8))
    assert whole.encoder == split.encoder
    for i in range(COUNT):
        np.testing.assert_allclose(whole[i][0], split[i][0], atol=2e-3, rtol=1e-3)
        np.testing.assert_array_equal(whole[i][1], split[i][1])
