"""A finished run as a recommender: raw item ids in, raw item ids out.

    from kdsr_jax import Recommender
    recommender = Recommender.from_workdir("runs/planted")
    recommender.recommend(["i0007", "i0123"], k=5)

It knows the items that the run was trained with; the model scores all of them, also those that no one took in training.
``recommend`` needs nothing but the workdir. Titles read the data set again at their first call, ``similar`` and ``explain``
also its features, which must be those of the run.
"""

import functools
import logging
import pathlib
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdsr_jax.checkpoint import load_best_variables
from kdsr_jax.config import entries_read, from_dict
from kdsr_jax.data import entries_at_hand, load_dataset
from kdsr_jax.data.arrays import read_arrays
from kdsr_jax.data.digest import feature_digests
from kdsr_jax.errors import UserError
from kdsr_jax.explain import Explanation, explain, teachers_of
from kdsr_jax.layout import make_student, precision
from kdsr_jax.models.student import candidates_of
from kdsr_jax.report.files import saved_run
from kdsr_jax.teacher import likeness_to
from kdsr_jax.workdir import refuse_other_features

SCORE_BYTES = 64 * 2**20  # of one batch's scores [B, N]; larger only costs memory
MOST_HISTORIES = 512  # of a batch; more only cost memory
UNKNOWN = ("warn", "error", "ignore")

_logger = logging.getLogger("kdsr_jax")


class Recommendation(NamedTuple):
    """An item and the model's score of it: comparable within one history only, higher is better."""

    item: str
    score: float


