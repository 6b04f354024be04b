"""Stable Diffusion that cannot be loaded or sampled: one line, which names the culprit."""

import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_stable_diffusion as small
from safetensors.numpy import save_file
from small_stable_diffusion import ONE_LEVEL

from jaxdiff.systems.init_image import InitImage
from jaxdiff.systems.pipeline import INPUT, After, Pipeline, SampleOptions
from jaxdiff.weights import autoencoder, stable_diffusion
from jaxdiff.weights.stable_diffusion import Reading

UNET = "model.diffusion_model."
LEVELS = ("multipliers", "blocks", "transformer_layers", "heads", "cross_only")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return small.pair(tmp_path_factory.mktemp("one"), "SD 1", **ONE_LEVEL)


@pytest.fixture
def copy(pair, tmp_path):
    shutil.copytree(pair.folder, tmp_path / "copy")
    return tmp_path / "copy"


def refused(match, kind, call, *arguments, **options):
    with pytest.raises(kind, match=match) as error:
        call(*arguments, **options)
    assert "\n" not in str(error.value), error.value


def rewrite(path, **change):
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def no_reading(*arguments):
    raise AssertionError("a tensor was read")


@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        ("model_index.json", {"_class_name": "FluxPipeline"}, "_class_name = 'FluxPipeline' is not supported"),
        (
            "model_index.json",
            {"_class_name": "StableDiffusionInstructPix2PixPipeline"},
            "_class_name = 'StableDiffusionInstructPix2PixPipeline' is not supported",
        ),
        ("unet/config.json", {"in_channels": 8}, "reads an image to be edited beside the latents, which is not"),
        ("unet/config.json", {"in_channels": 5}, "reads a depth map beside the latents, which is not supported"),
        ("unet/config.json", {"in_channels": 7}, "reads 3 channels beside the latents, which is not supported"),
        ("unet/config.json", {"sample_size": "64"}, "sample_size = '64' is not supported"),
        ("unet/config.json", {"cross_attention_dim": 24}, "copy/unet.* of another shape"),
        ("vae/config.json", {"latent_channels": 8}, "copy/vae/config.json: an autoencoder of 8 channels, but .* 4"),
        ("vae/config.json", {"_class_name": "AutoencoderTiny"}, "_class_name = 'AutoencoderTiny' is not supported"),
        ("scheduler/scheduler_config.json", {"_class_name": "LCMScheduler"}, "_class_name = 'LCMScheduler' is not"),
        ("text_encoder/config.json", {"model_type": "t5"}, "model_type = 't5' is not supported"),
    ],
)
def test_settings(copy, path, change, message):
    """Refused before the network is read."""
    rewrite(copy / path, **change)
    refused(message, ValueError, stable_diffusion.load, copy)


@pytest.mark.parametrize(
    ("lost", "kind", "message"),
    [
        ("unet", FileNotFoundError, "no unet at .*copy/unet: config.json is missing"),
        ("vae", ValueError, "copy has no vae: its pipeline needs one"),
        ("text_encoder", ValueError, "copy has no text_encoder: name one"),
        ("scheduler", FileNotFoundError, "copy/scheduler/scheduler_config.json is missing"),
        ("model_index.json", FileNotFoundError, "no pipeline at .*copy: model_index.json is missing"),
        ("unet/diffusion_pytorch_model.safetensors", FileNotFoundError, "no weights at .*copy/unet"),
    ],
)
def test_what_is_missing(copy, lost, kind, message):
    path = copy / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    refused(message, kind, stable_diffusion.load, copy)


def test_another_autoencoder(pair, tmp_path):
    for name, change, message in (
        ("stride", {"channels": (8, 8, 8)}, "stride/config.json: an autoencoder of stride 4, but .* have stride 8"),
        ("channels", {"latent_channels": 16}, "channels/config.json: an autoencoder of 16 channels, but .* 4 channels"),
    ):
        config = replace(pair.ours.decoders[0].config, **change)
        settings = autoencoder.Settings(config)
        params = jax.tree.map(
            lambda leaf: np.zeros(leaf.shape, "f4"), autoencoder.sizes.shapes_of(autoencoder._init, config)
        )
        autoencoder.export(settings, params, tmp_path / name)
        refused(message, ValueError, stable_diffusion.load, pair.folder, Reading(vae=tmp_path / name))


def test_text_encoders_that_do_not_fit(pair, copy):
    narrow = small.torch_text("quick_gelu", 24)
    narrow.save_pretrained(copy / "text_encoder")
    message = "embeddings of width 24, 77 of them; the 8 stage reads 32, 77 of them"
    refused(message, ValueError, stable_diffusion.load, copy)
    refused("prompts must be a list", ValueError, pair.ours.sample, "a red cat")


def test_xl_and_its_refiner(tmp_path):
    pair = small.pair(tmp_path, "SDXL", "StableDiffusionXLPipeline", **ONE_LEVEL)
    small.torch_text("gelu", 32, 24).save_pretrained(tmp_path / "text_encoder_2")
    message = "the U-Net reads one of width 32 as pooled text, the text encoders give one of width 24"
    refused(message, ValueError, stable_diffusion.load, tmp_path)
    rewrite(tmp_path / "model_index.json", requires_aesthetics_score=True)
    refused("unet/config.json: a refiner", ValueError, stable_diffusion.load, tmp_path)
    assert pair.ours.generator.model.text.pooled == 32


