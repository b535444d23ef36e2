"""How diverse a run's recommendations are; the paper claims that correlation codes add diversity (Section 4.2)."""

import numpy as np

from kdsr_jax import train
from kdsr_jax.layout import precision
from kdsr_jax.workdir import Workdir

TOP = 20  # items of a list
_LISTS = 1000  # lists whose features are held at once; more only cost memory


def measure(config, workdir):
    """Measure the lists of the 20 best items of all test instances, at the epoch that the run chose.

    Under the paper's protocol alone it is the epoch with the best mrr@20 on test.

    Args:
      config: of the run.
      workdir: its folder.

    Returns:
      dict "coverage@20" (percent of the items that are in any list), "gini" (of the items' exposure, see ``gini``),
      "distance" (modality -> mean distance within a list, see ``mean_distance``, for the modalities that the run reads)
      and "lists", their number.

    Raises:
      UserError: the run is not finished, belongs to another config, or has lost the checkpoint.
    """
    with Workdir(workdir, config, create=False) as folder:
        runner = train.reopen(config, folder)
        run, state = runner.run, runner.load_best()
    with precision(config):
        lists = runner.evaluator.top_items(state.params, state.frozen, TOP)
    exposure = np.bincount(lists.ravel(), minlength=run.student.num_items + 1)[1:]
    return {
        "coverage@20": 100 * float((exposure > 0).mean()),
        "gini": gini(exposure),
        "distance": {name: mean_distance(feature, lists) for name, feature in run.dataset.features.items()},
        "lists": len(lists),
    }


def gini(exposure):
    """Return the Gini coefficient of how often each item [N] is shown: 0 all alike, (N - 1) / N one item alone."""
    rising = np.sort(np.asarray(exposure, np.float64))
    place = np.arange(1, len(rising) + 1)
    return float(((2 * place - len(rising) - 1) * rising).sum() / (len(rising) * rising.sum()))


def mean_distance(feature, lists):
    """Average 1 - cosine of the centred features over the pairs of a list, then over lists.

    Args:
      feature: Features, values [N + 1, d_m] and has_feature [N + 1].
      lists: [T, k] int32 item ids, 0 for none.

    Returns:
      The mean over the lists in which two items or more have the feature; None where there is no such list.
    """
    covered = feature.has_feature
    unit = np.where(covered[:, None], feature.values - feature.values[covered].mean(0), 0)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    found = []
    for start in range(0, len(lists), _LISTS):
        part = lists[start : start + _LISTS]
        count = covered[part].sum(1)
        rows = unit[part]
        # The square of a sum of vectors holds every pair twice, and each vector with itself.
        twice = (rows.sum(1) ** 2).sum(1) - (rows**2).sum((1, 2))
        some = count > 1
        found.append(1 - twice[some] / (count * (count - 1))[some])
    found = np.concatenate(found)
    return float(found.mean()) if len(found) else None
