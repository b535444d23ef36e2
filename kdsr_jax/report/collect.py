"""Out of a run's folder: plain data for its report. What is not there yet, or cannot be read, is None or empty."""

import functools
import json
import pathlib

import numpy as np

from kdsr_jax import cli
from kdsr_jax.config import NOT_FINGERPRINTED, flatten, to_dict
from kdsr_jax.data.arrays import read_arrays
from kdsr_jax.errors import UserError
from kdsr_jax.report.bins import quantile_bins
from kdsr_jax.report.files import read_json, read_lines
from kdsr_jax.report.pictures import is_picture

BREAKDOWN_K = 20


def collect(workdir: str | pathlib.Path) -> dict:
    """Read what a run's folder holds so far.

    Args:
        workdir: folder of a run, finished or not.

    Returns:
        "fields" (dotted name -> value), "settings" (see ``compare_settings``), "overview", "selection", "result" and
        "examples" (those JSON files or None), "lines" (of metrics.jsonl), "name" of the data set, "seed" and "breakdowns"
        (see ``break_down``).
    """
    folder = pathlib.Path(workdir)
    config = (read_json(folder / "config.json") or {}).get("config", {})
    overview = read_json(folder / "overview.json")
    fields = flatten(config)
    return {
        "name": overview["name"] if overview else fields.get("data.name", ""),
        "seed": fields.get("seed"),
        "fields": fields,
        "settings": compare_settings(fields),
        "overview": overview,
        "lines": read_lines(folder / "metrics.jsonl"),
        "selection": read_json(folder / "selection.json"),
        "result": read_json(folder / "result.json"),
        "breakdowns": break_down(folder / "ranks.npz"),
        "examples": _without_odd_pictures(read_json(folder / "examples.json")),
    }


def compare_settings(fields: dict) -> list[dict]:
    """List a run's settings beside the defaults; those that cannot change a result, such as where the data lies, are left out.

    Args:
        fields: dotted name -> value.

    Returns:
        One {"name", "value", "default", "differs"} a field, values as JSON text; "default" is None where none is known.
    """
    defaults, settings = _defaults(), []
    for name, value in fields.items():
        if name not in NOT_FINGERPRINTED:
            known = name in defaults
            settings.append(
                {
                    "name": name,
                    "value": _text(value),
                    "default": _text(defaults[name]) if known else None,
                    "differs": not known or defaults[name] != value,
                }
            )
    return settings


def break_down(file: pathlib.Path) -> dict | None:
    """Average hr and mrr at 20 over bins of the test instances.

    Args:
        file: ranks.npz of a run.

    Returns:
        {"evaluated_on", "epoch", "parts": [{"title", "unit", "names", "counts", "hr", "mrr"}, ...]}, metrics in percent, by
        history length and by how often the target stands in the train parts; None without a readable file.
    """
    titles = {
        "history_length": ("by length of the history", "items that the model read"),
        "target_train_count": ("by popularity of the target", "times the target stands in the train parts"),
    }
    try:
        arrays = read_arrays(file, ("rank", "evaluated_on", "epoch", *titles))
    except UserError:
        return None
    rank = arrays["rank"]
    if not len(rank):
        return None
    gains = {"hr": 100.0 * (rank <= BREAKDOWN_K), "mrr": np.where(rank <= BREAKDOWN_K, 100.0 / rank, 0.0)}
    parts = []
    for column, (title, unit) in titles.items():
        names, which = quantile_bins(arrays[column])
        counts = np.bincount(which, minlength=len(names))
        part = {"title": title, "unit": unit, "names": names, "counts": counts.tolist()}
        part |= {name: (np.bincount(which, gain, len(names)) / counts).tolist() for name, gain in gains.items()}
        parts.append(part)
    return {"evaluated_on": str(arrays["evaluated_on"]), "epoch": int(arrays["epoch"]), "parts": parts}


@functools.cache
def _defaults():
    """Return the fields of configs/default.py; none where the package was installed without that folder."""
    return flatten(to_dict(cli.load_config(str(cli.DEFAULTS)))) if cli.DEFAULTS.is_file() else {}


def _text(value):
    return json.dumps(value, ensure_ascii=False)


def _without_odd_pictures(examples):
    for item in (examples or {}).get("items", {}).values():
        item["picture"] = item["picture"] if is_picture(item["picture"]) else None
    return examples
