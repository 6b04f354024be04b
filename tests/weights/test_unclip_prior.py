"""unCLIP's priors in diffusers' layout: the same numbers, names, settings and sampling loop."""

import itertools
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_unclip

from jaxdiff.core import trees
from jaxdiff.core.products import EmbeddingSpec
from jaxdiff.diffusion import noise
from jaxdiff.diffusion.guidance import Guidance
from jaxdiff.diffusion.parameterization import Prediction
from jaxdiff.diffusion.samplers import DDIM, DDPM
from jaxdiff.diffusion.schedules import CosineSchedule, TabulatedSchedule
from jaxdiff.diffusion.thresholding import DynamicThreshold, NoThreshold, StaticThreshold
from jaxdiff.diffusion.time_grid import Leading, Linspace
from jaxdiff.models.embedding_boxes import StandardizedPrior
from jaxdiff.models.sampling import SampleRequest, TrainedModel
from jaxdiff.nets.conditioning import Conditioning
from jaxdiff.nets.prior import PriorConfig
from jaxdiff.systems import karlo
from jaxdiff.text.encoder import TextEmbedding
from jaxdiff.weights import hub, unclip_prior, unclip_scheduler

SMALL = PriorConfig(embedding=12, text_width=12, text_length=7, width=32, layers=3, heads=4)
PUBLIC = {"Karlo": karlo.PRIOR.unet, "Kandinsky 2.2": PriorConfig(embedding=1280, text_width=1280)}


def test_same_numbers(tmp_path):
    """As those that diffusers computed."""
    wanted = small_unclip.write("prior", tmp_path)["0"]
    prior, given = unclip_prior.load_prior(tmp_path), small_unclip.inputs("prior")
    assert prior.config == SMALL
    conditioning = Conditioning(given["encoder_hidden_states"], given["attention_mask"], given["proj_embedding"])
    run = jax.jit(prior.config.module().apply)
    x, time = given["hidden_states"][:, None, None], given["timestep"].astype("f4")
    found = np.asarray(run({"params": prior.params}, x, time, conditioning))[:, 0, 0]
    error = np.abs(found - wanted).max() / np.abs(wanted).max()
    print(f"prior {error:.1e}")
    assert error < 5e-4 and np.abs(wanted[0] - wanted[1]).max() > 0.1


def test_the_kept_numbers_are_diffusers():
    small_unclip.check_kept("prior")


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_and_shapes(name, tmp_path):
    """Of the whole public network: nothing left over on either side, and its settings come back."""
    torch, _ = small_unclip.torch_and_diffusers()
    with torch.device("meta"):
        model = small_unclip.class_of("prior")(**small_unclip.PRIORS[name])
    values = json.loads(model.to_json_string())
    config = unclip_prior.read_config(values, tmp_path / "config.json")
    assert config == PUBLIC[name]
    shapes = unclip_prior.shapes_of(config)
    named, ours = unclip_prior.key_map(shapes), {}
    for path, leaf in trees.flatten(shapes).items():
        axes = (1,) * unclip_prior.AXES.get(named[path], 0)
        ours[named[path]] = axes + hub.theirs_shape(path, leaf.shape)
    assert ours == small_unclip.shapes_of(model)
    assert 1.0e9 < sum(leaf.size for leaf in jax.tree.leaves(shapes)) < 1.1e9
    assert unclip_prior.hub_config(config) | {"_diffusers_version": values["_diffusers_version"]} == values


def test_written_and_read(tmp_path):
    """Bit by bit, in either type; diffusers opens what is written."""
    small_unclip.write("prior", tmp_path / "a")
    prior = unclip_prior.load_prior(tmp_path / "a")
    unclip_prior.export_prior(prior, tmp_path / "b")
    again = unclip_prior.load_prior(tmp_path / "b")
    assert again.config == prior.config
    jax.tree.map(np.testing.assert_array_equal, again[1:], prior[1:])
    half = unclip_prior.load_prior(tmp_path / "b", "bfloat16")
    assert half.config.execution.dtype == "bfloat16"
    assert {leaf.dtype for leaf in jax.tree.leaves(half[1:])} == {jnp.dtype(jnp.bfloat16)}
    torch, diffusers = small_unclip.torch_and_diffusers()
    model = diffusers.PriorTransformer.from_pretrained(tmp_path / "b")
    for name, value in small_unclip.theirs("prior").state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize("weight", [1.0, 4.0])
