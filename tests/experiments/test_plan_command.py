"""Plans from the command line: one small TPU topology really compiled for, estimates, kept answers, the page of all."""

import dataclasses
import json
import shlex

import jax
import pytest
from small_others import shrink

from experiments import plan
from experiments.planning import report
from experiments.planning.settings import Planned, check
from experiments.recipes import plan_tables
from experiments.table import TASKS
from jaxdiff.training import chips
from jaxdiff.training.plan import Costs

SMALL = "imagen.sr256", "--topology", "v5e:2x2", "--preset", "tiny", "--batch", 8, "--mesh", "data=2,fsdp=2"


def question(model, topology, **settings):
    """As the command would ask it."""
    return Planned(model, TASKS[model], replaced(plan.commands()[model].settings, topology=topology, **settings))


def replaced(settings, **changes):
    """With other values of its fields and of those of how the network is computed."""
    ours = {name: value for name, value in changes.items() if hasattr(settings, name)}
    rest = {name: value for name, value in changes.items() if name not in ours}
    return dataclasses.replace(settings, compute=dataclasses.replace(settings.compute, **rest), **ours)


@pytest.mark.usefixtures("small_presets")
def test_a_small_slice_is_planned_and_the_answer_kept(tmp_path, command, monkeypatch):
    file = tmp_path / "plan.json"
    done = command(plan, *SMALL, "--json", file, "--hlo", tmp_path / "step.hlo", "--arrays")
    assert done.code == 0, done.err
    for words in ("4 chips, 4 devices (data 2, fsdp 2)", "of 16.00 GiB", "all-reduce", "pessimistic, none overlapped"):
        assert words in done.out
    assert "links of a chip: data 1, fsdp 1" in done.out and "fsdp" in done.out
    assert "ESTIMATE" not in done.out and "HloModule" in (tmp_path / "step.hlo").read_text()
    kept = json.loads(file.read_text())
    costs, roof = kept["costs"], report.rooflined(kept)
    assert costs["flops"] > 1e6 and costs["bytes_accessed"] > 1e5 and costs["unknown_loops"] == 0
    assert costs["argument_bytes"] >= sum(kept["bytes_per_device"].values())
    assert costs["peak_bytes"] > costs["argument_bytes"] + costs["temporary_bytes"]
    assert roof.overlapped < roof.serial and roof.share(roof.serial) < roof.share(roof.overlapped) <= 1
    # The compiler's counts, operation by operation, and of all.
    assert costs["cycles"] and costs["total_cycles"] >= sum(costs["cycles"].values())
    assert 0.5 < kept["useful_flops"] / (4 * costs["flops"]) < 1 and "at least" not in done.out

    monkeypatch.setattr(plan, "planned", lambda *_: pytest.fail("asked again"))
    again = command(plan, *SMALL, "--json", file)
    assert again.code == 0 and again.out in done.out
    with pytest.raises(pytest.fail.Exception):  # another question is another plan
        command(plan, *SMALL, "--json", file, "--remat", "blocks")


