"""A cascade on disk: what was saved is what is loaded, and a folder that does not fit is refused in one line."""

import errno
import json
import shutil
from collections import namedtuple
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import BASE as EIGHT
from small import LENGTH, SR, WIDTH, Formula, changed, random_params

from jaxdiff.core import trees
from jaxdiff.core.settings import flatten
from jaxdiff.diffusion.guidance import Guidance
from jaxdiff.diffusion.samplers import DDIM
from jaxdiff.models.conditioners import TextConditioner
from jaxdiff.models.sampling import SamplingConfig, TrainedModel
from jaxdiff.nets.t5 import T5Config, T5Encoder
from jaxdiff.text.tokenizer import byte_tokenizer
from jaxdiff.training.checkpoints import Checkpoints
from jaxdiff.training.optimizer import OptimizerConfig, optimizer
from jaxdiff.training.state import create_state
from jaxdiff.weights import t5 as t5_weights
from jaxdiff.weights import tree
from jaxdiff.weights.imagen import load, load_text
from jaxdiff.weights.stages import load_model, save_model

SAMPLING = SamplingConfig(DDIM(0.5), 7, guidance=Guidance(2.5, interval=(-3.0, 4.0)))
BASE = replace(EIGHT, side=4)
LARGEST = replace(SR, side=64)


def model(stage, seed=0):
    return TrainedModel(stage, random_params(stage, seed), SAMPLING)


