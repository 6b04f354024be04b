"""Checkpoints: what goes in comes out, other settings are named, damage and full disks are errors."""

import json
import resource
import shutil
from dataclasses import dataclass

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from training_toy import Stream, Toy, config

from jaxdiff.training import checkpoints as checkpoints_module
from jaxdiff.training import manifest
from jaxdiff.training.checkpoints import Checkpoints, load_ema
from jaxdiff.training.loop import Layout, train
from jaxdiff.training.mesh import make_mesh
from jaxdiff.training.optimizer import Adafactor, AdamW, Muon, OptimizerConfig
from jaxdiff.training.state import abstract_state, init_state

pytestmark = pytest.mark.usefixtures("shared_steps")
ONE = make_mesh(devices=jax.devices()[:1])
OPTIMIZER = OptimizerConfig()
WIDE = Toy(width=16_384)


@dataclass(frozen=True)
class Deep(Toy):
    """Has a matrix large enough to be split over devices, and for Adafactor to keep a row and a column of it."""

    width: int = 256

    def init(self, key):
        params, extra = super().init(key)
        return params | {"middle": {"kernel": jax.random.normal(key, (self.width, self.width)) / 16}}, extra

    def loss(self, params, extra, frozen, batch, key, step):
        hidden = jax.numpy.tanh(batch["x"] @ params["first"]["kernel"] + params["first"]["bias"])
        hidden = jax.numpy.tanh(hidden @ params["middle"]["kernel"])
        return ((hidden @ params["second"]["kernel"] - batch["noise"]) ** 2).mean(), ({}, extra)


