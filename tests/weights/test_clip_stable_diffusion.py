"""The text towers of Stable Diffusion 1, 2 and XL, narrow but as deep as the public ones, with the tokenizers in the
package: against transformers, and against diffusers' `encode_prompt`."""

from dataclasses import replace

import numpy as np
import pytest

from jaxdiff.text.clip import Pooling
from jaxdiff.text.clip_tokenizer import Padding, clip_tokenizer
from jaxdiff.text.combined import Axis, CombinedTextEncoder
from jaxdiff.weights import clip

CAPTIONS = ["a photo of a cat", "", "Hi! A dog?! 🎉 and Émile's <b>house</b>", "word " * 90]
NEGATIVE = ["blurry!!", "ugly, low quality", "", "x"]
COMMON = {
    "model_type": "clip_text_model",
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,  # so in all published configurations: the largest id
}
KINDS = {
    "1": ("CLIPTextModel", {"num_hidden_layers": 12, "hidden_act": "quick_gelu", "projection_dim": 768}),
    "2": ("CLIPTextModel", {"num_hidden_layers": 23, "hidden_act": "gelu", "projection_dim": 512}),
    "XL 1": ("CLIPTextModel", {"num_hidden_layers": 12, "hidden_act": "quick_gelu", "projection_dim": 768}),
    "XL 2": ("CLIPTextModelWithProjection", {"num_hidden_layers": 32, "hidden_act": "gelu", "projection_dim": 16}),
}
SETTINGS = {
    "1": {},
    "2": {},
    "XL 1": {"skip_last": 1, "final_norm": False, "pooling": Pooling.NONE},
    "XL 2": {"skip_last": 1, "final_norm": False},
}
PADDING = {"1": Padding.END, "2": Padding.EXCLAMATION, "XL 1": Padding.END, "XL 2": Padding.EXCLAMATION}

pytestmark = pytest.mark.filterwarnings("ignore:prompt longer than 77 tokens cut short")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """transformers' random model and our encoder of the folder that it wrote, by kind."""
    torch = pytest.importorskip("torch", reason="transformers' CLIP is PyTorch's")
    import transformers

    torch.manual_seed(0)
    made = {}
    for kind, (name, values) in KINDS.items():
        model = getattr(transformers, name)(transformers.CLIPTextConfig(**COMMON, **values))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1) / 2, std=0.2)
        folder = tmp_path_factory.mktemp("tower")
        model.eval().save_pretrained(folder)
        encoder = clip.load_text_encoder(folder, tokenizer=clip_tokenizer(PADDING[kind]))
        made[kind] = model, replace(encoder, **SETTINGS[kind])
    return made


def near(found, expected):
    expected = expected.detach().numpy()
    assert found.shape == expected.shape and np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize("kind", KINDS)
def test_states_and_pooled(kind, pairs):
    import torch

    model, encoder = pairs[kind]
    words = encoder.tokenizer(CAPTIONS, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    assert words.input_ids[1, 2] == (49407 if PADDING[kind] is Padding.END else 0)
    with torch.no_grad():
        expected = model(input_ids=words.input_ids, output_hidden_states=True)
    found = encoder.encode(CAPTIONS)
    np.testing.assert_array_equal(found.ids, words.input_ids)
    assert found.mask.all() and encoder.config.text.eos_id is None
    near(found.tokens, expected.hidden_states[-2] if "XL" in kind else expected.last_hidden_state)
    if kind == "XL 1":
        assert found.pooled is None
    else:
        near(found.pooled, expected.text_embeds if kind == "XL 2" else expected.pooler_output)


def test_the_pair_of_sdxl_is_diffusers(pairs):
    from diffusers import StableDiffusionXLPipeline

    (model, encoder), (model_2, encoder_2) = pairs["XL 1"], pairs["XL 2"]
    pipeline = StableDiffusionXLPipeline(
        vae=None,
        text_encoder=model,
        text_encoder_2=model_2,
        tokenizer=encoder.tokenizer,
        tokenizer_2=encoder_2.tokenizer,
        unet=None,
        scheduler=None,
        add_watermarker=False,
    )
    pair = CombinedTextEncoder((encoder, encoder_2), Axis.FEATURES)
    assert (pair.width, pair.length) == (32, 77)
    states, negative, pooled, negative_pooled = pipeline.encode_prompt(CAPTIONS, negative_prompt=NEGATIVE, device="cpu")
    for captions, tokens, vector in ((CAPTIONS, states, pooled), (NEGATIVE, negative, negative_pooled)):
        found = pair.encode(captions)
        near(found.tokens, tokens)
        near(found.pooled, vector)
    skipped, *_ = pipeline.encode_prompt(CAPTIONS, do_classifier_free_guidance=False, device="cpu", clip_skip=1)
    deeper = CombinedTextEncoder((replace(encoder, skip_last=2), replace(encoder_2, skip_last=2)), Axis.FEATURES)
    near(deeper.encode(CAPTIONS).tokens, skipped)
