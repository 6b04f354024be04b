"""The table of all models that the commands train, sample, plan and measure. A new system adds lines here."""

from pathlib import Path

from experiments.options.training import PresetOptimizer
from experiments.tasks.adapters import (
    ControlSettings,
    ControlTask,
    LoRASettings,
    LoRATask,
    WholeSettings,
    WholeTask,
)
from experiments.tasks.autoencoder import AutoencoderTask
from experiments.tasks.autoencoder import Preset as AutoencoderPreset
from experiments.tasks.autoencoder import Settings as AutoencoderSettings
from experiments.tasks.classifier import ClassifierTask
from experiments.tasks.classifier import Settings as ClassifierSettings
from experiments.tasks.clip import CLIPTask
from experiments.tasks.clip import Settings as CLIPSettings
from experiments.tasks.dalle import Settings as TransformerSettings
from experiments.tasks.dalle import TransformerTask
from experiments.tasks.diffusion import DiffusionTask, Preset, Settings
from experiments.tasks.dvae import DVAETask
from experiments.tasks.dvae import Preset as DVAEPreset
from experiments.tasks.dvae import Settings as DVAESettings
from experiments.tasks.latents import LatentSettings, LatentTask
from experiments.tasks.noise_levels import NoiseLevels
from experiments.tasks.prior_codes import Preset as PriorCodesPreset
from experiments.tasks.prior_codes import PriorCodesTask
from experiments.tasks.prior_codes import Settings as PriorCodesSettings
from experiments.tasks.t5 import Settings as T5Settings
from experiments.tasks.t5 import T5Task
from experiments.tasks.task import Task
from experiments.tasks.transformers import Preset as TransformerPreset
from experiments.tasks.unclip import DecoderTask, PriorTask, UnCLIPSettings
from jaxdiff.core.products import EmbeddingSpec
from jaxdiff.systems import (
    dalle,
    dalle_tiny,
    imagen,
    imagen_small,
    imagen_tiny,
    stable_diffusion,
    stable_diffusion_tiny,
    unclip,
    unclip_tiny,
)

SHIPPED_T5 = 24, 128
"""Length and width of the shipped text encoder's embeddings."""


SHIPPED_CLIP = 24, 128
"""Length and width of the shipped CLIP's states."""
SMALL = PresetOptimizer("muon", 2e-3)
"""Networks for CPUs: few updates on few images, where Muon learns most."""
MIDDLE = PresetOptimizer("adam", 2e-4)
"""Between SMALL and the papers' 1e-4; DDPM trains a model of this size (36 M) at 2e-4."""
EARLY = NoiseLevels((-9.0, 0.0), 0.75, snr_power=0.0)
"""Noise levels that hide everything but shapes and colours, which a small base model must learn first."""


LATENT = {
    "tiny": Preset(stable_diffusion_tiny.UNET_TINY, stable_diffusion_tiny.SAMPLING_TINY, SHIPPED_T5, SMALL),
    "1": Preset(stable_diffusion.SD_1, stable_diffusion.SAMPLING, (77, 768)),
    "2": Preset(stable_diffusion.SD_2_V, stable_diffusion.SAMPLING, (77, 1024)),
    "xl": Preset(stable_diffusion.SD_XL, stable_diffusion.SAMPLING_XL, (77, 2048)),
}
"""Latent diffusion models."""


def _folder(name: str) -> Path:
    return Path("runs") / name