class Recommender:
    """Answers for one finished run.

    Attributes:
      config: the run's.
      item_ids: [N + 1] raw item ids, text; entry 0 is "".
      student: Student.
      variables: dict "params" and "frozen", the student's, on the device.
    """

    def __init__(self, config, item_ids, params, frozen, run_features=None, folder=None):
        """Take a run's parts; ``from_workdir`` reads them."""
        self.config, self.item_ids, self._run_features = config, item_ids, run_features or {}
        self._folder = folder
        self._index = {str(raw): number for number, raw in enumerate(item_ids) if number}
        self.student = make_student(config, len(item_ids) - 1)
        self.variables = jax.device_put({"params": params, "frozen": frozen})

    @classmethod
    def from_workdir(cls, path: Any, data_root: str | None = None) -> "Recommender":
        """Load the checkpoint that a finished run chose.

        Args:
          path: the --workdir of the run; nothing in it is changed.
          data_root: instead of the run's --config.data.root, for titles, ``similar`` and ``explain``.

        Raises:
          UserError: there is no finished run, or its checkpoint or its ids are damaged.
        """
        path = pathlib.Path(path)
        saved = saved_run(path, finished=True)
        try:
            config = from_dict(saved["config"])
        except UserError as error:
            raise UserError(f"{path}: the run was trained by another version ({error})") from error
        if data_root is not None:
            config.data.root = str(data_root)
        item_ids = read_arrays(path / "ids.npz", ("item_ids",))["item_ids"]
        variables = load_best_variables(path / "checkpoints" / "refit")
        return cls(config, item_ids, *variables, saved.get("features"), path)

    @property
    def num_items(self) -> int:
        """Number of items N."""
        return len(self.item_ids) - 1

    @functools.cached_property
    def dataset(self):
        """The run's log and items, without features, loaded at the first use.

        Raises:
          UserError: they cannot be loaded, or there are other items than in the run.
        """
        return self._load(())

    def _load(self, entries):
        dataset = load_dataset(self.config.data, entries)
        if not np.array_equal(dataset.interactions.item_ids, self.item_ids):
            raise UserError(
                f"{self.config.data.name}: has other items than the run was trained with; give the same data"
            )
        return dataset

    def number(self, item: Any) -> int:
        """Return the number, from 1, of a raw id; UserError where there is none."""
        if str(item) not in self._index:
            raise UserError(f"there is no item {str(item)!r}")
        return self._index[str(item)]

    def title(self, item: Any) -> str:
        """Return an item's title in one line; "" where it has none."""
        return self.dataset.title(self.number(item))

    def recommend(self, history: Iterable, k: int = 10, **options: Any) -> list[Recommendation]:
        """Recommend after one history; see ``recommend_all``."""
        return self.recommend_all([history], k, **options)[0]

    def recommend_all(
        self,
        histories: Iterable[Iterable],
        k: int = 10,
        exclude_seen: bool = True,
        filter: Callable[[str], bool] | Collection | None = None,
        unknown: str = "warn",
        approximate: bool = False,
    ) -> list[list[Recommendation]]:
        """List the best items after each history.

        Args:
          histories: raw item ids of each, oldest first; numbers count as their digits. The model reads the newest
            ``config.data.max_length``.
          k: length of a list, 1..N.
          exclude_seen: leave out what the history holds.
          filter: the ids that may be recommended, or a function raw id -> whether it may.
          unknown: what to do about ids that the run does not know: "warn" (once a call) and go on without them, "ignore"
            (without a word), or "error".
          approximate: find the best by ``jax.lax.approx_max_k``, which on TPUs is faster and misses a few; see ``recall``.

        Returns:
          A list a history, the best first; shorter than k where fewer items are left.

        Raises:
          UserError: a history without a known item, an unknown id with ``unknown="error"``, or k out of range.
        """
        numbers = self.numbers(histories, unknown)
        lists, scores = self.top_items(numbers, k, exclude_seen, self._allowed(filter), approximate)
        return [
            [Recommendation(str(self.item_ids[i]), float(s)) for i, s in zip(*row, strict=True) if i]
            for row in zip(lists, scores, strict=True)
        ]

    def numbers(self, histories: Iterable[Iterable], unknown: str = "warn") -> list[np.ndarray]:
        """Return the item numbers, from 1, of histories of raw ids; arguments and errors as in ``recommend_all``."""
        if unknown not in UNKNOWN:
            raise UserError(f"unknown={unknown!r}: must be one of {', '.join(UNKNOWN)}")
        found, missing = [], {}
        for place, history in enumerate(histories):
            if isinstance(history, str | bytes):
                raise UserError(f"a history is a list of item ids, not the text {history!r}")
            ids = [str(raw) for raw in history]
            known = [self._index[raw] for raw in ids if raw in self._index]
            missing |= {raw: None for raw in ids if raw not in self._index}
            if missing and unknown == "error":
                raise UserError(f"history {place + 1}: there is no item {next(iter(missing))!r}")
            if not known:
                what = f"no known item; there is no {ids[0]!r}" if ids else "is empty"
                raise UserError(f"history {place + 1}: {what}")
            found.append(np.array(known, np.int32))
        if missing and unknown == "warn":
            shown = ", ".join(repr(raw) for raw in list(missing)[:5])
            _logger.warning("%s unknown item ids are left out of the histories: %s", len(missing), shown)
        return found

    def check_k(self, k: int) -> None:
        """Raise UserError where there are not k items to recommend."""
        if not 1 <= k <= self.num_items:
            raise UserError(f"k={k}: must be from 1 to {self.num_items}, the number of items")

    def top_items(
        self,
        histories: Sequence[np.ndarray],
        k: int,
        exclude_seen: bool = True,
        allowed: np.ndarray | None = None,
        approximate: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        """As ``recommend_all``, with item numbers instead of raw ids.

        Args:
          histories: item numbers 1..N of each, oldest first, none empty.
          k, exclude_seen, approximate: as there.
          allowed: [N] bool of what may be recommended; None is all.

        Returns:
          (items [n, k] int32, scores [n, k] float32), the best first; 0 and -inf where no items are left.
        """
        self.check_k(k)
        items, scores = np.zeros((len(histories), k), np.int32), np.full((len(histories), k), -np.inf, np.float32)
        allowed = np.ones(self.num_items, bool) if allowed is None else allowed
        most = max(1, min(MOST_HISTORIES, SCORE_BYTES // (4 * self.num_items)))
        order = np.argsort([len(row) for row in histories], kind="stable")  # alike ones together, for little padding
        for begin in range(0, len(histories), most):
            place = order[begin : begin + most]
            part = [histories[row] for row in place]
            rows = min(most, _power_of_two(len(part)))  # few sizes, few compiled programs
            longest = _power_of_two(len(part[-1]))
            newest = self._newest(part, rows, min(longest, self.config.data.max_length))
            seen = _padded(part if exclude_seen else [], rows, longest if exclude_seen else 1)
            arguments = self.variables, self.item_vectors, newest, seen, allowed
            with precision(self.config):
                best = jax.device_get(self._top(*arguments, k=k, approximate=approximate))
            items[place], scores[place] = (array[: len(part)] for array in best)
        return items, scores

    def recall(self, histories: Sequence[np.ndarray], k: int, exclude_seen: bool = True) -> float:
        """Return the share of the exact best items, 0..1, that approximate lists hold; arguments as in ``top_items``."""
        exact, approximate = (self.top_items(histories, k, exclude_seen, approximate=how)[0] for how in (False, True))
        found = [np.isin(row[row > 0], other) for row, other in zip(exact, approximate, strict=True)]
        return float(np.concatenate(found).mean()) if any(map(len, found)) else 1.0

    def similar(self, item: Any, k: int = 10, modality: str | None = None) -> list[Recommendation]:
        """List the items that the teacher takes for the most alike.

        Args:
          item: raw id.
          k: length of the list, from 1.
          modality: a name of ``config.data.modalities`` before its hyphen; None takes the mean over those that both have.

        Returns:
          The best first, with the teacher's holistic score (``teacher.score_fn``); distances are negative.

        Raises:
          UserError: an unknown item or modality, or an item without the feature.
        """
        if k < 1:
            raise UserError(f"k={k}: must be at least 1")
        number, names = self.number(item), list(self.teachers) if modality is None else [modality]
        if unknown := [name for name in names if name not in self.teachers]:
            raise UserError(f"modality={unknown[0]!r}: must be one of {', '.join(self.teachers) or 'none at all'}")
        names = [name for name in names if self.teachers[name].has_feature[number]]
        if not names:
            raise UserError(f"item {item!r} has no {modality or 'modality'} feature")
        total, count = np.zeros(self.num_items + 1), np.zeros(self.num_items + 1)
        for name in names:
            teacher = self.teachers[name]
            scores = np.asarray(likeness_to(teacher, number, self.config.teacher.score_fn))
            total += np.where(teacher.has_feature, scores, 0)
            count += np.asarray(teacher.has_feature)
        count[number] = 0
        mean = np.where(count > 0, total / np.maximum(count, 1), -np.inf)
        best = np.argsort(-mean, kind="stable")[:k]
        return [Recommendation(str(self.item_ids[i]), float(mean[i])) for i in best if np.isfinite(mean[i])]

    def explain(self, history: Iterable, item: Any, unknown: str = "warn") -> Explanation:
        """Say what speaks for an item after a history.

        Args:
          history: raw ids, oldest first.
          item: raw id.
          unknown: as in ``recommend_all``.

        Returns:
          Explanation.

        Raises:
          UserError: an unknown item, or a history that ``recommend_all`` refuses.
        """
        (full,) = self.numbers([history], unknown)
        return explain(self, full[-self.config.data.max_length :], self.number(item))

    @functools.cached_property
    def teachers(self) -> dict[str, Any]:
        """The run's Teacher of each modality, made or read at the first use; a model of ids alone gets them of the features at hand.

        Raises:
          UserError: features are missing, or not those that the run was trained with.
        """
        dataset = self._load(entries_read(self.config) or entries_at_hand(self.config.data))
        refuse_other_features(self.config.data.name, self._run_features, feature_digests(dataset))
        return teachers_of(self.config, dataset.features, self._folder)

    def scores(self, histories: Sequence[np.ndarray]) -> np.ndarray:
        """Return the scores [n, N] of all items after histories of item numbers, as ``top_items`` takes them."""
        newest = self._newest(histories, len(histories), self.config.data.max_length)
        with precision(self.config):
            return np.asarray(self.score_histories(self.variables, self.item_vectors, newest))

    def _newest(self, histories, count, width):
        return _padded([row[-self.config.data.max_length :] for row in histories], count, width)

    @functools.cached_property
    def item_vectors(self):
        """[N, dim] float32, on the device: what histories are compared with."""
        with precision(self.config):
            return jax.jit(functools.partial(candidates_of, self.student))(self.variables)

    @functools.cached_property
    def score_histories(self):
        """Compiled function (variables, item vectors [N, dim], histories [n, L] int32) -> scores [n, N]."""

        def score(variables, candidates, histories):
            states = self.student.apply(variables, histories, method="encode")
            last = jnp.maximum((histories > 0).sum(1) - 1, 0)
            return jnp.take_along_axis(states, last[:, None, None], 1)[:, 0] @ candidates.T

        return jax.jit(score)

    @functools.cached_property
    def _top(self):
        @functools.partial(jax.jit, static_argnames=("k", "approximate"))
        def top(variables, candidates, histories, seen, allowed, k, approximate):
            scores = jnp.where(allowed[None], self.score_histories(variables, candidates, histories), -jnp.inf)
            column = jnp.where(seen > 0, seen - 1, scores.shape[1])  # past the end: dropped
            scores = jax.vmap(lambda s, c: s.at[c].set(-jnp.inf, mode="drop"))(scores, column)
            values, items = (jax.lax.approx_max_k if approximate else jax.lax.top_k)(scores, k)
            return jnp.where(values > -jnp.inf, items + 1, 0), values

        return top

    def _allowed(self, wanted):
        if wanted is None:
            return None
        if isinstance(wanted, str | bytes):
            raise UserError(f"filter: is a collection of item ids or a function, not the text {wanted!r}")
        known = wanted if callable(wanted) else {str(raw) for raw in wanted}.__contains__
        return np.array([bool(known(str(raw))) for raw in self.item_ids[1:]])


def _power_of_two(number):
    return 1 << max(0, number - 1).bit_length()


def _padded(rows, count, width):
    """Return [count, width] int32 of rows of item numbers, right padded with 0."""
    array = np.zeros((count, width), np.int32)
    for place, row in enumerate(rows):
        array[place, : len(row)] = row
    return array
