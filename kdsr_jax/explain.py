"""Why an item may be recommended after a history: what teacher and student say about its pairs with the history's items."""

import functools
from typing import NamedTuple

import jax
import numpy as np

from kdsr_jax.cache import cache_folder
from kdsr_jax.config import entries_read
from kdsr_jax.layout import table_width
from kdsr_jax.ops.scoring import DISTANCES, SCORE_FNS
from kdsr_jax.teacher import fit_teachers, pair_correlations, read_teachers


class Link(NamedTuple):
    """What teacher and student say about a pair of items in one modality.

    Attributes:
      item: raw id of the history's item.
      modality: name.
      teacher_score, teacher_code: the holistic score and the dissected code (Section 3.2); the code is None without
        distillation.
      student_score, student_code: what the trained table predicts of both (Eqs. 2 and 4); None without distillation.
    """

    item: str
    modality: str
    teacher_score: float
    teacher_code: int | None
    student_score: float | None
    student_code: int | None


class Explanation(NamedTuple):
    """Why an item may be recommended after a history.

    Attributes:
      score: the model's, as in ``Recommendation``.
      rank: from 1, among all items, ties against it.
      links: Link of every item of the history and modality that both items have, oldest first.
      shares: for every item of the history that the model reads, oldest first, dict "item" or modality -> weight in the
        gate that fuses its vectors; they sum to 1. Empty for models that fuse otherwise.
    """

    score: float
    rank: int
    links: list[Link]
    shares: list[dict[str, float]]


def teachers_of(config, features, folder=None):
    """Return the teachers of a finished run; they are fitted where there are none.

    Args:
      config: the run's.
      features: dict modality -> Features, as the run reads them or, where it reads item ids alone, those at hand.
      folder: the run's, which may hold the teachers that it was trained with.

    Returns:
      dict modality -> Teacher; empty where features that the run does not read are too few for ``teacher.num_splits`` parts.
    """
    width = table_width(config)
    if not entries_read(config):  # then no width was ever held against these features
        width = min([width, *(min(f.values.shape[1], int(f.has_feature.sum())) for f in features.values())])
        width -= width % config.teacher.num_splits
    own = read_teachers(folder) if folder else None
    arguments = features if width else {}, config.teacher, width, cache_folder()
    return fit_teachers(*arguments, codes=config.distill.enabled, own=own)[0]


def explain(recommender, read, number):
    """Explain an item; see ``Recommender.explain``.

    Args:
      recommender: Recommender.
      read: [n] item numbers of what the model reads of the history, oldest first, not empty.
      number: of the item.

    Returns:
      Explanation.
    """
    scores = recommender.scores([read])[0]
    links = [link for name in recommender.teachers for link in _links(recommender, name, read, number)]
    links.sort(key=lambda link: link[0])
    own = scores[number - 1]
    return Explanation(float(own), int((scores >= own).sum()), [link for _, link in links], _shares(recommender, read))


def most_alike(teacher, settings, histories, items, sharding=None):
    """Find, for items after histories, what a modality's teacher says of the history's item most alike.

    Args:
      teacher: Teacher.
      settings: the config's teacher group.
      histories: [n, L] int32, 0 at padding.
      items: [n, k] int, of each history.
      sharding: of the values that the host looks at; needed where several processes hold parts of the teacher.

    Returns:
      [n][k] dicts "item" (number), "score" and "code" (None where the teacher has no codebook); None where either side has
      no such feature or the item is the same.
    """
    shape = (*items.shape, histories.shape[1])
    first = np.broadcast_to(items[:, :, None], shape).astype(np.int32)
    second = np.broadcast_to(histories[:, None, :], shape)
    state = _state if sharding is None else jax.jit(_state, static_argnums=(3, 4), out_shardings=sharding)
    scores, codes = state(teacher, first.ravel(), second.ravel(), settings.score_fn, settings.num_splits)
    scores, codes = (None if values is None else np.asarray(values).reshape(shape) for values in (scores, codes))
    covered = np.asarray(teacher.has_feature)
    usable = covered[first] & covered[second] & (first != second)
    likeness = np.where(usable, -scores if settings.score_fn in DISTANCES else scores, -np.inf)
    best = likeness.argmax(-1)

    def reason(row, place):
        at = row, place, best[row, place]
        code = None if codes is None else int(codes[at])
        return {"item": int(second[at]), "score": float(scores[at]), "code": code} if usable[at] else None

    return [[reason(row, place) for place in range(shape[1])] for row in range(shape[0])]


@functools.partial(jax.jit, static_argnames=("score_fn", "num_splits"))
def _state(teacher, first, second, score_fn, num_splits):
    """Return the teacher's (scores [P], codes [P]) of pairs of items [P]; None for the codes without a codebook."""
    if len(teacher.codebook):
        return pair_correlations(teacher, first, second, score_fn, num_splits)
    return jax.vmap(SCORE_FNS[score_fn])(teacher.condensed[first], teacher.condensed[second]), None


def _links(recommender, name, read, number):
    """Return [(place in the history, Link), ...] of a modality."""
    teacher, settings = recommender.teachers[name], recommender.config.teacher
    covered = np.asarray(teacher.has_feature)
    if not covered[number]:
        return []
    places = np.flatnonzero(covered[read])
    first, second = _padded(recommender, read), np.int32(number)[None]
    second = np.repeat(second, len(first))
    scores, codes = _state(teacher, first, second, settings.score_fn, settings.num_splits)
    predicted = None, None
    if recommender.config.distill.enabled:
        predicted = _predict(recommender.student, recommender.variables, settings.score_fn, name, first, second)
    else:
        codes = None
    kinds = zip((float, int, float, int), (scores, codes, *predicted), strict=True)
    columns = [
        [None] * len(places) if values is None else [kind(value) for value in np.asarray(values)[places]]
        for kind, values in kinds
    ]
    ids = [str(recommender.item_ids[i]) for i in read[places]]
    return [(int(p), Link(raw, name, *rest)) for p, raw, *rest in zip(places, ids, *columns, strict=True)]


def _padded(recommender, read):
    """Return [max_length] int32: item numbers with 0 behind them, so that one compiled program does for all histories."""
    return np.pad(read, (0, recommender.config.data.max_length - len(read))).astype(np.int32)


@functools.partial(jax.jit, static_argnames=("student", "score_fn", "name"))
def _predict(student, variables, score_fn, name, first, second):
    """Return what the student says of pairs of items [P]: (scores [P], codes [P])."""
    vectors = [student.apply(variables, name, ids, method="modality_vectors") for ids in (first, second)]
    logits = student.apply(variables, name, *vectors, method="code_logits")
    transformed = [student.apply(variables, name, rows, method="transform") for rows in vectors]
    return jax.vmap(SCORE_FNS[score_fn])(*transformed), logits.argmax(-1)


def _shares(recommender, read):
    """Return each item's weights in the gate; [] where the model has none."""
    weights = _gate(recommender.student, recommender.variables, _padded(recommender, read)[None])
    if weights is None:
        return []
    names = ("item", *recommender.student.modalities)
    return [dict(zip(names, map(float, row), strict=True)) for row in np.asarray(weights[0])[0, : len(read)]]


@functools.partial(jax.jit, static_argnames="student")
def _gate(student, variables, histories):
    _, found = student.apply(variables, histories, method="inputs", mutable=["intermediates"])
    return found.get("intermediates", {}).get("fuse", {}).get("weights")
