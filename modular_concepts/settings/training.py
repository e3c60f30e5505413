"""All that can be chosen about a training."""

from __future__ import annotations

from .setting import Setting, Widget, group

METHODS = ("lora", "orthogonal", "block", "block_orthogonal", "own_words", "custom_diffusion", "words")
TARGETS = ("attention", "cross_attention", "cross_attention_kv", "feed_forward", "all_linear")
LAYOUTS = ("contiguous", "strided")  # of a block's rows
SCHEDULES = ("constant", "linear", "cosine")
PRECISIONS = ("fp32", "bf16", "fp16")
OPTIMIZERS = ("adamw", "adamw8bit")
TOKEN_STARTS = ("words", "random + class")

# Who reads a setting, and what one may need besides.
LAYERED = METHODS[:-1]
FACTORED = METHODS[:-2]
BLOCKED = ("block", "block_orthogonal")
ERASED = tuple(method for method in LAYERED if method != "own_words")
NOISE = "a noise schedule, which flow models lack"
ONE_ROW = "a word that starts from one row"

LONGEST = 10_000_000  # steps that no training gets by
LAST_SEED = 2**31 - 1  # of a widget

METHOD = Setting("method", str, "orthogonal", "how the layers learn", choices=METHODS, widget=None)
RANK = Setting(
    "rank",
    int,
    20,
    "size of the adapters",
    "; more learn more and make a larger file",
    least=1,
    most=65_536,
    read_by=FACTORED,
    widget=Widget(most=512),
)
ALPHA = Setting(
    "alpha",
    float,
    None,
    "what an adapter adds is multiplied by alpha / rank",
    least=-1e6,
    most=1e6,
    never=0.0,
    must="with 0 nothing is learned, so give another number, at most 1e+06",
    without="by 1",
    read_by=FACTORED,
    widget=None,
)
# Which basis columns a concept has, and which rows: without a slot, orthogonal columns follow from the name.
SLOT = Setting(
    "slot",
    int,
    None,
    "the concept's own columns and rows",
    without="orthogonal columns follow from the name, and own words need none",
    read_by=("orthogonal", *BLOCKED, "own_words"),
    widget=Widget(least=0, most=10_000),
)
BLOCKS = Setting(
    "blocks",
    int,
    15,
    "into how many blocks the rows are divided",
    "; the same for all concepts of a set",
    " (block methods)",
    least=1,
    most=65_536,
    read_by=BLOCKED,
    widget=Widget(most=1000),
)
LAYOUT = Setting(
    "layout",
    str,
    "contiguous",
    "contiguous: neighbouring rows. strided: every blocks-th row",
    in_shell=" (block methods)",
    choices=LAYOUTS,
    read_by=BLOCKED,
    widget=Widget(advanced=True),
)
ERASURE = Setting(
    "erasure",
    float,
    0.0,
    "probability that a row is left out of a step, so that rows learn to do without each other",
    "; 0 for never",
    " (BlockLoRA)",
    least=0,
    below=1,
    why="nothing is left to train",
    read_by=ERASED,
    widget=Widget(most=0.95, step=0.05, round=0.01, advanced=True),
)
STEPS = Setting("steps", int, 500, "how many training steps", least=1, most=LONGEST, widget=Widget(most=100_000))
BATCH = Setting(
    "batch",
    int,
    4,
    "pictures per step",
    "; more need more memory",
    least=1,
    most=65_536,
    widget=Widget("batch_size", most=256),
)
SEED = Setting(
    "seed",
    int,
    0,
    "everything random follows from it",
    ", the fresh adapters too: same seed, same concept",
    least=0,
    most=2**63 - 1,
    widget=Widget(most=LAST_SEED),
)
ADAPTER_LR = Setting(
    "adapter_lr",
    float,
    1e-4,
    "step size of the layers",
    ", per step: 0.0001 for Stable Diffusion, 0.0002 for the toy base. Small beside the learned word's, so that merged "
    "concepts do not disturb each other",
    least=0,
    read_by=LAYERED,
    widget=Widget("learning_rate", most=1.0, step=1e-5, round=1e-7),
)
TEXT_ENCODER_LR = Setting(
    "text_encoder_lr",
    float,
    None,
    "step size of the text encoder's layers",
    ", per step, where they learn; ED-LoRA gives them a tenth of the others'",
    above=0,
    without="as the others",
    read_by=LAYERED,
    needs="text_encoder",
    widget=Widget("text_encoder_learning_rate", most=1.0, step=1e-5, round=1e-7),
)
TOKEN_LR = Setting(
    "token_lr",
    float,
    1e-3,
    "step size of the learned word",
    ", per step: 0.001 for Stable Diffusion, 0.03 for the toy base",
    least=0,
    widget=Widget("token_learning_rate", most=1.0, step=1e-4, round=1e-6),
)
# As many as a concept file can hold, and nearly all that a text model reads.
TOKEN_VECTORS = Setting(
    "token_vectors",
    int,
    2,
    "how many words' worth of meaning the trigger holds",
    "; a longer description has one for each word",
    least=1,
    most=64,
    widget=Widget(most=32),
)
# "random + class": the first vector is drawn from N(0, 0.013^2), the others are the class word's.
TOKEN_START = Setting(
    "token_start",
    str,
    "words",
    "where the learned word starts: from its class word or description (Textual Inversion, P+), or the first vector at "
    "random and the others from the class word (ED-LoRA)",
    choices=TOKEN_STARTS,
    widget=Widget("word_start"),
)
TOKEN_NOISE = Setting(
    "token_noise",
    float,
    0.1,
    "noise on a word that starts from one row, so that its vectors differ; relative to its size",
    least=0,
    most=100.0,
    needs=ONE_ROW,
    widget=None,
)
TOKEN_NORM = Setting(
    "token_norm",
    float,
    None,
    "longest that a vector of the learned word may grow; ED-LoRA's authors stop at 0.55",
    above=0,
    widget=Widget(most=10.0, step=0.01, round=1e-4),
)
LAYERWISE = Setting(
    "layerwise",
    bool,
    False,
    "give the word rows of its own for each cross-attention layer (P+)",
    widget=Widget("word_layers"),
)
WARMUP = Setting(
    "warmup",
    int,
    0,
    "steps in which the learning rates rise from 0",
    least=0,
    most=LONGEST,
    widget=Widget(most=100_000),
)
SCHEDULE = Setting(
    "schedule",
    str,
    "constant",
    "how the learning rates change over the training",
    ": the orthogonal, block and LoRA trainers use cosine, ED-LoRA linear, Textual Inversion and Custom Diffusion "
    "constant",
    ", after the warm-up",
    choices=SCHEDULES,
)
WEIGHT_DECAY = Setting(
    "weight_decay",
    float,
    0.01,
    "how strongly AdamW pulls what the layers learn towards 0 in each step, times the learning rate",
    "; ED-LoRA's authors use 0.01",
    least=0,
    most=100.0,
    read_by=LAYERED,
    widget=Widget(most=1.0, step=0.01, round=1e-4, advanced=True),
)
CLIP_NORM = Setting(
    "clip_norm",
    float,
    1.0,
    "longest gradient of a step; longer ones are shortened to it",
    ". 1 is usual",
    "; 0 for no bound",
    least=0,
    widget=Widget(most=1000.0, step=0.1, round=1e-4, advanced=True),
)
# The noise itself is 1.
NOISE_OFFSET = Setting(
    "noise_offset",
    float,
    0.0,
    "how much the noise may brighten or darken a whole picture, so that dark and bright ones are learned too",
    "; ED-LoRA's authors use 0.01, others up to 0.1",
    least=0,
    most=10.0,
    widget=Widget(most=1.0, step=0.01, round=1e-4),
)
MIN_SNR = Setting(
    "min_snr",
    float,
    None,
    "gamma of min-SNR, which gives steps with little noise less weight; its authors use 5",
    " (Hang et al. 2023). Without effect on flow models such as Stable Diffusion 3",
    above=0,
    needs=NOISE,
    widget=Widget(most=100.0, step=0.5, round=1e-4),
)
ATTENTION_REGULARISATION = Setting(
    "attention_regularisation",
    float,
    0.0,
    "weight of a term that keeps the learned word's attention inside the masks, so that it does not learn the "
    "background; Mix-of-Show uses 0.01",
    ". The pictures need masks",
    least=0,
    widget=Widget(most=10.0, step=0.005, round=1e-4),
)
PRIOR_WEIGHT = Setting(
    "prior_weight",
    float,
    1.0,
    "weight of the base's own pictures",
    " (prior_pictures) beside yours; 1 in DreamBooth and Custom Diffusion",
    " (--prior) beside yours",
    least=0,
    most=1e6,
    needs="prior",
    widget=Widget(most=100.0, step=0.1, round=1e-4, advanced=True),
)
CAPTION_DROPOUT = Setting(
    "caption_dropout",
    float,
    0.0,
    "share of captions that are left empty",
    ": the concept then shows without its word too. Off in the papers",
    least=0,
    below=1,
    why="the word is never learned",
    widget=Widget(most=0.95, step=0.05, round=0.01),
)
SHUFFLE_TAGS = Setting(
    "shuffle_tags",
    bool,
    False,
    "put the parts of a caption between commas in another order each time, except the first",
    "; for captions that are lists of tags (Mix-of-Show does so)",
)
FLIP = Setting(
    "flip",
    bool,
    False,
    "mirror half of the pictures, left and right",
    "; not for faces with a parting, writing or one-sided things. On in Custom Diffusion",
)
OPTIMIZER = Setting(
    "optimizer",
    str,
    "adamw",
    "adamw8bit keeps its moments in 8 bits, a quarter of their memory; it needs the Python package bitsandbytes and an "
    "NVIDIA GPU",
    choices=OPTIMIZERS,
)
PRECISION = Setting(
    "precision",
    str,
    "fp32",
    "how the networks compute: bf16 is faster and smaller on recent GPUs, fp16 on older ones",
    choices=PRECISIONS,
    widget=Widget(advanced=True),
)
GRADIENT_CHECKPOINTING = Setting(
    "gradient_checkpointing",
    bool,
    False,
    "compute the network's blocks again on the way back instead of keeping them: less memory, about a third more time "
    "a step; the result is the same",
)
CHECKPOINT_EVERY = Setting(
    "checkpoint_every",
    int,
    0,
    "steps between checkpoints, all that a crash can cost; 0: only at the end and when cancelled",
    ". They lie in output/modular_concepts/NAME",
    least=0,
    most=LONGEST,
    needs="checkpoints",
    widget=Widget(most=100_000, advanced=True),
)
KEEP_CHECKPOINTS = Setting(
    "keep_checkpoints",
    int,
    2,
    "how many of the newest checkpoints are kept",
    " in output/modular_concepts/NAME",
    least=1,
    most=1_000_000,
    needs="checkpoints",
    widget=Widget(most=1000, advanced=True),
)

