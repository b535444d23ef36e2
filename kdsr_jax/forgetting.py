"""Modality forgetting (paper Figure 1): what tuned modality tables still share with the features they began as.

A tuned table is compared with the raw features and, where a reference run is given, with the item table of a model of item
ids alone: Pearson's correlation between the cosines of the same item pairs. It is measured beside training and changes nothing
in it.
"""

import functools
import json
import pathlib

import jax
import numpy as np

from kdsr_jax import checkpoint
from kdsr_jax.config import differing_keys, reads_features, to_dict
from kdsr_jax.data.arrays import read_arrays
from kdsr_jax.errors import UserError
from kdsr_jax.ops.forgetting import pair_cosines, pearson
from kdsr_jax.teacher import draw_pairs

SEED = 0  # of the item pairs: fixed, so that runs of other seeds are measured on the same pairs

_cosines = jax.jit(pair_cosines)


class Forgetting:
    """Measures the tuned tables of a run.

    Attributes:
      spaces: dict modality -> (first, second, dict space -> (cosines, valid)): [P] int32 item pairs, and what their
        cosines are in the space "features" and, with a reference run, "ids".
    """

    def __init__(self, spaces):
        self.spaces = spaces

    def measure(self, params):
        """Return dict modality -> dict space -> Pearson's r of the modality's table with the space, from the params."""
        values = {name: _measure(params[f"{name}_embedding"]["embedding"], *s) for name, s in self.spaces.items()}
        return jax.tree.map(float, jax.device_get(values))


@jax.jit
def _measure(table, first, second, spaces):
    cosines, valid = pair_cosines(table, first, second)
    return {name: pearson(cosines, other, valid & both) for name, (other, both) in spaces.items()}


def make_forgetting(run):
    """Draw the item pairs of a run and compute what its tuned tables are compared with.

    Args:
      run: Run.

    Returns:
      Forgetting, or None where nothing is measured: without tuned tables, or with ``forgetting.num_pairs`` = 0.

    Raises:
      UserError: ``forgetting.reference_workdir`` is no finished run of item ids alone on the same data.
    """
    settings, interactions = run.config.forgetting, run.dataset.interactions
    if not (settings.num_pairs and run.student.tuned and run.student.modalities):
        return None
    ids = reference_table(settings.reference_workdir, run.config, interactions) if settings.reference_workdir else None
    spaces = {}
    for name in run.student.modalities:
        feature = run.dataset.features[name]
        covered = np.flatnonzero(feature.has_feature).astype(np.int32)
        pairs = [
            covered[np.asarray(index)] for index in draw_pairs(jax.random.key(SEED), len(covered), settings.num_pairs)
        ]
        first, second = run.placement.put(pairs)
        cosines = functools.partial(_cosines, first=first, second=second)
        spaces[name] = first, second, {"features": cosines(run.placement.put_table(centred(feature)))}
        if ids is not None:
            spaces[name][2]["ids"] = cosines(run.placement.put_table(ids))
    return Forgetting(spaces)


def centred(feature):
    """Return a modality's raw features [N + 1, d_m] less their mean over the items that have one; zero rows elsewhere."""
    mean = feature.values[feature.has_feature].mean(0, dtype=np.float64)
    return np.where(feature.has_feature[:, None], feature.values - mean, 0).astype(np.float32)


def reference_table(workdir, config, interactions):
    """Read the item table of a finished run of item ids alone, in the order of this run's items.

    Args:
      workdir: its folder.
      config: of the run at hand.
      interactions: Interactions of the run at hand.

    Returns:
      [N + 1, dim] float32; row 0 is zeros.

    Raises:
      UserError: the folder holds no such run, or one on other data.
    """
    folder, flag = pathlib.Path(workdir), f"--config.forgetting.reference_workdir={workdir}"
    try:
        saved = json.loads((folder / "config.json").read_text())["config"]
        model = saved["model"]
        alone = not reads_features(model["name"], model["tables"], model.get("cluster_weight", 0))
        finished = (folder / "result.json").is_file()
        ids = {name: ids.tolist() for name, ids in read_arrays(folder / "ids.npz", ("user_ids", "item_ids")).items()}
    except (OSError, ValueError, KeyError, TypeError, UserError) as error:
        raise UserError(f"{flag}: holds no run of kdsr_jax that can be read ({error})") from None
    if not finished:
        raise UserError(f"{flag}: the run is not finished; train it to the end first")
    if not alone:
        raise UserError(f"{flag}: is no run of item ids alone, whose variant is FILE:sasrec or the like")
    differing = [d for d in differing_keys(saved, to_dict(config)) if d.startswith(("data.k_core", "data.planted."))]
    same = all(set(ids[name]) == set(getattr(interactions, name).tolist()) for name in ids)
    if differing or not same:
        raise UserError(f"{flag}: was trained on other data ({'; '.join(differing) or 'other users or items'})")
    table = checkpoint.load_best_variables(folder / "checkpoints" / "refit")[0]["item_embedding"]["embedding"]
    row = {item: number for number, item in enumerate(ids["item_ids"])}
    return np.asarray(table, np.float32)[[row[item] for item in interactions.item_ids.tolist()]]
