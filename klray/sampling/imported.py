"""Models in diffusers' format that klray did not write: a UNet2DModel of pixels, or a pipeline around one."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from klray.core.denoiser import TermDenoiser
from klray.core.process import SingleTerm
from klray.core.schedule import VPDiscrete
from klray.networks.fused_unet import fused_unet
from klray.networks.half import HalfWeights

PREDICTIONS = {"epsilon": "share", "v_prediction": "v", "sample": "x0"}  # diffusers' words: klray's
PIPELINES = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline")
BETAS = {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule"}  # of schedulers that read noise levels there
AUTOENCODERS = ("vqvae", "vae", "movq")  # beside the network of a latent model
WEIGHTS = "diffusion_pytorch_model"


@dataclass(frozen=True)
class ImportedModel:
    """What a folder holds: its network, in evaluation mode, its schedule, and what the network's output means."""

    network: nn.Module
    schedule: VPDiscrete
    prediction: str
    clip_x0: bool
    clip_range: float
    shape: tuple[int, int, int]
    assumed: str | None  # what had to be assumed of it

    def denoiser(self, clip_x0: bool, dtype: torch.dtype | None = None, fused: bool = False) -> TermDenoiser:
        """What solvers call; the network computes in ``dtype``, ``fused`` through ``networks.fused_unet``."""
        predict = _Predict(self.network, self.schedule.num_train_steps, dtype, fused)
        clip = self.clip_range if clip_x0 else None
        return TermDenoiser(predict, SingleTerm(self.schedule), PREDICTIONS[self.prediction], clip_x0=clip)


class _Predict:
    """(x [B, C, H, W], t [B], terms [1]) -> [B, 1, C, H, W], from a network that is shown the index T t - 1.

    Of a network that also predicts a variance, the first C channels count.
    """

    def __init__(self, network: nn.Module, num_train_steps: int, dtype: torch.dtype | None, fused: bool) -> None:
        self.num_train_steps, self.dtype, self.fused = num_train_steps, dtype, fused
        self.network = HalfWeights(network, dtype).network if fused and dtype is not None else network

    def __call__(self, x: Tensor, t: Tensor, terms: Tensor) -> Tensor:
        dtype = torch.promote_types(next(self.network.parameters()).dtype, torch.float32)
        given, index = x.to(dtype), (self.num_train_steps * t - 1).to(dtype)
        if self.fused:
            output: Tensor = fused_unet(self.network, given, index)
        else:
            with torch.autocast(x.device.type, dtype=self.dtype, enabled=self.dtype is not None):
                output = self.network(given, index, return_dict=False)[0]
        return output[:, None, : x.shape[1]]


def is_imported(folder: Path) -> bool:
    """Whether the folder is laid out as diffusers does."""
    return any((folder / name).is_file() for name in ("model_index.json", "config.json")) or bool(weight_files(folder))


def models_inside(folder: Path) -> list[Path]:
    """Folders that may be meant where one above them is given, such as a hub's cache or a model's folder in it."""
    cached = ("snapshots/*", "models--*/snapshots/*")
    patterns = ["*/model_index.json", *(f"{each}/{name}.json" for each in cached for name in ("model_index", "config"))]
    return list(dict.fromkeys(file.parent for pattern in patterns for file in sorted(folder.glob(pattern))))


