"""What travels between our nodes, and the widgets that several of them share."""

from __future__ import annotations

from comfy_api.latest import io

from ..host.merging.notices import APPLY
from ..modular_concepts.errors import AdapterError
from ..modular_concepts.merging.block_strengths import EXAMPLE, check_strength
from ..modular_concepts.settings.merging import STRENGTH
from .widgets import widget

LORA_STACK = io.Custom("LORA_STACK")
CONCEPT = io.Custom("CONCEPT")
CONCEPT_STACK = io.Custom("CONCEPT_STACK")
CONCEPT_REGIONS = io.Custom("CONCEPT_REGIONS")
MAX_CONCEPTS = 100


def concepts_input(name: str = "concept", tooltip: str = "", optional: bool = False) -> io.MultiType.Input:
    """A socket that takes a CONCEPT (strength 1) or a CONCEPT_STACK."""
    return io.MultiType.Input(name, [CONCEPT_STACK, CONCEPT], optional=optional, tooltip=tooltip)


def many_concepts_input(tooltip: str) -> io.Autogrow.Input:
    """Sockets concepts.concept0, concepts.concept1, ...: a new one appears as soon as the last is connected."""
    template = io.Autogrow.TemplatePrefix(concepts_input("concept", tooltip), prefix="concept", min=1, max=MAX_CONCEPTS)
    return io.Autogrow.Input("concepts", template=template, tooltip=tooltip)


def strength_input(tooltip: str) -> io.Input:
    # The slider widget ignores `step` unless `round` is given too.
    return widget(
        STRENGTH,
        display_mode=io.NumberDisplay.slider,
        tooltip=f"{tooltip}. The slider ends at {STRENGTH.ends[1]:g}; a number connected to it may be {STRENGTH.reach}",
    )


def explain_strength(strength: float | None) -> str:
    """Why a strength cannot be taken, in a sentence, or "".  None is not known yet.

    Asked by nodes in the place of the host's own check, so that the slider's ends bind nobody.
    """
    try:
        if strength is not None:
            check_strength("strength", strength)
    except AdapterError as error:
        return str(error)
    return ""


def blocks_input() -> io.String.Input:
    return io.String.Input(
        "blocks",
        default="",
        optional=True,
        advanced=True,
        placeholder=EXAMPLE,
        tooltip=f"Strengths of parts, on top of the strength: {EXAMPLE}. Parts are down 0, down 1, ..., mid, up 0, ... "
        "and text 0, ..., or down, up, text for all of a kind; what is not named stays as it is",
    )


def apply_input() -> io.Combo.Input:
    return io.Combo.Input(
        "apply",
        options=list(APPLY),
        default=APPLY[0],
        optional=True,
        advanced=True,
        tooltip="weights: added to the weights once, then every step is as quick as without. activations: computed "
        "beside them at every step, which leaves quantised weights as they are and takes a changed strength at once, "
        "but makes each step slower",
    )
