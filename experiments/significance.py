"""Whether a study's reference beats another setting, user by user: paired bootstrap and permutation, Holm, Welch.

The resampling of users tells two trained models apart; it knows nothing of what other seeds would give, which often is more:
two seeds of one setting mostly differ "significantly" as well. So the difference of each seed stands beside it.

The unit is the user. A metric is a mean over test instances, so a user's share in it is the sum over its instances,
averaged over seeds, and the statistic is the sum over users divided by the number of instances. Whole users are drawn
or have their sign flipped: instances of one user are not independent.

A comparison is an object of runs.jsonl with
  kind                      "comparison"
  dataset, label, reference, metric
  difference, low, high     reference minus label in percentage points, and the bootstrap's 95 % percentile interval
  p                         two-sided, of the sign-flip permutation, not adjusted, 1 / (1 + DRAWS) at least
  by_seed                   the difference of each seed alone, in the order of ``seeds``
  group                     of targets, which alone are compared; missing where all are
  users, seeds              how many users, and the list of seeds that both settings have
  welch_p                   of Welch's t between the seeds' metrics, weak below five seeds; None below two
"""

import hashlib
import statistics

import numpy as np
import scipy.stats

from kdsr_jax.errors import UserError
from kdsr_jax.files import replace_file

METRICS = ("hr@5", "mrr@5", "hr@20", "mrr@20")
DRAWS = 10_000
LEVEL = 0.05  # of adjusted p
CHUNK = 250  # draws at a time


def keep_ranks(workdir, file):
    """Write what comparisons need of a finished run's ranks.npz: user and rank of each instance, and a hash of the targets.

    Args:
      workdir: Path of the run.
      file: Path to write; its folder is made.
    """
    with np.load(workdir / "ranks.npz") as arrays:
        user, rank = arrays["user"].astype(np.int32), arrays["rank"].astype(np.int32)
        targets = np.stack([arrays[name].astype(np.int64) for name in ("user", "position", "target")])
    digest = np.frombuffer(hashlib.sha256(targets.tobytes()).digest(), np.uint8)
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, lambda out: np.savez_compressed(out, user=user, rank=rank, targets=digest))


def compare_all(reference, files, known=(), groups=None):
    """Compare the reference with every other label of each dataset, over the seeds that both have.

    Args:
      reference: label; "" compares nothing.
      files: dict (dataset, label) -> dict seed -> file by ``keep_ranks``.
      known: set of (dataset, label, tuple of seeds) that need no comparison any more.
      groups: dataset -> dict name -> [T] bool, groups of its targets, of which each is compared besides; None is none.

    Returns:
      List of comparisons, one a dataset, label, metric and group.

    Raises:
      UserError: two runs rank other targets.
    """
    found = []
    for (dataset, label), others in files.items():
        ours = files.get((dataset, reference), {})
        seeds = sorted(ours.keys() & others.keys())
        if label != reference and seeds and (dataset, label, tuple(seeds)) not in known:
            shared = {"kind": "comparison", "dataset": dataset, "label": label}
            shared |= {"reference": reference, "seeds": seeds}
            pairs = [(ours[seed], others[seed]) for seed in seeds]
            found += [shared | line for line in compare_runs(pairs)]
            for group, inside in (groups(dataset) if groups else {}).items():
                found += [shared | line | {"group": group} for line in compare_runs(pairs, inside)]
    return found


def compare_runs(pairs, inside=slice(None)):
    """Compare two settings, given as [(file of a run of the reference, file of the other's), ...], a pair a seed.

    Args:
      pairs: the files.
      inside: [T] bool, the targets that are compared, at least one.

    Returns:
      List of dicts, one a metric, with the keys that the module's head lists from ``metric`` on.
    """
    ours, others, first = [], [], None
    for files in pairs:
        ranks = [dict(np.load(file)) for file in files]
        first = first or (files[0], ranks[0])
        for file, arrays in zip(files, ranks, strict=True):
            if any(not np.array_equal(first[1][name], arrays[name]) for name in ("user", "targets")):
                raise UserError(f"{first[0]} and {file} rank other targets; runs on the same data can be compared")
        ours.append(instance_metrics(ranks[0]["rank"][inside]))
        others.append(instance_metrics(ranks[1]["rank"][inside]))
    ours, others = np.stack(ours), np.stack(others)  # [seeds, instances, metrics]
    user = np.unique(first[1]["user"][inside], return_inverse=True)[1]
    sums = np.stack([np.bincount(user, column) for column in (ours - others).mean(0).T], 1)
    low, high, p = paired_tests(sums, np.bincount(user))
    lines = []
    for number, metric in enumerate(METRICS):
        seeds = ours[:, :, number].mean(1), others[:, :, number].mean(1)
        line = {"metric": metric, "difference": 100 * float(sums[:, number].sum() / len(user))}
        line |= {"low": 100 * float(low[number]), "high": 100 * float(high[number]), "p": float(p[number])}
        line["by_seed"] = [100 * float(difference) for difference in seeds[0] - seeds[1]]
        lines.append(line | {"users": len(sums), "welch_p": welch(*seeds)})
    return lines


