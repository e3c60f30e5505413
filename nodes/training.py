"""Teach the loaded model one concept: by orthogonal columns, by blocks of rows, or as a plain LoRA."""

from __future__ import annotations

from comfy_api.latest import io

from ..host.base import host_base
from ..host.training import Plan, Rates, checked_name, lora_of, settings_for, subject_of, train_in_host
from ..modular_concepts.bases import OrthogonalBasis
from ..modular_concepts.customisation import Targets
from ..modular_concepts.dataset import with_words
from ..modular_concepts.errors import AdapterError
from .bases import ORTHO_BASIS, OrthoChoice
from .datasets import CONCEPT_DATASET
from .types import CONCEPT

# What the widget says -> layers of the U-Net, and of the text encoder where that is switched on.
TARGETS = {
    "attention": (("attention",), ("attention",)),
    "attention + feed-forward": (("attention", "feed_forward"), ("attention", "feed_forward")),
    "all linear": (("all_linear",), ("all_linear",)),
    "cross-attention k,v": (("cross_attention_kv",), ("attention",)),
}


def _inputs(own: list[io.Input], rank: io.Input | None) -> list[io.Input]:
    """What all trainers ask for, with what one asks besides."""
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
        io.Int.Input("steps", default=400, min=1, max=100_000, tooltip="How many training steps"),
        io.Int.Input("batch_size", default=4, min=1, max=256, tooltip="Pictures per step; more need more memory"),
        io.Float.Input(
            "learning_rate",
            default=1e-4,
            min=0.0,
            max=1.0,
            step=1e-5,
            round=1e-7,
            tooltip="Step size of the layers, per step: 0.0001 for Stable Diffusion, 0.0002 for the toy base. Small "
            "beside the learned word's, so that merged concepts do not disturb each other",
        ),
        io.Float.Input(
            "token_learning_rate",
            default=1e-3,
            min=0.0,
            max=1.0,
            step=1e-4,
            round=1e-6,
            tooltip="Step size of the learned word, per step: 0.001 for Stable Diffusion, 0.03 for the toy base",
        ),
        io.Int.Input(
            "token_vectors",
            default=2,
            min=1,
            max=32,
            tooltip="How many words' worth of meaning the trigger holds; a longer description has one for each word",
        ),
        *([rank] if rank is not None else []),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**31 - 1,
            control_after_generate=io.ControlAfterGenerate.fixed,
            tooltip="Everything random follows from it, the fresh adapters too: same seed, same concept",
        ),
        io.Combo.Input(
            "targets",
            options=list(TARGETS),
            default="attention + feed-forward",
            tooltip="Which layers learn. More layers learn more and make a larger file",
        ),
        io.Boolean.Input("text_encoder", default=False, tooltip="Let the text encoder's layers learn too"),
        io.Int.Input(
            "prior_pictures",
            default=0,
            min=0,
            max=1000,
            tooltip="Pictures that the base draws itself first, to be trained on beside yours, so that it forgets "
            "nothing; 0 for none. Each step then takes twice as long",
            advanced=True,
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
        io.String.Input("preview_prompt", default="a {concept}", tooltip="{concept} becomes the trigger word"),
        io.Combo.Input(
            "precision",
            options=["fp32", "bf16"],
            default="fp32",
            tooltip="How the networks compute: bf16 is faster and smaller on recent GPUs",
            advanced=True,
        ),
    ]


def _outputs() -> list[io.Output]:
    return [
        CONCEPT.Output("concept", display_name="CONCEPT", tooltip="What was learned, at strength 1"),
        io.LoraModel.Output("lora", display_name="LORA_MODEL", tooltip="The layers alone, for core LoRA nodes"),
        io.LossMap.Output("losses", display_name="LOSS_MAP", tooltip="The loss of each step, for Plot Loss Graph"),
    ]


def _rank(tooltip: str) -> io.Input:
    return io.Int.Input("rank", default=16, min=1, max=512, tooltip=tooltip)


def _slot(tooltip: str) -> io.Input:
    return io.Int.Input("slot", default=0, min=0, max=10_000, tooltip=tooltip)


def _train(common: dict, method: str, rank: int, basis: OrthogonalBasis | None = None, **own: object) -> io.NodeOutput:
    """`common`: the values of `_inputs`."""
    subject = subject_of(common["dataset"], common["name"], common["class_word"], common.get("description") or "")
    base = host_base(common["model"], common["clip"], common["vae"])
    rates = Rates(common["learning_rate"], common["token_learning_rate"])
    settings = settings_for(
        base.architecture,
        rates,
        method=method,
        rank=rank,
        name=subject.name,
        steps=common["steps"],
        batch=common["batch_size"],
        token_vectors=common["token_vectors"],
        seed=common["seed"],
        checkpoint_every=common["checkpoint_every"],
        precision=common["precision"],
        **own,
    )
    unet, text = TARGETS[common["targets"]]
    plan = Plan(
        subject,
        settings,
        Targets(unet, text if common["text_encoder"] else None),
        basis or OrthogonalBasis(),
        common["prior_pictures"],
        common["preview_every"],
        with_words(common["preview_prompt"], (subject.trigger,)),
        common["resume"],
    )
    concept, result = train_in_host(base, plan)
    return io.NodeOutput(concept, lora_of(concept), {"loss": result.losses})