def load_imported(folder: Path) -> ImportedModel:
    """Reads a pipeline's folder, or a UNet2DModel's, whose schedule is then that of the pipeline around it, or DDPM's.
    As in diffusers, parts that have no folder of their own lie beside the pipeline's index.

    Raises:
        ValueError: one line, for a model of another kind.
    """
    unet_folder = _unet_folder(folder)
    for place in dict.fromkeys((folder, unet_folder.parent)):
        _check_pipeline(place)
    network = _network(unet_folder)
    schedulers = [folder / "scheduler", folder, folder.parent / "scheduler"]
    found = [place / "scheduler_config.json" for place in schedulers if (place / "scheduler_config.json").is_file()]
    settings = _json(found[0]) if found else {"_class_name": "DDPMScheduler"}
    # The noise levels and the meaning of the output are the model's; how its scheduler steps is the sampler's.
    kind = _scheduler(settings.get("_class_name"))
    if kind is None:
        rule = "the scheduler must be one whose noise levels are given by betas, as DDPMScheduler or PNDMScheduler"
        raise ValueError(f"{found[0]}: {rule}, got {settings.get('_class_name')}")
    try:
        scheduler = kind.from_config(settings)
        schedule = VPDiscrete(scheduler.alphas_cumprod)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ValueError(f"{found[0]}: {' '.join(str(error).split())[:200]}") from error
    if scheduler.config.get("thresholding"):
        raise ValueError(f"{found[0]}: dynamic thresholding is not supported; set thresholding to false")
    if scheduler.config.get("use_flow_sigmas"):
        raise ValueError(f"{found[0]}: use_flow_sigmas is another process, which is not supported; give a DDPM's model")
    prediction = scheduler.config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise ValueError(f"{folder}: prediction_type must be one of {', '.join(PREDICTIONS)}, got {prediction!r}")
    height, width = _size(unet_folder, network.config.sample_size)
    channels, outputs = network.config.in_channels, network.config.out_channels
    if channels not in (1, 3):
        rule = "in_channels must be 1 (grey) or 3 (RGB), a latent model's network draws no images"
        raise ValueError(f"{unet_folder / 'config.json'}: {rule}, got {channels}")
    learned = str(scheduler.config.get("variance_type")).startswith("learned")
    if outputs != channels * (2 if learned else 1):
        rule = f"{'a learned variance' if learned else 'a fixed variance'} goes with {channels * (2 if learned else 1)}"
        raise ValueError(f"{unet_folder / 'config.json'}: {rule} output channels, got {outputs}")
    return ImportedModel(
        network=network,
        schedule=schedule,
        prediction=prediction,
        clip_x0=bool(scheduler.config.get("clip_sample")),
        clip_range=float(scheduler.config.get("clip_sample_range") or 1.0),
        shape=(channels, height, width),
        assumed=None if found else f"{folder} has no scheduler_config.json: DDPM's noise levels and eps are assumed",
    )


def _network(folder: Path) -> Any:
    kind = _json(folder / "config.json").get("_class_name")
    if kind != "UNet2DModel":
        raise ValueError(f"{folder / 'config.json'}: the network must be a UNet2DModel, got {kind}")
    if not weight_files(folder):
        raise ValueError(f"{folder} holds no weights ({WEIGHTS}.safetensors)")
    try:
        from diffusers import UNet2DModel

        network, info = UNet2DModel.from_pretrained(
            folder, variant=_variant(folder), local_files_only=True, low_cpu_mem_usage=False, output_loading_info=True
        )
        if info["missing_keys"]:
            raise ValueError(f"the weights lack {info['missing_keys'][0]}")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder} holds no readable UNet2DModel: {' '.join(str(error).split())[:200]}") from error
    if network.class_embedding is not None:
        raise ValueError(f"{folder}: the model is class-conditional, which is not supported")
    return network.eval().requires_grad_(False)


def _json(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{file} cannot be read: {' '.join(str(error).split())[:200]}") from error


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the network's weights."""
    return sorted(_unet_folder(folder).glob(f"{WEIGHTS}*"))


def _variant(folder: Path) -> str | None:
    """fp16 of a folder that holds WEIGHTS.fp16.safetensors or .bin alone; None where there are plain weights."""
    names = [file.name.removeprefix(WEIGHTS) for file in folder.glob(f"{WEIGHTS}*")]
    variants = [name.split(".")[1] for name in names if name.count(".") == 2 and not name.endswith(".json")]
    return variants[0] if len(variants) == len(names) else None


def _unet_folder(folder: Path) -> Path:
    whole, flat = (folder / "model_index.json").is_file(), (folder / "config.json").is_file()
    return folder / "unet" if whole and ((folder / "unet").is_dir() or not flat) else folder


def _check_pipeline(folder: Path) -> None:
    """Refuses a folder whose pipeline is of another kind, or holds an autoencoder: its network draws latents."""
    index = folder / "model_index.json"
    pipeline = _json(index).get("_class_name") if index.is_file() else None
    if index.is_file() and pipeline not in PIPELINES:
        raise ValueError(f"{folder}: the pipeline must be one of {', '.join(PIPELINES)}, got {pipeline}")
    for name in AUTOENCODERS:
        if (folder / name / "config.json").is_file():
            raise ValueError(f"{folder}: a latent model, with {name}, is not supported; give a pixel model's pipeline")


def _scheduler(name: Any) -> Any:
    """The class of diffusers' of this name, if it reads noise levels from BETAS."""
    import diffusers

    kind = getattr(diffusers, name, None) if isinstance(name, str) and name.endswith("Scheduler") else None
    return kind if kind is not None and inspect.signature(kind.__init__).parameters.keys() >= BETAS else None


def _size(folder: Path, size: Any) -> tuple[int, int]:
    pair = [size, size] if isinstance(size, int) else size
    if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(each, int) for each in pair):
        raise ValueError(f"{folder / 'config.json'}: sample_size must be one or two whole numbers, got {size!r}")
    return pair[0], pair[1]
