"""Folders and stages that make no DeepFloyd IF, refused in one line; captions embedded once, in its encoder's place."""

import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import small_if

from jaxdiff.diffusion.parameterization import Prediction
from jaxdiff.diffusion.samplers import DDIM, DDPM, Euler
from jaxdiff.diffusion.schedules import CosineSchedule, TabulatedSchedule
from jaxdiff.diffusion.thresholding import DynamicThreshold, NoThreshold, StaticThreshold
from jaxdiff.diffusion.time_grid import Leading, Linspace, Trailing
from jaxdiff.models.conditioners import Enlargement, LowResConditioner, NullText, TextConditioner
from jaxdiff.models.sampling import TrainedModel
from jaxdiff.systems.imagen_tiny import SR_256_TINY
from jaxdiff.systems.pipeline import SampleOptions
from jaxdiff.text.encoder import TextEmbedding
from jaxdiff.text.precomputed import PrecomputedTextEncoder, embed_captions
from jaxdiff.weights import captions, deepfloyd_pipeline, imagen, tree


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The small cascade, and the folder of its stages."""
    model, folder = small_if.cascade(), tmp_path_factory.mktemp("if")
    imagen.export(model, folder)
    return model, folder


@pytest.fixture
def copy(exported, tmp_path):
    shutil.copytree(exported[1], tmp_path / "if")
    return tmp_path / "if"


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("model_index.json", {"_class_name": "StableDiffusionPipeline"}, "'StableDiffusionPipeline' is not supported"),
        ("model_index.json", {"_class_name": None}, "_class_name = None is not supported, only IF's pipelines"),
        ("model_index.json", {"_class_name": ["IFPipeline"]}, r"\['IFPipeline'\] is not supported"),
        ("unet/config.json", {"sample_size": None}, "sample_size = None is not supported"),
        ("unet/config.json", {"sample_size": "16"}, "sample_size = '16' is not supported"),
        ("unet/config.json", {"sample_size": True}, "sample_size = True is not supported"),
        ("unet/config.json", {"sample_size": 15}, "side of 15 pixels is not a multiple of the network's stride 2"),
        ("unet/config.json", {"act_fn": "relu"}, "act_fn = 'relu' is not supported"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "prediction_type = 'sample' is not"),
        ("text_encoder/config.json", {"model_type": "clip"}, "model_type = 'clip' is not supported"),
    ],
)
def test_settings_of_a_pipeline(copy, file, values, message):
    path = copy / "base64" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(ValueError, match=message) as error:
        imagen.load(copy)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize("text", ["[]", "{", ""])
def test_an_index_that_is_none(copy, text):
    (copy / "sr256/model_index.json").write_text(text)
    with pytest.raises(ValueError, match=r"sr256/model_index\.json is not JSON with settings") as error:
        imagen.load(copy)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("base64/unet/config.json", "no U-Net at .*base64/unet: config.json is missing"),
        ("base64/unet/diffusion_pytorch_model.safetensors", "no weights at .*base64/unet"),
        ("base64/text_encoder/config.json", "no T5 at .*base64/text_encoder: config.json is missing"),
        ("base64/text_encoder/model.safetensors", "no weights at .*base64/text_encoder"),
    ],
)
def test_files_that_are_missing(copy, lost, message):
    (copy / lost).unlink()
    with pytest.raises(FileNotFoundError, match=message) as error:
        imagen.load(copy)
    assert "\n" not in str(error.value)


def test_stages_out_of_order(exported, copy):
    """A stage II alone, after none, or before its stage I; named, whatever the captions come from."""
    text = embed_captions(exported[0].text_encoder, small_if.CAPTIONS)
    first, second = copy / "base64", copy / "sr256"
    missing = "the first stage enlarges 16 pixels to 64: it must come after a stage that samples from text"
    for weights in ([second], [second, first], [second, second]):
        with pytest.raises(ValueError, match=missing) as error:
            imagen.load(weights, text=text)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="the 16 stage samples from text, but after the 16 stage only"):
        imagen.load([first, first], text=text)
    with pytest.raises(ValueError, match="the 64 stage enlarges 16 pixels, but the stage before it produces 64"):
        imagen.load([first, second, second], text=text)
    with pytest.raises(ValueError, match=missing):
        imagen.load(second)  # where no encoder is either
    with pytest.raises(FileNotFoundError, match="unet: no weights: a cascade has base64/"):
        imagen.load([second, first / "unet"])
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder of weights"):
        imagen.load([second, copy / "nowhere"])
    shutil.rmtree(first)
    for weights, options in ((copy, {}), (copy, {"text": text})):
        with pytest.raises(ValueError, match="if: holds sr256 without the stage before it"):
            imagen.load(weights, **options)
    shutil.rmtree(second)
    with pytest.raises(FileNotFoundError, match="if: an empty folder"):
        imagen.load(copy)


# Export


def changed(pipeline, number=0, **changes):
    """The pipeline with other settings of a box's model, of its conditioners, or of how it samples."""
    boxes = list(pipeline.boxes)
    model, sampling = boxes[number].model, boxes[number].sampling
    for kind in (TextConditioner, LowResConditioner):
        told = {name: value for name, value in changes.items() if name in kind.__dataclass_fields__}
        model = small.changed(model, kind, **told)
    model = replace(model, **{name: value for name, value in changes.items() if name in vars(model)})
    sampling = replace(sampling, **{name: value for name, value in changes.items() if name in vars(sampling)})
    boxes[number] = replace(boxes[number], model=model, sampling=sampling)
    return replace(pipeline, generator=boxes[0], decoders=tuple(boxes[1:]))


