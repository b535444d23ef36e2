"""How users of the planted shop walk from item to item: a known kernel, so that its best predictor is known too.

With probability ``HABITS[habit, relation]`` the next item stands in that relation to the last one, else it is any item
(the popularity tail). Inside a relation, and in the tail, items are drawn in proportion to their popularity. A relation
in which no item stands gives its share to the tail.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

RELATIONS = (  # every pair of items stands in exactly one, and the relation is symmetric
    "unrelated",
    "same shape and colour",
    "same colour, other shape",
    "same shape, other colour",
    "same brand, other shape and colour",
    "same pattern, other shape, colour and brand",
)
_RELATION_OF_AGREEMENT = np.array([0, 4, 5, 4, 2, 2, 2, 2, 3, 3, 3, 3, 1, 1, 1, 1], np.uint8)  # bits shape..brand
HABITS = np.array(  # [habit, relation]: what is missing to 1 is the popularity tail
    [
        [0.0, 0.03, 0.78, 0.03, 0.03, 0.03],
        [0.0, 0.03, 0.03, 0.78, 0.03, 0.03],
        [0.0, 0.03, 0.03, 0.03, 0.78, 0.03],
    ]
)
_BLOCK = 2**22  # pairs of items that are looked at together


def relation(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the relation between items from their facets.

    Args:
        left: [..., 4] int, facets in the order shape, colour, pattern, brand.
        right: [..., 4] int, likewise; leading axes broadcast.

    Returns:
        [...] uint8, index into ``RELATIONS``.
    """
    agreement = np.zeros(np.broadcast_shapes(left.shape, right.shape)[:-1], np.uint8)
    for facet in range(left.shape[-1]):
        agreement = 2 * agreement + (left[..., facet] == right[..., facet])
    return _RELATION_OF_AGREEMENT[agreement]


@dataclass(frozen=True, eq=False)
class Kernel:
    """The law of the next item.

    Attributes:
        facets: [N, 4] int, of each item.
        weights: [N] float64, popularity.
        cold: [N] bool, items that are on sale only after the launch.
    """

    facets: np.ndarray
    weights: np.ndarray
    cold: np.ndarray

    @cached_property
    def on_sale(self) -> np.ndarray:
        """Popularity of what can be taken before and after the launch, [2, N] float64."""
        return np.stack([np.where(self.cold, 0.0, self.weights), self.weights])

    @cached_property
    def mass(self) -> np.ndarray:
        """Popularity on sale in each relation to each item, [2, N + 1, R] float64; the last row, no item, has none."""
        mass = np.zeros((2, len(self.weights) + 1, len(RELATIONS)))
        for rows in blocks(len(self.weights), len(self.weights)):
            relations = relation(self.facets[rows, None], self.facets)
            for kind in range(1, len(RELATIONS)):
                mass[:, rows, kind] = self.on_sale @ (relations == kind).T
        return mass

    def rates(self, last: np.ndarray, launched: np.ndarray, mix: np.ndarray) -> np.ndarray:
        """Return the next item's probability in units of its popularity, by its relation to the last item.

        Args:
            last: [A] int, the user's last item; -1 at the start of a history, where the tail alone decides.
            launched: [A] bool, whether cold items are on sale.
            mix: [A, R] or [R] float64, weight of each relation, as in ``HABITS``.

        Returns:
            [A, R] float64.
        """
        when = launched.astype(np.int64)
        mass = self.mass[when, last]
        possible = np.where(mass > 0, mix, 0.0)
        tail = (1.0 - possible.sum(1, keepdims=True)) / self.on_sale.sum(1)[when, None]
        return possible / np.where(mass > 0, mass, 1.0) + tail

    def probabilities(self, last: np.ndarray, launched: np.ndarray, mix: np.ndarray) -> np.ndarray:
        """Return the distribution of the next item, [A, N] float64; rows sum to one. Arguments as in ``rates``."""
        relations = relation(self.facets[last][:, None], self.facets)
        rates = np.take_along_axis(self.rates(last, launched, mix), relations, axis=1)
        return self.on_sale[launched.astype(np.int64)] * rates

    def evidence(self, last: np.ndarray, launched: np.ndarray, taken: np.ndarray) -> np.ndarray:
        """Return what the item ``taken`` [A] says of the user's habit: log-likelihoods [A, H] float64.

        An impossible item (a k-core may move a user's launch) says nothing: zeros.
        """
        kind = relation(self.facets[last], self.facets[taken])
        sold = self.on_sale[launched.astype(np.int64), taken]
        rates = np.stack([self.rates(last, launched, mix)[np.arange(len(taken)), kind] for mix in HABITS], 1)
        return np.where(sold[:, None] > 0, np.log(rates), 0.0)

    def simulate(
        self, rng: np.random.Generator, habits: np.ndarray, lengths: np.ndarray, launch: np.ndarray
    ) -> np.ndarray:
        """Draw histories.

        Args:
            rng: source of randomness.
            habits: [U] int, row of ``HABITS`` of each user.
            lengths: [U] int, items of each history.
            launch: [U] int, position from which cold items are on sale to the user.

        Returns:
            [U, max(lengths)] int32, items from 0, right padded with -1.
        """
        histories = np.full((len(lengths), lengths.max()), -1, np.int32)
        for position in range(lengths.max()):
            users = np.flatnonzero(lengths > position)
            last = histories[:, position - 1] if position else np.full(len(lengths), -1)
            for rows in blocks(len(users), len(self.weights)):
                some = users[rows]
                ladder = self.probabilities(last[some], position >= launch[some], HABITS[habits[some]]).cumsum(1)
                height = rng.random((len(some), 1)) * ladder[:, -1:]
                histories[some, position] = (ladder <= height).sum(1)
        return histories


def blocks(rows: int, columns: int) -> list[slice]:
    """Return slices over ``rows`` such that a slice times ``columns`` fits the memory."""
    size = max(1, _BLOCK // columns)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
