"""Models in diffusers' format that klray did not write: what they mean to klray is what they mean to diffusers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from klray import sample
from klray.build import build_sampler
from klray.config import ConfigError, Sampling
from klray.core.solver_parameters import SolverParameters
from klray.parallel.mesh import Mesh
from klray.runs.checkpoint import CheckpointError
from klray.sampling.model import Model, load_model
from tests.models import unet

CPU = torch.device("cpu")
WEAK = {"beta_end": 0.002}  # of weak noise, so that an untrained network's images are not black and white
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
SCHEDULER, UNET = "scheduler/scheduler_config.json", "unet/config.json"


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def pipeline(folder: Path, network: UNet2DModel | None = None, kind: Any = DDPMPipeline, **scheduler: Any) -> Path:
    """A pipeline as its author would save it, of a DDPMScheduler with these settings."""
    kind(unet=network or unet(), scheduler=DDPMScheduler(**{**WEAK, **scheduler})).save_pretrained(folder)
    return folder


def start(channels: int = 1) -> Tensor:
    """The noise that a pipeline with a generator of seed 3 starts from."""
    return torch.randn(4, channels, 8, 8, generator=torch.Generator().manual_seed(3))


def output_of_diffusers(folder: Path, num_steps: int, *, use_clipped: bool, **scheduler: Any) -> Tensor:
    """DDIMPipeline's images [4, C, 8, 8] in [0, 1]."""
    theirs = DDIMPipeline.from_pretrained(folder)
    theirs.scheduler = DDIMScheduler.from_config(theirs.scheduler.config, **scheduler)
    theirs.set_progress_bar_config(disable=True)
    return theirs(
        batch_size=4,
        generator=torch.Generator().manual_seed(3),
        eta=0.0,
        num_inference_steps=num_steps,
        use_clipped_model_output=use_clipped,
        output_type="pt",
    ).images


def output_of_klray(model: Model, points: list[float], final: str = "denoise") -> Tensor:
    """The ddim sampler's images on this grid, from the same noise, in [0, 1]."""
    sampler = build_sampler(Sampling.model_validate({"solver": "ddim", "final": final}), SolverParameters(points))
    level = model.schedule.sigma(torch.tensor(points[0], dtype=torch.float64))
    with torch.no_grad():
        images = sampler.sample(model.denoiser, model.schedule, start(model.shape[0]) / level)
    assert images.dtype == torch.float32
    return (images / 2 + 0.5).clamp(0, 1)


def assert_equal(mine: Tensor, theirs: Tensor) -> None:
    assert float(((theirs > 0) & (theirs < 1)).float().mean()) > 0.2  # else the clamp hides everything
    torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-5)


def times(indices: list[int]) -> list[float]:
    """The index k of a chain of 1000 steps is klray's (k + 1)/1000."""
    return [(k + 1) / 1000 for k in indices]


