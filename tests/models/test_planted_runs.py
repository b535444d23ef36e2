"""Every model runs on the planted shop as published and with KDSR, from the command line to the result."""

import json
import math

import pytest

from kdsr_jax import cli, train
from kdsr_jax.config import BACKBONES

SHOP = (
    *("data.planted.num_users=150", "data.planted.num_items=60", "data.planted.mean_length=9", "data.k_core=2"),
    *("teacher.num_codes=16", "teacher.num_pairs=5000", "model.dim=16", "model.num_layers=1", "model.num_clusters=8"),
    *("data.max_length=8", "train.epochs=2", "train.batch_size=64", "eval.protocol=paper", "forgetting.num_pairs=500"),
)


@pytest.mark.slow
@pytest.mark.parametrize("variant", [kind + name for name in BACKBONES for kind in ("", "kdsr-")])
@pytest.mark.usefixtures("quick_compilation")
def test_every_model_runs_on_the_planted_shop(repository, tmp_path, variant):
    words = [f"--config={repository}/configs/planted.py:{variant}", *(f"--config.{setting}" for setting in SHOP)]
    command = cli.parse([*words, f"--workdir={tmp_path}"])
    result = train.train_and_evaluate(command.config, command.workdir)
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert result["epochs"] == 2
    assert all(0 <= value <= 100 for value in result["paper"].values())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["losses"] for line in lines if line["epoch"]]
    distilled = {f"{part}/{modality}" for part in ("holistic", "dissected") for modality in ("image", "text")}
    for parts in losses:
        assert all(math.isfinite(value) for value in parts.values())
        assert distilled <= parts.keys() if variant.startswith("kdsr-") else distilled.isdisjoint(parts)
    assert losses[1]["next_item"] < losses[0]["next_item"]