class _Trainer(io.ComfyNode):
    """What the trainers have in common."""

    @classmethod
    def validate_inputs(cls, name: str | None = None) -> bool | str:
        """Refused before anything runs: another concept's long training may come first."""
        try:
            return name is None or bool(checked_name(name))
        except AdapterError as error:
            return str(error)


class OrthoLoRATrainer(_Trainer):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OrthoLoRATrainer",
            display_name="Train Orthogonal Concept",
            category="modular concepts/training",
            description="Learns one concept in columns of a shared orthogonal basis. Concepts in different slots add "
            "up without mixing, however many they are and whoever trained them.",
            search_aliases=["train lora", "dreambooth", "orthogonal adaptation", "train concept", "fine-tune"],
            inputs=_inputs(
                [
                    ORTHO_BASIS.Input("ortho_basis", tooltip="The shared basis, with method orthogonal; sets the rank"),
                    _slot("Which columns are this concept's own; a different number for each concept of a set"),
                ],
                None,
            ),
            outputs=_outputs(),
        )

    @classmethod
    def execute(cls, ortho_basis: OrthoChoice, slot: int, **common) -> io.NodeOutput:
        if ortho_basis.method != "orthogonal":
            raise AdapterError(
                f"the basis is for method {ortho_basis.method}; set it to orthogonal, or use Train Block Concept"
            )
        own = slot if ortho_basis.slot_policy == "slot" else None
        return _train(common, "orthogonal", ortho_basis.rank, ortho_basis.basis, slot=own)


class BlockLoRATrainer(_Trainer):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="BlockLoRATrainer",
            display_name="Train Block Concept",
            category="modular concepts/training",
            description="Learns one concept in output rows of its own: each layer is divided into blocks, and every "
            "concept of a set writes to one. Merge them with Merge Block Concepts.",
            search_aliases=["train lora", "block lora", "dreambooth", "train concept", "fine-tune"],
            inputs=_inputs(
                [
                    ORTHO_BASIS.Input(
                        "ortho_basis",
                        optional=True,
                        tooltip="With method block_orthogonal: rows and columns of its own; sets the rank",
                    ),
                    io.Int.Input(
                        "blocks",
                        default=15,
                        min=1,
                        max=1000,
                        tooltip="Into how many blocks the rows are divided; the same for all concepts of a set",
                    ),
                    _slot("Which block is this concept's own, from 0; a different number for each concept of a set"),
                    io.Combo.Input(
                        "layout",
                        options=["contiguous", "strided"],
                        default="contiguous",
                        tooltip="contiguous: neighbouring rows. strided: every blocks-th row",
                        advanced=True,
                    ),
                    io.Float.Input(
                        "erasure",
                        default=0.0,
                        min=0.0,
                        max=0.95,
                        step=0.05,
                        round=0.01,
                        tooltip="Probability that a row is left out of a step, so that rows learn to do without each "
                        "other; 0 for never",
                        advanced=True,
                    ),
                ],
                _rank("Size of the adapters; at most the rows of a block. No effect where a basis is connected"),
            ),
            outputs=_outputs(),
        )

    @classmethod
    def execute(
        cls,
        blocks: int,
        slot: int,
        layout: str,
        erasure: float,
        rank: int,
        ortho_basis: OrthoChoice | None = None,
        **common,
    ) -> io.NodeOutput:
        own = dict(blocks=blocks, slot=slot, layout=layout, erasure=erasure)
        if ortho_basis is None:
            return _train(common, "block", rank, **own)
        if ortho_basis.method != "block_orthogonal":
            raise AdapterError(
                f"the basis is for method {ortho_basis.method}; set it to block_orthogonal, or use Train "
                "Orthogonal Concept"
            )
        if ortho_basis.slot_policy != "slot":
            raise AdapterError("a block concept's columns go by its slot; set the basis' slot_policy to slot")
        return _train(common, "block_orthogonal", ortho_basis.rank, ortho_basis.basis, **own)


class LoRATrainer(_Trainer):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LoRATrainer",
            display_name="Train LoRA Concept",
            category="modular concepts/training",
            description="Learns one concept as an ordinary LoRA with a word of its own. Good alone; for several that "
            "are to be merged, train orthogonal concepts.",
            search_aliases=["train lora", "lora trainer", "dreambooth", "textual inversion", "fine-tune"],
            inputs=_inputs([], _rank("Size of the adapters; more learn more and make a larger file")),
            outputs=_outputs(),
        )

    @classmethod
    def execute(cls, rank: int, **common) -> io.NodeOutput:
        return _train(common, "lora", rank)
