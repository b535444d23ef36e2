"""What the explorer's page asks for, as JSON data.

Every argument of a public method of ``Answers`` comes from a request and is checked; ``UserError`` says what is wrong with it.
An item is described as {"id": raw id, "title", "picture": path of its picture or None}, and a history is a list of raw ids,
oldest first. Places are those of the ranking without what the history holds, from 1; None for the history's own items.
"""

import random

import numpy as np

from kdsr_jax.config import flatten, to_dict
from kdsr_jax.data.interactions import train_lengths
from kdsr_jax.errors import UserError
from kdsr_jax.explain import explain, most_alike
from kdsr_jax.ops.scoring import DISTANCES
from kdsr_jax.report.page import describe_model
from kdsr_jax.report.pictures import Picture, find_picture
from kdsr_jax.report.text import clean

MOST_FOUND = 20  # items or users of one search
MOST_LISTED = 100  # recommendations of one list
NUM_SIMILAR = 8
PICTURE_BYTES = 4 * 2**20  # of one file; larger ones are not shown


class Answers:
    """Answers of one run, beside those of another one on the same data where there is one.

    Attributes:
      names: of the runs.
      runs: Recommender of each; the first also says what is alike, and why.
    """

    def __init__(self, runs):
        """Take dict name -> Recommender, one or two, and load what the first answer would wait for."""
        self.names, self.runs = list(runs), list(runs.values())
        self.main, self.dataset = self.runs[0], self.runs[0].dataset
        data, names = self.dataset.interactions, map(str, self.dataset.interactions.user_ids)
        self._users = {name: number for number, name in enumerate(names)}
        self._folded = [f"{self.main.title(raw)} {raw}".casefold() if raw else "" for raw in map(str, data.item_ids)]
        self._taken = np.bincount(data.items, minlength=data.num_items + 1)
        first, last = str(data.item_ids[1]), str(data.item_ids[-1])
        self.recommend([first]), self.explain([first, first], last), self.similar(first)  # compiles all there is

    def about(self) -> dict:
        """Return what the page says of the shop and the runs."""
        data, settings = self.dataset.interactions, self.main.config
        models = [describe_model(flatten(to_dict(run.config))) for run in self.runs]
        return {
            "name": clean(self.dataset.name),
            "items": data.num_items,
            "users": data.num_users,
            "most": self._most(),
            "max_length": settings.data.max_length,
            "score_fn": settings.teacher.score_fn,
            "modalities": list(self.main.teachers),
            "runs": [{"name": n, "model": clean(m)} for n, m in zip(self.names, models, strict=True)],
        }

    def items(self, words: str) -> dict:
        """Search titles and ids for all of some words; the most popular items come first, titles that begin so before them."""
        wanted = _text("words", words).casefold().split()
        found = [n for n, text in enumerate(self._folded) if n and all(word in text for word in wanted)]
        start = " ".join(wanted)
        found.sort(key=lambda n: (not self._folded[n].startswith(start), -self._taken[n], n))
        return {"found": len(found), "items": [self._item(number) for number in found[:MOST_FOUND]]}

    def users(self, words: str) -> dict:
        """Search user ids for a text; ids that begin with it come first."""
        wanted = _text("words", words).strip().casefold()
        found = [raw for raw in self._users if wanted in raw.casefold()]
        found.sort(key=lambda raw: not raw.casefold().startswith(wanted))
        lengths = self.dataset.interactions.lengths
        users = [
            {"id": raw, "title": clean(raw), "length": int(lengths[self._users[raw]])} for raw in found[:MOST_FOUND]
        ]
        return {"found": len(found), "users": users}

    def user(self, user: str | None = None) -> dict:
        """Return a user, or any one: the train part is the history, the test part what was taken after it."""
        raw = random.choice(list(self._users)) if user is None else _text("user", user)
        if raw not in self._users:
            raise UserError(f"there is no user {raw!r}")
        data, number = self.dataset.interactions, self._users[raw]
        taken = data.items[data.offsets[number] : data.offsets[number + 1]]
        trained = int(train_lengths(data.lengths[[number]])[0])
        history, after = ([self._item(n) for n in part] for part in (taken[:trained], taken[trained:]))
        return {"user": raw, "title": clean(raw), "history": history, "after": after}

    def recommend(self, history: list, without: list = (), k: int = 10) -> dict:
        """Recommend after a history of which some items are left out.

        Args:
          history: raw ids.
          without: places in the history, from 0, of what is left out; it is not recommended either.
          k: length of a list, from 1.

        Returns:
          {"history": its items, "read": number of those left that the model reads, "runs": a run {"recommendations": [...],
          "dropped": [...]}}. A recommendation has "item", "place", "before" (its place with the whole history), "elsewhere"
          (its place in the other run; None without) and "because", by modality the history's item that the teacher takes for
          the most alike with "score" and "code". Dropped are items of the first k with the whole history that are no more.
        """
        full, kept = self._history(history, without)
        if type(k) is not int or not 1 <= k <= self._most():
            raise UserError(f"k={k}: must be a whole number from 1 to {self._most()}")
        scores = [self._scores(run, [kept, full], full) for run in self.runs]
        places = [[_places(row) for row in rows] for rows in scores]
        answers = []
        for index, (run, (now, before)) in enumerate(zip(self.runs, places, strict=True)):
            other = places[1 - index][0] if len(self.runs) == 2 else None
            listed = [n for n in np.argsort(-scores[index][0], kind="stable")[:k] if now[n]]
            reasons = self._reasons(run, kept, np.array(listed, int) + 1)
            recommendations = [
                {
                    "item": self._item(n + 1),
                    "place": _json(now[n]),
                    "before": _json(before[n]),
                    "elsewhere": None if other is None else _json(other[n]),
                    "because": because,
                }
                for n, because in zip(listed, reasons, strict=True)
            ]
            gone = sorted(np.flatnonzero((before > 0) & (before <= k) & (now > k)), key=lambda n: before[n])
            dropped = [{"item": self._item(n + 1), "place": _json(now[n]), "before": _json(before[n])} for n in gone]
            answers.append({"recommendations": recommendations, "dropped": dropped})
        read = min(len(kept), self.main.config.data.max_length)
        return {"history": [self._item(n) for n in full], "read": read, "runs": answers}

    def explain(self, history: list, item: str, without: list = ()) -> dict:
        """Say what speaks for an item after a history of which some items are left out; arguments as in ``recommend``.

        Returns:
          "item", "places" (in each run), "modalities", "shares" and "alone". The second is by modality a list, the most alike
          first, of the history's items with the scores and codes of ``explain.Link``; the third the mean weights in the gate
          over the items read, or None; the last a list, oldest first, of the items read, each with the "place" that the item
          would have without it.
        """
        full, kept = self._history(history, without)
        number, longest = self.main.number(_text("item", item)), self.main.config.data.max_length
        found = explain(self.main, kept[-longest:], number)
        sign = -1 if self.main.config.teacher.score_fn in DISTANCES else 1
        modalities = {name: {} for name in self.main.teachers}
        for link in found.links:
            modalities[link.modality][link.item] = link
        read = range(max(0, len(kept) - longest), len(kept)) if len(kept) > 1 else ()
        fewer = [np.delete(kept, place) for place in read]
        scores = self._scores(self.main, [kept, *fewer], full, 1 + longest)
        places = [_place(row, number) for row in scores]
        return {
            "item": self._item(number),
            "places": [places[0], *(_place(self._scores(run, [kept], full)[0], number) for run in self.runs[1:])],
            "modalities": {
                name: [self._link(link) for link in sorted(links.values(), key=lambda link: -sign * link.teacher_score)]
                for name, links in modalities.items()
            },
            "shares": _mean(found.shares),
            "alone": [
                {"item": self._item(kept[at]), "place": place} for at, place in zip(read, places[1:], strict=True)
            ],
        }

    def similar(self, item: str) -> dict:
        """List, by modality, the items that the teacher takes for the most alike; none where the item lacks it."""
        number, found = self.main.number(_text("item", item)), {}
        for name, teacher in self.main.teachers.items():
            alike = self.main.similar(item, NUM_SIMILAR, name) if bool(teacher.has_feature[number]) else []
            found[name] = [{"item": self._item(self.main.number(raw)), "score": score} for raw, score in alike]
        return {"item": self._item(number), "modalities": found}

    def picture(self, number: int) -> Picture | None:
        """Find the picture of an item by its number; None where there is none, or no such item."""
        if not 1 <= number <= self.main.num_items:
            return None
        known = self.dataset.items[number] if self.dataset.items else {}
        root = self.main.config.data.root
        return find_picture(str(self.main.item_ids[number]), known, self.dataset, root, PICTURE_BYTES)

    def _item(self, number):
        raw, number = str(self.main.item_ids[number]), int(number)
        found = self.picture(number) is not None
        return {
            "id": raw,
            "title": clean(self.main.title(raw) or raw),
            "picture": f"/picture/{number}" if found else None,
        }

    def _link(self, link):
        scores = {name: value for name, value in link._asdict().items() if name not in ("item", "modality")}
        return {"item": self._item(self.main.number(link.item)), **scores}

    def _most(self):
        return min(MOST_LISTED, self.main.num_items)

    def _history(self, history, without):
        """Return the item numbers of a history and of what is left of it."""
        if not isinstance(history, list) or not all(isinstance(raw, str) for raw in history):
            raise UserError("history: must be a list of item ids")
        if not history:
            raise UserError("history: is empty; it takes one item at least")
        places = range(len(history))
        if not isinstance(without, list | tuple) or not all(type(at) is int and at in places for at in without):
            raise UserError(f"without: must be a list of places in the history, from 0 to {len(history) - 1}")
        full = np.array([self.main.number(raw) for raw in history], np.int32)
        kept = np.delete(full, list(without))
        if not len(kept):
            raise UserError("without: leaves nothing of the history; it takes one item at least")
        return full, kept

    def _scores(self, run, histories, seen, rows=2):
        """Return the scores [n, N] after histories, at most ``rows``, -inf for the item numbers that are seen."""
        # Filled up to so many rows, there is one compiled program.
        scores = run.scores([*histories, *histories[:1] * (rows - len(histories))])[: len(histories)].copy()
        scores[:, seen - 1] = -np.inf
        return scores

    def _reasons(self, run, kept, items):
        """Return, for each item number, what ``most_alike`` finds by modality; nothing where the run knows ids alone."""
        names = run.student.modalities or run.student.clustered
        longest = run.config.data.max_length
        history = np.zeros((1, longest), np.int32)
        history[0, : len(kept[-longest:])] = kept[-longest:]
        filled = np.pad(items, (0, self._most() - len(items)))[None]
        found = {name: most_alike(run.teachers[name], run.config.teacher, history, filled)[0] for name in names}
        return [
            {name: row[at] | {"item": self._item(row[at]["item"])} for name, row in found.items() if row[at]}
            for at in range(len(items))
        ]


def _text(name, value):
    if not isinstance(value, str):
        raise UserError(f"{name}: must be a text")
    return value


def _places(scores):
    """Return the place [N] of each item, from 1, ties in the order of their numbers; 0 where the score is -inf."""
    places = np.empty(len(scores), int)
    places[np.argsort(-scores, kind="stable")] = np.arange(len(scores)) + 1
    return np.where(np.isfinite(scores), places, 0)


def _place(scores, number):
    return _json(_places(scores)[number - 1])


def _json(place):
    return int(place) or None


def _mean(shares):
    """Return the mean of dicts with the same keys; None of none."""
    return {name: sum(row[name] for row in shares) / len(shares) for name in shares[0]} if shares else None
