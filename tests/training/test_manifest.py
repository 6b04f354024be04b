"""Damage to a checkpoint: whatever file, whatever byte, it is named, and the newest one that is intact is offered."""

import json
import os
import shutil
import threading

import jax
import pytest
from training_toy import Stream, Toy, config

from jaxdiff.training import checkpoints, manifest
from jaxdiff.training.checkpoints import load_ema
from jaxdiff.training.loop import Layout, train
from jaxdiff.training.mesh import make_mesh

ONE = make_mesh(devices=jax.devices()[:1])


def resume(out):
    return train(Toy(), Stream(), config(save_every=5), out, layout=Layout(ONE))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of 20 steps, with checkpoints 10, 15 and 20."""
    folder = tmp_path_factory.mktemp("run")
    resume(folder)
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy") / "checkpoints"


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


HARM = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "emptied": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "first byte": lambda path: flip(path, 0),
    "middle byte": lambda path: flip(path, path.stat().st_size // 2),
    "last byte": lambda path: flip(path, -1),
    "gone": lambda path: path.unlink(),
}


def test_a_manifest_lists_every_file_of_a_step(finished):
    for step in (10, 15, 20):
        step = finished / "checkpoints" / str(step)
        listed = json.loads((step / manifest.MANIFEST).read_text())["files"]
        assert {step / name for name in listed} == set(files(step)) - {step / manifest.MANIFEST}
        manifest.verify(step)
    items = {name.split("/")[0] for name in listed}
    assert {"state", "ema", "data", "settings", "_CHECKPOINT_METADATA"} <= items


@pytest.mark.parametrize("harm", HARM)
def test_damage_to_any_file_is_named(finished, tmp_path, harm):
    whole = finished / "checkpoints" / "20"
    for path in files(whole):
        copy = shutil.copytree(whole, tmp_path / "20")
        victim = copy / path.relative_to(whole)
        HARM[harm](victim)
        if victim.name == manifest.MANIFEST and harm == "longer":
            manifest.verify(copy)  # white space behind JSON is no damage
        else:
            with pytest.raises(ValueError, match=r"missing|bytes in place of|damaged") as caught:
                manifest.verify(copy)
            assert str(victim) in str(caught.value) and "\n" not in str(caught.value)
            # With the work shared out, some process finds it.
            assert any(manifest.damage(copy, process=part, processes=3) for part in range(3))
        shutil.rmtree(copy)


def test_a_flipped_byte_of_a_manifest_is_seen(folder):
    path = folder / "20" / manifest.MANIFEST
    for place in range(0, path.stat().st_size, 17):
        flip(path, place)
        assert manifest.damage(folder / "20"), f"byte {place} was flipped unseen"
        flip(path, place)
    manifest.verify(folder / "20")


@pytest.mark.parametrize("harm", ["cut short", "middle byte", "gone"])
@pytest.mark.parametrize("item", ["state", "ema", "settings", "_CHECKPOINT_METADATA"])
def test_a_run_does_not_go_on_from_damage(folder, item, harm):
    victim = max(path for path in files(folder / "20") if item in str(path))
    HARM[harm](victim)
    before = files(folder)
    with pytest.raises(ValueError, match="checkpoint of step 20 cannot be restored") as caught:
        resume(folder.parent)
    assert str(victim) in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).endswith(f"; delete {folder / '20'} to go on from step 15, which is intact")
    assert files(folder) == before
    if item in ("ema", "_CHECKPOINT_METADATA"):
        with pytest.raises(ValueError, match="averaged parameters of step 20 cannot be restored") as caught:
            load_ema(folder)
        assert str(victim) in str(caught.value) and "step 15, which is intact" in str(caught.value)
    else:
        load_ema(folder)  # whose files are as they were


def test_what_is_advised_helps(folder):
    HARM["middle byte"](max(files(folder / "20" / "state")))
    HARM["gone"](folder / "15" / manifest.MANIFEST)
    with pytest.raises(ValueError, match="to go on from step 10, which is intact") as caught:
        resume(folder.parent)
    assert f"delete {folder / '20'} and {folder / '15'} to go on" in str(caught.value)
    shutil.rmtree(folder / "20")
    shutil.rmtree(folder / "15")
    assert int(resume(folder.parent).step) == 20
    manifest.verify(folder / "20")


def test_a_missing_manifest_is_damage_that_can_be_made_good(folder):
    (folder / "20" / manifest.MANIFEST).unlink()
    with pytest.raises(ValueError, match=r"manifest\.json is missing .*jaxdiff\.training\.manifest\.write makes one"):
        resume(folder.parent)
    manifest.write(str(folder / "20"))
    assert int(resume(folder.parent).step) == 20


@pytest.mark.parametrize("harm", ["middle byte", "gone"])
def test_where_all_is_damaged_nothing_begins_anew(folder, harm):
    for step in (10, 15, 20):
        HARM[harm](max(files(folder / str(step) / "state")))
    before = files(folder.parent)
    with pytest.raises(ValueError, match=f"no older one is intact: delete {folder} to begin anew"):
        resume(folder.parent)
    assert files(folder.parent) == before


def test_things_that_are_no_checkpoints_are_no_fresh_start(folder, tmp_path):
    for step in (10, 15):
        shutil.rmtree(folder / str(step))
    shutil.rmtree(folder / "20")
    (folder / "20").write_text("a file")
    with pytest.raises(ValueError, match="20 is not a complete checkpoint; no older one is intact"):
        resume(folder.parent)
    os.rename(folder / "20", folder / "20.kept")
    with pytest.raises(ValueError, match=r"no checkpoint here, but 20\.kept"):
        resume(folder.parent)


def test_rests_of_a_first_save_alone_are_a_fresh_start(folder):
    for step in (10, 15):
        shutil.rmtree(folder / str(step))
    os.rename(folder / "20", folder / f"20{checkpoints.UNFINISHED}")
    assert int(resume(folder.parent).step) == 20
    assert sorted(path.name for path in folder.iterdir()) == ["10", "15", "20"]


def test_training_goes_on_while_a_manifest_is_made(tmp_path, monkeypatch):
    gone_on = threading.Event()
    write = manifest.write

    def patient(folder):
        assert gone_on.wait(60), "no step was made meanwhile"
        write(folder)

    monkeypatch.setattr(manifest, "write", patient)
    stream = Stream(before=lambda index: gone_on.set() if index == 8 else None)
    train(Toy(), stream, config(steps=9, save_every=5), tmp_path, layout=Layout(ONE))
    manifest.verify(tmp_path / "checkpoints" / "5")


def test_an_unfinished_checkpoint_is_no_damage(folder):
    """Whatever a death leaves: the folder before it has its name, with a manifest or not; a half-deleted old one."""
    for name in ("25{0}", "25{0}-sealing{0}", "5-deleted{0}"):
        rest = folder / name.format(checkpoints.UNFINISHED)
        shutil.copytree(folder / "20", rest)
        HARM["gone"](max(files(rest / "state")))
    load_ema(folder)
    assert int(resume(folder.parent).step) == 20
    assert sorted(path.name for path in folder.iterdir()) == ["10", "15", "20"]
