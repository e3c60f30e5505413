"""One step's gradients: noise the latents, let the hooked base predict, weigh the error, go backward."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from ..adapters.attach import attached, frozen_networks
from ..adapters.low_rank import erasure_mask
from ..adapters.own_words import NOTHING_SAID, Said, at_own_words
from ..errors import AdapterError
from .attention_regularisation import Watch, attention_outside, watched
from .batches import Batch, draw_batches
from .frozen import frozen_forward
from .gradient_checkpointing import checkpointed
from .losses import draw_noise, masked_mean
from .optimizers import limit_gradients
from .precision import computing_in
from .problem import Problem
from .run import Run
from .settings import TrainSettings
from .text_features import TextFeatures

TEXT = "text_encoder"


class Step:
    """What computes the gradients of a run's next step, on the base that `on_base` has hooked."""

    def __init__(self, problem: Problem, run: Run, watch: Watch | None, erasure: dict[str, Tensor]):
        self.problem, self.run, self.watch, self.erasure = problem, run, watch, erasure
        self.said = NOTHING_SAID
        self._places: dict[str, list[int]] = {}
        self.parameters = list(run.parameters().values())
        self.context = TextFeatures(problem, run.tokens, any(name.startswith(TEXT) for name in run.adapters))

    def gradients(self) -> tuple[float, float]:
        """Gradients of the next pictures, clipped; the loss and the gradient's norm, which may be no finite numbers."""
        run = self.run
        run.optimizer.zero_grad()
        self._draw_erasure()
        losses = [self._backward(batch) for batch in draw_batches(self.problem, run)]
        # So that a callback's previews show the whole adapter, and at the words of their own prompts.
        self.erasure.clear()
        self.said = NOTHING_SAID
        if run.loss_scale is not None:
            run.loss_scale.unscale([parameter.grad for parameter in self.parameters if parameter.grad is not None])
        norm = limit_gradients(self.parameters, run.settings.clip_norm or math.inf)
        loss = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
        value, norm = torch.stack([loss, norm.to(loss)]).tolist()
        return value, norm

    def _backward(self, batch: Batch) -> Tensor:
        loss = self.loss(batch)
        if loss.requires_grad:
            (loss if self.run.loss_scale is None else loss * self.run.loss_scale.value).backward()
        elif self.context.says_trigger(batch.captions) or not self.problem.triggers:
            raise AdapterError(
                "no chosen layer and no trigger word has a part in the prediction; nothing can be learned"
            )
        return loss.detach()

    def loss(self, batch: Batch) -> Tensor:
        """Weighted mean over samples of the (masked) mean squared error at random noise levels."""
        settings, schedule, latents = self.run.settings, self.problem.base.schedule, batch.latents
        noise = draw_noise(latents.shape, self.run.generators["noise"], settings.noise_offset).to(latents)
        indices = schedule.draw(len(latents), self.run.generators["noise"]).to(latents.device)
        noisy = schedule.noisy(latents, noise, indices)
        self._find_words(batch.captions)
        with computing_in(settings.precision, latents.device):
            context = self.context(batch.captions)
            with ExitStack() as stack:
                if self.watch is not None:
                    stack.enter_context(self.watch.listening())
                prediction = self.problem.base.predict(noisy, schedule.times_of(indices), context)
        error = (prediction.to(latents.dtype) - schedule.target(latents, noise, indices)).square()
        per_sample = masked_mean(error, batch.masks)
        weights = batch.weights
        if settings.min_snr is not None:
            weights = weights * schedule.loss_weight(indices, settings.min_snr).to(weights)
        loss = (per_sample * weights).sum()
        return loss if self.watch is None else loss + self._attention_outside(batch)

    def _find_words(self, captions: Sequence[str]) -> None:
        """Where the batch says the concept's words, for layers that learn there alone."""
        if not self.run.by_word:
            return
        (residual,) = self.run.by_word
        for caption in captions:
            if caption not in self._places:
                places = self.problem.base.word_places(caption, self.run.tokens)
                self._places[caption] = residual.places(places)
        self.said = Said({0: [self._places[caption] for caption in captions]})

    def _attention_outside(self, batch: Batch) -> Tensor:
        masks = batch.masks if batch.attended is None else batch.attended
        if masks is None or self.watch is None:
            return batch.latents.new_zeros(())
        positions = self.problem.base.trigger_positions(batch.captions, self.run.tokens).to(masks.device)
        outside = attention_outside(self.watch.take_maps(positions), positions, masks)
        return self.run.settings.attention_regularisation * outside

    def _draw_erasure(self) -> None:
        """A fresh mask of output rows for each layer and step, from one draw."""
        run = self.run
        if run.settings.erasure == 0 or not run.adapters:
            return
        heights = [len(adapter.lora_up) for adapter in run.adapters.values()]
        masks = erasure_mask(sum(heights), run.settings.erasure, run.generators["erasure"]).split(heights)
        for (name, adapter), mask in zip(run.adapters.items(), masks, strict=True):
            self.erasure[name] = mask.to(adapter.lora_up)


@contextmanager
def on_base(problem: Problem, run: Run) -> Generator[Step]:
    """Within the block the base is frozen and has the run's adapters; then it is as before, without hooks."""
    settings: TrainSettings = run.settings
    erasure: dict[str, Tensor] = {}
    with ExitStack() as stack:
        stack.enter_context(frozen_networks(problem.base.modules))
        if problem.base.lean:
            stack.enter_context(frozen_forward(problem.networks))
        step = Step(problem, run, None, erasure)
        if run.by_word:
            stack.enter_context(at_own_words(problem.layers, run.by_word, lambda text: step.said(text)))
        else:
            stack.enter_context(attached(problem.layers, run.adapters, erasure=erasure))
        if settings.gradient_checkpointing:
            stack.enter_context(checkpointed(problem.networks))
        if settings.attention_regularisation:
            step.watch = stack.enter_context(watched(problem.base.cross_attentions()))
        yield step