def equal(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(x, y), jax.device_get(a), jax.device_get(b))))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of 10 steps and its last state; copied by the tests that damage it."""
    folder = tmp_path_factory.mktemp("run")
    state = train(Toy(), Stream(), config(steps=10), folder, layout=Layout(ONE))
    return folder, state


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "copy")


def test_saving_does_not_tell_jax_at_which_step_the_run_is(tmp_path, monkeypatch):
    """Orbax would, of a step gone by, while processes agree on the one to stop after."""
    told = []
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", told.append)
    train(Toy(), Stream(), config(steps=10), tmp_path, layout=Layout(ONE))
    assert (tmp_path / "checkpoints" / "10").is_dir() and not told


@pytest.mark.parametrize("data", [{"index": 7, "workers": [1, 2]}, b"\x00\xffbytes"])
@pytest.mark.parametrize("sizes", [(1, 1), (2, 4)])
def test_state_and_data_come_back(tmp_path, data, sizes):
    mesh = make_mesh(data=sizes[0], fsdp=sizes[1], devices=jax.devices()[: sizes[0] * sizes[1]])
    stage = Toy(width=8192)
    state = init_state(stage, OPTIMIZER, jax.random.key(0), mesh).replace(step=jax.numpy.int32(4))
    with Checkpoints(tmp_path, {}) as checkpoints:
        checkpoints.save(4, state, data)
    with Checkpoints(tmp_path, {}) as checkpoints:
        assert checkpoints.latest() == 4
        restored, place = checkpoints.restore(abstract_state(stage, OPTIMIZER, mesh))
    assert equal(restored, state)
    assert place == data
    kernel = restored.params["first"]["kernel"]
    assert kernel.sharding == state.params["first"]["kernel"].sharding


def test_a_checkpoint_moves_to_another_mesh(finished, copied):
    mesh = make_mesh(data=2, fsdp=4)
    state = train(Toy(), Stream(), config(steps=10), copied, layout=Layout(mesh))
    assert equal(state, finished[1])
    assert state.params["first"]["kernel"].sharding.mesh == mesh


@pytest.fixture(scope="module", params=[AdamW(), Adafactor(), Muon()], ids=lambda kind: type(kind).__name__)
def on_eight(request, tmp_path_factory):
    """A run of every optimizer on eight devices, parameters split over four: the folder, optimizer and last state."""
    folder = tmp_path_factory.mktemp("eight")
    mesh = make_mesh(data=2, fsdp=4)
    optimizer = OptimizerConfig(request.param, 1e-2, 5, 200)
    settings = config(steps=3, save_every=3, optimizer=optimizer)
    state = train(Deep(), Stream(), settings, folder, layout=Layout(mesh))
    assert "fsdp" in state.params["middle"]["kernel"].sharding.spec
    shapes = [leaf.shape for leaf in jax.tree.leaves(state.opt_state)]
    assert isinstance(request.param, Adafactor) == ((256, 256) not in shapes)  # factored moments, or whole ones
    return folder, optimizer, jax.device_get(state)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 2, 1), (4, 1, 1), (1, 2, 2), (1, 8, 1), (2, 2, 2)], ids=str)
def test_another_mesh_gets_every_bit(on_eight, sizes):
    folder, optimizer, state = on_eight
    count = int(np.prod(sizes))
    mesh = make_mesh(*sizes, devices=jax.devices()[:count])
    abstract = abstract_state(Deep(), optimizer, mesh)
    settings = json.loads((folder / "checkpoints" / "3" / "settings" / "metadata").read_text())
    with Checkpoints(folder / "checkpoints", settings) as checkpoints:
        restored, place = checkpoints.restore(abstract)
    assert place == {"index": 3}
    assert equal(restored, state) and jax.tree.structure(restored) == jax.tree.structure(abstract)
    for leaf, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(abstract), strict=True):
        assert leaf.sharding == expected.sharding and leaf.dtype == expected.dtype
    moments = [leaf for leaf in jax.tree.leaves(restored.opt_state) if leaf.size > 1]
    assert moments and all(np.any(leaf) for leaf in moments if leaf.ndim)


def test_only_the_newest_are_kept(tmp_path):
    train(Toy(), Stream(), config(save_every=2, keep=2), tmp_path, layout=Layout(ONE))
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [18, 20]


def test_averaged_parameters_alone(finished):
    folder, state = finished
    averaged = load_ema(folder / "checkpoints")
    assert equal(averaged, state.ema) and not equal(averaged, state.params)
    mesh = make_mesh(fsdp=8)
    abstract = abstract_state(Toy(), OPTIMIZER, mesh).ema
    placed = load_ema(folder / "checkpoints", abstract)
    assert equal(placed, state.ema)
    assert placed["first"]["kernel"].sharding.mesh == mesh
    with pytest.raises(ValueError, match="averaged parameters of step 10 cannot be restored"):
        load_ema(folder / "checkpoints", abstract_state(Toy(width=32), OPTIMIZER, mesh).ema)
    more = abstract | {"third": abstract["first"]}
    assert equal(load_ema(folder / "checkpoints", more, part=True), state.ema)
    with pytest.raises(ValueError, match="averaged parameters of step 10 cannot be restored"):
        load_ema(folder / "checkpoints", more)


def test_no_checkpoint_is_said_so(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(FileNotFoundError, match="no checkpoint here"):
            load_ema(folder)
    assert not list(tmp_path.iterdir())  # looking creates nothing
    with Checkpoints(tmp_path, {}) as checkpoints, pytest.raises(ValueError, match="no checkpoint here"):
        checkpoints.restore(abstract_state(Toy(), OPTIMIZER, ONE))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stage": Toy(width=32)}, "stage.width was 16 and is 32 here"),
        ({"seed": 1}, "seed was 0 and is 1 here"),
        ({"accumulate": 2}, "accumulate was 1 and is 2 here"),
        ({"optimizer": OptimizerConfig(AdamW(b1=0.8), 1e-2, 5, 200)}, "optimizer.kind.b1 was 0.9 and is 0.8 here"),
        ({"optimizer": OptimizerConfig(AdamW(), 1e-3, 5, 200)}, "optimizer.learning_rate was 0.01 and is 0.001 here"),
    ],
)
def test_other_settings_are_named(finished, changes, words):
    stage = changes.pop("stage", Toy())
    with pytest.raises(ValueError, match=f"was saved with other settings: {words}") as caught:
        train(stage, Stream(), config(**changes), finished[0], layout=Layout(ONE))
    assert "\n" not in str(caught.value)


def cut(folder, item):
    for path in (folder / item).rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    "state cut short": lambda folder: cut(folder, "state"),
    "averages cut short": lambda folder: cut(folder, "ema"),
    "settings cut short": lambda folder: cut(folder, "settings"),
    "averages gone": lambda folder: shutil.rmtree(folder / "ema"),
    "data's place gone": lambda folder: shutil.rmtree(folder / "data"),
    "everything gone": lambda folder: [shutil.rmtree(path) for path in folder.iterdir() if path.is_dir()],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_restore_that_fails_raises(copied, damage):
    DAMAGE[damage](copied / "checkpoints" / "10")
    with pytest.raises(ValueError, match="checkpoint of step 10 cannot be restored") as caught:
        train(Toy(), Stream(), config(), copied, layout=Layout(ONE))
    assert "\n" not in str(caught.value)


def test_a_directory_that_orbax_does_not_count_is_no_fresh_start(copied, monkeypatch):
    monkeypatch.setattr(checkpoints_module.ocp.CheckpointManager, "latest_step", lambda self: None)
    with pytest.raises(ValueError, match="10 is not a complete checkpoint"):
        train(Toy(), Stream(), config(), copied, layout=Layout(ONE))


def test_rests_of_an_interrupted_save_are_ignored_and_removed(finished, copied):
    rest = copied / "checkpoints" / "15.orbax-checkpoint-tmp"
    shutil.copytree(copied / "checkpoints" / "10" / "state", rest / "state.orbax-checkpoint-tmp")
    assert equal(load_ema(copied / "checkpoints"), finished[1].ema)
    assert rest.exists()  # a reader leaves a running save alone
    state = train(Toy(), Stream(), config(steps=10), copied, layout=Layout(ONE))
    assert equal(state, finished[1])
    assert not rest.exists()


def test_a_disk_too_full_is_said_before_writing(finished, copied, monkeypatch):
    usage = shutil.disk_usage(copied)._replace(free=1000)
    monkeypatch.setattr(checkpoints_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"disk full: the checkpoint of step 15 takes .* MB, 0 MB are free"):
        train(Toy(), Stream(), config(), copied, layout=Layout(ONE))
    assert sorted(path.name for path in (copied / "checkpoints").iterdir()) == ["10", "5"]
    assert equal(load_ema(copied / "checkpoints"), finished[1].ema)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's own threads, cut short
def test_a_write_that_fails_is_an_error_and_older_checkpoints_stay(tmp_path):
    state = init_state(Toy(width=20_000), OPTIMIZER, jax.random.key(0), ONE)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(tmp_path, {}, keep=1) as checkpoints:
        checkpoints.save(1, state, {})
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # writes fail as on a full disk
        with (
            pytest.raises(OSError, match="checkpoint of step 2 not saved, the older ones are intact") as caught,
            Checkpoints(tmp_path, {}, keep=1) as checkpoints,
        ):
            checkpoints.save(2, state, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    with Checkpoints(tmp_path, {}) as checkpoints:
        assert checkpoints.latest() == 1
        assert equal(checkpoints.restore(abstract_state(Toy(width=20_000), OPTIMIZER, ONE))[0], state)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_run_whose_disk_was_full_goes_on_from_the_older_checkpoint(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def run(steps, before=None):
        return train(WIDE, Stream(before=before), config(steps=steps), tmp_path, layout=Layout(ONE))

    def fill(index):
        if index == 8:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))

    run(5)
    try:
        with pytest.raises(OSError, match=r"checkpoint of step 10 not saved, the older ones are intact: .*too large"):
            run(10, fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    manifest.verify(tmp_path / "checkpoints" / "5")
    assert not (tmp_path / "checkpoints" / "10").exists()
    seen = []
    assert int(run(10, seen.append).step) == 10
    assert seen == [5, 6, 7, 8, 9]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["10", "5"]


def test_a_run_told_to_stop_does_not_claim_to_have_saved(tmp_path, monkeypatch):
    def fail():
        raise RuntimeError("write failed")

    with pytest.raises(OSError, match=r"not saved.*write failed"), Checkpoints(tmp_path, {}) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "wait_until_finished", fail)
        raise SystemExit(75)
