"""The planted shop: a generated data set whose truth is known, for demonstration and as an oracle for tests.

Items carry four facets. Each modality sees some of them (``MODALITY_FACETS``), so that neither is enough. Users walk by
the kernel of ``planted_kernel``, whose relations hold between facets: what is learned of one item's relations holds for
every item with such features, which is what the modalities have to give.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kdsr_jax.data.interactions import Interactions, RawLog, in_train_part, train_lengths
from kdsr_jax.data.sources.planted_icons import FACETS, icon
from kdsr_jax.data.sources.planted_kernel import HABITS, RELATIONS, Kernel, blocks, relation

__all__ = ["FACETS", "MODALITY_FACETS", "RELATIONS", "PlantedShop", "feature_blocks", "generate", "icon"]

MODALITY_FACETS = {"image": ("shape", "colour", "pattern"), "text": ("shape", "brand")}
_SPLITS = 8  # facet blocks end at multiples of 1/8 of a feature vector, as the paper's product split (D = 8) does
_SHORTEST = 6  # items of the shortest history: one more than the 5-core asks for
_POPULARITY_SHIFT, _POPULARITY_EXPONENT = 10.0, 0.6  # weight of the item of rank n: (n + shift) ** -exponent
_COLD_POPULARITY = 3.0  # a cold item's popularity after its launch, in units of the mean: it is a novelty
_DAY = 86_400  # seconds
_START, _SEASON, _AFTER_LAUNCH = 1_700_000_000, 300 * _DAY, 60 * _DAY  # seconds


@dataclass(frozen=True, eq=False)
class PlantedShop:
    """A shop with its truth. Its items are numbered 0 .. num_items - 1 here; ``index`` finds them by raw id.

    Attributes:
        log: the interactions with raw ids (``u0001``, ``i0001``) and timestamps, in order of time.
        raw_features: by modality, raw ids [n] and features [n, feature_dim] float32 of the items that have it.
        items: metadata by item: ``item_id``, ``title`` and the four facets by name.
        item_ids: [num_items] unicode, raw ids in rising order.
        facets: [num_items, 4] int64, shape, colour, pattern and brand as indices into ``FACETS``.
        kernel: the law of the next item, with each item's popularity and whether it is cold.
    """

    log: RawLog
    raw_features: dict[str, tuple[np.ndarray, np.ndarray]]
    items: list[dict]
    item_ids: np.ndarray
    facets: np.ndarray
    kernel: Kernel

    def index(self, item_ids: Sequence[str]) -> np.ndarray:
        """Return the shop's numbers [n] int64 of raw item ids; -1 for an unknown id, such as the "" of padding."""
        found = np.searchsorted(self.item_ids, item_ids).clip(max=len(self.item_ids) - 1)
        return np.where(self.item_ids[found] == np.asarray(item_ids), found, -1)

    def relation(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Return the relation of items to items, as an index into ``RELATIONS``; the arguments broadcast."""
        return relation(self.facets[left], self.facets[right])

    def next_item_probabilities(
        self, histories: Sequence[Sequence[int]], launch: Sequence[int] | None = None
    ) -> np.ndarray:
        """Return the true distribution of the item after each history.

        The user's habit is unknown: it starts from equal odds and is learned from the history by Bayes' rule, so this
        is the exact predictive distribution given the history, and ranking by it is the best that can be done.

        Args:
            histories: one sequence of the shop's item numbers each, oldest first; may be empty.
            launch: position in each history from which cold items are on sale, the user's train length; the item to
                predict has the position ``len(history)``, and by default is the first after the launch.

        Returns:
            [len(histories), num_items] float64; rows sum to one.
        """
        lengths = np.array([len(history) for history in histories])
        items = np.concatenate([np.asarray(history, np.int64) for history in histories])
        owners, before = _with_item_before(items, lengths)
        launch = lengths if launch is None else np.asarray(launch)
        positions = np.arange(len(items)) - np.repeat(lengths.cumsum() - lengths, lengths)
        evidence = np.zeros((len(lengths), len(HABITS)))
        np.add.at(evidence, owners, self.kernel.evidence(before, positions >= launch[owners], items))
        last = np.array([history[-1] if len(history) else -1 for history in histories])
        return self.kernel.probabilities(last, lengths >= launch, _odds(evidence) @ HABITS)

    def oracle_ranks(self, interactions: Interactions, topk: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Rank every test target by its true distribution over the items of ``interactions``.

        Args:
            interactions: what is left of ``log``; the last ``length - train_length`` items of a user are the targets.
            topk: cut-offs k.

        Returns:
            Ranks [T] from 1, ties against the target, and the probability [T, len(topk)] that the target is among the
            first k. Exact where the k-core removed nothing, else very nearly so.
        """
        catalogue, lengths, test = (
            self.index(interactions.item_ids[1:]),
            interactions.lengths,
            ~in_train_part(interactions),
        )
        items = catalogue[interactions.items - 1]
        _, before = _with_item_before(items, lengths)
        evidence = self.kernel.evidence(before, test, items)
        past = evidence.cumsum(0) - evidence  # of all rows above, from which those of other users are taken off
        mix = _odds(past - np.repeat(past[interactions.offsets[:-1]], lengths, axis=0)) @ HABITS
        targets = np.flatnonzero(test)
        ranks, expected = np.empty(len(targets), np.int64), np.empty((len(targets), len(topk)))
        for rows in blocks(len(targets), len(self.item_ids)):
            some = targets[rows]
            scores = self.kernel.probabilities(before[some], test[some], mix[some])[:, catalogue]
            ranks[rows] = (scores >= np.take_along_axis(scores, interactions.items[some, None] - 1, 1)).sum(1)
            chance = np.sort(scores, axis=1)[:, ::-1].cumsum(1) / scores.sum(1, keepdims=True)
            expected[rows] = chance[:, [min(k, len(catalogue)) - 1 for k in topk]]
        return ranks, expected

    def oracle_hit_rates(self, interactions: Interactions, topk: Sequence[int] = (5, 10, 20)) -> dict[str, float]:
        """Return the best attainable ``hr@k`` in percent: ranking the test targets by their true distribution."""
        return _hit_rates(self.oracle_ranks(interactions, topk)[0], topk)

    def popularity_hit_rates(self, interactions: Interactions, topk: Sequence[int] = (5, 10, 20)) -> dict[str, float]:
        """Return the ``hr@k`` in percent of ranking every item by its count in the train parts."""
        test = ~in_train_part(interactions)
        counts = np.bincount(interactions.items[~test], minlength=len(interactions.item_ids))[1:]
        ranks = len(counts) - np.searchsorted(np.sort(counts), counts)  # ties count against an item
        return _hit_rates(ranks[interactions.items[test] - 1], topk)


def feature_blocks(modality: str, feature_dim: int) -> dict[str, slice]:
    """Return the coordinates that show each facet of a modality at ``entanglement`` 0."""
    names = MODALITY_FACETS[modality]
    ends = [_SPLITS * (n + 1) // len(names) * feature_dim // _SPLITS for n in range(len(names))]
    return {name: slice(start, end) for name, start, end in zip(names, [0, *ends], ends, strict=False)}


def generate(
    *,
    num_users: int,
    num_items: int,
    mean_length: float,
    entanglement: float,
    noise: float,
    missing_rate: float,
    cold_rate: float,
    feature_dim: int,
    seed: int,
) -> PlantedShop:
    """Generate a shop; the same settings give the same shop, and the log does not depend on those of the features.

    A cold item is launched when users have done all that is in their train parts: it is never in one, but it is in
    later parts, often enough to outlast the 5-core. The settings are those of the config's `data.planted`, which
    `config.validate` checks.

    Args:
        num_users: users, 1 or more.
        num_items: items, 18 or more.
        mean_length: interactions a user on average, 6 (the fewest a user has) .. num_items / 3.
        entanglement: 0 .. 1; 0 = each facet in coordinates of its own, 1 = a random rotation mixes all coordinates.
        noise: standard deviation of the noise on every coordinate, whose signal has standard deviation 1; 0 or more.
        missing_rate: share of items that lack a modality, for each modality, 0 .. 1; never a cold one.
        cold_rate: share of cold items, 0 .. 0.5.
        feature_dim: coordinates of a feature vector, 8 or more.
        seed: 0 or more.
    """
    catalogue_seed, walk_seed, feature_seed = np.random.SeedSequence(seed).spawn(3)
    kernel = _catalogue(np.random.default_rng(catalogue_seed), num_items, cold_rate)
    item_ids = _names("i", num_items)
    log = _walk(np.random.default_rng(walk_seed), kernel, num_users, mean_length, item_ids)
    raw_features = {}
    for modality, child in zip(MODALITY_FACETS, feature_seed.spawn(len(MODALITY_FACETS)), strict=True):
        rng = np.random.default_rng(child)
        values = _features(rng, kernel.facets, modality, feature_dim, entanglement, noise)
        candidates = rng.permutation(np.flatnonzero(~kernel.cold))
        covered = np.setdiff1d(np.arange(num_items), candidates[: round(missing_rate * num_items)])
        raw_features[modality] = item_ids[covered], values[covered]
    items = [_metadata(name, facets) for name, facets in zip(item_ids.tolist(), kernel.facets.tolist(), strict=True)]
    return PlantedShop(log, raw_features, items, item_ids, kernel.facets, kernel)


def _names(letter: str, count: int) -> np.ndarray:
    """Return raw ids such as ``u0001``; their lexicographic order is that of their numbers."""
    width = max(4, len(str(count)))
    return np.array([f"{letter}{number:0{width}d}" for number in range(1, count + 1)])


def _catalogue(rng: np.random.Generator, num_items: int, cold_rate: float) -> Kernel:
    """Draw the items: facets independent of each other and evenly spread, popularity independent of facets."""
    columns = [rng.permutation(np.arange(num_items) % len(values)) for values in FACETS.values()]
    weights = (rng.permutation(num_items) + 1.0 + _POPULARITY_SHIFT) ** -_POPULARITY_EXPONENT
    weights /= weights.mean()
    cold = np.zeros(num_items, bool)
    cold[rng.permutation(num_items)[: round(cold_rate * num_items)]] = True
    return Kernel(np.stack(columns, 1), np.where(cold, _COLD_POPULARITY, weights), cold)


def _walk(rng: np.random.Generator, kernel: Kernel, num_users: int, mean_length: float, item_ids: np.ndarray) -> RawLog:
    """Let users with evenly spread habits walk through the shop; return the log."""
    habits = rng.permutation(np.arange(num_users) % len(HABITS))
    lengths = _SHORTEST + rng.negative_binomial(2, 2 / (2 + mean_length - _SHORTEST), num_users)
    launch = train_lengths(lengths)
    items = kernel.simulate(rng, habits, lengths, launch)
    times = np.empty(len(items), np.int64)
    ends = np.cumsum(lengths)
    for rows in blocks(num_users, int(lengths.max())):
        times[ends[rows.start] - lengths[rows.start] : ends[rows.stop - 1]] = _times(
            rng, lengths[rows], launch[rows], int(lengths.max())
        )
    order = np.argsort(times, kind="stable")
    users = np.repeat(np.arange(num_users, dtype=np.int32), lengths)
    return RawLog(users[order], items[order], _names("u", num_users), item_ids, times[order])


def _times(rng: np.random.Generator, lengths: np.ndarray, launch: np.ndarray, longest: int) -> np.ndarray:
    """Return rising times [sum(lengths)] int64 of users' histories, user after user, no two of a user equal."""
    position = np.arange(longest)
    sold_late, real = position >= launch[:, None], position < lengths[:, None]
    begin, span = np.where(sold_late, _START + _SEASON, _START), np.where(sold_late, _AFTER_LAUNCH, _SEASON)
    times = np.sort(np.where(real, begin + span * rng.random(real.shape), np.inf), axis=1)
    return times[real].astype(np.int64) + np.nonzero(real)[1]


def _features(
    rng: np.random.Generator, facets: np.ndarray, modality: str, feature_dim: int, entanglement: float, noise: float
) -> np.ndarray:
    """Return [num_items, feature_dim] float32: a random vector a facet value, side by side, noised, rotated."""
    values = np.empty((len(facets), feature_dim))
    for name, block in feature_blocks(modality, feature_dim).items():
        vectors = _spread(rng, len(FACETS[name]), block.stop - block.start)
        values[:, block] = vectors[facets[:, list(FACETS).index(name)]]
    values += noise * rng.normal(size=values.shape)
    return (values @ _rotation(rng, feature_dim, entanglement)).astype(np.float32)


def _spread(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    """Return random vectors [count, size] of mean 0 and mean square 1; equally far apart where ``size`` allows it."""
    vectors = np.linalg.qr(rng.normal(size=(max(count, size), min(count, size))))[0]
    vectors = vectors.T if count <= size else vectors
    vectors -= vectors.mean(0)
    return vectors / np.sqrt(np.square(vectors).mean())


def _rotation(rng: np.random.Generator, size: int, amount: float) -> np.ndarray:
    """Return a rotation [size, size]: random planes turn by angles that are uniform in +-180 degrees times amount."""
    basis = np.linalg.qr(rng.normal(size=(size, size)))[0]
    angles = amount * rng.uniform(-np.pi, np.pi, size // 2)
    turn = np.eye(size)
    even, odd = np.arange(0, size - 1, 2), np.arange(1, size, 2)
    turn[even, even] = turn[odd, odd] = np.cos(angles)
    turn[even, odd], turn[odd, even] = -np.sin(angles), np.sin(angles)
    return basis @ turn @ basis.T


def _metadata(item_id: str, facets: Sequence[int]) -> dict:
    """Return an item's metadata; the title names what the text modality sees."""
    named = {name: values[facet] for (name, values), facet in zip(FACETS.items(), facets, strict=True)}
    return {"item_id": item_id, "title": f"{named['brand']} {named['shape']}", **named}


def _with_item_before(items: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the owner [n] of each item of joined histories and the item before it [n], -1 at a history's start."""
    owners = np.repeat(np.arange(len(lengths)), lengths)
    first = np.diff(owners, prepend=-1) > 0
    return owners, np.where(first, -1, np.roll(items, 1))


def _odds(evidence: np.ndarray) -> np.ndarray:
    """Return the probability [A, H] of each habit from the log-likelihoods of a history."""
    odds = np.exp(evidence - evidence.max(1, keepdims=True))
    return odds / odds.sum(1, keepdims=True)


def _hit_rates(ranks: np.ndarray, topk: Sequence[int]) -> dict[str, float]:
    """Return the percentage of ranks within each cut-off."""
    return {f"hr@{k}": 100.0 * float((ranks <= k).mean()) for k in topk}
