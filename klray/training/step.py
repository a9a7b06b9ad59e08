"""One optimiser step of KL training on a data x basis mesh."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from klray.build import build_parametrisation, build_rate
from klray.config import Config
from klray.core.losses import NoisyBatch, backward_kl_loss
from klray.core.process import NoiseProcess, training_times
from klray.data.stream import ImageStream
from klray.networks.half import HalfWeights, amp_dtype
from klray.networks.terms import TermNetwork
from klray.parallel.cuda_graph import CudaGraph
from klray.parallel.mesh import Mesh
from klray.parallel.random import Purpose, dropout_keys, normal, permutation, uniform
from klray.runs.progress import steps_of
from klray.runs.train_state import TrainState


class TrainStep:
    """Draws the step's images, times, noise and terms, forms the exact gradient, and moves the weights.

    What differs between steps is written to three tensors that keep their place (the step's number, the images' rows,
    the learning rate), and everything after that is work of the device alone: on one GPU it is replayed as one graph.
    """

    def __init__(
        self,
        config: Config,
        process: NoiseProcess,
        state: TrainState,
        images: ImageStream,
        mesh: Mesh,
        device: torch.device,
        warn: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.config, self.process, self.state = config, process, state
        self.images, self.mesh, self.device = images, mesh, device
        self.amp = amp_dtype(config.precision.amp, device)
        self.parameters = list(state.network.parameters())
        self.has_dropout = state.network.has_dropout
        self.read = build_parametrisation(config)(process)
        self.rate = rate_of(config)
        self.skips_alone = getattr(state.optimizer, "_step_supports_amp_scaling", False)  # where found_inf is set
        self.data_seconds = 0.0  # waiting for images, until whoever reports it sets it back
        self.positions = mesh.local_positions(config.optimizer.batch_size)
        self.number = torch.zeros((), dtype=torch.int64, device=device)
        self.rows = torch.zeros(len(self.positions), dtype=torch.int64, device=device)
        self.synchronised: nn.Module = state.network
        if mesh.size > 1:
            # A fixed bucket layout: DDP otherwise rebuilds its buckets after the first step of each process, so that
            # a resumed run would sum gradients in another order. A rank may also have parameters without gradient.
            self.synchronised = DistributedDataParallel(
                state.network, broadcast_buffers=False, find_unused_parameters=True, gradient_as_bucket_view=True
            )
        self.half: HalfWeights[TermNetwork] | None = None
        if mesh.size == 1 and state.network.fused and self.amp is not None:
            self.half = HalfWeights(state.network, self.amp)
        self.compute: Callable[[], Tensor] = self._compute
        capturable = state.optimizer.defaults.get("capturable", False)
        if mesh.size == 1 and device.type == "cuda" and config.precision.cuda_graph == "auto" and capturable:
            self.compute = CudaGraph(self._compute, lambda why: warn(f"the step runs without a CUDA graph: {why}"))

    def __call__(self) -> Tensor:
        """Trains on the next batch. Returns this rank's part of the loss, 0-dim: sum over basis, mean over data."""
        config, progress = self.config, self.state.progress
        began = time.perf_counter()
        self.rows.copy_(self.images.rows(progress.images_seen, self.positions))
        self.data_seconds += time.perf_counter() - began
        self.number.fill_(progress.step)
        for group in self.state.optimizer.param_groups:
            group["lr"] = _placed(group["lr"], group.get("lr_share", 1.0) * self.rate(progress.images_seen))
        loss = self.compute()
        if (progress.step + 1) % config.ema.every == 0:
            self.state.ema.update()
        progress.step += 1
        progress.images_seen += config.optimizer.batch_size
        progress.network_evals += config.optimizer.batch_size * config.evals_per_image
        return loss

    def _compute(self) -> Tensor:
        """From the images to the moved weights; the host neither waits for the device nor sends it anything."""
        config = self.config
        where = torch.arange(self.positions.start, self.positions.stop, device=self.device)
        x0 = self.images.take(self.rows, self.number, where).to(self.parameters[0].dtype)
        if config.precision.channels_last or self.state.network.fused:
            x0 = x0.contiguous(memory_format=torch.channels_last)
        if self.half is not None:
            self.half.refresh()
        micro = config.optimizer.micro_batch or len(where)
        # Not len(where): the mean over the data ranks is then that over the images, however they are spread.
        share = config.optimizer.batch_size / self.mesh.data_size
        loss = torch.zeros((), device=self.device)
        for start in range(0, len(where), micro):
            part = slice(start, start + micro)
            loss += self._backward(x0[part], where[part], share, start + micro >= len(where)).float()
        self._update()
        return loss

    def _times(self, where: Tensor) -> Tensor:
        """t [B] float64: the process' own training times, or uniform on n/N."""
        u = uniform(self.config.seed, self.number, Purpose.TIME, where)
        grid = self.config.process.time_grid
        if grid == "continuous":
            return training_times(self.process, u)
        return (torch.floor(u * grid) + 1) / grid

    def _terms(self) -> Tensor:
        """The step's K terms, the same for all images and ranks; all M in order where K = M."""
        config, count = self.config, self.process.num_terms
        if config.terms_per_step == count:
            return torch.arange(count, device=self.device)
        order = permutation(config.seed, self.number, Purpose.TERMS, count, self.device)
        return order[: config.terms_per_step]

    def _backward(self, x0: Tensor, where: Tensor, share: float, last_batch: bool) -> Tensor:
        """Adds the gradient of one micro-batch; the last one's last backward also averages over the ranks.

        ``where``: its positions in the global batch. ``share``: the batch over the data ranks, not always whole.
        """
        config = self.config
        network = self.state.network if self.half is None else self.half.network
        shape = (self.process.num_terms, *x0.shape[1:])
        z = normal(config.seed, self.number, Purpose.NOISE, where, shape, x0.dtype)
        t = self._times(where)
        terms = self._terms()
        batch = NoisyBatch.of(self.process, self.read, x0, z, t, terms)
        mine = self.mesh.local_terms(torch.arange(len(terms), device=self.device))

        def predict(x: Tensor, t: Tensor, chunk: Tensor, last: bool = False) -> Tensor:
            rows = chunk[:1] * 0 if network.wide else chunk
            keys = dropout_keys(config.seed, self.number, where[: len(x)], rows) if self.has_dropout else None
            module = self.synchronised if last and last_batch and self.half is None else network
            autocast = self.amp is not None and self.half is None
            with torch.autocast(self.device.type, dtype=self.amp, enabled=autocast, cache_enabled=False):
                return module(x, t, chunk, keys)

        def backward(loss: Tensor) -> None:
            # DDP takes the mean over all ranks, where the basis ranks' gradients are to be summed.
            self.state.scaler.scale(loss.sum() * (self.mesh.basis_size / share)).backward()
            if self.half is not None:
                self.half.collect()

        loss = backward_kl_loss(
            predict,
            batch,
            config.loss.coupling,
            mine.split(config.loss.term_chunk or len(mine)) if len(mine) else (),
            self.mesh.sum_over_basis,
            backward,
        )
        if last_batch and not len(mine):
            # A rank without terms in this step still takes part in the reduction of the gradients.
            backward(0 * predict(batch.shown[:1], batch.time[:1], terms[:1], True).float().sum())
        return loss.sum() / share

    def _update(self) -> None:
        """Clip and step. A step with a non-finite gradient changes nothing and is counted."""
        settings, state = self.config.optimizer, self.state
        if state.scaler.is_enabled():
            state.scaler.unscale_(state.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, settings.clip_norm or float("inf"))
        bad = (~torch.isfinite(norm)).float()
        if state.scaler.is_enabled():
            state.scaler.step(state.optimizer)
            state.scaler.update()
        elif self.skips_alone:  # on the device, where found_inf is 1: nothing waits for the host
            state.optimizer.found_inf = bad  # type: ignore[attr-defined]
            state.optimizer.step()
        elif not bool(bad):
            state.optimizer.step()
        state.optimizer.zero_grad()
        state.nonfinite[0] += bad
        state.nonfinite[1] = (state.nonfinite[1] + 1) * bad


def call_size(config: Config, mesh: Mesh) -> tuple[int, int]:
    """(images, terms) that go through the network at once in a step; terms is M where one call gives them all."""
    images = config.optimizer.micro_batch or len(mesh.local_positions(config.optimizer.batch_size))
    if config.network.architecture == "wide":
        return images, max(1, config.process.num_terms)
    return images, config.loss.term_chunk or -(-config.terms_per_step // mesh.basis_size)


def rate_of(config: Config) -> Callable[[int], float]:
    """images seen -> the learning rate of the step that follows: the rate schedule, after a linear warm-up."""
    settings, schedule = config.optimizer, build_rate(config)
    # In seconds there is no knowing how many images it will be, and the rate is constant.
    whole = math.inf if config.budget.unit == "seconds" else steps_of(config) * settings.batch_size

    def rate(images_seen: int) -> float:
        warm = min(1.0, (images_seen + settings.batch_size) / max(1, settings.warmup_images))
        return settings.lr * warm * schedule(images_seen / whole)

    return rate


def _placed(place: Tensor | float, value: float) -> Tensor | float:
    return place.fill_(value) if isinstance(place, Tensor) else value
