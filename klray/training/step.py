"""One optimiser step of KL training on a data x basis mesh."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from klray.config import Config
from klray.core.losses import backward_kl_loss
from klray.core.process import NoiseProcess
from klray.data.stream import ImageStream
from klray.parallel.mesh import Mesh
from klray.parallel.random import Purpose, dropout_keys, normal, permutation, uniform
from klray.runs.train_state import TrainState, amp_dtype


class TrainStep:
    """Draws the step's images, times, noise and terms, forms the exact gradient, and moves the weights."""

    def __init__(
        self,
        config: Config,
        process: NoiseProcess,
        state: TrainState,
        images: ImageStream,
        mesh: Mesh,
        device: torch.device,
    ) -> None:
        self.config, self.process, self.state = config, process, state
        self.images, self.mesh, self.device = images, mesh, device
        self.amp = amp_dtype(config, device)
        self.parameters = list(state.network.parameters())
        self.has_dropout = config.network.dropout > 0
        self.data_seconds = 0.0  # waiting for images, until whoever reports it sets it back
        self.synchronised: nn.Module = state.network
        if mesh.size > 1:
            # A fixed bucket layout: DDP otherwise rebuilds its buckets after the first step of each process, so that
            # a resumed run would sum gradients in another order. A rank may also have parameters without gradient.
            self.synchronised = DistributedDataParallel(
                state.network, broadcast_buffers=False, find_unused_parameters=True, gradient_as_bucket_view=True
            )

    def __call__(self) -> Tensor:
        """Trains on the next batch. Returns this rank's part of the loss, 0-dim: sum over basis, mean over data."""
        config, progress = self.config, self.state.progress
        positions = self.mesh.local_positions(config.optimizer.batch_size)
        began = time.perf_counter()
        x0 = self.images.batch(progress.step, progress.images_seen, positions)
        self.data_seconds += time.perf_counter() - began
        x0 = x0.to(self.parameters[0].dtype)
        if config.precision.channels_last:
            x0 = x0.contiguous(memory_format=torch.channels_last)
        micro = config.optimizer.micro_batch or len(positions)
        starts = range(0, len(positions), micro)
        # Not len(positions): the mean over the data ranks is then that over the images, however they are spread.
        share = config.optimizer.batch_size / self.mesh.data_size
        loss = torch.zeros((), device=self.device)
        for start in starts:
            part = range(positions[start], positions[min(start + micro, len(positions)) - 1] + 1)
            last = start == starts[-1]
            loss += self._backward(x0[start : start + micro], part, share, last).float()
        self._update()
        progress.step += 1
        progress.images_seen += config.optimizer.batch_size
        progress.network_evals += config.optimizer.batch_size * config.evals_per_image
        return loss

    def _times(self, where: Tensor) -> Tensor:
        """t [B] float64: uniform on [t_min, t_max], or on n/N."""
        config, step = self.config, self.state.progress.step
        u = uniform(config.seed, step, Purpose.TIME, where)
        grid = config.process.time_grid
        if grid == "continuous":
            return self.process.t_min + u * (self.process.t_max - self.process.t_min)
        return (torch.floor(u * grid) + 1) / grid

    def _terms(self) -> Tensor:
        """The step's K terms, the same for all images and ranks; all M in order where K = M."""
        config, count = self.config, self.process.num_terms
        if config.terms_per_step == count:
            return torch.arange(count, device=self.device)
        order = permutation(config.seed, self.state.progress.step, Purpose.TERMS, count, self.device)
        return order[: config.terms_per_step]

    def _backward(self, x0: Tensor, positions: range, share: float, last_batch: bool) -> Tensor:
        """Adds the gradient of one micro-batch; the last one's last backward also averages over the ranks.

        ``share``: the batch over the data ranks, not always whole.
        """
        config, network, step = self.config, self.state.network, self.state.progress.step
        where = torch.arange(positions.start, positions.stop, device=self.device)
        shape = (self.process.num_terms, *x0.shape[1:])
        z = normal(config.seed, step, Purpose.NOISE, where, shape).to(x0.dtype)
        t = self._times(where)
        terms = self._terms()
        mine = self.mesh.local_terms(terms)

        def predict(x: Tensor, t: Tensor, chunk: Tensor, last: bool = False) -> Tensor:
            rows = chunk[:1] * 0 if network.wide else chunk
            keys = dropout_keys(config.seed, step, where[: len(x)], rows) if self.has_dropout else None
            module = self.synchronised if last and last_batch else network
            with torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None):
                return module(x, t, chunk, keys)

        def backward(loss: Tensor) -> None:
            # DDP takes the mean over all ranks, where the basis ranks' gradients are to be summed.
            self.state.scaler.scale(loss.sum() * (self.mesh.basis_size / share)).backward()

        loss = backward_kl_loss(
            predict,
            self.process,
            x0,
            z,
            t,
            coupling=config.loss.coupling,
            prediction=config.loss.prediction,
            terms=terms,
            chunks=mine.split(config.loss.term_chunk or len(mine)) if len(mine) else (),
            sum_over_basis=self.mesh.sum_over_basis,
            backward=backward,
        )
        if last_batch and not len(mine):
            # A rank without terms in this step still takes part in the reduction of the gradients.
            backward(0 * predict(x0[:1], t[:1], terms[:1], True).float().sum())
        return loss.sum() / share

    def _update(self) -> None:
        """Clip, warm up, step, average. A step with a non-finite gradient changes nothing and is counted."""
        settings, state = self.config.optimizer, self.state
        warmup = min(1.0, (state.progress.images_seen + settings.batch_size) / max(1, settings.warmup_images))
        for group in state.optimizer.param_groups:
            group["lr"] = settings.lr * warmup
        if state.scaler.is_enabled():
            state.scaler.unscale_(state.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, settings.clip_norm or float("inf"))
        bad = (~torch.isfinite(norm)).float()
        if state.scaler.is_enabled():
            state.scaler.step(state.optimizer)
            state.scaler.update()
        else:
            # The fused optimiser skips on the device where found_inf is 1: nothing waits for the host.
            state.optimizer.found_inf = bad  # type: ignore[attr-defined]
            state.optimizer.step()
        state.optimizer.zero_grad()
        state.nonfinite[0] += bad
        state.nonfinite[1] = (state.nonfinite[1] + 1) * bad
        if (state.progress.step + 1) % self.config.ema.every == 0:
            state.ema.update_parameters(state.network)