@pytest.mark.usefixtures("small_presets")
@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("t5", {"preset": "xxl", "sample": True}),
        ("t5", {"remat": True}),
        ("imagen.base64", {"mesh": "data=2,fsdp=2", "sample": True}),
        ("imagen.sr1024", {"mesh": "data=2,tensor=2", "rows": True, "remat": "outputs"}),
        ("imagen.sr1024", {"mesh": "data=2,tensor=2", "rows": True, "sample": True}),
        ("imagen.base64", {"mesh": "data=2,tensor=2", "accumulate": 2}),
        ("clip", {}),
        ("clip", {"mesh": "data=2,fsdp=2", "sample": True}),
        ("classifier", {"optimizer": "adam"}),
        ("classifier", {"sample": True}),
    ],
    ids=lambda each: " ".join(f"{name}={value}" for name, value in each.items()) if isinstance(each, dict) else each,
)
def test_every_kind_of_step_can_be_asked_for(model, settings, monkeypatch):
    """Traced and lowered for the slice; compiling them all would take minutes."""
    shrink(monkeypatch)
    lowered = []

    def stop(function, *arguments, name, hlo, options):
        lowered.append((function.lower(*arguments).as_text(), arguments[0]))
        return Costs(1, 1, 2, 1.0, 1.0, {})

    asked = question(model, "v5e:2x2", batch=8, **settings)
    topology = chips.parse("v5e:2x2")
    monkeypatch.setattr(plan, "_compiled", stop)
    check(asked, topology)
    made = plan.planned(asked, topology)
    ((text, arguments),) = lowered
    assert "sharding" in text and made["parameters"] > 1000 and made["useful_flops"] > 1e5
    assert report.is_plan(json.loads(json.dumps(made)))
    assert report.report(made).count("\n") > 10
    if asked.settings.sample and model not in ("clip", "classifier"):  # what they use lies in memory in bfloat16
        assert all(leaf.dtype == jax.numpy.bfloat16 for leaf in jax.tree.leaves(arguments) if leaf.ndim > 1)


@pytest.mark.usefixtures("small_presets")
@pytest.mark.parametrize("model", ["t5", "clip", "classifier"])
def test_every_model_can_be_estimated(model, command, monkeypatch):
    shrink(monkeypatch)
    done = command(plan, model, "--topology", "h100:8", "--batch", 64, "--mesh", "fsdp=8")
    assert done.code == 0 and "AN ESTIMATE" in done.out, done.err
    assert f"64 {TASKS[model].unit}, {'float32' if model == 'classifier' else 'bfloat16'}, remat none" in done.out


def test_gpus_are_estimated_and_it_is_said(tmp_path, command):
    asked = "imagen.base64", "--topology", "h100:8", "--preset", "tiny", "--mesh", "fsdp=8"
    large = command(plan, *asked, "--batch", 256, "--json", tmp_path / "large.json")
    assert large.code == 0 and "AN ESTIMATE from shapes alone" in large.out, large.err
    blocks = command(plan, *asked, "--batch", 256, "--remat", "blocks", "--json", tmp_path / "blocks.json")
    assert blocks.code == 0
    large, blocks = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("large", "blocks"))
    assert blocks["costs"]["temporary_bytes"] < 0.5 * large["costs"]["temporary_bytes"]
    assert blocks["useful_flops"] == large["useful_flops"] == pytest.approx(8 * large["costs"]["flops"], rel=0.02)
    # The forward pass once more, but for the last layer of each block, whose result nothing asks for.
    assert 1.1 < blocks["costs"]["flops"] / large["costs"]["flops"] < 4 / 3


