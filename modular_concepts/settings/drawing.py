"""All that can be chosen about a picture and about the regions in it."""

from __future__ import annotations

from .setting import Setting, Widget, group

GUIDANCE = "guidance (cfg above 1)"  # what a negative prompt needs

STEPS = Setting("steps", int, 20, "sampling steps; more is slower and finer", least=1, widget=Widget(most=10_000))
CFG = Setting(
    "cfg",
    float,
    5.0,
    "guidance scale: how strictly the prompt is followed; 1 is no guidance",
    " and twice as fast",
    least=-100.0,
    most=100.0,  # what the hosts' samplers take, either way
    must="it must be a finite number from -100 to 100, 1 for no guidance",
    widget=Widget(least=0.0, step=0.1, round=0.01),
)
SEED = Setting(
    "seed",
    int,
    0,
    "number that the noise is drawn from",
    "; the same noise whatever the regions are",
    ", of the first picture; the next has the next",
    least=0,
    most=2**63 - 1,
    widget=Widget(most=2**64 - 1),
)
HEIGHT = Setting("height", int, None, "of the picture, in pixels", without="the base's own, 32 for toy", widget=None)
WIDTH = Setting("width", int, None, "of the picture, in pixels", without="the base's own, 32 for toy", widget=None)
NEGATIVE = Setting("negative", str, "", "what not to draw", needs=GUIDANCE)
BATCH = Setting("batch", int, 16, "pictures that are drawn at once", least=1, widget=None)
COUNT = Setting("count", int, 1, "how many pictures", least=1, most=10_000, widget=None)
ZOOM = Setting("zoom", int, 1, "enlarge the file, each pixel to ZOOM x ZOOM", least=1, most=10_000, widget=None)
DENOISE = Setting(
    "denoise",
    float,
    1.0,
    "how much of the latent is drawn anew: 1 all of it, less keeps its composition",
    least=0.0,
    most=1.0,
    widget=Widget(step=0.01, round=0.01),
)

UNITS = Setting(
    "units",
    str,
    "fractions",
    "what boxes count: fractions of the picture, from 0 to 1, or its pixels",
    choices=("fractions", "pixels"),
    needs="region",
)
MODE = Setting(
    "mode",
    str,
    "gated",
    "gated: each concept acts in its regions alone, so look-alikes stay apart. merged: all concepts are in the weights "
    "and act everywhere; only the prompts are regional",
    ". Give gated the model from before any merge",
    choices=("gated", "merged"),
    needs="region",
)
OVERLAP = Setting(
    "overlap",
    str,
    "average",
    "where regions overlap: average lets them share the place, priority gives it to the one with the highest priority, "
    "of equals to the later one",
    choices=("average", "priority"),
)
# One region's own.
EDGE = Setting("edge", float, 0.0, "an edge of the box", least=0.0, widget=Widget(most=16384.0, step=0.01, round=0.001))
FEATHER = Setting(
    "feather",
    float,
    0.0,
    "width of the soft edge, half of it on each side: a fraction of the picture's shorter side, or pixels; 0 is a hard "
    "edge",
    least=0.0,
    widget=Widget(most=16384.0, step=0.01, round=0.001),
)
STRENGTH = Setting(
    "strength",
    float,
    1.0,
    "how far this prompt replaces the global one inside: 1 wholly, 0.5 half of each, 0 not at all",
    least=0.0,
    most=1.0,
    widget=Widget(step=0.05, round=0.05),
)
_SHARE = Widget(step=0.01, round=0.001, advanced=True)
START = Setting(
    "start",
    float,
    0.0,
    "part of the sampling from which the region holds: 0 from the first step on",
    least=0.0,
    most=1.0,
    widget=_SHARE,
)
END = Setting(
    "end",
    float,
    1.0,
    "part of the sampling up to which the region holds: 1 to the last step",
    least=0.0,
    most=1.0,
    widget=_SHARE,
)
PRIORITY = Setting(
    "priority",
    int,
    0,
    "who lies on top where regions overlap, if the sampler's overlap is set to priority",
    widget=Widget(least=-1000, most=1000, advanced=True),
)
CONTROL = Setting(
    "control",
    float,
    1.0,
    "what ControlNets and adapters are multiplied with here; 0 leaves the region free of them",
    least=0.0,
    most=10.0,
    widget=None,
)
# Of a form's picture, for its shape alone.
CANVAS = Setting("side", int, 512, "of the picture, in pixels", widget=Widget(least=16, most=16384, step=8))

DRAWING = group(STEPS, CFG, HEIGHT, WIDTH, NEGATIVE, BATCH)  # what `SampleSettings` holds
SAMPLED = group(UNITS, MODE, NEGATIVE, WIDTH, HEIGHT, STEPS, CFG, SEED, COUNT, ZOOM)  # what the shell asks
REGION = group(FEATHER, STRENGTH, START, END, PRIORITY, CONTROL)
