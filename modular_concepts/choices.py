"""What a person can choose from, in names and numbers alone: a shell's help reads them without loading torch."""

LAYOUTS = ("contiguous", "strided")  # of a block's rows
TARGETS = ("attention", "cross_attention", "cross_attention_kv", "feed_forward", "all_linear")

# Family -> what it is, and what it does to orthogonal concepts, in a sentence for the person who chooses.
FAMILIES = {
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
DENSITY, SEED, RANK, RIDGE = 0.5, 0, 64, 0.1  # of a merge: see `merging/options.py`
