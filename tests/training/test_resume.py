"""How long a run may become: as its learning rate allows, and refused in one line where it has fallen to 0."""

import pickle
from dataclasses import replace

import jax
import pytest
from training_toy import Stream, Toy, config

from jaxdiff.core.settings import flatten
from jaxdiff.training.checkpoints import SettingsDifferError
from jaxdiff.training.loop import Layout, train
from jaxdiff.training.mesh import make_mesh
from jaxdiff.training.metrics import read
from jaxdiff.training.optimizer import AdamW, Decay, OptimizerConfig, StableDecay
from jaxdiff.training.resume import RunFinishedError, adapted, comparable

pytestmark = pytest.mark.usefixtures("shared_steps")
ONE = make_mesh(devices=jax.devices()[:1])


def rates(decay=Decay.COSINE, total=10, **changes):
    return OptimizerConfig(AdamW(), **({"learning_rate": 1e-2, "warmup": 2, "total": total, "decay": decay} | changes))


def run(out, steps, optimizer, before=None, **changes):
    settings = config(steps=steps, optimizer=optimizer, **changes)
    return train(Toy(), Stream(before=before), settings, out, layout=Layout(ONE))


def lines(out):
    return [(line["step"], line["loss"], line["learning_rate"]) for line in read(out / "metrics.jsonl")]


@pytest.mark.parametrize("total", [10, 14], ids=["the same schedule", "a longer one"])
def test_more_steps_of_a_run_whose_rate_has_fallen_to_0_are_refused(tmp_path, total):
    run(tmp_path, 10, rates())
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(RunFinishedError) as caught:
        run(tmp_path, 14, rates(total=total))
    error = caught.value
    assert (error.step, error.asked, error.out) == (10, 14, tmp_path)
    assert "by step 10 its learning rate has fallen to 0" in str(error) and "in another folder" in str(error)
    assert "\n" not in str(error) and isinstance(error, ValueError)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    run(tmp_path, 10, rates())  # asked for what it has, it is left as it is


def test_a_constant_rate_goes_on_for_as_long_as_is_asked(tmp_path):
    """A finished run, and one that was stopped, whatever `total` says; bit by bit as if begun with so many steps."""
    run(tmp_path / "at once", 9, rates(Decay.CONSTANT, total=9))
    for steps in (3, 5, 9):
        run(tmp_path / "longer", steps, rates(Decay.CONSTANT, total=steps))
    assert lines(tmp_path / "longer") == lines(tmp_path / "at once")


def test_a_warmup_may_change_when_it_is_over(tmp_path):
    """Its default is a tenth of the steps, so that more steps change it."""
    constant = rates(Decay.CONSTANT)
    for warmup, allowed in ((4, True), (5, False)):
        longer = replace(constant, warmup=warmup)
        kept = adapted(4, flat(constant, steps=4), flat(longer), longer, 14, tmp_path)
        assert (kept == flat(longer)) == allowed
    with pytest.raises(RunFinishedError):
        longer = rates(warmup=3, total=14)
        adapted(10, flat(rates(), steps=10), flat(longer), longer, 14, tmp_path)


@pytest.mark.slow
def test_a_stable_rate_may_fall_later_until_it_falls(tmp_path):
    """Bit by bit as if it had been begun with the longer schedule; from then on its schedule stays."""
    longer = rates(StableDecay(0.4), total=20)  # falls from 12 on
    run(tmp_path / "at once", 20, longer)
    run(tmp_path / "longer", 6, rates(StableDecay(0.4)))  # falls from 6 on
    run(tmp_path / "longer", 14, longer)
    with pytest.raises(SettingsDifferError, match=r"optimizer\.total was 20 and is 30 here") as caught:
        run(tmp_path / "longer", 30, replace(longer, total=30))
    assert (caught.value.name, caught.value.saved, caught.value.given) == ("optimizer.total", 20, 30)
    run(tmp_path / "longer", 20, longer)
    assert lines(tmp_path / "longer") == lines(tmp_path / "at once")
    with pytest.raises(RunFinishedError, match="by step 20"):
        run(tmp_path / "longer", 30, replace(longer, total=30))