def instance_metrics(ranks):
    """Return METRICS [T, 4] of ranks [T], as shares, not percent."""
    columns = []
    for name in METRICS:
        kind, k = name.split("@")
        columns.append((ranks <= int(k)) * (1.0 if kind == "hr" else 1.0 / ranks))
    return np.stack(columns, 1)


def paired_tests(sums, counts, draws=DRAWS):
    """Resample users.

    Args:
      sums: [U, m], a user's difference summed over its instances, for each of m metrics.
      counts: [U], its instances.
      draws: of each of the two.

    Returns:
      (low [m], high [m], p [m]): 95 % percentile interval of sum(sums) / sum(counts) when users are drawn with
      replacement, and the two-sided share of sign flips whose sum is at least as far from zero, (1 + count) /
      (1 + draws). The same for the same data.
    """
    # Users in an order of their own make the draws the same whatever order they come in.
    order = np.lexsort((*np.asarray(sums).T, counts))
    sums, counts = np.asarray(sums, np.float64)[order], np.asarray(counts, np.float64)[order]
    rng, users, both = np.random.default_rng(0), len(counts), np.column_stack([sums, counts])
    means, beyond, seen = [], np.zeros(sums.shape[1]), np.abs(sums.sum(0))
    for begin in range(0, draws, CHUNK):
        size = min(CHUNK, draws - begin)
        drawn = rng.integers(0, users, (size, users)) + users * np.arange(size)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=size * users).reshape(size, users)
        totals = weights @ both
        means.append(totals[:, :-1] / totals[:, -1:])
        signs = 2.0 * rng.integers(0, 2, (size, users), dtype=np.int8) - 1.0
        beyond += (np.abs(signs @ sums) >= seen[None] * (1 - 1e-12) - 1e-12).sum(0)
    low, high = np.percentile(np.concatenate(means), (2.5, 97.5), axis=0)
    return low, high, (1 + beyond) / (1 + draws)


def differs(row, adjusted):
    """Say whether a comparison tells its settings apart: users do (adjusted p), and two seeds or more, all by the same sign."""
    signs = np.sign(row["by_seed"])
    return adjusted < LEVEL and len(signs) > 1 and abs(signs.sum()) == len(signs)


def welch(ours, others):
    """Return the two-sided p of Welch's t between two lists of numbers; None below two each or where neither varies."""
    if min(len(ours), len(others)) < 2 or np.ptp(ours) == np.ptp(others) == 0:
        return None
    sides = [(np.mean(values), np.std(values, ddof=1), len(values)) for values in (ours, others)]
    return float(scipy.stats.ttest_ind_from_stats(*sides[0], *sides[1], equal_var=False).pvalue)


def holm(p_values):
    """Adjust p values for their number by Holm's step-down rule; returns them in the same order."""
    adjusted, highest = [1.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def best_baseline(rows, dataset, reference):
    """Return a dataset's label with the best validation mrr@20 (mean over seeds), not the reference, or None."""
    scores = {}
    for row in rows:
        if row["kind"] == "run" and row["dataset"] == dataset and row["label"] != reference and row.get("validation"):
            scores.setdefault(row["label"], []).append(row["validation"]["mrr@20"])
    return max(scores, key=lambda label: statistics.fmean(scores[label]), default=None)


def average_gain(ours, best):
    """Return the average relative gain, the mean over cells of ours / best - 1.

    The paper's 6.8 % is the mean of HR +10.2 % and MRR +3.4 %; over the best other cell of each column of its own Table
    2 the mean is +4.4 %.

    Args:
      ours: values of any one unit, a cell each.
      best: what each is compared with, in the same order; none is 0.
    """
    return statistics.fmean(a / b - 1 for a, b in zip(ours, best, strict=True))