def test_single_files(tmp_path):
    zeros = lambda *shape: np.zeros(shape, np.float16)  # noqa: E731
    key = f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    vector = f"{UNET}label_emb.0.0.weight"

    others = {"first_stage_model.quant_conv.bias": (8,), "conditioner.embedders.0.model.ln_final.bias": (1280,)}

    def unet(channels, width, **others):
        first = {f"{UNET}input_blocks.0.0.weight": zeros(32, channels, 3, 3), key: zeros(32, width)}
        return first | {name: zeros(*shape) for name, shape in others.items()}

    files = {
        "a model of FLUX or its kind": {"double_blocks.0.img_attn.qkv.weight": zeros(4, 4)},
        "a LoRA with kohya's names": {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": zeros(4, 4)},
        "InstructPix2Pix": unet(8, 768),
        "a depth-to-image model": unet(5, 1024),
        "a U-Net of 4 input channels and text of width 32": unet(4, 32),
        "holds no autoencoder .* pass vae=": unet(4, 768),
        "a refiner, which reads an aesthetic score": unet(4, 1280, **{vector: (1536, 2560)} | others),
    }
    for number, (message, tensors) in enumerate(files.items()):
        path = tmp_path / f"{number}.safetensors"
        save_file(tensors, path)
        refused(message, ValueError, stable_diffusion.load, path)
    pickle = tmp_path / "v1-5.ckpt"
    pickle.write_bytes(b"PK\x03\x04 of PyTorch")
    refused("v1-5.ckpt is a pickle, which can run code .*v1-5.safetensors", ValueError, stable_diffusion.load, pickle)
    refused(
        "no weights at .*gone.safetensors",
        FileNotFoundError,
        stable_diffusion.load,
        tmp_path / "gone.safetensors",
    )


def test_sizes_and_masks(pair, monkeypatch):
    """Before anything is sampled."""
    sample = pair.ours.sample
    monkeypatch.setattr(type(pair.ours.generator), "generate", no_reading)
    init = InitImage(small.IMAGE, (0.5,), small.MASK[:-1])
    refused("a mask of 63×128 pixels for an image of 64×128", ValueError, sample, ["a"], SampleOptions(init=init))
    refused(
        "2 strengths for 1 stages", ValueError, sample, ["a"], SampleOptions(init=InitImage(small.IMAGE, (0.5, 1.0)))
    )
    refused(
        "strength 0.01 leaves no step", ValueError, sample, ["a"], SampleOptions(init=InitImage(small.IMAGE, (0.01,)))
    )
    both = {name: 2 * getattr(pair.ours.generator.model.unet, name) for name in LEVELS}
    levels = replace(pair.ours.generator.model.unet, **both)
    two = replace(pair.ours.generator, model=replace(pair.ours.generator.model, unet=levels))
    pipeline = replace(pair.ours, generator=two)
    refused(
        "a side of 9 .* not a multiple of the network's stride 2",
        ValueError,
        pipeline.sample,
        ["a"],
        SampleOptions(size=(8, 9)),
    )


def test_upscalers(tmp_path):
    ours = small.pair(tmp_path, "upscaler", "StableDiffusionUpscalePipeline", **ONE_LEVEL).ours
    refused("starts from images of 3 channels", ValueError, ours.sample, ["a"])
    grey = After(INPUT, small.SMALL_IMAGES[:1, ..., :1])
    refused(
        "1×8×16×1, which is not a batch of images of 3 channels",
        ValueError,
        ours.sample,
        ["a"],
        SampleOptions(after=grey),
    )
    noisy = replace(ours.generator, sampling=replace(ours.generator.sampling, aug_level=0.5))
    start = After(INPUT, small.SMALL_IMAGES[:1])
    refused(
        "aug_level 0.5 is above 0.35",
        ValueError,
        replace(ours, generator=noisy).sample,
        ["a"],
        SampleOptions(after=start),
    )


def test_values_that_are_not_finite(pair):
    """Of the U-Net: an error. Of an autoencoder in half precision: a warning, and the images of float32."""
    ours = small.sampled_as(pair.ours, pair.theirs, small.STEPS)
    generator = ours.generator
    broken = jax.tree.map(lambda leaf: leaf, generator.params)
    broken["head"]["bias"] = broken["head"]["bias"].at[0].set(jnp.nan)
    one = Pipeline(ours.text_encoder, replace(generator, params=broken), ours.decoders)
    refused("the 8 stage produced values that are not finite", ValueError, one.sample, [small.PROMPT], small.options())
    decoder = ours.decoders[0]
    params = jax.tree.map(lambda leaf: leaf, decoder.params)
    params["decoder"]["head"]["bias"] = params["decoder"]["head"]["bias"].at[0].set(3.4e38)  # bfloat16 ends at 3.39e38
    plain = replace(decoder, params=params, upcast=True)
    half = replace(plain, config=replace(decoder.config, dtype="bfloat16"), upcast=False)
    wanted = replace(ours, decoders=(plain,)).sample([small.PROMPT], small.options())[-1]
    with pytest.warns(UserWarning, match="in bfloat16 gave values that are not finite: it is repeated in float32"):
        found = replace(ours, decoders=(half,)).sample([small.PROMPT], small.options())[-1]
    np.testing.assert_array_equal(found, wanted)