COMPANY = Setting(
    "company",
    float,
    0.0,
    "share of the steps on wide pictures, the concept in one half and in the other somebody else whom the base drew, "
    "so that its word learns to leave places to others; 0 for none, 0.5 is half",
    ". For people and things, not for styles",
    least=0,
    most=1,
    widget=Widget(step=0.05, round=0.01),
)

# What `TrainSettings` holds beside the concept's name; the shell's help has them in this order.
TRAINING = group(
    *(METHOD, SLOT, BLOCKS, LAYOUT, ERASURE, RANK, ALPHA, STEPS, BATCH, SEED, ADAPTER_LR, TEXT_ENCODER_LR, TOKEN_LR),
    *(TOKEN_VECTORS, TOKEN_START, TOKEN_NOISE, TOKEN_NORM, WARMUP, SCHEDULE, WEIGHT_DECAY, CLIP_NORM, NOISE_OFFSET),
    *(MIN_SNR, ATTENTION_REGULARISATION, PRIOR_WEIGHT, CAPTION_DROPOUT, OPTIMIZER, PRECISION, CHECKPOINT_EVERY),
    *(KEEP_CHECKPOINTS, LAYERWISE, SHUFFLE_TAGS, FLIP, GRADIENT_CHECKPOINTING, COMPANY),
)