def assert_equal(found, wanted, **tolerance):
    assert (found.model, found.sampling) == (wanted.model, wanted.sampling)
    a, b = trees.flatten(found.params), trees.flatten(wanted.params)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == jnp.float32
        if tolerance:
            np.testing.assert_allclose(a[name], b[name], **tolerance, err_msg=name)
        else:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of three stages and a text encoder, and the models in it."""
    directory = tmp_path_factory.mktemp("cascade")
    models = [model(BASE, 0), model(SR, 1), model(LARGEST, 2)]
    for name, each in zip(("base64", "sr256", "sr1024"), models):
        save_model(each, directory / name)
    config = T5Config(vocab=384, d_model=WIDTH, d_kv=4, d_ff=8, layers=1, decoder_layers=0, heads=2)
    ids = jnp.zeros((1, LENGTH), int)
    shapes = jax.eval_shape(T5Encoder(config).init, jax.random.key(0), ids, ids == 0)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    t5_weights.export(config, params, directory / "text")
    byte_tokenizer().save_pretrained(directory / "text")
    return directory, models, params


@pytest.fixture
def copy(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "copy")
    return tmp_path / "copy"


def test_one_stage(saved):
    directory, models, _ = saved
    for name, wanted in zip(("base64", "sr256", "sr1024"), models):
        assert_equal(load_model(directory / name), wanted)


@pytest.mark.parametrize(("dtype", "bound"), [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_half_precision_files(tmp_path, dtype, bound):
    """Half the size, read back as float32, off by rounding alone."""
    wanted = model(BASE)
    save_model(wanted, tmp_path / "half", dtype)
    assert_equal(load_model(tmp_path / "half"), wanted, rtol=bound, atol=1e-7)
    save_model(wanted, tmp_path / "full")
    half, full = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("half", "full"))
    count = sum(leaf.size for leaf in jax.tree.leaves(wanted.params))
    assert full - half == pytest.approx(2 * count, abs=500)


def test_the_whole_cascade(saved):
    directory, models, text = saved
    pipeline = load(directory)
    assert pipeline.sides == (4, 16, 64)
    for found, wanted in zip(pipeline.boxes, models):
        assert_equal(found, wanted)
    assert pipeline.text_encoder.length == LENGTH
    jax.tree.map(np.testing.assert_array_equal, pipeline.text_encoder.params, text)
    embedding = pipeline.text_encoder.encode(["ab"])
    assert embedding.tokens.shape == (1, LENGTH, 6) and embedding.mask.sum() == 3


def test_stages_may_be_missing_from_the_end(copy):
    shutil.rmtree(copy / "sr1024")
    assert load(copy).sides == (4, 16)
    shutil.rmtree(copy / "sr256")
    assert load(copy).sides == (4,)


def test_a_stage_without_the_one_before_it(copy):
    shutil.rmtree(copy / "sr256")
    with pytest.raises(ValueError, match="holds sr1024 without the stage before it"):
        load(copy)


def test_stages_that_do_not_fit_each_other(copy):
    save_model(model(LARGEST), copy / "sr256")
    with pytest.raises(ValueError, match="the 64 stage enlarges 16 pixels, but the stage before it produces 4"):
        load(copy)


def test_an_encoder_of_another_width(copy):
    """Named when the cascade is put together, not by a shape error while drawing."""
    save_model(model(BASE.reading(LENGTH, 10)), copy / "base64")
    with pytest.raises(ValueError, match="embeddings of width 6, 4 of them; the 4 stage reads 10, 4 of them"):
        load(copy)


def test_an_encoder_that_is_not_known(copy):
    """A file that says nothing of the text embeddings that its stage reads is named, whatever is loaded of it."""
    path = copy / "base64/stage.json"
    told = json.loads(path.read_text())
    for name in ("length", "width"):
        damaged = json.loads(json.dumps(told))
        damaged["stage"]["conditioners"][0][name] = None
        path.write_text(json.dumps(damaged))
        for read in (load, load_text, lambda folder: load_model(folder / "base64")):
            with pytest.raises(ValueError, match=r"base64/stage\.json: length or width of TextConditioner is None"):
                read(copy)


def test_missing_folders(tmp_path, copy):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        load(tmp_path / "nowhere")
    (copy / "base64/stage.json").unlink()
    with pytest.raises(FileNotFoundError, match="base64: no stage here"):
        load(copy)
    (copy / "sr256/model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"sr256/model\.safetensors"):
        load_model(copy / "sr256")


def test_missing_and_extra_keys_are_listed(copy):
    path = copy / "base64/model.safetensors"
    params, metadata = tree.load_tree(path)
    params["unheard_of"] = {"kernel": params["stem"].pop("kernel")}
    params["head"]["bias"] = np.zeros(5, np.float32)
    tree.save_tree(path, params, metadata)
    with pytest.raises(ValueError) as error:
        load(copy)
    message = str(error.value)
    assert "\n" not in message and "base64/model.safetensors" in message
    for part in ("1 missing (stem/kernel)", "1 unexpected (unheard_of/kernel)", "head/bias (5,), not (3,)"):
        assert part in message


def test_settings_of_another_preset(copy):
    """stage.json and the tensors beside it must be of one stage."""
    shutil.copy(copy / "sr256/stage.json", copy / "base64/stage.json")
    with pytest.raises(ValueError, match=r"does not fit the settings.*missing \(aug_level"):
        load_model(copy / "base64")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[]", "not JSON with settings: it holds a list"),
        (b'{"stage": 1}', "not the settings of a stage"),
        (b'{"stage": 1, "sampling": 2, "version": 2}', "not the settings of a stage"),
        (b'{"stage": 1, "sampling": 2}', r"stage\.json has version 1, but only version 2 is supported"),
        (b'{"stage": 1, "sampling": 2, "version": "\\u001b"}', r"has version '\\x1b', but only version 2"),
        pytest.param(b'{"stage": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", "not JSON .* too deeply", id="nested"),
        (b'{"stage": 1, "stage": 2, "sampling": 2}', "not JSON .* 'stage' occurs twice, with different values"),
        (b'{"version": 2, "stage": {"class": "\\u001b[2J"}, "sampling": 2}', r"unknown class of settings '\\x1b\[2J'"),
    ],
)
def test_damaged_settings(copy, content, match):
    (copy / "base64/stage.json").write_bytes(content)
    with pytest.raises(ValueError, match=match) as error:
        load_model(copy / "base64")
    assert "stage.json" in str(error.value) and "\n" not in str(error.value)


def test_truncated_weights_and_pickles(copy):
    path = copy / "base64/model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"base64/model\.safetensors.*truncated or damaged"):
        load_model(copy / "base64")
    path.write_bytes(b"\x80\x04" + whole)
    with pytest.raises(ValueError, match="is a pickle"):
        load_model(copy / "base64")


def files_in(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def full_by_size(monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 100))


def full_while_writing_weights(monkeypatch):
    def write(tensors, path, metadata):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tree, "save_file", write)


def full_while_writing_settings(monkeypatch):
    def dump(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", dump)


@pytest.mark.parametrize("full", [full_by_size, full_while_writing_weights, full_while_writing_settings])
@pytest.mark.parametrize("over_an_older_one", [False, True])
def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch, full, over_an_older_one):
    directory = tmp_path / "stage"
    if over_an_older_one:
        save_model(model(SR), directory)
    before = files_in(tmp_path)
    with monkeypatch.context() as patched:
        full(patched)
        with pytest.raises(OSError) as error:
            save_model(model(BASE), directory)
    assert str(directory) in str(error.value) and "\n" not in str(error.value)
    assert files_in(tmp_path) == before
    save_model(model(BASE), directory)
    assert_equal(load_model(directory), model(BASE))


def test_settings_that_no_file_can_hold(tmp_path):
    """Refused before a byte is written."""
    with pytest.raises(ValueError, match="Formula cannot be written"):
        save_model(TrainedModel(replace(BASE, unet=Formula()), {}, SAMPLING), tmp_path / "stage")
    assert files_in(tmp_path) == {}


def test_a_training_checkpoint_of_another_preset_names_the_setting(tmp_path):
    def checkpoints(model):
        return Checkpoints(tmp_path / "checkpoints", flatten({"model": model}))

    rule = optimizer(OptimizerConfig(warmup=1, total=10))
    state = create_state(jax.tree.map(jnp.asarray, random_params(BASE)), (), rule)
    with checkpoints(BASE) as saving:
        saving.save(1, state, {"index": 0})
    wider = replace(BASE, unet=replace(BASE.unet, channels=16))
    with checkpoints(wider) as other, pytest.raises(ValueError, match=r"model\.unet\.channels was 8 and is 16 here"):
        other.restore(state)
    dropping = changed(BASE, TextConditioner, dropout=0.2)
    with checkpoints(dropping) as other, pytest.raises(ValueError, match=r"model\.conditioners\.0\.dropout was 0\.1"):
        other.restore(state)


def test_settings_are_readable(saved):
    """stage.json says in words what the stage is."""
    data = json.loads((saved[0] / "base64/stage.json").read_text())
    assert (
        data["version"] == 2
        and data["stage"]["class"] == "models.Diffusion"
        and data["stage"]["prediction"]["member"] == "EPSILON"
    )
    assert data["stage"]["unet"]["channels"] == 8 and data["sampling"]["guidance"]["weight"] == 2.5
    assert data["stage"]["unet"]["attention"]["heads"] == 2 and data["stage"]["side"] == 4
    assert data["stage"]["product"] == {"class": "core.Image", "channels": 3, "stride": 1}
    (text,) = data["stage"]["conditioners"]
    assert (text["class"], text["length"], text["width"]) == ("models.TextConditioner", LENGTH, WIDTH)


def test_a_tensor_named_like_a_group(copy):
    path = copy / "base64/model.safetensors"
    params, metadata = tree.load_tree(path)
    tensors = {name: np.asarray(leaf) for name, leaf in trees.flatten(params).items()}
    tree.write_safetensors(path, tensors | {"head": np.zeros(3, np.float32)}, metadata)
    with pytest.raises(ValueError, match=r"1 unexpected \(head\)"):
        load(copy)


def test_others_may_read_what_is_saved(copy):
    """As they may any new file here; safetensors alone would leave it to its owner."""
    (copy / "new").touch()
    assert (copy / "base64/model.safetensors").stat().st_mode == (copy / "new").stat().st_mode


def test_the_encoder_of_the_training_is_remembered(tmp_path):
    save_model(replace(model(BASE), text_fingerprint="0123456789abcdef"), tmp_path)
    assert load_model(tmp_path).text_fingerprint == "0123456789abcdef"
    save_model(model(BASE), tmp_path)
    assert load_model(tmp_path).text_fingerprint is None


def test_what_is_shipped_knows_its_encoder():
    """A fingerprint is stored with stages and embeddings, so an encoder must keep it from one version to the next."""
    shipped = load()
    made_by = shipped.text_encoder.fingerprint
    assert shipped.generator.text_fingerprint == made_by
    assert {model.text_fingerprint for model in shipped.decoders} <= {None, made_by}