def test_a_constant_run_may_be_cooled_down(tmp_path):
    run(tmp_path, 6, rates(Decay.CONSTANT))
    run(tmp_path, 10, rates(StableDecay(0.4)))
    assert [rate for *_, rate in lines(tmp_path)][-4:] == pytest.approx([1e-2, 0.75e-2, 0.5e-2, 0.25e-2])
    with pytest.raises(RunFinishedError):
        run(tmp_path, 12, rates(Decay.CONSTANT))


def test_an_unfinished_cosine_is_finished_as_it_was_begun(tmp_path):
    run(tmp_path, 6, rates())
    with pytest.raises(SettingsDifferError, match=r"optimizer\.total was 10 and is 14 here") as caught:
        run(tmp_path, 14, rates(total=14))
    assert caught.value.name == "optimizer.total"
    run(tmp_path, 10, rates())
    assert lines(tmp_path)[-1][0] == 10


def test_what_else_differs_is_said_first(tmp_path):
    """Of another network, a new run could not begin from these parameters."""
    run(tmp_path, 10, rates())
    with pytest.raises(SettingsDifferError, match=r"stage\.width was 16 and is 32 here") as caught:
        settings = config(steps=14, optimizer=rates(total=14))
        train(Toy(width=32), Stream(), settings, tmp_path, layout=Layout(ONE))
    assert caught.value.name == "stage.width"


def test_steps_that_were_asked_for_are_taken_though_the_rate_is_0(tmp_path):
    """Told to stop amid them, the run goes on; only more than those are refused."""
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path, 18, rates(), before=die_at(14), save_every=12)
    run(tmp_path, 18, rates())
    assert lines(tmp_path)[-1][0] == 18
    with pytest.raises(RunFinishedError, match="by step 18"):
        run(tmp_path, 19, rates())


def die_at(index):
    def die(asked):
        if asked == index:
            raise RuntimeError("killed")

    return die


def flat(optimizer, steps=14):
    return flatten({"steps": steps, "optimizer": comparable(optimizer)})


def test_of_several_optimizers_each_has_its_schedule(tmp_path):
    """A run is finished when all of them have come to 0."""
    one, other = rates(), rates(Decay.CONSTANT, total=99)
    both, more = {"a": one, "b": other}, {"a": replace(one, total=14), "b": replace(other, total=14)}
    saved = flat(both)
    assert adapted(10, saved, flat(more), more, 14, tmp_path) == saved  # differs in optimizer.a.total
    assert adapted(10, saved, saved, both, 14, tmp_path) == saved
    falls = both | {"b": replace(other, total=99, decay=StableDecay())}
    assert adapted(10, saved, flat(falls), falls, 14, tmp_path) == flat(falls)  # a's stays, b's has not begun to fall
    alike = {"a": one, "b": one}
    with pytest.raises(RunFinishedError):
        adapted(10, flat(alike, steps=10), flat(alike), alike, 14, tmp_path)
    older = {name: value for name, value in flat(alike).items() if name != "steps"}  # of a version that saved no steps
    with pytest.raises(RunFinishedError):
        adapted(10, older, flat(alike), alike, 14, tmp_path)
    assert adapted(9, older, flat(alike), alike, 14, tmp_path) == flat(alike)


def test_settings_of_another_version_are_compared_as_they_are(tmp_path):
    given = flat(rates(StableDecay(0.4)))
    for changed in ({"optimizer.decay": "Spiral"}, {"optimizer.total": "ten"}, {"optimizer.decay.fraction": None}):
        saved = given | changed
        assert adapted(10, saved, given, rates(StableDecay(0.4)), 14, tmp_path) == saved