V5E = "--topology", "v5e:2x2"
GPUS = "--topology", "h100:8"
BASE, PAPER = ("imagen.base64", "--preset", "2b"), ("imagen.sr256", "--preset", "paper")
T5 = "t5", "--preset", "xxl", "--sample"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*BASE,), "--topology names the chips, such as v6e:2x4"),
        ((*BASE, "--topology", "v5litepod-256"), "topology 'v5litepod-256': write the chip and its shape"),
        ((*BASE, *V5E, "--mesh", "fsdp=3"), "does not fit 4 devices"),
        ((*BASE, *V5E, "--mesh", "pipe=4"), "mesh 'pipe=4': write sizes of"),
        ((*BASE, *V5E, "--batch", 6), "a batch of 6 does not divide over 4 devices"),
        (("imagen.base64", *V5E, "--preset", "3b"), "--preset 3b: choose from tiny, quick, 50m, 120m, 300m, 500m, 2b"),
        (("imagen.base256", *V5E), "unknown 'imagen.base256': the first argument names one of imagen.base64"),
        ((*BASE, "--topology", "h100:16"), "plans for GPUs are of one host"),
        (
            ("imagen.base64", *GPUS, "--batch", 8, "--mesh", "tensor=2"),
            "--mesh tensor: estimates know data and fsdp alone",
        ),
        (
            (*BASE, *GPUS, "--batch", 8, "--sample"),
            "--sample is for chips that are compiled for: XLA's CUDA compiler is not installed",
        ),
        (
            (*T5, *GPUS, "--batch", 8),
            "--sample is for chips that are compiled for: XLA's CUDA compiler is not installed",
        ),
        ((*PAPER, *GPUS, "--batch", 8, "--crop", 40), "a crop of 40"),
        ((*BASE, *V5E, "--mesh", "tensor=3"), "does not fit 4 devices"),
        ((*BASE, *V5E, "--mesh", "data=0"), "sizes are at least 1"),
        ((*BASE, "--topology", "v5p:100x100x100"), "1,000,000 chips, and the largest slice of v5p has 8,960"),
        ((*BASE, "--topology", "v5e:0x2"), "write the chip and its shape"),
        ((*BASE, "--topology", "h100:0"), "write the chip and its shape"),
        ((*BASE, *V5E, "--batch", 0), "--batch 0: at least 1"),
        ((*BASE, *V5E, "--batch", -8), "--batch -8: at least 1"),
        ((*BASE, *GPUS, "--batch", 0), "--batch 0: at least 1"),
        ((*BASE, *V5E, "--accumulate", 0), "--accumulate 0: at least 1"),
        ((*BASE, *V5E, "--accumulate", -2), "--accumulate -2: at least 1"),
        ((*PAPER, *V5E, "--crop", 0), "--crop 0: at least 1"),
        ((*SMALL, "--crop", 512), "--crop 512: larger than the images, 256"),
        ((*SMALL, "--crop", 264), "--crop 264: larger than the images, 256"),
        (("imagen.sr1024", *GPUS, "--preset", "paper", "--crop", 2048), "larger than the images"),
        ((*BASE, *V5E, "--batch", 10**12), "its arrays alone take 255,614,519 GiB"),
        ((*BASE, *V5E, "--batch", 10**12, "--sample"), "of a device, which has 16"),
        ((*T5, *V5E, "--batch", 10**12), "of a device, which has 16"),
        ((*BASE, "--topology", "tpu7x:2x2x1", "--batch", 10**30, "--mesh", "fsdp=8"), "of a device, which has 96"),
        ((*BASE, "--topology", "tpu7x:2x2x1", "--batch", 10**30, "--sample"), "of a device, which has 96"),
        ((*BASE, *GPUS, "--batch", 10**9), "of a device, which has 75"),
        ((*BASE, *V5E, "--scan"), "--scan: this network has no equal blocks in a row"),
        ((*PAPER, *GPUS, "--scan"), "--scan means nothing here"),
        ((*BASE, *V5E, "--rows"), "--rows means nothing here: the mesh has one device along tensor"),
        ((*BASE, *GPUS, "--rows"), "--rows means nothing here"),
        ((*BASE, *V5E, "--crop", 64), "--crop 64: for super-resolution; this model is trained on whole images"),
        (("t5", *V5E, "--crop", 64), "--crop: this model is not trained on crops"),
        (("clip", *V5E, "--optimizer", "adafactor"), "--optimizer adafactor: clip has adam, muon"),
        ((*T5, *V5E, "--remat"), "--remat means nothing here: sampling has no backward pass"),
        ((*T5, *V5E, "--rows"), "--rows"),
        (("t5", *V5E, "--sample", "--preset", "300m"), "--preset 300m: choose from micro, tiny"),
        ((*BASE, *V5E, "--sample", "--accumulate", 2), "--accumulate means nothing here: sampling"),
        ((*BASE, *V5E, "--sample", "--optimizer", "adam"), "--optimizer means nothing here: sampling"),
        ((*BASE, *V5E, "--sample", "--arrays"), "--arrays means nothing here: sampling"),
        ((*PAPER, *V5E, "--sample", "--crop", 64), "--crop means nothing here: sampling"),
        (
            (*BASE, *GPUS, "--hlo", "x.hlo"),
            "--hlo means nothing here: nothing is compiled: XLA's CUDA compiler is not installed",
        ),
    ],
)
def test_bad_questions(command, arguments, message):
    done = command(plan, *arguments)
    assert done.code == 2 and message in done.err and done.err.count("\n") == 1, done.err


