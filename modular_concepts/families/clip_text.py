"""CLIP's text model, by transformers' paths; both of SDXL's and SD3's are one."""

import re

from .family import NEITHER, Network

CLIP_TEXT = Network(
    layers=re.compile(r"text_model\.|text_projection"),
    targets={
        "attention": re.compile(r"\.self_attn\.(q|k|v|out)_proj$"),
        "feed_forward": re.compile(r"\.mlp\.fc[12]$"),
        "all_linear": re.compile(r"\.encoder\.layers\."),
    },
    blocks=((re.compile(r".*encoder\.layers\.(\d+)\."), "text {}"),),
    # Its tokens are words before any picture is: no region's and no step's.
    tokens=((re.compile(""), NEITHER),),
    words=("text_model", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj", "text_projection"),
)
