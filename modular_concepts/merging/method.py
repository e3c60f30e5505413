"""What a merge method is: how one layer's adapters become one, and what has to be there first."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from ..adapters.low_rank import LowRank
from ..adapters.sites import layer_of
from ..errors import AdapterError
from ..storage.room import check_room
from .moments import Moment
from .options import Evidence, MergeOptions

if TYPE_CHECKING:
    from .methods import Merged

MOMENTS, TEXTS = "moments", "texts"  # what a method may need beside the adapters: fields of `Evidence`


class Mergeable(Protocol):
    """What merging reads of a concept."""

    @property
    def name(self) -> str: ...

    @property
    def layers(self) -> Mapping[str, LowRank]: ...


@dataclass(frozen=True, eq=False)
class LayerStack:
    """One layer, or site of one, of the concepts that change it, each with its strength; all on one device.

    evidence: of these concepts alone, in their order.
    """

    layer: str
    names: Sequence[str]
    adapters: Sequence[LowRank]
    strengths: Sequence[float]
    options: MergeOptions
    evidence: Evidence

    @property
    def moments(self) -> list[Tensor | Moment]:
        """Each concept's second moments of what the layer reads.

        Raises AdapterError that names the concept where there are none, or those of another width.
        """
        return [
            _find_moment(self.layer, name, adapter, recorded)
            for name, adapter, recorded in zip(self.names, self.adapters, self.evidence.moments, strict=True)
        ]

    def check_room(self, how: str, whole: bool = False) -> None:
        """Raise AdapterError where no memory holds the whole weights that are about to be formed.

        Factors of a few kilobytes can stand for a weight of gigabytes.  whole: of all adapters, and not of the full
        ones alone.
        """
        full = [adapter for adapter in self.adapters if adapter.kind == "full"]
        if whole or full:
            shape = self.adapters[0].weight_shape
            numbers = math.prod(shape) * (3 + 2 * len(self.adapters)) + sum(a.lora_down.numel() for a in full)
            what = f"{self.layer}: a weight of {' x '.join(map(str, shape))} numbers, merged by {how},"
            check_room(what, 4 * numbers, "merge factors by sum")


@dataclass(frozen=True, eq=False)
class Method:
    """A way to merge.  What it is for a person who chooses stands in `settings.merging.METHOD_HELP`, by the same name.

    merge_layer: one layer's adapters -> one merged layer; strengths enter here, once.
    strengths: what becomes of all concepts' strengths before.  check(concepts): raises AdapterError for concepts that
    it cannot merge.  needs: MOMENTS or TEXTS, where adapters are not enough.
    """

    name: str
    merge_layer: Callable[[LayerStack], Merged]
    strengths: Callable[[Sequence[float]], list[float]] = list
    check: Callable[[Sequence[Mergeable]], None] = lambda concepts: None
    needs: str = ""


def _find_moment(layer: str, name: str, adapter: LowRank, recorded: Mapping[str, Tensor | Moment]) -> Tensor | Moment:
    # What a layer reads, all of its sites read.
    moment = recorded.get(layer, recorded.get(layer_of(layer)))
    if moment is None:
        raise AdapterError(f"{name}: its moments say nothing of {layer}; record them again for this concept")
    inputs = adapter.lora_down[0].numel()
    width = moment.factor.shape[1] if isinstance(moment, Moment) else len(moment)
    if width != inputs:
        raise AdapterError(
            f"{name}: its moments are of {width} inputs of {layer}, which has {inputs}; record them again for this "
            "concept"
        )
    return moment
