"""Plans from the command line: one small TPU topology really compiled for, estimates, kept answers, the page of all."""

import dataclasses
import json
import shlex

import pytest
import tyro

from experiments import plan, plan_tables
from jaxdiff.training import chips
from jaxdiff.training.plan import Costs

SMALL = "--topology", "v5e:2x2", "--stage", "sr256", "--preset", "tiny", "--batch", 8, "--mesh", "data=2,fsdp=2"


@pytest.mark.usefixtures("small_presets")
def test_a_small_slice_is_planned_and_the_answer_kept(tmp_path, command, monkeypatch):
    file = tmp_path / "plan.json"
    done = command(plan.main, *SMALL, "--json", file, "--hlo", tmp_path / "step.hlo", "--arrays")
    assert done.code == 0, done.err
    for words in ("4 chips, 4 devices (data 2, fsdp 2)", "of 16.00 GiB", "all-reduce", "none overlapped", "fsdp"):
        assert words in done.out
    assert "ESTIMATE" not in done.out and "HloModule" in (tmp_path / "step.hlo").read_text()
    kept = json.loads(file.read_text())
    costs, roof = kept["costs"], plan.rooflined(kept)
    assert costs["flops"] > 1e6 and costs["bytes_accessed"] > 1e5 and costs["unknown_loops"] == 0
    assert costs["argument_bytes"] >= sum(kept["bytes_per_device"].values())
    assert costs["peak_bytes"] > costs["argument_bytes"] + costs["temporary_bytes"]
    assert roof.overlapped < roof.serial and roof.share_serial < roof.share_overlapped <= 1
    assert costs["cycles"]  # the compiler's estimate, operation by operation

    monkeypatch.setattr(plan, "planned", lambda *_: pytest.fail("asked again"))
    again = command(plan.main, *SMALL, "--json", file)
    assert again.code == 0 and again.out in done.out
    with pytest.raises(pytest.fail.Exception):  # another question is another plan
        command(plan.main, *SMALL, "--json", file, "--remat", "blocks")


@pytest.mark.usefixtures("small_presets")
@pytest.mark.parametrize(
    "asked",
    [
        plan.Run("v5e:2x2", "text", batch=8),
        plan.Run("v5e:2x2", "base64", "tiny", 8, "data=2,fsdp=2", sample=True),
        plan.Run("v5e:2x2", "sr1024", "tiny", 8, "data=2,tensor=2", rows=True, scan=True, remat="outputs"),
        plan.Run("v5e:2x2", "sr1024", "tiny", 8, "data=2,tensor=2", rows=True, sample=True),
        plan.Run("v5e:2x2", "base64", "tiny", 8, "data=2,tensor=2", accumulate=2),
    ],
    ids=lambda run: f"{run.stage}{' drawn' * run.sample}{' rows' * run.rows}",
)
def test_every_kind_of_step_can_be_asked_for(asked, monkeypatch):
    """Traced and lowered for the slice; compiling them all would take minutes."""
    lowered = []

    def stop(function, *arguments, name, hlo):
        lowered.append(function.lower(*arguments).as_text())
        return Costs(1, 1, 2, 1.0, 1.0, {})

    monkeypatch.setattr(plan, "_compiled", stop)
    made = plan.planned(asked, chips.parse(asked.topology))
    assert "sharding" in lowered[0] and made["parameters"] > 1000
    assert plan.report(made).count("\n") > 10


def test_gpus_are_estimated_and_it_is_said(tmp_path, command):
    asked = "--topology", "h100:8", "--preset", "tiny", "--mesh", "fsdp=8"
    large = command(plan.main, *asked, "--batch", 256, "--json", tmp_path / "large.json")
    assert large.code == 0 and "AN ESTIMATE from shapes alone" in large.out, large.err
    blocks = command(plan.main, *asked, "--batch", 256, "--remat", "blocks", "--json", tmp_path / "blocks.json")
    assert blocks.code == 0
    large, blocks = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("large", "blocks"))
    assert blocks["costs"]["temporary_bytes"] < 0.5 * large["costs"]["temporary_bytes"]
    # The forward pass once more, but for the last layer of each block, whose result nothing asks for.
    assert 1.1 < blocks["costs"]["flops"] / large["costs"]["flops"] < 4 / 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--topology", "v5litepod-256"), "topology 'v5litepod-256': write the chip and its shape"),
        (("--topology", "v5e:2x2", "--mesh", "fsdp=3"), "does not fit 4 devices"),
        (("--topology", "v5e:2x2", "--mesh", "pipe=4"), "mesh 'pipe=4': write sizes of"),
        (("--topology", "v5e:2x2", "--batch", 6), "a batch of 6 does not divide over 4 devices"),
        (("--topology", "v5e:2x2", "--preset", "3b"), "base64 has no preset '3b'"),
        (("--topology", "h100:16"), "estimates are of one host, whose 8 GPUs NVLink joins"),
        (("--topology", "h100:8", "--batch", 8, "--preset", "tiny", "--mesh", "tensor=2"), "--mesh tensor: for TPU"),
        (("--topology", "h100:8", "--batch", 8, "--sample"), "--sample: for TPU topologies"),
        (("--topology", "h100:8", "--batch", 8, "--stage", "text"), "--stage text: for TPU topologies"),
        (("--topology", "h100:8", "--batch", 8, "--stage", "sr256", "--preset", "paper", "--crop", 40), "a crop of 40"),
        (("--topology", "v5e:2x2", "--mesh", "tensor=3"), "does not fit 4 devices"),
    ],
)
def test_bad_questions(command, arguments, message):
    done = command(plan.main, *arguments)
    assert done.code == 2 and message in done.err and done.err.count("\n") == 1