def test_sampling_loop(weight, tmp_path, monkeypatch):
    """The embeddings of diffusers' loop from the same noise, with its clipping and statistics."""
    torch, diffusers = small_unclip.torch_and_diffusers()
    model, count, steps = small_unclip.theirs("prior"), 3, 6
    small_unclip.write("prior", tmp_path)
    found = unclip_prior.load_prior(tmp_path)
    settings = {"prediction_type": "sample", "clip_sample_range": 1.5, "variance_type": "fixed_small_log"}
    scheduler = diffusers.UnCLIPScheduler(**settings)
    scheduler.save_pretrained(tmp_path)
    schedule, prediction, fields = unclip_scheduler.read(tmp_path / "scheduler_config.json")
    trained = TrainedModel(
        replace(karlo.prior_model(found.config), schedule=schedule, prediction=prediction),
        found.params,
        replace(karlo.SAMPLING_PRIOR, steps=steps, guidance=Guidance(weight), **fields),
    )
    box = StandardizedPrior(trained.model, trained.params, trained.sampling, mean=found.mean, deviation=found.deviation)
    rng = np.random.default_rng(3)
    texts = [
        TextEmbedding(
            jnp.asarray(rng.normal(size=(count, 7, 12)), jnp.float32),
            jnp.arange(7) < jnp.asarray(lengths)[:, None],
            jnp.asarray(rng.normal(size=(count, 12)), jnp.float32),
        )
        for lengths in ([7, 3, 5], [2, 2, 2])
    ]
    keys = noise.sample_keys(jax.random.key(0), jnp.arange(count))
    ours = box.generate(SampleRequest(keys, (1, 1), *texts))
    assert box.produces == EmbeddingSpec(12) and ours.shape == (count, 1, 1, 12)
    both = [torch.tensor(np.concatenate([np.asarray(part[i]) for part in texts[::-1]])) for i in range(3)]
    x = torch.tensor(np.asarray(noise.normal_like(noise.fold(keys, 0), (12,))))
    scheduler.set_timesteps(steps)
    for i, (t, after) in enumerate(itertools.pairwise([*scheduler.timesteps, None])):
        drawn = torch.tensor(np.asarray(noise.normal_like(noise.fold(noise.fold(keys, 1), i), (12,))))
        monkeypatch.setattr("diffusers.schedulers.scheduling_unclip.randn_tensor", lambda *_, drawn=drawn, **__: drawn)
        with torch.no_grad():
            output = model(torch.cat([x, x]), t, both[2], both[0], both[1]).predicted_image_embedding
        null, seen = output.chunk(2)
        x = scheduler.step(null + weight * (seen - null), t, x, prev_timestep=after).prev_sample
    wanted = model.post_process_latents(x).detach().numpy()
    error = np.abs(ours[:, 0, 0] - wanted).mean() / np.abs(wanted).max()
    print(f"loop {error:.1e}")
    assert error < 2 / 255 and np.abs(ours[:, 0, 0] - wanted).max() < 1e-3 * np.abs(wanted).max()
    np.testing.assert_allclose(box.standardized(box.restored(ours)), ours, atol=1e-5)
    assert box.reads == (7, 12) and box.batch_size(3) == 3 and (box.side, box.steps) == (1, steps)


def test_timesteps():
    """Those of diffusers' scheduler, for any number of steps."""
    _, diffusers = small_unclip.torch_and_diffusers()
    for steps in range(2, 200):
        scheduler = diffusers.UnCLIPScheduler()
        scheduler.set_timesteps(steps)
        np.testing.assert_array_equal(Linspace().entries(1000, steps)[::-1], scheduler.timesteps.numpy())


SCHEDULERS = {
    "prior": ({"prediction_type": "sample", "clip_sample_range": 5.0}, False),
    "decoder": ({"variance_type": "learned_range"}, True),
    "super-resolution": ({}, False),
    "not clipped": ({"clip_sample": False, "num_train_timesteps": 50}, False),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name, tmp_path):
    _, diffusers = small_unclip.torch_and_diffusers()
    settings, learned = SCHEDULERS[name]
    theirs = diffusers.UnCLIPScheduler(**settings)
    theirs.save_pretrained(tmp_path)
    schedule, prediction, fields = unclip_scheduler.read(tmp_path / "scheduler_config.json", learned)
    alpha_bar = np.asarray(schedule.alpha_bar)
    np.testing.assert_allclose(alpha_bar, theirs.alphas_cumprod.numpy(), rtol=1e-4)
    assert fields["sampler"] == DDPM(None if learned else 0.0)
    sampling = replace(karlo.SAMPLING_PRIOR, **fields)
    written = unclip_scheduler.described(schedule, prediction, sampling)
    assert {key: theirs.config[key] for key in written if key != "_class_name"} == {
        key: value for key, value in written.items() if key != "_class_name"
    }


