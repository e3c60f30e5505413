"""What all trainers ask for and give, and the one call that they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from comfy_api.latest import io

from ..host.training.base import host_base
from ..host.training.train import Plan, Rates, checked_name, lora_of, settings_for, subject_of, train_in_host
from ..modular_concepts.adapters.basis import OrthogonalBasis
from ..modular_concepts.data.dataset import with_words
from ..modular_concepts.errors import AdapterError
from ..modular_concepts.models.targets import Targets
from .datasets import CONCEPT_DATASET
from .training_options import CONCEPT_TRAINING_OPTIONS
from .types import CONCEPT

# What the widget says -> layers of the network that draws, and of the text encoder where that is switched on.
TARGETS = {
    "attention": (("attention",), ("attention",)),
    "attention + feed-forward": (("attention", "feed_forward"), ("attention", "feed_forward")),
    "all linear": (("all_linear",), ("all_linear",)),
    "cross-attention k,v": (("cross_attention_kv",), ("attention",)),
}
CHANGES = ("refuse", "go on")


@dataclass(frozen=True)
class Form:
    """Where a trainer's widgets start, and what their tooltips say of it.

    rank, rate, targets: None where the method leaves no choice.
    """

    rank: io.Input | None = None
    steps: int = 400
    steps_help: str = "How many training steps"
    batch: int = 4
    rate: float | None = 1e-4
    rate_help: str = (
        "Step size of the layers, per step: 0.0001 for Stable Diffusion, 0.0002 for the toy base. Small "
        "beside the learned word's, so that merged concepts do not disturb each other"
    )
    token_rate: float = 1e-3
    word_help: str = "Step size of the learned word, per step: 0.001 for Stable Diffusion, 0.03 for the toy base"
    vectors: int = 2
    targets: str | None = "attention + feed-forward"
    text_encoder: bool = False
    prior: int = 0


def inputs(own: list[io.Input], form: Form) -> list[io.Input]:
    """What all trainers ask for, with what one asks besides.  Orders are kept: saved workflows go by them."""
    return [
        io.Model.Input("model", tooltip="The base model, as its loader gives it; it stays as it is, bit for bit"),
        io.Clip.Input("clip", tooltip="Its text encoder"),
        io.Vae.Input("vae", tooltip="Its VAE, which turns the pictures into latents"),
        CONCEPT_DATASET.Input("dataset", tooltip="Pictures, captions and masks, from Concept Pictures"),
        *own,
        io.String.Input(
            "name", default="my_concept", tooltip="The concept's name; <name> is the word that calls it in a prompt"
        ),
        io.String.Input(
            "class_word",
            default="",
            tooltip="What it is, in one or two words that the base knows: man, dog, style",
        ),
        io.String.Input(
            "description",
            default="",
            optional=True,
            tooltip="What it looks like, in words that the base knows, such as: man red shirt brown hair. The learned "
            "word starts from there, with one vector for each word; empty: from the class word",
        ),
        io.Int.Input("steps", default=form.steps, min=1, max=100_000, tooltip=form.steps_help),
        io.Int.Input(
            "batch_size", default=form.batch, min=1, max=256, tooltip="Pictures per step; more need more memory"
        ),
        *_rates(form),
        io.Int.Input(
            "token_vectors",
            default=form.vectors,
            min=1,
            max=32,
            tooltip="How many words' worth of meaning the trigger holds; a longer description has one for each word",
        ),
        *([form.rank] if form.rank is not None else []),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**31 - 1,
            control_after_generate=io.ControlAfterGenerate.fixed,
            tooltip="Everything random follows from it, the fresh adapters too: same seed, same concept",
        ),
        *_targets(form),
        io.Int.Input(
            "prior_pictures",
            default=form.prior,
            min=0,
            max=1000,
            tooltip="Pictures that the base draws itself first, to be trained on beside yours, so that it forgets "
            "nothing; 0 for none. Each step then takes twice as long",
            advanced=not form.prior,
        ),
        io.Int.Input(
            "checkpoint_every",
            default=100,
            min=0,
            max=100_000,
            tooltip="Steps between checkpoints in output/modular_concepts/NAME, all that a crash can cost; 0: only at "
            "the end and when cancelled",
            advanced=True,
        ),
        io.Boolean.Input(
            "resume",
            default=False,
            tooltip="Go on from the newest checkpoint of this name, exactly as if there had been no pause. Without one "
            "it starts from the beginning",
            advanced=True,
        ),
        io.Int.Input(
            "preview_every", default=50, min=0, max=100_000, tooltip="Steps between preview pictures; 0 for none"
        ),
        io.String.Input(
            "preview_prompt",
            default="a {concept}",
            tooltip="What previews show, drawn with the same seed each time; {concept} becomes the trigger word. "
            "Several prompts, one a picture, with | between them",
        ),
        io.Combo.Input(
            "precision",
            options=["fp32", "bf16", "fp16"],
            default="fp32",
            tooltip="How the networks compute: bf16 is faster and smaller on recent GPUs, fp16 on older ones",
            advanced=True,
        ),
        CONCEPT_TRAINING_OPTIONS.Input(
            "options",
            optional=True,
            tooltip="More choices, from Training Options: the loss, captions, speed and memory",
        ),
        io.Combo.Input(
            "on_change",
            options=list(CHANGES),
            default=CHANGES[0],
            optional=True,
            tooltip="What resume does when settings, pictures, captions or the base are others than the checkpoint's. "
            "refuse: say what changed, and stop. go on: from there with the new ones",
            advanced=True,
        ),
    ]


def _rates(form: Form) -> list[io.Input]:
    token_rate = io.Float.Input(
        "token_learning_rate",
        default=form.token_rate,
        min=0.0,
        max=1.0,
        step=1e-4 if form.token_rate >= 1e-4 else 1e-5,
        round=1e-6,
        tooltip=form.word_help,
    )
    if form.rate is None:
        return [token_rate]
    rate = io.Float.Input(
        "learning_rate",
        default=form.rate,
        min=0.0,
        max=1.0,
        step=1e-5,
        round=1e-7,
        tooltip=form.rate_help,
    )
    return [rate, token_rate]


def _targets(form: Form) -> list[io.Input]:
    if form.targets is None:
        return []
    return [
        io.Combo.Input(
            "targets",
            options=list(TARGETS),
            default=form.targets,
            tooltip="Which layers learn. More layers learn more and make a larger file",
        ),
        io.Boolean.Input("text_encoder", default=form.text_encoder, tooltip="Let the text encoder's layers learn too"),
    ]


def outputs(lora: bool = True) -> list[io.Output]:
    """lora: whether layers are learned at all."""
    return [
        CONCEPT.Output("concept", display_name="CONCEPT", tooltip="What was learned, at strength 1"),
        *([_LORA] if lora else []),
        io.LossMap.Output("losses", display_name="LOSS_MAP", tooltip="The loss of each step, for Plot Loss Graph"),
    ]


_LORA = io.LoraModel.Output("lora", display_name="LORA_MODEL", tooltip="The layers alone, for ComfyUI's LoRA nodes")


def rank_input(tooltip: str, default: int = 16) -> io.Input:
    return io.Int.Input("rank", default=default, min=1, max=512, tooltip=tooltip)


@dataclass(frozen=True)
class Way:
    """A method as a trainer means it.  settings: the engine's, those that differ from ours for all trainers.

    notes: what the trainer has to say of its own widgets.
    """

    method: str
    rank: int = 1
    basis: OrthogonalBasis | None = None
    targets: Targets | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
    notes: Sequence[str] = ()


def train(common: dict, way: Way) -> io.NodeOutput:
    """`common`: the values of `inputs` without a trainer's own."""
    subject = subject_of(common["dataset"], common["name"], common["class_word"], common.get("description") or "")
    base = host_base(common["model"], common["clip"], common["vae"])
    chosen = dict(
        method=way.method,
        rank=way.rank,
        name=subject.name,
        steps=common["steps"],
        batch=common["batch_size"],
        token_vectors=common["token_vectors"],
        seed=common["seed"],
        checkpoint_every=common["checkpoint_every"],
        precision=common["precision"],
    )
    options = dict(common.get("options") or {})
    keep_latents = bool(options.pop("keep_latents", False))
    rates = Rates(common.get("learning_rate", 0.0), common["token_learning_rate"])
    own = dict(way.settings)
    if not base.family.family.token_norm:
        own.pop("token_norm", None)  # a length in CLIP-L's table says nothing of others
    settings = settings_for(base.family.family, rates, **{**chosen, **own, **options})
    plan = Plan(
        subject,
        settings,
        way.targets or _chosen_targets(common),
        way.basis or OrthogonalBasis(),
        common["prior_pictures"],
        common["preview_every"],
        tuple(with_words(text.strip(), (subject.trigger,)) for text in common["preview_prompt"].split("|")),
        common["resume"],
        common.get("on_change") == CHANGES[1],
        keep_latents,
        tuple(options),
        tuple(way.notes),
    )
    concept, result = train_in_host(base, plan)
    learned = [lora_of(concept)] if concept.layers else []
    return io.NodeOutput(concept, *learned, {"loss": result.losses})


def _chosen_targets(common: dict) -> Targets:
    unet, text = TARGETS[common["targets"]]
    return Targets(unet, text if common["text_encoder"] else None)


class Trainer(io.ComfyNode):
    """What the trainers have in common."""

    @classmethod
    def validate_inputs(cls, name: str | None = None) -> bool | str:
        """Refused before anything runs: another concept's long training may come first."""
        try:
            return name is None or bool(checked_name(name))
        except AdapterError as error:
            return str(error)