@pytest.mark.parametrize("more", [(), ("--arrays",), ("--hlo", "step.hlo")])
def test_no_other_file_is_overwritten(tmp_path, command, monkeypatch, more):
    monkeypatch.setattr(plan, "planned", lambda *_: pytest.fail("planned"))
    file = tmp_path / "notes.json"
    file.write_text('{"mine": 1}')
    done = command(plan, *SMALL, "--json", file, *more)
    assert done.code == 2 and "not a plan, or a damaged one, and not overwritten" in done.err
    assert file.read_text() == '{"mine": 1}'


def without(made, name):
    return {key: value for key, value in made.items() if key != name}


def costs_with(made, **changes):
    return made | {"costs": made["costs"] | changes}


DAMAGED_PLANS = {
    "two numbers": lambda made: {"asked": 1, "costs": 2},
    "a list": lambda made: [made],
    "asked as a list": lambda made: made | {"asked": list(made["asked"])},
    "asked without a topology": lambda made: made | {"asked": without(made["asked"], "topology")},
    "asked without a model": lambda made: made | {"asked": without(made["asked"], "model")},
    "asked with a type that is a number": lambda made: made | {"asked": made["asked"] | {"dtype": 16}},
    "no costs": lambda made: made | {"costs": {}},
    "costs as a number": lambda made: made | {"costs": 7},
    "costs without a name": lambda made: made | {"costs": without(made["costs"], "flops")},
    "costs with a name too many": lambda made: costs_with(made, joules=1),
    "flops in words": lambda made: costs_with(made, flops="many"),
    "flops that are none": lambda made: costs_with(made, flops=0),
    "flops of many digits": lambda made: costs_with(made, flops=10**400),
    "flops that are NaN": lambda made: costs_with(made, flops=float("nan")),
    "a peak that is missing": lambda made: costs_with(made, peak_bytes=None),
    "collectives as a list": lambda made: costs_with(made, collectives=[1]),
    "collectives without bytes": lambda made: costs_with(made, collectives={"all-gather": {"count": 1}}),
    "cycles in words": lambda made: costs_with(made, cycles={"dot": "1"}),
    "no seconds": lambda made: costs_with(made, seconds=0),
    "no mesh": lambda made: without(made, "mesh"),
    "a mesh as a list": lambda made: made | {"mesh": [1, 4]},
    "no chips": lambda made: without(made, "chips"),
    "chips that are true": lambda made: made | {"chips": True},
    "no parameters": lambda made: without(made, "parameters"),
    "parameters in words": lambda made: made | {"parameters": "2b"},
    "no links": lambda made: without(made, "links"),
    "links as a number": lambda made: made | {"links": 3},
    "no useful FLOPs": lambda made: without(made, "useful_flops"),
    "useful FLOPs in words": lambda made: made | {"useful_flops": "1"},
    "no unit": lambda made: without(made, "unit"),
}


@pytest.mark.parametrize("case", DAMAGED_PLANS)
def test_a_damaged_plan_is_left_as_it_is(tmp_path, command, monkeypatch, case):
    """By the command that would answer from it, and by the page, which leaves it out."""
    asked = plan_tables.cases()["text-v4"]
    made = json.loads((plan_tables.FOLDER / "text-v4.json").read_text())
    made["asked"] = plan.asked(asked, None) | {"compiler": "libtpu 1"}
    assert report.is_plan(made)
    monkeypatch.setattr(plan, "planned", lambda *_: pytest.fail("planned"))
    monkeypatch.setattr(plan, "compiler", lambda _: "libtpu 1")
    file = tmp_path / "text-v4.json"
    words = ["t5", "--preset", "xxl", "--sample", "--topology", asked.settings.topology, "--json", file]
    file.write_text(json.dumps(made))
    assert command(plan, *words).code == 0

    damaged = json.dumps(DAMAGED_PLANS[case](made))
    file.write_text(damaged)
    done = command(plan, *words)
    assert done.code == 2 and f"{file}: not a plan, or a damaged one" in done.err and done.err.count("\n") == 1
    done = command(plan_tables.main, "--only", "text-v4", "--out", tmp_path)
    assert done.code == 2 and f"{file}: not a plan, or a damaged one" in done.err
    done = command(plan_tables.main, "--only", "none", "--out", tmp_path)
    assert done.code == 0 and "0 plans" in done.out
    assert file.read_text() == damaged


