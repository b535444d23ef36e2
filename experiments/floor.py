"""The least that a training step must do, counted by hand, and how long the machine needs for it at its best.

Per step of a model with d wide states: S targets, T real inputs, Q the sum over its rows of their lengths squared, N items.
A product of matrices that the loss is differentiated through costs three times its forward pass, two operations a multiply-add:

    encoder     3 x 2 x T x (numbers of its matrices)       every input goes through every matrix once
    attention   3 x 2 x Q x 2 d a layer                     compare and mix; the masked half counts as well
    softmax     3 x 2 x S x N x d                           all items are scored
    codes       3 x 2 x pairs x (w^2 + w x codes)           a modality; and g of Eq. 2, w^2, for each input
    Adam        8 x 4 bytes a parameter                     read and write it, both moments and its gradient

Padding, activations, elementwise functions, dropout and the logits' own way through memory are nothing of the floor: a program may avoid
them, or hide them behind the products. Bytes of Adam are added to the time of the products, for the update waits for the gradient.
For graph models and those that encode all items anew the count is a lower bound, as it knows neither edges nor candidates.
"""


def count(work):
    """Count one mean step of an epoch.

    Args:
      work: dict of ``experiments.contestant.Contestant.work``; "steps", "targets", "inputs" and "squares" are an epoch's.

    Returns:
      dict of "flops", by part, and "bytes".
    """
    steps = work["steps"]
    targets, inputs, squares = (work[name] / steps for name in ("targets", "inputs", "squares"))
    width, pairs = work["table_width"], max(0.0, (squares - inputs) / 2)
    if work["pair_budget"]:
        pairs = min(pairs, work["pair_budget"] / max(1, work["distilled"]))  # shared by the modalities
    flops = {
        "encoder": 6 * inputs * work["maps"],
        "attention": 12 * squares * work["dim"] * work["attention"],
        "softmax": 6 * targets * work["items"] * work["dim"],
        "codes": 6 * work["distilled"] * (pairs * (width**2 + width * work["codes"]) + inputs * width**2),
    }
    return {"flops": flops, "bytes": 32 * work["parameters"]}


def seconds(counted, machine):
    """Return how long a counted step takes at least.

    Args:
      counted: of ``count``.
      machine: dict of "gflops" and "gbytes", the measured peaks, in 10^9 a second.
    """
    return sum(counted["flops"].values()) / machine["gflops"] / 1e9 + counted["bytes"] / machine["gbytes"] / 1e9
