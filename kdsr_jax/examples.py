"""What the report shows of a run's data and model: an overview of both, and some users with their recommendations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kdsr_jax.data.interactions import item_counts, statistics, train_lengths
from kdsr_jax.explain import most_alike
from kdsr_jax.layout import precision
from kdsr_jax.models.student import candidates_of
from kdsr_jax.report.bins import histogram
from kdsr_jax.report.pictures import item_picture

NUM_USERS, TOP_K = 12, 10
SHOWN_HISTORY = 12  # newest items of a history that are shown, of those that the model reads
PICTURE_BYTES = 4 * 2**20  # of all pictures together; further items go without


def overview(run, parameters):
    """Describe what a run works on, as JSON data.

    Args:
      run: Run.
      parameters: number of trainable numbers.

    Returns:
      dict "name", "statistics" (the paper's Table 1), "history_lengths" and "item_counts" (histograms over users and over
      items), "parameters" and "teacher" (the report of each modality).
    """
    data = run.dataset.interactions
    return {
        "name": run.dataset.name,
        "statistics": statistics(data, run.dataset.features),
        "history_lengths": histogram(data.lengths),
        "item_counts": histogram(item_counts(data)[1:]),
        "parameters": parameters,
        "teacher": run.teacher_report,
    }


def make_examples(run, state):
    """Recommend to some users, drawn by the run's seed, at the point where their train part ends.

    Args:
      run: Run.
      state: TrainState of the model to ask.

    Returns:
      JSON data: {"users": [...], "items": {item index: {"id", "title", "picture"}}}. A user has "user" (raw id), "length"
      (items before the target), "history" (newest item indices, oldest first), "target", "rank" (of the target, ties
      against it) and "recommendations": "item", "score", "taken" (it stands in the history) and "because", by modality the item of the history that the
      teacher takes for the most alike with its "score" and "code"; empty without distillation.
    """
    users, histories, targets = _choose(run)
    scores = _score(run, state, histories)
    if run.config.eval.filter_seen:
        scores = _without_seen(run, scores, users, targets)
    top = np.argsort(-scores, axis=1, kind="stable")[:, :TOP_K]
    own = np.take_along_axis(scores, targets[:, None] - 1, 1)
    ranks = (scores >= own).sum(1)
    given = run.config.teacher, histories, top + 1, run.placement.replicated
    reasons = {name: most_alike(teacher, *given) for name, teacher in run.teachers.items()}
    data, examples = run.dataset.interactions, []
    for row, user in enumerate(users):
        read = histories[row][histories[row] > 0]
        recommendations = [
            {
                "item": int(item) + 1,
                "score": float(scores[row, item]),
                "taken": int(item) + 1 in read,
                "because": {name: found[row][place] for name, found in reasons.items() if found[row][place]},
            }
            for place, item in enumerate(top[row])
            if np.isfinite(scores[row, item])
        ]
        examples.append(
            {
                "user": str(data.user_ids[user]),
                "length": int(train_lengths(data.lengths)[user]),
                "history": read[-SHOWN_HISTORY:].tolist(),
                "target": int(targets[row]),
                "rank": int(ranks[row]),
                "recommendations": recommendations,
            }
        )
    return {"users": examples, "items": _describe_items(run, examples)}


def _choose(run):
    """Return (users [n], histories [n, max_length] right padded, targets [n]): each user's first test item is the target."""
    data, longest = run.dataset.interactions, run.config.data.max_length
    trained = train_lengths(data.lengths)
    rng = np.random.default_rng(run.config.seed)
    users = rng.choice(data.num_users, min(NUM_USERS, data.num_users), replace=False)
    histories = np.zeros((len(users), longest), np.int32)
    for row, user in enumerate(users):
        end = data.offsets[user] + trained[user]
        read = data.items[max(data.offsets[user], end - longest) : end]
        histories[row, : len(read)] = read
    return users, histories, data.items[data.offsets[users] + trained[users]]


def _score(run, state, histories):
    """Return the scores [n, N] of all items after each history, as a numpy array."""

    @functools.partial(jax.jit, out_shardings=run.placement.replicated)
    def score(params, frozen, histories):
        variables = run.placement.unpack({"params": params, "frozen": frozen}, run.student.num_items)
        states = run.student.apply(variables, histories, method="encode")
        last = jnp.take_along_axis(states, (histories > 0).sum(1)[:, None, None] - 1, 1)[:, 0]
        return last @ candidates_of(run.student, variables).T

    with precision(run.config):
        return np.asarray(score(state.params, state.frozen, run.placement.put(histories)))


def _without_seen(run, scores, users, targets):
    data, scores = run.dataset.interactions, scores.copy()
    for row, user in enumerate(users):
        begin = data.offsets[user]
        seen = data.items[begin : begin + train_lengths(data.lengths)[user]]
        scores[row, seen[seen != targets[row]] - 1] = -np.inf
    return scores


def _describe_items(run, examples):
    """Return id, title and picture of every item that the examples name."""
    named = {example["target"] for example in examples}
    for example in examples:
        named |= set(example["history"])
        for recommendation in example["recommendations"]:
            named |= {recommendation["item"]} | {reason["item"] for reason in recommendation["because"].values()}
    dataset, described, spent = run.dataset, {}, 0
    for item in sorted(named):
        item_id = str(dataset.interactions.item_ids[item])
        known = dataset.items[item] if dataset.items else {}
        picture = item_picture(item_id, known, dataset, run.config.data.root)
        spent += len(picture or "")
        described[str(item)] = {
            "id": item_id,
            "title": dataset.title(item) or item_id,
            "picture": picture if spent <= PICTURE_BYTES else None,
        }
    return described
