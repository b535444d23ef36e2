"""Round numbers for the axes of charts."""

import itertools
import math
import re
from collections.abc import Sequence


def nice_ticks(low: float, high: float, count: int = 5, *, whole: bool = False, cover: bool = False) -> list[float]:
    """Return about ``count`` round numbers in low .. high, steps of 1, 2 or 5 times a power of ten.

    Args:
        low, high: finite, low at most high.
        count: how many steps to aim for.
        whole: only whole numbers.
        cover: also the round numbers just outside, so that all of low .. high lies between the first and the last.
    """
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        pad = abs(low) / 10 or 1.0
        low, high = (low - pad, high + pad) if cover else (low, low + pad)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    step = max(1.0, round(step)) if whole else step
    first, last = (math.floor, math.ceil) if cover else (math.ceil, math.floor)
    slack = 1e-9 if cover else -1e-9
    begin, end = first(low / step + slack), last(high / step - slack)
    return [round(index * step, 12 - math.floor(math.log10(step))) for index in range(begin, end + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return at most seven powers of ten that enclose low .. high, both positive; finer ones within a single decade."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    if last <= first + 1:
        ladder = [m * 10.0**p for p in (first, first + 1) for m in (1, 2, 5)]
        begin = max(n for n, tick in enumerate(ladder) if tick <= low * (1 + 1e-9))
        end = next((n for n, tick in enumerate(ladder) if tick >= high * (1 - 1e-9) and n > begin), len(ladder) - 1)
        return ladder[begin : end + 1]
    stride = math.ceil((last - first) / 6)
    return [10.0**p for p in range(first, last + stride, stride)]


def tick_texts(ticks: Sequence[float]) -> list[str]:
    """Return the ticks as text, with as many decimals as tell them apart."""
    if len(ticks) > 1 and ticks[0] > 0 and ticks[-1] / ticks[0] >= 99 or max(map(abs, ticks)) >= 1e6:
        return [re.sub(r"e([+-])0*", r"e\1", f"{tick:g}").replace("e+", "e") for tick in ticks]
    step = min((b - a for a, b in itertools.pairwise(ticks)), default=1.0)
    if step < 1e-3 and max(map(abs, ticks)) < 1e-2:
        return [re.sub(r"(\.0)?e([+-])0*", r"e\2", f"{tick:.1e}") if tick else "0" for tick in ticks]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9)) if step != int(step) else 0
    return [f"{tick:,.{decimals}f}" for tick in ticks]
