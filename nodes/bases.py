"""The orthogonal basis that concepts share, so that their sums do not mix."""

from __future__ import annotations

from dataclasses import dataclass

from comfy_api.latest import io, ui

from ..host.files.basis import basis_changed, basis_names, load_basis_named
from ..host.messages import show_text
from ..modular_concepts.adapters.basis import OrthogonalBasis, capacity
from ..modular_concepts.settings import basis as declared
from .unused import unused
from .widgets import widget

ORTHO_BASIS = io.Custom("ORTHO_BASIS")
GENERATED = "generated"
# Input widths of the layers that adapters go to, the narrowest first: it decides how many concepts there is room for.
WIDTHS = {"toy base": (64, 128, 256, 512), "Stable Diffusion 1.5": (320, 640, 768, 1280, 2560, 5120)}


@dataclass(frozen=True, eq=False)
class OrthoChoice:
    """An ORTHO_BASIS: the basis and how a concept takes its columns of it.

    slot_policy: "slot" (columns by number, exactly disjoint) or "hashed" (by the concept's name).
    """

    basis: OrthogonalBasis
    method: str
    rank: int
    slot_policy: str


def describe(choice: OrthoChoice) -> str:
    """Fingerprint and capacity in a person's words."""
    basis, rank = choice.basis, choice.rank
    origin = "from a file" if basis.kind == "file" else f"{basis.kind}, seed {basis.seed}"
    widths = {"this file": tuple(sorted(basis.matrices))} if basis.kind == "file" else WIDTHS
    lines = [f"fingerprint {basis.identity} ({origin})"]
    for model, inputs in widths.items():
        room = [f"{capacity(width, rank)} at width {width}" for width in inputs if width >= rank]
        narrow = [str(width) for width in inputs if width < rank]
        lines.append(f"{model}, rank {rank}: room for {', '.join(room) or 'none'}")
        if narrow:
            lines[-1] += f"; layers of width {', '.join(narrow)} are too narrow"
    lines.append("concepts that are merged need the same fingerprint and rank, and a slot of their own each")
    return "\n".join(lines)


class OrthoBasisLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OrthoBasisLoader",
            display_name="Load Orthogonal Basis",
            category="modular concepts/training",
            description="The basis that all concepts of a set share. Each concept trains in columns of its own, so "
            "that adding many of them does not mix them. Generated from a number, the same on every computer.",
            search_aliases=["orthogonal adaptation", "ortho lora", "shared basis", "orthogonal matrix", "slots"],
            inputs=[
                io.Combo.Input(
                    "basis",
                    options=[GENERATED, *basis_names()],
                    default=GENERATED,
                    tooltip="generated: made from kind and seed. Else a file or folder of matrices in "
                    "models/ortho_bases (.safetensors, .npy)",
                ),
                widget(declared.KIND),
                widget(declared.SEED, control_after_generate=io.ControlAfterGenerate.fixed),
                widget(declared.METHOD),
                widget(declared.COLUMNS),
                widget(declared.SLOT_POLICY),
            ],
            outputs=[
                ORTHO_BASIS.Output("ortho_basis", display_name="ORTHO_BASIS", tooltip="For the concept trainers"),
                io.String.Output("info", display_name="info", tooltip="Fingerprint, and how many concepts fit"),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, basis: str, **_widgets) -> str:
        return "" if basis == GENERATED else basis_changed(basis)

    @classmethod
    def execute(cls, basis: str, kind: str, seed: int, method: str, rank: int, slot_policy: str) -> io.NodeOutput:
        matrices = OrthogonalBasis(kind, seed) if basis == GENERATED else load_basis_named(basis)
        choice = OrthoChoice(matrices, method, rank, slot_policy)
        values = dict(basis=basis, kind=kind, seed=seed)
        info = "\n".join([*unused(OrthoBasisLoader, values), describe(choice)])
        show_text(info)
        return io.NodeOutput(choice, info, ui=ui.PreviewText(info))
