"""In the host: lessons as the trainer nodes make them, who listens to their progress, and the loss on fixed draws."""

from __future__ import annotations

from dataclasses import dataclass

import comfy.model_management
import comfy.utils
import torch
from modular_concepts_pack.host.training import train as training
from modular_concepts_pack.modular_concepts.adapters import attach
from modular_concepts_pack.modular_concepts.adapters.basis import OrthogonalBasis
from modular_concepts_pack.modular_concepts.data.dataset import of_pictures
from modular_concepts_pack.modular_concepts.families import find_family
from modular_concepts_pack.modular_concepts.models.targets import Targets


@dataclass(frozen=True)
class Material:
    """What lessons are about: pictures (N, 3, H, W), captions, and masks (N, H, W) for the cases that ask for them."""

    family: str
    pictures: torch.Tensor
    captions: list[str]
    masks: torch.Tensor | None = None


class Seen:
    """Stands where the host's server listens to progress bars."""

    def __init__(self, stop_at: int | None = None):
        self.steps, self.previews, self.stop_at = [], [], stop_at
        comfy.utils.set_progress_bar_global_hook(self)

    def __call__(self, value, total, preview, node_id=None):
        self.steps.append([value, total])
        if preview is not None:
            self.previews.append([preview[0], *preview[1].size])
        if value == self.stop_at:
            comfy.model_management.interrupt_current_processing(True)
        # The server's own hook raises here too.
        comfy.model_management.throw_exception_if_processing_interrupted()


def lesson(material: Material, case: dict) -> training.Plan:
    """A plan as the trainer nodes make it."""
    masks = list(material.masks) if case.get("masks") else None
    data = of_pictures(list(material.pictures), material.captions, masks, tuple(material.pictures.shape[2:]))
    subject = training.subject_of(data, case["name"], case.get("class_word", "man"), case.get("description", ""))
    rates = training.Rates(case.get("learning_rate", 1e-3), case.get("token_learning_rate", 3e-2))
    settings = training.settings_for(find_family(material.family), rates, name=subject.name, **case["settings"])
    unet, text = tuple(case.get("targets", ["attention"])), ("attention",) if case.get("text_encoder") else None
    return training.Plan(
        subject,
        settings,
        Targets(unet, text),
        OrthogonalBasis(),
        case.get("prior", 0),
        case.get("preview_every", 0),
        (f"a {subject.trigger}",),
        case.get("resume", False),
        case.get("accept_changes", False),
        company_pictures=4,
    )


@torch.no_grad()
def fixed_loss(base, subject, concept=None) -> float:
    """Mean loss on 32 fixed draws of picture, noise and timestep, with the class word's own rows without a concept."""
    generator = torch.Generator().manual_seed(7)
    latents = base.encode(subject.pictures)
    picked = torch.arange(32) % len(latents)
    latents, captions = latents[picked], [subject.captions[i] for i in picked.tolist()]
    noise, timesteps = torch.randn(latents.shape, generator=generator), torch.randint(1000, (32,), generator=generator)
    signal = base.schedule.alphas_cumprod[timesteps][:, None, None, None]
    noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
    v = base.schedule.prediction == "v_prediction"
    wanted = signal.sqrt() * noise - (1 - signal).sqrt() * latents if v else noise
    adapters = concept.layers if concept else {}
    tokens = dict(concept.tokens) if concept else {subject.trigger: base.word_rows(subject.class_word)}
    with base.trainable(), attach.attached(base.layers(("all_linear",), ("all_linear",)), adapters):
        told = dict.fromkeys(captions)
        context = dict(zip(told, base.context(list(told), tokens), strict=True))
        context = torch.stack([context[caption] for caption in captions])
        predicted = torch.cat(
            [base.predict(noisy[i : i + 8], timesteps[i : i + 8], context[i : i + 8]) for i in range(0, 32, 8)]
        )
    return float((predicted - wanted).square().mean())


def outcome(attempt) -> str:
    try:
        attempt()
    except comfy.model_management.InterruptProcessingException:
        return "interrupted"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "worked"