TASKS: dict[str, Task] = {
    "imagen.base64": DiffusionTask(
        "Imagen's base model: 64×64 images from captions",
        {
            "tiny": Preset(imagen_tiny.BASE_64_TINY, imagen_tiny.SAMPLING_BASE_TINY, SHIPPED_T5, SMALL, EARLY),
            "quick": Preset(imagen_tiny.BASE_64_QUICK, imagen_tiny.SAMPLING_BASE_QUICK, SHIPPED_T5, SMALL, EARLY),
            "50m": Preset(imagen_small.BASE_64_50M, imagen_small.SAMPLING_BASE_SMALL, imagen.T5_XXL, MIDDLE),
            "120m": Preset(imagen_small.BASE_64_120M, imagen_small.SAMPLING_BASE_SMALL, imagen.T5_XXL, MIDDLE),
            "300m": Preset(imagen.BASE_64_300M, imagen.SAMPLING_BASE, imagen.T5_XXL),
            "500m": Preset(imagen.BASE_64_500M, imagen.SAMPLING_BASE, imagen.T5_XXL),
            "2b": Preset(imagen.BASE_64_2B, imagen.SAMPLING_BASE, imagen.T5_XXL, PresetOptimizer("adafactor", 1e-4)),
        },
        Settings(_folder("base64")),
    ),
    "imagen.sr256": DiffusionTask(
        "Imagen's super-resolution to 256×256",
        {
            "tiny": Preset(imagen_tiny.SR_256_TINY, imagen_tiny.SAMPLING_SR_TINY, SHIPPED_T5, SMALL),
            "small": Preset(imagen_small.SR_256_SMALL, imagen_small.SAMPLING_SR_SMALL, imagen.T5_XXL, MIDDLE),
            "medium": Preset(imagen_small.SR_256_MEDIUM, imagen_small.SAMPLING_SR_SMALL, imagen.T5_XXL, MIDDLE),
            "paper": Preset(imagen.SR_256, imagen.SAMPLING_SR, imagen.T5_XXL),
        },
        Settings(_folder("sr256")),
    ),
    "imagen.sr1024": DiffusionTask(
        "Imagen's super-resolution to 1024×1024",
        {
            "tiny": Preset(imagen_tiny.SR_1024_TINY, imagen_tiny.SAMPLING_SR_TINY, SHIPPED_T5, SMALL),
            "small": Preset(imagen_small.SR_1024_SMALL, imagen_small.SAMPLING_SR_SMALL, imagen.T5_XXL, MIDDLE),
            "medium": Preset(imagen_small.SR_1024_MEDIUM, imagen_small.SAMPLING_SR_SMALL, imagen.T5_XXL, MIDDLE),
            "paper": Preset(imagen.SR_1024, imagen.SAMPLING_SR, imagen.T5_XXL),
        },
        Settings(_folder("sr1024")),
    ),
    "imagen.base32": DiffusionTask(
        "base models of 32×32 pixels, for the curves and the composition benchmark",
        {
            "micro": Preset(imagen_tiny.BASE_32_MICRO, imagen_tiny.SAMPLING_BASE_32, SHIPPED_T5, SMALL),
            "small": Preset(imagen_tiny.BASE_32_SMALL, imagen_tiny.SAMPLING_BASE_32, SHIPPED_T5, SMALL),
            "medium": Preset(imagen_tiny.BASE_32_MEDIUM, imagen_tiny.SAMPLING_BASE_32, SHIPPED_T5, SMALL),
            "tiny": Preset(imagen_tiny.BASE_32_TINY, imagen_tiny.SAMPLING_BASE_32, SHIPPED_T5, SMALL),
        },
        Settings(_folder("base32")),
    ),
    "sd.autoencoder": AutoencoderTask(
        "an autoencoder of images, for latent diffusion",
        {
            "tiny": AutoencoderPreset(stable_diffusion_tiny.AUTOENCODER_TINY, SMALL),
            "tiny-f4": AutoencoderPreset(stable_diffusion_tiny.AUTOENCODER_TINY_F4, SMALL),
            "tiny-vq": AutoencoderPreset(stable_diffusion_tiny.AUTOENCODER_TINY_VQ, SMALL),
            "tiny-vq-f2": AutoencoderPreset(stable_diffusion_tiny.AUTOENCODER_TINY_VQ_F2, SMALL),
            "kl-f8": AutoencoderPreset(stable_diffusion.KL_F8),
            "kl-f4": AutoencoderPreset(stable_diffusion.KL_F4),
            "vq-f8": AutoencoderPreset(stable_diffusion.VQ_F8),
            "vq-f4": AutoencoderPreset(stable_diffusion.VQ_F4),
        },
        AutoencoderSettings(_folder("autoencoder")),
    ),
    "sd.unet": LatentTask(
        "a latent diffusion model, in the latents of a trained autoencoder",
        LATENT,
        LatentSettings(_folder("unet")),
    ),
    "sd.lora": LoRATask(
        "a LoRA of a latent diffusion model",
        {"default": PresetOptimizer("adam", 1e-4)},
        LoRASettings(_folder("lora")),
        LATENT,
    ),
    "sd.controlnet": ControlTask(
        "a ControlNet of a latent diffusion model, for edge maps",
        {"default": PresetOptimizer("adam", 1e-5)},
        ControlSettings(_folder("controlnet")),
        LATENT,
    ),
    "sd.finetune": WholeTask(
        "all parameters of a Stable Diffusion's U-Net",
        {"default": PresetOptimizer("adam", 1e-5)},
        WholeSettings(_folder("finetune")),
        LATENT,
    ),
    "dalle.dvae": DVAETask(
        "a discrete VAE of images, for DALL·E 1",
        {"tiny": DVAEPreset(dalle_tiny.DVAE_TINY, SMALL), "paper": DVAEPreset(dalle.DVAE)},
        DVAESettings(_folder("dvae")),
    ),
    "dalle.transformer": TransformerTask(
        "DALL·E 1's transformer, in the codes of a trained dVAE",
        {
            "tiny": TransformerPreset(dalle_tiny.TRANSFORMER_TINY, dalle_tiny.SAMPLING_TINY, SMALL),
            "paper": TransformerPreset(dalle.TRANSFORMER),
        },
        TransformerSettings(_folder("dalle")),
    ),
    "unclip.prior": PriorTask(
        "DALL·E 2's diffusion prior: CLIP's image embeddings from captions",
        {
            "tiny": Preset(unclip_tiny.PRIOR_TINY, unclip_tiny.SAMPLING_PRIOR_TINY, SHIPPED_CLIP, SMALL),
            "paper": Preset(unclip.PRIOR, unclip.SAMPLING_PRIOR, unclip.CLIP_H, PresetOptimizer("adam", 1.1e-4)),
        },
        UnCLIPSettings(_folder("prior")),
    ),
    "unclip.autoregressive": PriorCodesTask(
        "DALL·E 2's autoregressive prior: codes of CLIP's image embeddings from captions",
        {
            "tiny": PriorCodesPreset(
                unclip_tiny.PRIOR_CODES_TINY,
                unclip_tiny.SAMPLING_PRIOR_CODES_TINY,
                SMALL,
                embeddings=EmbeddingSpec(unclip_tiny.WIDTH, unclip_tiny.NORM),
            ),
            "paper": PriorCodesPreset(
                unclip.PRIOR_CODES,
                optimizer=PresetOptimizer("adam", 1.6e-4),
                embeddings=EmbeddingSpec(unclip.CLIP_H[1], unclip.SCALE),
            ),
        },
        PriorCodesSettings(_folder("prior")),
    ),
    "unclip.decoder": DecoderTask(
        "DALL·E 2's decoder: 64×64 images from CLIP's image embeddings",
        {
            "tiny": Preset(unclip_tiny.DECODER_TINY, unclip_tiny.SAMPLING_DECODER_TINY, SHIPPED_CLIP, SMALL, EARLY),
            "paper": Preset(unclip.DECODER, unclip.SAMPLING_DECODER, unclip.CLIP_H, PresetOptimizer("adam", 1.2e-4)),
        },
        UnCLIPSettings(_folder("decoder")),
    ),
    "unclip.sr256": DiffusionTask(
        "DALL·E 2's upsampler to 256×256",
        {
            "tiny": Preset(unclip_tiny.SR_256_TINY, imagen_tiny.SAMPLING_SR_TINY, SHIPPED_T5, SMALL),
            "paper": Preset(unclip.SR_256, unclip.SAMPLING_SR_256, SHIPPED_T5, PresetOptimizer("adam", 1.2e-4)),
        },
        Settings(_folder("upsampler256")),
    ),
    "unclip.sr1024": DiffusionTask(
        "DALL·E 2's upsampler to 1024×1024",
        {
            "tiny": Preset(unclip_tiny.SR_1024_TINY, imagen_tiny.SAMPLING_SR_TINY, SHIPPED_T5, SMALL),
            "paper": Preset(unclip.SR_1024, unclip.SAMPLING_SR_1024, SHIPPED_T5),
        },
        Settings(_folder("upsampler1024")),
    ),
    "t5": T5Task("a T5, pre-trained on captions, whose frozen encoder reads them", settings=T5Settings(_folder("t5"))),
    "clip": CLIPTask("a CLIP, from captioned images", settings=CLIPSettings(_folder("clip"))),
    "classifier": ClassifierTask(
        "a classifier of `shapes`, for FD-shapes", settings=ClassifierSettings(_folder("classifier"))
    ),
}
