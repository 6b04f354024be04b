"""What the bar says while a run compiles, and speeds that leave compilation out, in whatever unit the task counts."""

import re
import time
from dataclasses import dataclass

import jax
import pytest
from training_toy import Stream, Toy, config

from jaxdiff.training.loop import Hooks, Layout, train
from jaxdiff.training.mesh import make_mesh
from jaxdiff.training.metrics import read
from jaxdiff.training.reporter import _Stopwatch

ONE = make_mesh(devices=jax.devices()[:1])
COMPILES = 1.5  # seconds
FAST = 8  # steps a second: six of them with one compilation, or twelve with two, are at most 4


@dataclass(frozen=True)
class Slow(Toy):
    """Takes long to be compiled: tracing is a part of it."""

    def loss(self, params, extra, frozen, batch, key, step):
        time.sleep(COMPILES / 2)  # a gradient is traced once
        return super().loss(params, extra, frozen, batch, key, step)


@dataclass
class TwoShapes(Stream):
    """Batches of 16 rows, and from the 7th on of 8."""

    def __next__(self):
        self.rows = 16 if self.index < 6 else 8
        return super().__next__()


def run(out, stream=None, trainable=Slow(), hooks=Hooks(), **changes):  # noqa: B008
    settings = config(**{"steps": 12, "log_every": 3, "save_every": 50, "progress": True} | changes)
    return train(trainable, stream or Stream(), settings, out, layout=Layout(ONE), hooks=hooks)


def speeds(out, unit="images"):
    return {line["step"]: line[f"{unit}_per_second"] for line in read(out / "metrics.jsonl")}


def rates(shown):
    """Steps a second, of every bar that was shown."""
    found = [re.search(r"([\d.]+)(step/s|s/step)", bar) for bar in shown.split("\r")]
    return [float(m[1]) if m[2] == "step/s" else 1 / float(m[1]) for m in found if m]


def test_it_says_that_it_compiles_and_then_a_speed_without_that(tmp_path, capsys):
    run(tmp_path, steps=6)
    shown = capsys.readouterr().err
    bars = shown.split("\r")
    compiling = [bar for bar in bars if "compiling" in bar]
    assert compiling and "0/6" in compiling[0] and "compiling 00:00" in compiling[0] and "?step/s" in compiling[0]
    assert "compiling" not in bars[-1] and "6/6" in bars[-1]
    assert min(speeds(tmp_path).values()) > 16 / COMPILES * 3  # else 3 steps in 1.5 s or more: at most 32
    assert min(rates(shown)) > FAST
    run(tmp_path, steps=12)  # goes on, compiled anew
    assert [speeds(tmp_path)[step] > 16 / COMPILES * 3 for step in (9, 12)] == [True, True]
    again = capsys.readouterr().err
    assert "compiling 00:00" in again and "6/12" in again and min(rates(again)) > FAST


def test_a_second_shape_is_compiled_outside_of_the_speed_too(tmp_path, capsys):
    run(tmp_path, TwoShapes())
    assert min(speeds(tmp_path).values()) > 8 / COMPILES * 3
    shown = capsys.readouterr().err
    assert min(rates(shown)) > FAST
    compiling = [bar for bar in shown.split("\r") if "compiling" in bar]
    assert any("0/12" in bar for bar in compiling) and any("6/12" in bar for bar in compiling)


def test_the_time_of_samples_is_none_of_the_speed(tmp_path, capsys):
    hooks = Hooks(lambda step, averaged, extra: time.sleep(COMPILES))
    run(tmp_path, trainable=Toy(), hooks=hooks, sample_every=6)
    shown = capsys.readouterr().err
    assert "sampling 00:00" in shown and min(rates(shown)) > FAST
    assert min(speeds(tmp_path).values()) > 16 / COMPILES * 3


def test_a_first_line_of_one_step_has_no_speed(tmp_path, capsys):
    run(tmp_path, trainable=Toy(), steps=2, log_every=1)
    assert speeds(tmp_path)[1] is None and speeds(tmp_path)[2] > 0
    assert "0 images/s" not in capsys.readouterr().err.replace("00 images/s", "")


@pytest.mark.parametrize("unit", ["captions", "pairs"])
def test_the_unit_is_the_tasks(tmp_path, capsys, unit):
    run(tmp_path, trainable=Toy(), steps=3, unit=unit)
    assert speeds(tmp_path, unit)[3] > 0 and "images_per_second" not in read(tmp_path / "metrics.jsonl")[0]
    assert re.search(rf"loss [\d.]+, \d[\d.e+]* {unit}/s", capsys.readouterr().err.split("\r")[-1])


def test_a_stopwatch_counts_what_is_completed_while_it_runs(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("jaxdiff.training.reporter.time.perf_counter", lambda: now[0])
    watch = _Stopwatch(5)
    assert watch.rate == 0.0
    watch.start()  # after the first step, which was compiled
    watch.uncounted(6)
    now[0] = 2.0
    watch.completed(6)
    assert watch.rate == 0.0
    watch.completed(10)
    now[0] = 3.0
    assert watch.rate == 2.0  # 4 steps in 2 s; the third second belongs to a step that is not completed
    assert watch.lap() == 3.0
    now[0] = 4.0
    watch.completed(12)
    watch.stop()
    now[0] = 100.0
    watch.start()
    now[0] = 102.0
    watch.completed(15)
    assert watch.rate == 1.5 and watch.lap() == 3.0  # 9 steps in 2 + 2 + 2 s


def test_the_unit_is_a_word():
    with pytest.raises(ValueError, match=r"^unit 'images a second': must be a word"):
        config(unit="images a second")
