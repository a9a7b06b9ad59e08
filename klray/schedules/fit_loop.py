"""The loop of an LD3 fit: training steps, validations, and what is kept."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from klray import registry
from klray.parallel.cuda_graph import CudaGraph
from klray.parallel.random import Purpose, permutation
from klray.schedules.fit_settings import FitSettings
from klray.schedules.forcing import TrainingNoise
from klray.schedules.perceptual import Distance
from klray.schedules.student import Student
from klray.schedules.teacher import TeacherPairs

Report = Callable[[int, dict[str, float]], None]  # iteration, numbers
Grids = Mapping[str, Tensor | tuple[Tensor, Tensor | None]]  # name -> timesteps, or (timesteps, model_timesteps)


class FitLoop:
    """One job's state. ``best``: [v], the validation losses of the best parameters so far."""

    def __init__(
        self,
        student: Student,
        pairs: TeacherPairs,
        settings: FitSettings,
        distance: Distance,
        nfe: int,
        report: Report,
    ) -> None:
        self.student, self.times, self.settings, self.distance = student, student.times, settings, distance
        self.count = len(pairs) - settings.validation_pairs
        self.pairs, self.train, self.validation = pairs, pairs[: self.count], pairs[self.count :]
        self.report = report
        radius = settings.gamma * pairs.noise[0].numel() / nfe**2
        self.noise = TrainingNoise(self.train.noise, radius, settings.latent_lr / nfe)
        self.optimizers = registry.entry("learner", settings.optimizer).optimizers(self.times, settings, nfe)
        self.iteration = 0
        # Where a batch lies, in place, for the graphs that read it.
        size = min(settings.batch_size, self.count)
        self._noise, self._images = (torch.empty_like(each[:size]) for each in (self.train.noise, self.train.images))
        self._graphs: dict[tuple[str, int], Callable[[], Any]] = {}

    def choose_start(self, starts: Grids) -> tuple[str, dict[str, float]]:
        """The start with the least loss, and the validation losses of all. No start was fitted to any pair, so all
        pairs choose: where rare noises decide, the validation pairs alone take the wrong one twice as often."""
        found: dict[str, Tensor] = {}
        for name, grid in starts.items():
            self.times.start_from(*_both(grid))
            losses = self.losses(self.pairs)
            if bool(torch.isfinite(losses).all()):
                found[name] = losses
        if not found:
            raise ValueError(f"the loss of every start is not finite: {', '.join(starts)}")
        best = min(found, key=lambda name: float(found[name].mean()))
        self.times.start_from(*_both(starts[best]))
        self.start = found[best]
        self.best = self.start[self.count :]
        self._save()
        self.start_state = self.best_state
        # Losses are trained on in units of the start's, so that step sizes mean the same for every loss and solver.
        self.unit = max(float(self.start[: self.count].mean()), 1e-300)
        return best, {name: float(losses[self.count :].mean()) for name, losses in found.items()}

    def learn(self) -> bool:
        """Trains; leaves the chosen parameters in ``times``. Returns whether they are learned ones."""
        settings, patience = self.settings, 0
        rounds = settings.rounds_theta + settings.rounds_both
        if self.times.num_steps == 1 and self.times.scale is None:
            rounds = 0  # nothing is free
        batches = -(-len(self.train) // settings.batch_size)
        for number in range(rounds):
            if number == settings.rounds_theta:
                self.optimizers.learn_network_times()
            if number and settings.reload_each_round:
                self._reload()
            order = permutation(settings.seed, number, Purpose.SHUFFLE, len(self.train), self.train.noise.device)
            for batch in order.split(settings.batch_size):
                loss = self._step(batch)
                self.optimizers.anneal(self.iteration / (rounds * batches))
                if self.iteration % settings.validate_every and self.iteration < rounds * batches:
                    continue
                improved = self._validate(loss)
                patience = 0 if improved else patience + 1
                if patience == settings.patience:
                    patience = 0
                    self._reload()
                    self.optimizers.decay()
            self.noise.end_round()
        return self._choose()

    def _step(self, batch: Tensor) -> Tensor:
        """One step of the parameters, and of the noises of these training pairs [b]; returns the mean loss."""
        count, soft = len(self.optimizers.parameters), self.noise.soft
        noise, images = self._noise[: len(batch)], self._images[: len(batch)]
        noise.copy_(self.noise.moved[batch])
        images.copy_(self.train.images[batch])
        losses, gradients = self._replayed("gradients", len(batch), lambda: self._gradients(noise, images))
        self.iteration += 1
        if not bool(torch.stack([torch.isfinite(each).all() for each in gradients]).all()):
            self._reload()
            return torch.tensor(math.nan)
        if soft:
            proposed = self.noise.propose(batch, gradients[-1])
            noise.copy_(proposed)  # the parameters have not moved yet: both losses are of the same student
            after = self._replayed("losses", len(batch), lambda: torch.no_grad()(self._losses)(noise, images))
            self.noise.keep_better(batch, proposed, losses, after)
        self.optimizers.step([each / len(batch) for each in gradients[:count]])
        return losses.mean() * self.unit

    def _losses(self, noise: Tensor, images: Tensor) -> Tensor:
        return self.distance(self.student(noise), images) / self.unit

    def _gradients(self, noise: Tensor, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The losses [b], and the gradients to the parameters and, with soft forcing, to the noises."""
        noise = noise.detach().requires_grad_(self.noise.soft)
        losses = self._losses(noise, images)
        inputs = [*self.optimizers.parameters, *([noise] if self.noise.soft else [])]
        # The sum: so the noises' gradients do not depend on the batch; the parameters' are divided later.
        return losses.detach(), torch.autograd.grad(losses.sum(), inputs, materialize_grads=True)

    def _replayed(self, what: str, rows: int, work: Callable[[], Any]) -> Any:
        """The work on a whole batch, which is the same each time but for the numbers: on a GPU one graph."""
        if self._noise.device.type != "cuda" or rows < len(self._noise):
            return work()
        key = (what, len(self.optimizers.parameters))
        if key not in self._graphs:
            self._graphs[key] = CudaGraph(
                work, lambda why: warnings.warn(f"LD3 without a CUDA graph: {why}", stacklevel=2), 1
            )
        return self._graphs[key]()

    def _validate(self, train_loss: Tensor) -> bool:
        losses = self.losses(self.validation)
        mean = float(losses.mean())
        improved = mean < float(self.best.mean())
        if improved:
            self.best = losses
            self._save()
        numbers = {"train_loss": float(train_loss), "validation_loss": mean, "best_loss": float(self.best.mean())}
        self.report(self.iteration, {**numbers, **self.noise.statistics(), "lr": self.optimizers.lr})
        return improved

    def _choose(self) -> bool:
        """Keeps the best parameters if they beat the start by more than chance; else goes back to the start."""
        self.times.load_state_dict(self.best_state)
        gain = self.start - self.losses(self.pairs)
        error = float(gain.std(correction=0)) / math.sqrt(max(1, len(gain) - 1))
        better = float(self.best.mean()) < float(self.start[self.count :].mean())
        if better and float(gain.mean()) > self.settings.margin * error:
            return True
        self.best = self.start[self.count :]
        self.times.load_state_dict(self.start_state)
        return False

    @torch.no_grad()
    def losses(self, pairs: TeacherPairs) -> Tensor:
        """The loss of each pair at its own noise, [n] float64."""
        size = self.settings.validation_batch
        parts = zip(pairs.noise.split(size), pairs.images.split(size), strict=True)
        return torch.cat([self.distance(self.student(noise), images).double() for noise, images in parts])

    @torch.no_grad()
    def grid(self) -> tuple[Tensor, Tensor]:
        """The two grids as they are now, each [N + 1]."""
        return self.times()

    def statistics(self) -> dict[str, float]:
        """On the whole fit."""
        return {"iterations": float(self.iteration), **self.noise.statistics(), "radius": self.noise.radius}

    def _save(self) -> None:
        self.best_state = {name: value.clone() for name, value in self.times.state_dict().items()}

    def _reload(self) -> None:
        """The best parameters again, with fresh optimisers; noises stay where they are."""
        self.times.load_state_dict(self.best_state)
        self.optimizers.reset()


def _both(grid: Tensor | tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    return grid if isinstance(grid, tuple) else (grid, None)