def test_the_command_of_a_plan_asks_for_it(command, monkeypatch):
    heard = []
    monkeypatch.setattr(plan, "main", lambda *given: heard.append(given))
    for case in plan_tables.cases().values():
        line = plan_tables.command_of({"asked": plan.asked(case, None)})
        done = command(plan, *shlex.split(line.removeprefix("python -m experiments.plan ")))
        assert done.code == 0, done.err
        assert heard.pop() == (case.name, case.task, case.settings)
        chips.parse(case.settings.topology)


def test_no_published_plan_has_a_setting_without_meaning():
    for case in plan_tables.cases().values():
        check(case, chips.parse(case.settings.topology))


def test_the_page_is_made_of_plans_that_are_still_wanted(tmp_path, command):
    case = plan_tables.cases()["base64-v5p-64"]
    costs = {"argument_bytes": 1, "temporary_bytes": 2, "peak_bytes": int(40 * chips.GIB), "flops": 4.59e13}
    moved = {"all-gather": {"count": 1, "bytes": 4e9}, "all-reduce": {"count": 1, "bytes": 1e9}}
    costs |= {"bytes_accessed": 1e9, "collectives": moved, "seconds": 0.2, "cycles": {"dot": 0.25 * chips.V5P.clock}}
    asked = plan.asked(case, None) | {"compiler": "libtpu 1"}
    made = {"date": "2026-01-02", "asked": asked, "mesh": {"data": 2, "fsdp": 32}, "chips": 64, "unit": "images"}
    made |= {"parameters": 2 * 10**9, "estimate": False}
    made |= {"costs": costs, "useful_flops": 64 * 3.672e13, "links": {"data": 1, "fsdp": 4}, "added": "links: later"}
    (tmp_path / "base64-v5p-64.json").write_text(json.dumps(made))
    other = dataclasses.replace(case, settings=replaced(case.settings, remat="blocks"))
    old = made | {"asked": plan.asked(other, None)}
    (tmp_path / "base64-v5p-512.json").write_text(json.dumps(old))
    done = command(plan_tables.main, "--only", "none", "--out", tmp_path)
    assert done.code == 0 and "1 plans" in done.out, done.err
    page = (tmp_path / "README.md").read_text()
    needs, times = (cells_of(page, number)["base64-v5p-64"] for number in range(2))
    assert needs["HBM a chip"] == "40.0 of 95 GiB" and needs["free"] == "58%" and needs["links"] == "data 1 fsdp 4"
    assert (needs["useful TFLOP a chip"], needs["compiled"], needs["GB received a chip"]) == ("36.7", "45.9", "5.0")
    assert times == {
        "plan": "base64-v5p-64",
        "overlapped, *optimistic*": "100 ms, 80%",
        "estimate, *optimistic*": "200 ms, 40%",
        "cycles, *optimistic*": "≥ 250 ms, ≤ 32%",
        "serial, *pessimistic*": "120 ms, 66%",  # 100 + 0.4 + 10 + 10
        "cycles, interconnect, *pessimistic*": "≥ 270 ms, ≤ 30%",
        "interconnect alone, *optimistic*": "12 ms",
        "interconnect alone, *pessimistic*": "20 ms",
        "images a second, *optimistic*": "2,048",
        "images a second, *pessimistic*": "1,896",
        "days, *optimistic*": "7.2",
        "days, *pessimistic*": "7.8",
    }
    assert "Compilers and dates: libtpu 1, 2026-01-02." in page and "\nlinks: later.\n" in page
    assert "imagen.base64 --topology v5p:4x4x4 --preset 2b --batch 512 --mesh data=2,fsdp=32" in page
    assert command(plan_tables.main, "--only", "v9", "--out", tmp_path).code == 2