@pytest.mark.parametrize(
    ("number", "changes", "message"),
    [
        (0, {"null": NullText.ZEROS}, "no stage with text.null = NullText.ZEROS"),
        (1, {"null": NullText.ZEROS}, "no stage with text.null = NullText.ZEROS"),
        (0, {"prediction": Prediction.V}, "no stage with prediction = Prediction.V"),
        (1, {"enlargement": Enlargement.CUBIC}, "no stage with low_res.enlargement = Enlargement.CUBIC"),
        (
            0,
            {"schedule": TabulatedSchedule.linear()},
            r"no schedule = TabulatedSchedule\(.*: it has to be TabulatedSchedule.cosine",
        ),
        (0, {"schedule": TabulatedSchedule.cosine(offset=0.01)}, "no schedule = TabulatedSchedule"),
        (1, {"augmentation": CosineSchedule()}, "no low_res.augmentation = Cosine"),
        (0, {"sampler": Euler()}, r"no sampler = Euler\(\)"),
        (0, {"sampler": DDPM(0.5)}, r"no sampler = DDPM\(gamma=0.5\)"),
        (0, {"sampler": DDIM(0.5), "keep_eps": True}, r"no sampler = DDIM\(eta=0.5\)"),
        (0, {"sampler": DDIM()}, r"no sampler = DDIM\(eta=0.0\) with keep_eps = False"),
    ],
)
def test_what_diffusers_cannot_say(exported, tmp_path, number, changes, message):
    """Refused before a byte is written, of the stages before it too."""
    with pytest.raises(ValueError, match=message) as error:
        imagen.export(changed(exported[0], number, **changes), tmp_path / "if")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_networks_of_another_kind(exported, tmp_path):
    base = exported[0].generator
    efficient, silent = replace(small.BASE, side=16), SR_256_TINY
    epsilon = replace(silent, prediction=Prediction.EPSILON, residual=False)
    twofold = small.changed(exported[0].decoders[0].model, LowResConditioner, factor=2)
    for other, message in (
        (
            TrainedModel(efficient, small.random_params(efficient), small_sampling()),
            "no stage with text.null = .*ZEROS",
        ),
        (TrainedModel(silent, {}, small_sampling()), "no stage with prediction = Prediction.X0"),
        (TrainedModel(epsilon, {}, small_sampling()), "no stage with low_res.enlargement = Enlargement.CUBIC"),
        (replace(base, model=small.changed(base.model, TextConditioner, length=12)), "no stage with text.length = 12"),
        (replace(exported[0].decoders[0], model=twofold), "no stage with low_res.factor = 2"),
        (replace(base, params={}), "the U-Net to export does not fit the settings"),
        (replace(base, model=base.model.reading(77, 48)), r"pool/k/kernel \(24, 24\), not \(48, 48\)"),
        (replace(exported[0].decoders[0], params=base.params), r"does not fit the settings: .*missing \(aug_level"),
    ):
        with pytest.raises(ValueError, match=message):
            deepfloyd_pipeline.export_stage(other, tmp_path / "stage")
    unet = replace(base.model.unet, coordinates=True)
    with pytest.raises(ValueError, match="no coordinates = True"):
        deepfloyd_pipeline.export_stage(replace(base, model=replace(base.model, unet=unet)), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def small_sampling():
    return replace(small_if.cascade().generator.sampling, sampler=DDPM(0.0))


@pytest.mark.parametrize(
    "changes",
    [
        {"sampler": DDIM(), "keep_eps": True},
        {"sampler": DDPM(0.0), "thresholding": StaticThreshold()},
        {"sampler": DDPM(1.0), "thresholding": NoThreshold()},
        {"thresholding": DynamicThreshold(0.9, 2.0)},
        {"thresholding": DynamicThreshold(1.0, 1e6)},
        {"schedule": TabulatedSchedule.cosine(50)},
        {"spacing": Leading()},
        {"spacing": Leading(1)},
        {"spacing": Trailing()},
        {"spacing": Linspace()},
    ],
    ids=str,
)
def test_what_diffusers_can_say_comes_back(exported, tmp_path, changes):
    wanted = changed(exported[0], 0, **changes)
    deepfloyd_pipeline.export_stage(wanted.generator, tmp_path)
    found = deepfloyd_pipeline.load_stage(tmp_path)
    assert (found.model, found.sampling) == (wanted.generator.model, wanted.generator.sampling)


# Captions that were embedded before


@pytest.fixture(scope="module")
def embedded(exported):
    return embed_captions(exported[0].text_encoder, small_if.CAPTIONS)


def test_captions_are_written_and_read(exported, embedded, tmp_path):
    captions.save(tmp_path / "captions.safetensors", embedded)
    found = captions.load(tmp_path / "captions.safetensors")
    assert found.captions == ("", *small_if.CAPTIONS) and found.padding_is_read is True
    assert (found.width, found.length) == (24, 77) == (exported[0].text_encoder.width, exported[0].text_encoder.length)
    np.testing.assert_array_equal(found.embedding.tokens, embedded.embedding.tokens)
    np.testing.assert_array_equal(found.embedding.mask, embedded.embedding.mask)
    twice = [small_if.CAPTIONS[2], "", small_if.CAPTIONS[2]]
    np.testing.assert_allclose(found.encode(twice).tokens, exported[0].text_encoder.encode(twice).tokens, atol=1e-5)
    assert found.encode([]).tokens.shape == (0, 77, 24)


def test_the_same_pictures_without_the_encoder(exported, embedded):
    """Of the base; and what was not embedded is named, not drawn otherwise."""
    pipeline = changed(exported[0], sampler=DDIM(), steps=2, spacing=Leading())
    options = SampleOptions(seed=4, last=0)
    (wanted,) = pipeline.sample(small_if.CAPTIONS[:2], options)
    without = replace(pipeline, text_encoder=embedded)
    np.testing.assert_allclose(without.sample(small_if.CAPTIONS[:2], options)[0], wanted, atol=1e-4)
    assert wanted.std() > 0.1 and np.abs(wanted[0] - wanted[1]).max() > 0.1
    for prompts, negative in ((["a dog"], ""), (small_if.CAPTIONS[:2], "a dog")):
        with pytest.raises(ValueError, match="no embedding of 'a dog' among those of 4 captions") as error:
            without.sample(prompts, replace(options, negative=negative))
        assert "\n" not in str(error.value)


def test_embeddings_of_another_encoder(exported, embedded):
    """Of another width or length, or with padding masked: the cascade says so before anything is drawn."""
    text, mask, *_ = embedded.embedding
    for other, message in (
        (TextEmbedding(text[..., :8], mask), "embeddings of width 8, 77 of them; the 16 stage reads 24, 77 of them"),
        (TextEmbedding(text[:, :70], mask[:, :70]), "embeddings of width 24, 70 of them"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(exported[0], text_encoder=replace(embedded, embedding=other))
    with pytest.raises(ValueError, match="the 16 stage reads padding and empty captions too"):
        replace(exported[0], text_encoder=replace(embedded, padding_is_read=False))


def test_files_that_hold_no_captions(embedded, tmp_path):
    path = tmp_path / "captions.safetensors"
    with pytest.raises(FileNotFoundError):
        captions.load(path)
    captions.save(path, embedded)
    whole = path.read_bytes()
    params, told = tree.load_tree(path)
    text, mask = params["embeddings"], params["mask"]
    damaged = [
        (params, {}),
        (params, told | {"captions": "[1, 2, 3, 4]"}),
        (params, told | {"captions": '"abcd"'}),
        (params, told | {"captions": "{"}),
        (params, told | {"captions": '["a"]'}),
        (params, told | {"captions": "7"}),
        (params, told | {"whole": "3"}),
        ({"embeddings": text}, told),
        ({"embeddings": text[0], "mask": mask}, told),
        ({"embeddings": text, "mask": mask[:, :5]}, told),
        ({"embeddings": text, "mask": mask.astype("f4")}, told),
        ({"embeddings": {"a": text}, "mask": mask}, told),
        ({"embeddings": text.astype("i4"), "mask": mask}, told),
    ]
    for number, (tensors, metadata) in enumerate(damaged):
        tree.save_tree(path, tensors, metadata)
        with pytest.raises(ValueError, match="not a file of embedded captions") as error:
            pytest.fail(f"{number} was read: {captions.load(path).captions}")
        assert "\n" not in str(error.value) and str(path) in str(error.value)
    for content in (b"", whole[:40], whole[:-7], b"\x80\x04" + whole):
        path.write_bytes(content)
        with pytest.raises(ValueError) as error:
            captions.load(path)
        assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_captions_in_bfloat16(embedded, tmp_path):
    """Half the file; they are float32 when they come back."""
    text, mask, *_ = embedded.embedding
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), jnp.asarray(text))
    captions.save(
        tmp_path / "half.safetensors", PrecomputedTextEncoder(embedded.captions, TextEmbedding(half, mask), True)
    )
    found = captions.load(tmp_path / "half.safetensors").embedding.tokens
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, text, rtol=2**-8)
