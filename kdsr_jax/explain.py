"""Why an item may be recommended after a history: what teacher and student say about its pairs with the history's items."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdsr_jax.ops.scoring import SCORE_FNS
from kdsr_jax.teacher import pair_correlations


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


def _links(recommender, name, read, number):
    """Return [(place in the history, Link), ...] of a modality."""
    teacher, settings = recommender.teachers[name], recommender.config.teacher
    covered = np.asarray(teacher.has_feature)
    if not covered[number]:
        return []
    places = np.flatnonzero(covered[read])
    first, second = read[places], np.full(len(places), number, np.int32)
    score_fn = SCORE_FNS[settings.score_fn]
    if recommender.config.distill.enabled:
        scores, codes = pair_correlations(teacher, first, second, settings.score_fn, settings.num_splits)
        predicted = _predict(recommender.student, recommender.variables, score_fn, name, first, second)
    else:
        scores = jax.vmap(score_fn)(teacher.condensed[first], teacher.condensed[second])
        codes, predicted = (None,) * len(places), ((None,) * len(places),) * 2
    kinds = zip((float, int, float, int), (scores, codes, *predicted), strict=True)
    columns = [[None if value is None else kind(value) for value in values] for kind, values in kinds]
    ids = [str(recommender.item_ids[i]) for i in first]
    return [(int(p), Link(raw, name, *rest)) for p, raw, *rest in zip(places, ids, *columns, strict=True)]


def _predict(student, variables, score_fn, name, first, second):
    """Return what the student says of pairs of items [P]: (scores [P], codes [P])."""
    vectors = [student.apply(variables, name, ids, method="modality_vectors") for ids in (first, second)]
    logits = student.apply(variables, name, *vectors, method="code_logits")
    transformed = [student.apply(variables, name, rows, method="transform") for rows in vectors]
    return jax.vmap(score_fn)(*transformed), logits.argmax(-1)


def _shares(recommender, read):
    """Return each item's weights in the gate; [] where the model has none."""
    student = recommender.student
    capture = {"method": "inputs", "mutable": ["intermediates"]}
    _, found = student.apply(recommender.variables, jnp.asarray(read)[None], **capture)
    weights = found.get("intermediates", {}).get("fuse", {}).get("weights")
    if weights is None:
        return []
    names = ("item", *student.modalities)
    return [dict(zip(names, map(float, row), strict=True)) for row in np.asarray(weights[0])[0]]