# Beside them, of a training but not of its step.
CHECKPOINTED = 100  # steps between checkpoints where there is a place for them
TARGET = Setting(
    "targets",
    str,
    ("attention", "feed_forward"),
    "which layers learn",
    ". More layers learn more and make a larger file",
    choices=TARGETS,
    read_by=LAYERED,
)
TEXT_ENCODER = Setting(
    "text_encoder", bool, False, "let the text encoder's layers learn too", in_shell=": its attention", read_by=LAYERED
)
PRIOR = Setting(
    "prior",
    int,
    0,
    "pictures that the base draws itself first, to be trained on beside yours, so that it forgets nothing; 0 for none",
    ". Each step then takes twice as long",
    least=0,
    most=10_000,
    must="it must be from 0 to 10000 pictures",
    widget=Widget("prior_pictures", most=1000),
)
COMPANY_PICTURES = Setting(
    "company_pictures",
    int,
    96,
    "pictures of others that the base draws itself first, for company",
    least=2,
    most=10_000,
    must="it must be from 2 to 10000 pictures",
    needs="company",
    widget=Widget(most=1000, advanced=True),
)
BUCKETS = Setting(
    "buckets",
    bool,
    False,
    "train wide pictures wide and high ones high, each at a size of about width x height pixels, instead of cropping "
    "all to one size",
    widget=Widget("keep_aspect", advanced=True),
)
BESIDE_TRAINING = group(BUCKETS, TARGET, TEXT_ENCODER, PRIOR, COMPANY_PICTURES)