def test_karlos_preset():
    """It is the public scheduler's."""
    written = unclip_scheduler.described(karlo.PRIOR.schedule, karlo.PRIOR.prediction, karlo.SAMPLING_PRIOR)
    assert written["prediction_type"] == "sample" and written["clip_sample_range"] == 5.0
    assert karlo.PRIOR.reading(*karlo.CLIP_L) == karlo.PRIOR


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "_class_name = 'UNet2DConditionModel' .* only 'PriorTransformer'"),
        ({"unheard_of": 1}, "unknown settings of PriorTransformer: unheard_of"),
        ({"added_emb_type": None}, "added_emb_type = None"),
        ({"encoder_hid_proj_type": None}, "encoder_hid_proj_type"),
        ({"additional_embeddings": 3}, "additional_embeddings = 3"),
        ({"norm_in_type": "layer"}, "norm_in_type"),
        ({"clip_embed_dim": 13}, "clip_embed_dim = 13 .* None or 12"),
        ({"num_layers": 0}, "num_layers = 0"),
        ({"num_attention_heads": 2**20}, "num_attention_heads = 1048576 .* a width of up to"),
        ({"num_layers": 2}, r"does not fit the settings: 16 unexpected \(transformer_blocks.2"),
        ({"embedding_dim": 14}, r"of another shape .*clip_mean \(12,\), not \(14,\)"),
    ],
)
def test_refused_folders(change, message, tmp_path):
    small_unclip.write("prior", tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None or key in change}))
    with pytest.raises(ValueError, match=message) as error:
        unclip_prior.load_prior(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no prior at"):
        unclip_prior.load_prior(tmp_path)
    small_unclip.write("prior", tmp_path)
    (tmp_path / small_unclip.FILE).unlink()
    with pytest.raises(FileNotFoundError, match="no weights at"):
        unclip_prior.load_prior(tmp_path)


def test_what_diffusers_cannot_express(tmp_path):
    small_unclip.write("prior", tmp_path / "a")
    prior = unclip_prior.load_prior(tmp_path / "a")
    for change, message in (
        ({"text_width": 24}, "no text_width = 24: it has to be 12"),
        ({"feed_forward": 2}, "no feed_forward = 2: it has to be 4"),
        ({"layers": 2}, r"the prior to export does not fit the settings: 16 unexpected"),
    ):
        with pytest.raises(ValueError, match=message):
            unclip_prior.export_prior(prior._replace(config=replace(prior.config, **change)), tmp_path / "b")
    assert not (tmp_path / "b").exists()
    table, x0, sampling = TabulatedSchedule.cosine(), Prediction.X0, karlo.SAMPLING_PRIOR
    for arguments, message in (
        ((CosineSchedule(), x0, sampling), "no schedule = CosineSchedule"),
        ((TabulatedSchedule.linear(), x0, sampling), "no schedule"),
        ((table, Prediction.V, sampling), "no prediction"),
        ((table, x0, replace(sampling, sampler=DDIM())), "no sampler = DDIM"),
        ((table, x0, replace(sampling, sampler=DDPM(1.0))), "no sampler = DDPM"),
        ((table, x0, replace(sampling, spacing=Leading())), "no spacing = Leading"),
        ((table, x0, replace(sampling, thresholding=DynamicThreshold())), "no thresholding"),
        ((table, x0, replace(sampling, keep_eps=True)), "no keep_eps"),
    ):
        with pytest.raises(ValueError, match=message):
            unclip_scheduler.described(*arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variance_type": "learned_range"}, "variance_type = 'learned_range' .* only 'fixed_small_log'"),
        ({"prediction_type": "v_prediction"}, "prediction_type"),
        ({"clip_sample_range": 0}, "clip_sample_range = 0"),
        ({"beta_schedule": "linear"}, "beta_schedule"),
        ({"num_train_timesteps": 1}, "num_train_timesteps = 1"),
        ({"_class_name": "DDPMScheduler"}, "_class_name"),
        ({"unheard_of": 1}, "unknown settings of UnCLIPScheduler"),
    ],
)
def test_refused_schedulers(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        unclip_scheduler.from_values(tmp_path, {"_class_name": "UnCLIPScheduler"} | change)
    assert unclip_scheduler.from_values(tmp_path, {"clip_sample": False}).sampling["thresholding"] == NoThreshold()
    assert unclip_scheduler.from_values(tmp_path, {}).sampling["thresholding"] == StaticThreshold()


def test_statistics_of_another_width(tmp_path):
    small_unclip.write("prior", tmp_path)
    prior = unclip_prior.load_prior(tmp_path)
    trained = TrainedModel(karlo.prior_model(prior.config), prior.params, karlo.SAMPLING_PRIOR)
    with pytest.raises(ValueError, match="mean of 3 numbers is not one of embeddings of width 12"):
        StandardizedPrior(trained.model, {}, trained.sampling, mean=jnp.zeros(3), deviation=jnp.ones(3))
