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
_ASKED = {  # relation -> what it asks of two items' shape, colour, pattern and brand
    1: ("same", "same", "any", "any"),
    2: ("other", "same", "any", "any"),
    3: ("same", "other", "any", "any"),
    4: ("other", "other", "any", "same"),
    5: ("other", "other", "same", "other"),
}
_BLOCK = 2**22  # pairs of items that are looked at together
_LADDER = 4096  # items up to which all are gone through for every draw; the logs of such shops are known to the bit


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
        # Items of equal facets stand in the same relations, so nothing is asked of pairs of items: popularity is added up
        # by facets, and a relation asks of each facet to be the same, another, or any.
        shape = self.facets.max(0) + 1
        cells = np.ravel_multi_index(tuple(self.facets.T), shape)
        mass = np.zeros((2, len(self.weights) + 1, len(RELATIONS)))
        for when, kind in np.ndindex(2, len(RELATIONS)):
            sold = np.bincount(cells, self.on_sale[when], shape.prod()).reshape(shape)
            for facet, asked in enumerate(_ASKED.get(kind, ())):
                same = np.eye(shape[facet])
                links = {"same": same, "other": 1 - same, "any": np.ones_like(same)}[asked]
                sold = np.moveaxis(np.tensordot(links, sold, (1, facet)), 0, facet)
            if kind in _ASKED:
                mass[when, :-1, kind] = sold.ravel()[cells]
        return mass

    @cached_property
    def shelves(self) -> tuple["Shelves", "Shelves"]:
        """What is on sale before and after the launch, to draw from."""
        return Shelves(self.facets, self.on_sale[0]), Shelves(self.facets, self.on_sale[1])

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
            [sum(lengths)] int32, items from 0, user after user.
        """
        begins = np.cumsum(lengths) - lengths
        taken, last = np.empty(lengths.sum(), np.int32), np.full(len(lengths), -1, np.int32)
        draw = self._draw_by_ladder if len(self.weights) <= _LADDER else self._draw_from_shelves
        for position in range(lengths.max()):
            users = np.flatnonzero(lengths > position)
            last[users] = draw(rng, last[users], position >= launch[users], habits[users])
            taken[begins[users] + position] = last[users]
        return taken

    def _draw_by_ladder(
        self, rng: np.random.Generator, last: np.ndarray, launched: np.ndarray, habits: np.ndarray
    ) -> np.ndarray:
        """Draw the next items [A] by going through all items: exact to the last bit, A * N steps."""
        drawn = np.empty(len(last), np.int32)
        for rows in blocks(len(last), len(self.weights)):
            ladder = self.probabilities(last[rows], launched[rows], HABITS[habits[rows]]).cumsum(1)
            height = rng.random((len(ladder), 1)) * ladder[:, -1:]
            drawn[rows] = (ladder <= height).sum(1)
        return drawn

    def _draw_from_shelves(
        self, rng: np.random.Generator, last: np.ndarray, launched: np.ndarray, habits: np.ndarray
    ) -> np.ndarray:
        """Draw the next items [A] of the same law in steps whose number does not grow with N: first the relation."""
        drawn = np.empty(len(last), np.int32)
        for rows in blocks(len(last), len(RELATIONS)):
            when = launched[rows].astype(np.int64)
            possible = np.where(self.mass[when, last[rows]] > 0, HABITS[habits[rows]], 0.0)
            kinds = (possible.cumsum(1) <= rng.random((len(when), 1))).sum(1) % len(
                RELATIONS
            )  # beyond all: the tail, 0
            for launch, kind in np.ndindex(2, len(RELATIONS)):
                those = np.flatnonzero((when == launch) & (kinds == kind))
                drawn[rows.start + those] = self.shelves[launch].draw(rng, kind, last[rows.start + those])
        return drawn


class Shelves:
    """Items in proportion to their popularity, all of them or those in a relation to an item."""

    def __init__(self, facets: np.ndarray, weights: np.ndarray):
        """Arrange items of ``facets`` [N, 4] and ``weights`` [N], for every relation those alike together."""
        self._facets, self._ladders = facets, {}
        for kind in range(len(RELATIONS)):
            keys = np.zeros(len(facets), np.int64)
            for facet in np.flatnonzero([asked == "same" for asked in _ASKED.get(kind, ())]):
                keys = keys * (facets[:, facet].max() + 1) + facets[:, facet]
            order = np.argsort(keys, kind="stable").astype(np.int32)
            ends = np.cumsum(np.bincount(keys))
            ladder = np.concatenate([[0.0], weights[order].cumsum()])
            self._ladders[kind] = keys, order, np.append(0, ends), ladder

    def draw(self, rng: np.random.Generator, kind: int, last: np.ndarray) -> np.ndarray:
        """Draw an item in relation ``kind`` to each item of ``last`` [A], where there is one on sale; 0 is any item."""
        drawn, open_ = np.empty(len(last), np.int32), np.arange(len(last))
        keys, order, ends, ladder = self._ladders[kind]
        while len(open_):
            shelf = keys[last[open_]] if kind else np.zeros(len(open_), np.int64)
            low, high = ladder[ends[shelf]], ladder[ends[shelf + 1]]
            place = np.searchsorted(ladder, low + rng.random(len(open_)) * (high - low), side="right") - 1
            drawn[open_] = order[place.clip(max=ends[shelf + 1] - 1)]
            # Some of those that share the facets stand in a closer relation: these are drawn again.
            if not kind:
                break
            open_ = open_[relation(self._facets[last[open_]], self._facets[drawn[open_]]) != kind]
        return drawn


def blocks(rows: int, columns: int) -> list[slice]:
    """Return slices over ``rows`` such that a slice times ``columns`` fits the memory."""
    size = max(1, _BLOCK // columns)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
