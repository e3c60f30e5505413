"""All that can be chosen about a merge, and what its methods are in a sentence each."""

from __future__ import annotations

from .setting import Setting, Widget, group
from .training import LAST_SEED

# Method -> what it is, and what it does to orthogonal concepts, in a sentence for the person who chooses.
METHOD_HELP = {
    "sum": "every concept as trained, times its strength; keeps orthogonal concepts apart",
    "mean": "the sum over the number of concepts (FedAvg): each acts at a fraction of its strength",
    "average": "the sum with strengths scaled to add up to 1: each acts at a fraction of its strength",
    "block": "block concepts side by side, each in its own rows, exactly as trained",
    "fusion": "damped least squares (RegMean's form): each layer answers every concept's recorded inputs nearly as "
    "that concept alone would, and one alone stays itself; needs their moments, and destroys orthogonality",
    "custom_diffusion": "key and value layers answer the concepts' words as trained and move least for a list of "
    "ordinary captions; other layers are summed",
    "magnitude": "only the largest weights of each concept, summed; destroys orthogonality",
    "dare": "random weights of each concept, enlarged, summed; destroys orthogonality",
    "ties": "the weights that agree with the majority's sign, averaged; destroys orthogonality",
    "svd": "the sum cut to a lower rank; small files, but orthogonal concepts lose most by it",
}

HOW = Setting("how", str, "sum", "how concepts become one", choices=tuple(METHOD_HELP), widget=Widget("method"))
LITERAL = Setting(
    "literal",
    bool,
    False,
    "strengths scaled to add up to 1, as in the paper",
    read_by=("block",),
    widget=Widget("strengths"),
)
DENSITY = Setting(
    "density",
    float,
    0.5,
    "the share of each concept's weights that stays",
    above=0,
    most=1,
    must="it must be above 0 and at most 1",
    read_by=("magnitude", "dare", "ties"),
    widget=Widget(least=0.01, most=1.0, step=0.05, round=0.01, advanced=True),
)
RANK = Setting(
    "rank",
    int,
    64,
    "the rank that the sum is cut to",
    "; the node says how much of it is lost",
    least=1,
    read_by=("svd",),
    widget=Widget(most=4096, advanced=True),
)
SEED = Setting(
    "seed",
    int,
    0,
    "which weights are dropped follows from it",
    "; same seed, same merge",
    least=0,
    most=2**63 - 1,
    read_by=("dare",),
    widget=Widget(most=LAST_SEED, advanced=True),
)
RIDGE = Setting(
    "ridge",
    float,
    0.1,
    "damping towards each concept's own weight, relative to the mean of its moments' spectrum",
    "; larger is nearer to the mean of all where the concepts were not seen; far below 0.1 the merge only fits the "
    "prompts that were recorded, and 0.000001 is the exact optimum for them",
    above=0,
    must="it must be a positive number, such as 0.1",
    read_by=("fusion",),
    widget=Widget(least=1e-6, most=10.0, step=0.05, round=1e-6),
)
ACT_ON = Setting(
    "act_on",
    str,
    "everywhere",
    "everywhere: concepts as they were trained, those for their own words at these. own words: every concept that has "
    "a trigger word acts there alone, with its keys and values of cross-attention, so that no sum mixes",
    "; what is left out of it is told",
    choices=("everywhere", "own words"),
    read_by=("sum",),
)
EXACT = Setting(
    "exact",
    bool,
    False,
    "the least-squares optimum of what was recorded, without damping; what was not recorded suffers",
    read_by=("fusion",),
    widget=None,
)

# How concepts are drawn to be recorded, where there are no moments of them.
RECORDED_PICTURES = Setting(
    "pictures", int, 8, "how many pictures of each concept are drawn", least=1, widget=Widget(most=1000)
)
RECORDED_STEPS = Setting(
    "steps", int, 12, "sampling steps of a picture", least=1, widget=Widget(most=200, advanced=True)
)
RECORDED_SIDE = Setting(
    "size",
    int,
    512,
    "width and height of the pictures drawn, in pixels",
    "; 32 for the toy base",
    least=16,
    widget=Widget(most=2048, step=8, advanced=True),
)

WAY = Setting(
    "way",
    str,
    "symmetric",
    "symmetric: all give way alike. sequential: the first keeps everything, each next one gives way to those before it",
    choices=("symmetric", "sequential"),
)
# As far as the host's own loaders go; LoRAs that are sliders are used far beyond 1.
STRENGTH = Setting(
    "strength",
    float,
    1.0,
    "how strongly a concept acts: 0 not at all, 1 as it was trained",
    least=-100.0,
    most=100.0,
    widget=Widget(least=-2.0, most=2.0, step=0.01, round=0.01),
)

MERGING = group(DENSITY, RANK, SEED, RIDGE)  # what `MergeOptions` holds, in the order of the shell's help
BESIDE_MERGING = group(HOW, LITERAL, ACT_ON, EXACT)
RECORDING = group(RECORDED_PICTURES, RECORDED_STEPS, RECORDED_SIDE)
