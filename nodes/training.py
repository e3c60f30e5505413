"""Teach the loaded model one concept: at its own words, by orthogonal columns or blocks of rows, or as a plain LoRA."""

from __future__ import annotations

from comfy_api.latest import io

from ..modular_concepts.errors import AdapterError
from ..modular_concepts.models.targets import Targets
from ..modular_concepts.settings import training as declared
from ..modular_concepts.training.presets import PRESETS
from .bases import ORTHO_BASIS, OrthoChoice
from .training_form import Form, Trainer, Way, inputs, outputs, rank_input, train
from .unused import unused
from .widgets import widget

OWN_WORDS = PRESETS["own words"]


def _slot(tooltip: str) -> io.Input:
    """A node that asks for one has a slot, where the shell may leave it out."""
    return widget(declared.SLOT, default=0, tooltip=tooltip)


class OrthoLoRATrainer(Trainer):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OrthoLoRATrainer",
            display_name="Train Orthogonal Concept",
            category="modular concepts/training",
            description="Learns one concept in columns of a shared orthogonal basis. Concepts in different slots add "
            "up without mixing, however many they are and whoever trained them.",
            search_aliases=["train lora", "dreambooth", "orthogonal adaptation", "train concept", "fine-tune"],
            inputs=inputs(
                [
                    ORTHO_BASIS.Input("ortho_basis", tooltip="The shared basis, with method orthogonal; sets the rank"),
                    _slot("Which columns are this concept's own; a different number for each concept of a set"),
                ],
                Form(),
            ),
            outputs=outputs(),
        )

    @classmethod
    def execute(cls, ortho_basis: OrthoChoice, slot: int, **common) -> io.NodeOutput:
        if ortho_basis.method != "orthogonal":
            raise AdapterError(
                f"the basis is for method {ortho_basis.method}; set it to orthogonal, or use Train Block Concept"
            )
        numbered = slot if ortho_basis.slot_policy == "slot" else None
        notes = unused(cls, {**common, "ortho_basis": ortho_basis, "slot": slot})
        return train(
            common, Way("orthogonal", ortho_basis.rank, ortho_basis.basis, settings={"slot": numbered}, notes=notes)
        )


class BlockLoRATrainer(Trainer):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="BlockLoRATrainer",
            display_name="Train Block Concept",
            category="modular concepts/training",
            description="Learns one concept in output rows of its own: each layer is divided into blocks, and every "
            "concept of a set writes to one. Merge them with Merge Block Concepts.",
            search_aliases=["train lora", "block lora", "dreambooth", "train concept", "fine-tune"],
            inputs=inputs(
                [
                    ORTHO_BASIS.Input(
                        "ortho_basis",
                        optional=True,
                        tooltip="With method block_orthogonal: rows and columns of its own; sets the rank",
                    ),
                    widget(declared.BLOCKS),
                    _slot("Which block is this concept's own, from 0; a different number for each concept of a set"),
                    widget(declared.LAYOUT),
                    widget(declared.ERASURE),
                ],
                Form(rank_input("; at most the rows of a block. No effect where a basis is connected")),
            ),
            outputs=outputs(),
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
        settings = dict(blocks=blocks, slot=slot, layout=layout, erasure=erasure)
        notes = unused(cls, {**common, "ortho_basis": ortho_basis, "rank": rank})
        if ortho_basis is None:
            return train(common, Way("block", rank, settings=settings, notes=notes))
        if ortho_basis.method != "block_orthogonal":
            raise AdapterError(
                f"the basis is for method {ortho_basis.method}; set it to block_orthogonal, or use Train "
                "Orthogonal Concept"
            )
        if ortho_basis.slot_policy != "slot":
            raise AdapterError("a block concept's columns go by its slot; set the basis' slot_policy to slot")
        way = Way("block_orthogonal", ortho_basis.rank, ortho_basis.basis, settings=settings, notes=notes)
        return train(common, way)


class LoRATrainer(Trainer):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LoRATrainer",
            display_name="Train LoRA Concept",
            category="modular concepts/training",
            description="Learns one concept as an ordinary LoRA with a word of its own. Good alone; for several that "
            "are to be merged, train orthogonal concepts.",
            search_aliases=["train lora", "lora trainer", "dreambooth", "textual inversion", "fine-tune"],
            inputs=inputs([], Form(rank_input())),
            outputs=outputs(),
        )

    @classmethod
    def execute(cls, rank: int, **common) -> io.NodeOutput:
        return train(common, Way("lora", rank, notes=unused(cls, common)))


class OwnWordTrainer(Trainer):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OwnWordTrainer",
            display_name="Train Own-Word Concept",
            category="modular concepts/training",
            description="Learns one concept that acts where a prompt says its own word and nowhere else. Any number of "
            "them add up without a trace of each other, and a prompt without the word draws what the base draws.",
            search_aliases=["train lora", "token gate", "tara", "multi concept", "train concept", "dreambooth"],
            inputs=inputs(
                [],
                Form(
                    rank=rank_input(default=OWN_WORDS.settings.rank),
                    steps=OWN_WORDS.settings.steps,
                    rate=OWN_WORDS.settings.adapter_lr,
                    rate_more=", per step; they act at the concept's own word alone, so they need not be small",
                    token_rate=OWN_WORDS.settings.token_lr,
                    vectors=OWN_WORDS.settings.token_vectors,
                    targets=None,
                    prior=OWN_WORDS.prior,
                ),
            ),
            outputs=outputs(lora=False),
        )

    @classmethod
    def execute(cls, rank: int, **common) -> io.NodeOutput:
        way = Way(OWN_WORDS.settings.method, rank, targets=Targets(OWN_WORDS.targets), notes=unused(cls, common))
        return train(common, way)
