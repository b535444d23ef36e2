"""The three real data sets give the counts of the paper's Table 1 and of the data's own README."""

import os
import types
from pathlib import Path

import numpy as np
import pytest

from kdsr_jax.data import load_dataset
from kdsr_jax.data.interactions import statistics, train_lengths
from kdsr_jax.data.sequences import evaluation_windows, train_windows

ROOT = Path(os.environ.get("KDSR_DATA_ROOT") or Path(__file__).resolve().parents[2] / "shared" / "data")

# name: users, items, interactions, sparsity in percent (Table 1), train and test instances, covered items by modality
FACTS = {
    "ml-1m": (
        6_040,
        3_416,
        999_611,
        95.16,
        796_045,
        197_526,
        {"image-efficientnet-lite0": 3_256, "text-minilm": 3_416},
    ),
    "beauty": (22_363, 12_101, 198_502, 99.93, 142_197, 33_942, {"text-minilm": 12_101}),
    "sports": (35_598, 18_357, 296_337, 99.95, 210_551, 50_188, {"text-minilm": 18_357}),
}


@pytest.mark.parametrize("name", FACTS)
def test_counts(name):
    if not (ROOT / name).is_dir():
        pytest.skip(f"no real data at {ROOT / name}; set KDSR_DATA_ROOT")
    users, items, interactions, sparsity, train, test, covered = FACTS[name]
    config = types.SimpleNamespace(
        name=name, source="auto", root=str(ROOT), k_core=5, user_fraction=1.0, modalities=tuple(covered)
    )
    dataset = load_dataset(config)
    facts = statistics(dataset.interactions, dataset.features)
    assert (facts["users"], facts["items"], facts["interactions"]) == (users, items, interactions)
    assert round(100 * facts["sparsity"], 2) == sparsity
    assert facts["average_length"] == pytest.approx(interactions / users, abs=1e-3)
    assert (facts["train_instances"], facts["test_instances"]) == (train, test)
    assert list(facts["modalities"].values()) == list(covered.values())
    check_windows(dataset.interactions, train, test)
    assert {item["item_id"] for item in dataset.items[1:]} == set(dataset.interactions.item_ids[1:].tolist())


def check_windows(interactions, train: int, test: int) -> None:
    """Every train and test instance is one target."""
    lengths, kept = interactions.lengths, train_lengths(interactions.lengths)
    for windows, count in (
        (train_windows(interactions.offsets, kept, 50, 0), train),
        (evaluation_windows(interactions.offsets, kept, lengths, 50), test),
    ):
        targets = windows.targets()[2]
        assert len(targets) == windows.num_targets == count
        assert (np.diff(targets) > 0).all()
