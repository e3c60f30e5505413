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
from ..modular_concepts.merging.compatibility import trained_for_words
from ..modular_concepts.models.targets import Targets
from ..modular_concepts.settings import training as declared
from .datasets import CONCEPT_DATASET
from .training_options import CONCEPT_TRAINING_OPTIONS
from .types import CONCEPT
from .widgets import widget

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

    rank, rate, targets: None where the method leaves no choice.  steps_more, rate_more, word_more: what tooltips go on
    with, None for what the declaration says.
    """

    rank: io.Input | None = None
    steps: int = 400
    steps_more: str | None = None
    batch: int = declared.BATCH.default
    rate: float | None = declared.ADAPTER_LR.default
    rate_more: str | None = None
    token_rate: float = declared.TOKEN_LR.default
    word_more: str | None = None
    vectors: int = declared.TOKEN_VECTORS.default
    targets: str | None = "attention + feed-forward"
    text_encoder: bool = declared.TEXT_ENCODER.default
    prior: int = declared.PRIOR.default
    company: float = declared.COMPANY.default


def inputs(special: list[io.Input], form: Form) -> list[io.Input]:
    """What all trainers ask for, with what one asks besides.  Orders are kept: saved workflows go by them."""
    return [
        io.Model.Input("model", tooltip="The base model, as its loader gives it; it stays as it is, bit for bit"),
        io.Clip.Input("clip", tooltip="Its text encoder"),
        io.Vae.Input("vae", tooltip="Its VAE, which turns the pictures into latents"),
        CONCEPT_DATASET.Input("dataset", tooltip="Pictures, captions and masks, from Concept Pictures"),
        *special,
        *_who_it_is(),
        widget(declared.STEPS, form.steps_more, default=form.steps),
        widget(declared.BATCH, default=form.batch),
        *_rates(form),
        widget(declared.TOKEN_VECTORS, default=form.vectors),
        *([form.rank] if form.rank is not None else []),
        widget(declared.SEED, control_after_generate=io.ControlAfterGenerate.fixed),
        *_targets(form),
        widget(declared.PRIOR, default=form.prior, advanced=not form.prior),
        widget(declared.CHECKPOINT_EVERY, default=declared.CHECKPOINTED),
        io.Boolean.Input(
            "resume",
            default=False,
            tooltip="Go on from the newest checkpoint of this name, exactly as if there had been no pause. Without one "
            "it starts from the beginning",
            advanced=True,
        ),
        *_previews(),
        widget(declared.PRECISION),
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
        widget(declared.COMPANY, default=form.company, optional=True, advanced=not form.company),
        widget(declared.COMPANY_PICTURES, optional=True),
    ]


def _who_it_is() -> list[io.Input]:
    return [
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
    ]


def _rates(form: Form) -> list[io.Input]:
    step = {} if form.token_rate >= 1e-4 else {"step": 1e-5}
    token_rate = widget(declared.TOKEN_LR, form.word_more, default=form.token_rate, **step)
    if form.rate is None:
        return [token_rate]
    return [widget(declared.ADAPTER_LR, form.rate_more, default=form.rate), token_rate]


def _targets(form: Form) -> list[io.Input]:
    if form.targets is None:
        return []
    return [
        widget(declared.TARGET, options=list(TARGETS), default=form.targets),
        widget(declared.TEXT_ENCODER, default=form.text_encoder),
    ]


def _previews() -> list[io.Input]:
    return [
        io.Int.Input(
            "preview_every", default=50, min=0, max=100_000, tooltip="Steps between preview pictures; 0 for none"
        ),
        io.String.Input(
            "preview_prompt",
            default="a {concept}",
            tooltip="What previews show, drawn with the same seed each time; {concept} becomes the trigger word. "
            "Several prompts, one a picture, with | between them",
        ),
    ]


def outputs(lora: bool = True) -> list[io.Output]:
    """lora: whether layers are learned that a plain LoRA can have."""
    return [
        CONCEPT.Output("concept", display_name="CONCEPT", tooltip="What was learned, at strength 1"),
        *([_LORA] if lora else []),
        io.LossMap.Output("losses", display_name="LOSS_MAP", tooltip="The loss of each step, for Plot Loss Graph"),
    ]


_LORA = io.LoraModel.Output("lora", display_name="LORA_MODEL", tooltip="The layers alone, for ComfyUI's LoRA nodes")


def rank_input(more: str | None = None, default: int = 16) -> io.Input:
    """more: what the tooltip says of it for this method."""
    return widget(declared.RANK, more, default=default)


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
        company=common.get("company", declared.COMPANY.default),
    )
    options = dict(common.get("options") or {})
    keep_latents = bool(options.pop("keep_latents", False))
    rates = Rates(common.get("learning_rate", 0.0), common["token_learning_rate"])
    of_method = dict(way.settings)
    if not base.family.family.token_norm:
        of_method.pop("token_norm", None)  # a length in CLIP-L's table says nothing of others
    settings = settings_for(base.family.family, rates, **{**chosen, **of_method, **options})
    plan = Plan(
        subject,
        settings,
        way.targets or _choose_targets(common),
        way.basis or OrthogonalBasis(),
        common["prior_pictures"],
        common["preview_every"],
        tuple(with_words(text.strip(), (subject.trigger,)) for text in common["preview_prompt"].split("|")),
        common["resume"],
        common.get("on_change") == CHANGES[1],
        keep_latents,
        tuple(options),
        tuple(way.notes),
        common.get("company_pictures", declared.COMPANY_PICTURES.default),
    )
    concept, result = train_in_host(base, plan)
    learned = [lora_of(concept)] if concept.layers and not trained_for_words(concept) else []
    return io.NodeOutput(concept, *learned, {"loss": result.losses})


def _choose_targets(common: dict) -> Targets:
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
