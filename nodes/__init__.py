"""The pack's nodes, as the host asks for them."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from ..host.files import folders
from .automatic import FindRegions
from .baselines import CustomDiffusionTrainer, EDLoRATrainer, WordTrainer
from .bases import OrthoBasisLoader
from .concepts import ConceptLoader, ConceptSave, ConceptStrength, ConceptTextEncode, LoRAToConcept
from .datasets import ConceptDataset
from .merging import BlockLoRAMerge, ConceptFromModel, ConceptFusion, ConceptHook, ConceptMerge, ConceptOrthogonalize
from .region_drawing import DrawRegions
from .region_json import RegionsFromJSON
from .regions import ConceptRegion, RegionalConcepts, RegionalConceptSampler, RegionPreview
from .reports import CrosstalkReport
from .stacking import ConceptStack
from .toy import ToyBaseLoader, ToyPictures
from .training import BlockLoRATrainer, LoRATrainer, OrthoLoRATrainer, OwnWordTrainer
from .training_options import ConceptTrainingOptions

NODES: list[type[io.ComfyNode]] = [
    ToyBaseLoader,
    ToyPictures,
    OrthoBasisLoader,
    ConceptDataset,
    OwnWordTrainer,
    OrthoLoRATrainer,
    BlockLoRATrainer,
    LoRATrainer,
    EDLoRATrainer,
    CustomDiffusionTrainer,
    WordTrainer,
    ConceptTrainingOptions,
    ConceptLoader,
    LoRAToConcept,
    ConceptStrength,
    ConceptSave,
    ConceptTextEncode,
    ConceptStack,
    ConceptMerge,
    BlockLoRAMerge,
    ConceptFusion,
    ConceptOrthogonalize,
    ConceptHook,
    ConceptFromModel,
    ConceptRegion,
    DrawRegions,
    RegionsFromJSON,
    RegionPreview,
    FindRegions,
    RegionalConcepts,
    RegionalConceptSampler,
    CrosstalkReport,
]


class ModularConcepts(ComfyExtension):
    async def on_load(self) -> None:
        folders.register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
