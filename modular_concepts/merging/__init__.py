"""Merging: several concepts become one residual a layer, by one of several methods; each method its own file."""

from ..settings.merging import METHOD_HELP
from .block_strengths import BlockStrengths
from .blocks import MergedBlocks, merged_blocks
from .dense import MergedDense
from .methods import DEFAULTS, NOTHING, Merged, add_concepts, merge_concepts
from .options import Evidence, MergeOptions
from .sums import MergedLayer, MergedSum, average_strengths, mean_strengths, merged_delta, merged_factors

__all__ = [
    "DEFAULTS",
    "METHOD_HELP",
    "NOTHING",
    "BlockStrengths",
    "Evidence",
    "MergeOptions",
    "Merged",
    "MergedBlocks",
    "MergedDense",
    "MergedLayer",
    "MergedSum",
    "add_concepts",
    "average_strengths",
    "mean_strengths",
    "merge_concepts",
    "merged_blocks",
    "merged_delta",
    "merged_factors",
]