@pytest.mark.parametrize("clip", [True, False], ids=["clipped", "free"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("kind", [DDPMPipeline, DDIMPipeline])
def test_ddim_on_a_pipelines_own_times_is_its_own_output(
    kind: Any, prediction: str, clip: bool, tmp_path: Path
) -> None:
    """10 steps: diffusers' default times 900, 800, ... 0, and from there to alpha = 1, klray's t = 0.

    Where x0 is clamped, klray holds the noise that goes with the clamped x0; of diffusers this is an option.
    """
    folder = pipeline(tmp_path / "model", unet(3), kind, prediction_type=prediction, clip_sample=clip)
    model = load_model(folder, CPU)
    assert model.clip_x0 == clip
    mine = output_of_klray(model, [*times(list(range(900, -1, -100))), 0.0])
    assert_equal(mine, output_of_diffusers(folder, 10, use_clipped=True))
    if clip:
        free = output_of_klray(load_model(folder, CPU, clip_x0=False), [*times(list(range(900, -1, -100))), 0.0])
        assert float((free - mine).abs().max()) > 1e-2  # so the clamp did something


@pytest.mark.parametrize("final", ["denoise", "keep"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_ddim_on_trailing_times_is_diffusers(prediction: str, final: str, tmp_path: Path) -> None:
    """From 999 to the level of index 0, klray's own default ends, t = 1 and t = 1/1000, and from there to no noise, as
    is diffusers' default too; or the noise of index 0 is left in the image. RGB."""
    network = unet(5, in_channels=3, out_channels=3)
    folder = pipeline(tmp_path / "model", network, prediction_type=prediction, clip_sample=False)
    settings = {"timestep_spacing": "trailing", "set_alpha_to_one": final == "denoise"}
    theirs = output_of_diffusers(folder, 8, use_clipped=False, **settings)
    model = load_model(folder, CPU)
    assert model.shape == (3, 8, 8)
    assert (model.schedule.t_max, model.schedule.t_min) == (1.0, 0.001)
    assert_equal(output_of_klray(model, [*times(list(range(999, 0, -125))), 0.001], final), theirs)


@pytest.mark.parametrize(
    "schedule",
    [
        {"beta_schedule": "scaled_linear"},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": np.linspace(1e-4, 3e-3, 1000).tolist()},
    ],
    ids=lambda settings: str(next(iter(settings.values())))[:8],
)
def test_noise_levels_are_the_schedulers(schedule: dict[str, Any], tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "model", prediction_type="sample", **schedule)
    model = load_model(folder, CPU)
    expected = DDPMScheduler.from_pretrained(folder / "scheduler").alphas_cumprod.double()
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    torch.testing.assert_close(model.schedule.alpha(t).square(), expected, rtol=1e-9, atol=0)
    mine = output_of_klray(model, [*times(list(range(900, -1, -100))), 0.0])
    assert_equal(mine, output_of_diffusers(folder, 10, use_clipped=True))


def test_a_chain_that_ends_without_signal_starts_one_step_before(tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "model", prediction_type="v_prediction", rescale_betas_zero_snr=True)
    model = load_model(folder, CPU)
    assert model.schedule.t_max == 0.999
    assert bool(output_of_klray(model, times([998, 500, 0])).isfinite().all())


def test_a_bare_network_says_what_is_assumed_of_it(tmp_path: Path) -> None:
    unet(3).save_pretrained(tmp_path / "bare")
    model = load_model(tmp_path / "bare", CPU)
    assert model.assumed == f"{tmp_path / 'bare'} has no scheduler_config.json: DDPM's noise levels and eps are assumed"
    assert (model.shape, model.evals, model.config, model.clip_x0) == ((1, 8, 8), 1, None, True)

    whole = pipeline(tmp_path / "whole", unet(3), beta_end=0.02)
    x, t = start(), torch.tensor(0.5, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(model.denoiser(x, t), load_model(whole, CPU).denoiser(x, t))
    assert load_model(whole, CPU).assumed is None
    assert load_model(whole, CPU).fingerprint == model.fingerprint


def test_a_network_inside_a_pipeline_has_the_pipelines_schedule(tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "model", prediction_type="v_prediction", clip_sample=False)
    inside, whole = load_model(folder / "unet", CPU), load_model(folder, CPU)
    assert inside.assumed is None
    assert inside.fingerprint == whole.fingerprint
    x, t = start(), torch.tensor(0.5, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(inside.denoiser(x, t), whole.denoiser(x, t))


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_flat_folder_is_the_same_pipeline(suffix: str, tmp_path: Path) -> None:
    """As google's first models lie: config, scheduler and weights beside model_index.json."""
    folder = pipeline(tmp_path / "model", unet(3), prediction_type="v_prediction", clip_sample=False)
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in (folder / "model_index.json", folder / "unet/config.json", folder / SCHEDULER):
        shutil.copy(file, flat)
    if suffix == "safetensors":
        shutil.copy(folder / WEIGHTS, flat)
    else:
        torch.save(load_file(folder / WEIGHTS), flat / "diffusion_pytorch_model.bin")
    whole, found = load_model(folder, CPU), load_model(flat, CPU)
    assert found.assumed is None
    assert_equal(
        output_of_klray(found, [*times(list(range(900, -1, -100))), 0.0]),
        output_of_diffusers(flat, 10, use_clipped=True),
    )
    x, t = start(), torch.tensor(0.5, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(found.denoiser(x, t), whole.denoiser(x, t))


@pytest.mark.parametrize(
    "kind",
    [
        DDIMScheduler,
        PNDMScheduler,
        UniPCMultistepScheduler,
        DPMSolverMultistepScheduler,
        DEISMultistepScheduler,
        EulerDiscreteScheduler,
        HeunDiscreteScheduler,
    ],
)
def test_a_model_may_come_with_any_scheduler_of_betas(kind: Any, tmp_path: Path) -> None:
    """Whichever its author sampled with: the noise levels are the same. Its own settings decide on clamping."""
    levels = {**WEAK, "beta_start": 1e-4, "beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}
    own = load_model(pipeline(tmp_path / "own", unet(3), **levels), CPU, clip_x0=False)
    folder = pipeline(tmp_path / "model", unet(3))
    kind(**levels).save_pretrained(folder / "scheduler")
    model = load_model(folder, CPU)
    assert model.clip_x0 == (kind is DDIMScheduler)
    assert model.fingerprint == own.fingerprint
    x, t = start(), torch.tensor(0.5, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(load_model(folder, CPU, clip_x0=False).denoiser(x, t), own.denoiser(x, t))


def test_levels_that_a_scheduler_does_not_name_are_its_defaults(tmp_path: Path) -> None:
    """Not DDPM's: Heun's are Stable Diffusion's."""
    folder = pipeline(tmp_path / "model")
    (folder / SCHEDULER).write_text('{"_class_name": "HeunDiscreteScheduler"}')
    expected = HeunDiscreteScheduler().alphas_cumprod.double()
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    torch.testing.assert_close(load_model(folder, CPU).schedule.alpha(t).square(), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("bare", [True, False])
def test_half_precision_weights_are_read_where_there_are_no_others(bare: bool, tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "model", unet(3))
    state = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    half = {name: tensor.half() for name, tensor in state.items()}
    save_file(half, folder / "unet/diffusion_pytorch_model.fp16.safetensors", metadata={"format": "pt"})
    model = load_model(folder / "unet" if bare else folder, CPU)
    for name, tensor in model.network.state_dict().items():
        assert torch.equal(tensor, half[name].float())


def test_weights_without_their_settings_are_named(tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "model") / "unet"
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="/unet/config.json cannot be read: "):
        load_model(folder, CPU)


@pytest.mark.parametrize("bare", [True, False])
def test_a_hubs_cache_names_the_folder_to_give(bare: bool, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / "0123abcd"
    if bare:
        unet().save_pretrained(snapshot)
    else:
        pipeline(snapshot)
    for given in (tmp_path / "hub", tmp_path / "hub/models--org--name", *([] if bare else [snapshot.parent])):
        with pytest.raises(CheckpointError) as caught:
            load_model(given, CPU)
        assert str(caught.value) == f"{given} is no model but holds some; give one, such as {snapshot}"
    assert load_model(snapshot, CPU).shape == (1, 8, 8)


@pytest.mark.parametrize("channels", [3, 4])
def test_the_network_of_a_latent_pipeline_is_no_pixel_model(channels: int, tmp_path: Path) -> None:
    """Its pipeline says so; without it, four channels do."""
    folder = pipeline(tmp_path / "ldm", unet(0, in_channels=channels, out_channels=channels))
    edit("model_index.json", _class_name="LDMPipeline")(folder)
    with pytest.raises(CheckpointError, match="the pipeline must be one of DDPMPipeline, .*, got LDMPipeline"):
        load_model(folder / "unet", CPU)
    shutil.copytree(folder / "unet", tmp_path / "alone")
    if channels == 4:
        with pytest.raises(CheckpointError, match=r"in_channels must be 1 \(grey\) or 3 \(RGB\), .*, got 4"):
            load_model(tmp_path / "alone", CPU)


@pytest.mark.parametrize("clip", [True, False])
def test_clip_x0_is_the_schedulers_or_the_users(clip: bool, tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "model", clip_sample=clip)
    x, t = 3 * start(), torch.tensor(0.9, dtype=torch.float64)
    with torch.no_grad():
        own, yes, no = (load_model(folder, CPU, clip_x0=value).denoiser(x, t) for value in (None, True, False))
    assert float(no.abs().max()) > 2
    assert torch.equal(yes, no.clamp(-1, 1))
    assert torch.equal(own, yes if clip else no)
    assert [load_model(folder, CPU, clip_x0=value).clip_x0 for value in (None, True, False)] == [clip, True, False]


def test_clip_x0_is_as_wide_as_the_schedulers(tmp_path: Path) -> None:
    """Else the model is another one than its author's, or it must be refused."""
    folder = pipeline(tmp_path / "model", clip_sample=True, clip_sample_range=2.0)
    try:
        model = load_model(folder, CPU)
    except CheckpointError as error:
        assert "clip_sample_range" in str(error)
        return
    with torch.no_grad():
        x0_hat = model.denoiser(3 * start(), torch.tensor(0.9, dtype=torch.float64))
    assert float(x0_hat.abs().max()) == 2


def test_of_a_learned_variance_the_mean_counts(tmp_path: Path) -> None:
    one, two = unet(0, in_channels=3, out_channels=3), unet(1, in_channels=3, out_channels=6)
    state = one.state_dict()
    for name in ("conv_out.weight", "conv_out.bias"):
        state[name] = torch.cat([state[name], two.state_dict()[name][3:]])
    two.load_state_dict(state)
    mean = load_model(pipeline(tmp_path / "mean", one), CPU)
    both = load_model(pipeline(tmp_path / "both", two, variance_type="learned_range"), CPU)
    assert both.shape == (3, 8, 8)
    x, t = start(3), torch.tensor(0.5, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(both.denoiser(x, t), mean.denoiser(x, t), rtol=1e-5, atol=1e-5)
        assert float(mean.denoiser(x, t).std()) > 0.1


def edit(file: str, **changes: Any) -> Callable[[Path], None]:
    """A key set, or removed for None in ``sample_size`` and ``_class_name``."""

    def change(folder: Path) -> None:
        settings = json.loads((folder / file).read_text()) | changes
        (folder / file).write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))

    return change


def weights(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes())) and None


def tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        state = load_file(folder / WEIGHTS)
        change(state)
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})

    return rewrite


def network(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: unet(**changes).save_pretrained(folder / "unet")


def text(file: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_text(content) and None


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "class-conditional": (
        network(num_class_embeds=10),
        "/unet: the model is class-conditional, which is not supported",
    ),
    "conditioned on a time": (network(class_embed_type="timestep"), "class-conditional"),
    "another scheduler": (
        lambda folder: EDMEulerScheduler().save_pretrained(folder / "scheduler"),
        "scheduler_config.json: the scheduler must be one whose noise levels are given by betas, as DDPMScheduler or "
        "PNDMScheduler, got EDMEulerScheduler",
    ),
    "a scheduler of nobody's": (edit(SCHEDULER, _class_name="MyScheduler"), "given by betas, as DDPMScheduler"),
    "no scheduler": (edit(SCHEDULER, _class_name="UNet2DModel"), "given by betas, as DDPMScheduler"),
    "flow sigmas": (
        lambda folder: UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction").save_pretrained(
            folder / "scheduler"
        ),
        "use_flow_sigmas is another process",
    ),
    "a scheduler without a class": (edit(SCHEDULER, _class_name=None), "given by betas, as DDPMScheduler"),
    "a scheduler that is no object": (text(SCHEDULER, "[1]"), "scheduler_config.json"),
    "a torn scheduler": (text(SCHEDULER, '{"_class'), "scheduler_config.json cannot be read: Unterminated string"),
    "unknown betas": (edit(SCHEDULER, beta_schedule="foo"), "foo"),
    "rising alphas": (edit(SCHEDULER, beta_end=-1.0), "alphas_cumprod must fall strictly"),
    "another meaning": (
        edit(SCHEDULER, prediction_type="flow"),
        "prediction_type must be one of epsilon, v_prediction, sample, got 'flow'",
    ),
    "dynamic thresholds": (edit(SCHEDULER, thresholding=True), "thresholding"),
    "another network": (
        edit(UNET, _class_name="UNet2DConditionModel"),
        "/unet/config.json: the network must be a UNet2DModel, got UNet2DConditionModel",
    ),
    "no class of network": (edit(UNET, _class_name=None), "the network must be a UNet2DModel, got None"),
    "no size": (
        edit(UNET, sample_size=None),
        "/unet/config.json: sample_size must be one or two whole numbers, got None",
    ),
    "a latent model": (
        edit("model_index.json", _class_name="LDMPipeline", vqvae=["diffusers", "VQModel"]),
        "got LDMPipeline",
    ),
    "a latent model's network in a pixel pipeline": (
        network(in_channels=4, out_channels=4),
        "/unet/config.json: in_channels must be 1 (grey) or 3 (RGB), a latent model's network draws no images, got 4",
    ),
    "an autoencoder beside the network": (
        lambda folder: (folder / "vqvae").mkdir() or text("vqvae/config.json", "{}")(folder),
        "a latent model, with vqvae, is not supported; give a pixel model's pipeline",
    ),
    "an output of other channels": (network(in_channels=3, out_channels=1), "channels"),
    "an output of many channels": (network(out_channels=8), "channels"),
    "no network": (lambda folder: shutil.rmtree(folder / "unet"), "/unet/config.json cannot be read: "),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "/unet holds no weights"),
    "torn weights": (weights(lambda data: data[:-100]), "/unet holds no readable UNet2DModel: Unable to load weights"),
    "a torn header": (weights(lambda data: data[:50]), "/unet holds no readable UNet2DModel: Unable to load weights"),
    "empty weights": (weights(lambda data: b""), "/unet holds no readable UNet2DModel: Unable to load weights"),
    "weights of another width": (
        tensors(lambda state: state.update({"conv_out.weight": torch.ones(2, 8, 3, 3)})),
        "/unet holds no readable UNet2DModel: Error(s) in loading state_dict",
    ),
    "a tensor missing": (tensors(lambda state: state.pop("conv_out.weight")), "conv_out.weight"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_such_a_model_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    change, message = REFUSED[case]
    folder = pipeline(tmp_path / "model")
    change(folder)
    with pytest.raises(CheckpointError) as caught:
        load_model(folder, CPU)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_refusal_is_all_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """diffusers would log its own account of missing weights, which goes to stderr."""
    folder = pipeline(tmp_path / "model")
    (folder / WEIGHTS).unlink()
    capsys.readouterr()
    caplog.clear()
    assert sample.main(["--checkpoint", str(folder)]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"klray.sample: {folder}/unet holds no weights (")
    assert "\n" not in error
    assert [record.message for record in caplog.records if record.name.startswith("diffusers")] == []


class Touch:
    """Unpickled, it creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.target,)


def test_older_weights_are_read_and_run_nothing(tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "model", unet(3))
    state, old = load_file(folder / WEIGHTS), (folder / WEIGHTS).with_suffix(".bin")
    x, t = start(), torch.tensor(0.5, dtype=torch.float64)
    with torch.no_grad():
        expected = load_model(folder, CPU).denoiser(x, t)
    (folder / WEIGHTS).unlink()
    torch.save(state, old)
    with torch.no_grad():
        assert torch.equal(load_model(folder, CPU).denoiser(x, t), expected)
    torch.save({**state, "extra": Touch(tmp_path / "trace")}, old)
    with pytest.raises(CheckpointError, match="/unet holds no readable UNet2DModel"):
        load_model(folder, CPU)
    assert not (tmp_path / "trace").exists()


def test_an_imported_model_has_one_term(tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "model")
    with pytest.raises(ConfigError, match="--basis must be 1 for a diffusers model: it has one term"):
        load_model(folder, CPU, mesh=Mesh(1, 2, 0))


def test_the_fingerprint_is_of_what_was_trained(tmp_path: Path) -> None:
    def fingerprint(name: str, seed: int = 0, **scheduler: Any) -> str:
        return load_model(pipeline(tmp_path / name, unet(seed), **scheduler), CPU).fingerprint

    first = fingerprint("first")
    assert len(first) == 16
    assert fingerprint("same") == fingerprint("clipping", clip_sample=False) == first
    others = {
        first,
        fingerprint("weights", seed=1),
        fingerprint("levels", beta_end=0.003),
        fingerprint("meaning", prediction_type="sample"),
    }
    assert len(others) == 4


def test_images_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = pipeline(tmp_path / "model", unet(3, in_channels=3, out_channels=3))
    unet(3).save_pretrained(tmp_path / "bare")
    how = ["--nfe", "3", "--seeds", "0-8", "--batch-size", "4"]
    assert sample.main(["--checkpoint", str(folder), *how, "--out", "rgb.png", "--out", "rgb.npz"]) == 0
    assert "wrote rgb.png: seeds 0-8, ddim, logsnr, 3 NFE, 3 network evaluations an image" in capsys.readouterr().out
    picture = np.asarray(Image.open("rgb.png"))
    images = np.load("rgb.npz")["arr_0"]
    assert picture.shape == (3 * 33 + 1, 3 * 33 + 1, 3)
    assert images.shape == (9, 8, 8, 3)
    assert np.array_equal(picture[1:33:4, 34:66:4], images[1])
    assert len(np.unique(images)) > 20

    assert sample.main(["--checkpoint", "bare", *how, "--out", "grey.png"]) == 0
    said = capsys.readouterr().out
    assert "note: " in said
    assert "has no scheduler_config.json: DDPM's noise levels and eps are assumed" in said
    assert np.asarray(Image.open("grey.png")).shape == (100, 100, 3)