def cells_of(page, number):
    """The rows of a table of a page, by their first cell."""
    tables = [part.splitlines() for part in page.split("\n\n") if part.startswith("| plan")]
    names, _, *rows = ([cell.strip() for cell in line.strip("|").split(" | ")] for line in tables[number])
    return {row[0]: dict(zip(names, row, strict=True)) for row in rows}


@pytest.fixture(scope="module")
def kept():
    """The published plans."""
    return plan_tables.kept_of(plan_tables.cases(), plan_tables.FOLDER)


def test_the_published_plans_leave_memory_free(kept):
    assert kept.keys() == plan_tables.cases().keys()
    for name, made in kept.items():
        assert plan_tables.free(made) >= plan_tables.LEAST_FREE, name
        assert made["costs"]["unknown_loops"] == 0, name
        assert name.startswith("text") or "-v5p-" in name or (made["chips"] == 256 and made["asked"]["batch"] == 2048)


def test_useful_flops_are_those_of_the_network(kept):
    """The same for an image on every chip; by hand 4.45 TFLOP for one of the base model."""
    per_image = {}
    for name, made in kept.items():
        each = per_image.setdefault(name.split("-")[0], set())
        each.add(made["useful_flops"] / made["asked"]["batch"])
        assert made["useful_flops"] <= made["costs"]["flops"] * chips.parse(made["asked"]["topology"]).devices, name
    assert all(len(each) == 1 for each in per_image.values())
    assert per_image["base64"].pop() == pytest.approx(4.45e12, rel=2e-3)
    one = question("imagen.base64", "v5p:4x8x8", preset="2b", batch=1)
    assert plan.useful_flops(one) == pytest.approx(4.45e12, rel=2e-3)
    one = question("t5", "v5p:2x2x1", preset="xxl", batch=1, sample=True)
    assert plan.useful_flops(one) == pytest.approx(per_image["text"].pop())


def test_the_published_times_are_what_the_kept_numbers_carry(kept):
    """The compiler's estimate is shorter than its own cycles, and neither is the last word."""
    base, text = (report.rooflined(kept[name]) for name in ("base64-v5p", "text-v5p"))
    assert [round(1e3 * seconds) for seconds in (base.estimate, base.cycles)] == [138, 162]
    assert [round(100 * base.share(seconds)) for seconds in (base.estimate, base.cycles)] == [56, 48]
    assert [round(100 * text.share(seconds)) for seconds in (text.estimate, text.cycles)] == [78, 51]
    for made in kept.values():
        roof = report.rooflined(made)
        assert roof.optimistic <= roof.pessimistic and roof.fastest <= roof.slowest
        assert roof.share(roof.optimistic) <= 1
        assert report.cycles_are_least(made)


def test_every_time_is_headed_and_no_scaling_is_claimed():
    page = (plan_tables.FOLDER / "README.md").read_text()
    for number in (1, 3):
        columns = list(next(iter(cells_of(page, number).values())))[1:]
        assert all(("*optimistic*" in name) != ("*pessimistic*" in name) for name in columns), columns
    assert "say nothing about how a run scales" in page and "100.0%" not in page


def test_the_page_is_of_these_plans(tmp_path, command, monkeypatch):
    """From the JSON alone: nothing is traced."""
    for path in plan_tables.FOLDER.glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    for name in ("useful_flops", "links_of", "planned"):
        monkeypatch.setattr(plan, name, lambda *_: pytest.fail("traced"))
    assert command(plan_tables.main, "--only", "none", "--out", tmp_path).code == 0
    assert (tmp_path / "README.md").read_text() == (plan_tables.FOLDER / "README.md").read_text()