def test_no_other_file_is_overwritten(tmp_path, command):
    file = tmp_path / "notes.json"
    file.write_text('{"mine": 1}')
    done = command(plan.main, *SMALL, "--json", file)
    assert done.code == 2 and "not a plan, and not overwritten" in done.err
    assert file.read_text() == '{"mine": 1}'


def test_the_command_of_a_plan_asks_for_it():
    for case in plan_tables.cases().values():
        line = plan_tables.command({"asked": plan.asked(case, None)})
        words = shlex.split(line.removeprefix("python -m experiments.plan "))
        assert tyro.cli(plan.Run, args=words) == case
        chips.parse(case.topology)


def test_the_page_is_made_of_plans_that_are_still_wanted(tmp_path, command):
    case = plan_tables.cases()["base64-v5p-64"]
    costs = {"argument_bytes": 1, "temporary_bytes": 2, "peak_bytes": int(40 * chips.GIB), "flops": 4.59e13}
    costs |= {"bytes_accessed": 1e9, "collectives": {}, "seconds": 0.2}
    asked = plan.asked(case, None) | {"compiler": "libtpu 1"}
    made = {"date": "2026-01-02", "asked": asked, "mesh": {"data": 2, "fsdp": 32}, "chips": 64}
    made |= {"costs": costs}
    (tmp_path / "base64-v5p-64.json").write_text(json.dumps(made))
    old = made | {"asked": plan.asked(dataclasses.replace(case, remat="blocks"), None)}
    (tmp_path / "base64-v5p-512.json").write_text(json.dumps(old))
    done = command(plan_tables.main, "--only", "none", "--out", tmp_path)
    assert done.code == 0 and "1 plans" in done.out, done.err
    page = (tmp_path / "README.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith("| base64-v5p-64"))
    for cell in ("64 v5p", "data 2 fsdp 32", "40.0 of 95 GiB", "58%", "45.9", "200 ms, 50%", "2,560", "5.8"):
        assert f" {cell} |" in row, cell
    assert "Compilers and dates: libtpu 1, 2026-01-02." in page
    assert "--topology v5p:4x4x4 --batch 512 --mesh data=2,fsdp=32" in page
    assert command(plan_tables.main, "--only", "v9", "--out", tmp_path).code == 2


@pytest.fixture(scope="module")
def kept():
    """The published plans."""
    return plan_tables._kept(plan_tables.FOLDER)


def test_the_published_plans_leave_memory_free(kept):
    assert kept.keys() == plan_tables.cases().keys()
    for name, made in kept.items():
        assert plan_tables.free(made) >= plan_tables.LEAST_FREE, name
        assert made["costs"]["unknown_loops"] == 0, name
        assert name.startswith("text") or "-v5p-" in name or (made["chips"] == 256 and made["asked"]["batch"] == 2048)


def test_the_base_model_can_be_fast_on_v5p(kept):
    roof = plan.rooflined(kept["base64-v5p"])
    assert roof.share_overlapped >= 0.6 and roof.share_serial >= 0.4 and roof.share_compiler >= 0.4


def test_more_chips_are_as_fast_each(kept):
    plans = {chips: kept[name] for chips, name in plan_tables.scaled().items()}
    assert {made["asked"]["batch"] // chips for chips, made in plans.items()} == {8}
    assert plan_tables.speed(plans[512]) >= 0.95 * plan_tables.speed(plans[64])
    assert plan_tables.serial_speed(plans[512]) >= 0.95 * plan_tables.serial_speed(plans[64])


def test_the_page_is_of_these_plans(tmp_path, command):
    for path in plan_tables.FOLDER.glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    assert command(plan_tables.main, "--only", "none", "--out", tmp_path).code == 0
    assert (tmp_path / "README.md").read_text() == (plan_tables.FOLDER / "README.md").read_text()
