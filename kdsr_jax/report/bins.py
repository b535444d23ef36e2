"""Bins of whole numbers that hold about equally many values each."""

import numpy as np

MOST_BINS = 6


def quantile_bins(values: np.ndarray, most: int = MOST_BINS) -> tuple[list[str], np.ndarray]:
    """Sort whole numbers into at most ``most`` bins of neighbouring values, zero always in one of its own.

    Args:
        values: [n] int, not negative, n at least 1.
        most: number of bins, besides that of zero.

    Returns:
        Names of the bins, such as "0", "3" or "4–7", by what they really hold, and the bin [n] int of each value.
    """
    above = values[values > 0]
    tops = np.quantile(above, np.linspace(0, 1, most + 1)[1:], method="higher") if len(above) else np.array([], int)
    tops = np.unique(np.append(tops, 0) if (values == 0).any() else tops)
    which = np.searchsorted(tops, values)
    names = []
    for number in range(len(tops)):
        inside = values[which == number]
        low, high = int(inside.min()), int(inside.max())
        names.append(f"{low:,}" if low == high else f"{low:,}–{high:,}")
    return names, which


def histogram(values: np.ndarray) -> dict[str, list]:
    """Count whole numbers [n], not negative, in bins that double: 1, 2–3, 4–7, 8–15 and so on, zeros before them.

    Returns:
        {"names": bins from the first to the last that holds any, "counts": how many each holds}.
    """
    if not len(values):
        return {"names": [], "counts": []}
    which = np.frexp(values)[1]  # 2 ** (b - 1) <= value < 2 ** b; 0 for zero
    first, last = int(which.min()), int(which.max())
    spans = [(2**b // 2, max(0, 2**b - 1)) for b in range(first, last + 1)]
    short = len(spans) > 7  # there is no room for both ends
    names = [f"{low:,}" if low == high else f"{low:,}+" if short else f"{low:,}–{high:,}" for low, high in spans]
    return {"names": names, "counts": np.bincount(which - first).tolist()}
