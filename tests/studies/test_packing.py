"""What packing could save: padding counted by hand, and the command from end to end."""

import json

import pytest

from experiments import packing

TINY = ["--datasets=planted", "--config.data.planted.num_users=200", "--config.data.planted.num_items=150"]


@pytest.mark.slow
def test_packing_is_compared_with_buckets(tmp_path, capsys):
    out = tmp_path / "packing.json"
    packing.main([*TINY, "--config.model.dim=8", f"--out={out}"])
    row = json.loads(out.read_text())["rows"][0]
    read = {
        form: sum(rows * length * times for (rows, length), times in kinds) for form, kinds in row["shapes"].items()
    }
    assert row["targets"] <= row["inputs"]  # inputs of overlapping windows count twice
    for form, cells in read.items():
        assert row[f"padding, {form}"] == pytest.approx(1 - row["inputs"] / cells)
    batches, ((full_rows, length), _) = sum(times for _, times in row["shapes"]["buckets"]), row["shapes"]["packed"][0]
    assert (full_rows - 1) * length * batches < row["inputs"] <= full_rows * length * batches
    assert 0.1 < row["encoder flops, packed / buckets"] < 10
    assert row["step flops, packed / buckets"] > 0
    assert "| planted |" in capsys.readouterr().out
