"""The comparison with RecBole: what it is given, and its course with a stand-in in the place of RecBole."""

import json
import sys

import numpy as np
import pytest

from experiments import peers, performance
from kdsr_jax.data.interactions import Interactions

WORDS = (
    *("--config.data.planted.num_users=60", "--config.data.planted.num_items=40", "--config.data.k_core=1"),
    *("--config.model.dim=8", "--config.data.max_length=4", "--config.data.planted.feature_dim=8"),
    *("--config.train.batch_size=80", "--config.train.steps_per_call=2"),
)
# Ranks every target 7th; its mrr@20 is 100 / 7.
STAND_IN = """
import json, os, sys
import numpy as np

def rows(part):
    with open(f"{folder}/{name}/{name}.{part}.inter") as file:
        return [line.split("\\t") for line in file.read().splitlines()[1:]]

epochs = 0
for line in sys.stdin:
    request = json.loads(line)
    do, answer = request.pop("do"), {}
    if do == "start":
        folder, name, checkpoint = request["folder"], request["name"], request["checkpoint"]
        epochs = int(open(checkpoint).read()) if os.path.exists(checkpoint) else 0
        sizes = {part: len(rows(part)) for part in ("train", "valid", "test")}
        answer = {"targets": sizes.pop("train"), "evaluated": sizes, "items": int(os.environ.get("ITEMS", 40)), "steps": 5}
        answer |= {"parameters": 1, "epochs": epochs, "threads": 1, "torch": "none"}
    elif do == "turn":
        answer = {"seconds": 10.0 * request["steps"], "cpu": 15.0 * request["steps"]}
    elif do == "epoch":
        epochs += 1
        answer = {"seconds": 50.0 + epochs}
    elif do == "save":
        with open(checkpoint, "w") as file:
            file.write(str(epochs))
    elif do == "rank":
        np.savez(request["file"], rank=np.full(len(rows(request["part"])), 7))
        answer = {"seconds": 1.0}
    elif do == "evaluate":
        answer = {"metrics": {"hit@20": 1.0, "mrr@20": 0.143}}
    print(json.dumps(answer), flush=True)
"""


def test_files_hold_every_target_once_with_what_stands_before_it(tmp_path):
    # Train parts of 4 and 8 items: one held out for validation, the rest of each history is for the test.
    items = np.array([1, 2, 3, 4, 5, *range(11, 21)], np.int32)
    offsets = np.array([0, 5, 15])
    log = Interactions(items, offsets, np.array(["a", "b"]), np.arange(21).astype(str))
    assert peers.write_atomic_files(log, tmp_path, "shop", 3) == {"train": 2 + 6, "valid": 2, "test": 1 + 2}
    lines = {
        part: (tmp_path / "shop" / f"shop.{part}.inter").read_text().splitlines() for part in ("train", "valid", "test")
    }
    assert lines["train"][:4] == [
        "user_id:token\titem_id_list:token_seq\titem_id:token",
        "0\t1\t2",
        "0\t1 2\t3",
        "1\t11\t12",
    ]
    assert lines["train"][-1] == "1\t14 15 16\t17"
    assert lines["valid"][1:] == ["0\t1 2 3\t4", "1\t15 16 17\t18"]
    assert lines["test"][1:] == ["0\t2 3 4\t5", "1\t16 17 18\t19", "1\t17 18 19\t20"]


@pytest.mark.parametrize("name", peers.PEERS)
def test_theirs_has_the_sizes_of_ours(name):
    settings = [f"--config.{field}={value}" for field, value in peers.SHARED.items()]
    theirs = peers.their_settings(peers.read_config(f"configs/planted.py:{name}", settings))
    assert (theirs["hidden_size"], theirs["MAX_ITEM_LIST_LENGTH"], theirs["train_batch_size"]) == (128, 50, 512)
    assert theirs["loss_type"] == "CE" and theirs["train_neg_sample_args"] is None
    if name == "sasrec":
        assert (theirs["n_layers"], theirs["n_heads"], theirs["inner_size"]) == (2, 2, 256)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Run a comparison with the stand-in; returns (exit code, content of the JSON file)."""
    (tmp_path / "peers").mkdir()
    (tmp_path / "peers" / "recbole_worker.py").write_text(STAND_IN)
    (tmp_path / "performance.md").write_text("<!-- bench:peers-quality -->\n<!-- /bench -->\n")
    monkeypatch.setattr(peers, "FOLDER", tmp_path)
    monkeypatch.setattr(peers, "REACHED", 2)
    monkeypatch.setattr(performance, "DOCS", tmp_path / "performance.md")
    monkeypatch.setattr(performance, "PEERS", tmp_path / "peers.json")

    def run(*words):
        places = [f"--python={sys.executable}", f"--folder={tmp_path}", f"--out={tmp_path / 'peers.json'}"]
        code = peers.main(["--config=configs/planted.py", "--models=sasrec", *places, *WORDS, *words])
        file = tmp_path / "peers.json"
        return code, json.loads(file.read_text())["planted"]["sasrec"] if file.exists() else None

    return run


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_comparison_from_end_to_end_and_on(stand_in, tmp_path, capsys):
    code, row = stand_in("--rounds=2", "--steps=3", "--epochs=1")
    assert code == 0, capsys.readouterr().err
    assert row["theirs"] == {"epoch": 10.0 * 5, "cpu": 15.0 * 5} and row["ratio"]["epoch"] > 1
    assert [epoch["seconds"] for epoch in row["quality"]["theirs"]] == [51.0]
    assert row["quality"]["target"] == row["quality"]["checks"]["test"]["ours"]["mrr@20"] == pytest.approx(100 / 7)
    assert (
        row["quality"]["ours"]["mrr@20"]
        and "| planted | `sasrec` | 1 | 14.286 | 100.000 | 51.0 |" in performance.DOCS.read_text()
    )
    code, further = stand_in("--rounds=0", "--epochs=2")
    assert code == 0 and [epoch["seconds"] for epoch in further["quality"]["theirs"]] == [51.0, 52.0]
    assert further["ratio"] == row["ratio"]
    assert stand_in("--models=sasrec+train.matmul_precision=bf16", "--rounds=1", "--epochs=1")[0] == 0
    rows = json.loads((tmp_path / "peers.json").read_text())["planted"]
    assert rows["sasrec"] == further and set(rows) == {"sasrec", "sasrec+train.matmul_precision=bf16"}
    (tmp_path / "peers.json").unlink()
    assert stand_in("--rounds=0", "--epochs=3")[0] == 2
    assert "remove it" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_other_items_are_no_comparison(stand_in, monkeypatch, capsys):
    monkeypatch.setenv("ITEMS", "41")
    assert stand_in("--rounds=1")[0] == 2
    assert "RecBole reads" in capsys.readouterr().err


def test_without_their_environment_there_is_one_line(tmp_path, capsys):
    assert peers.main([f"--python={tmp_path / 'none'}"]) == 2
    assert "make -C benchmarks/peers" in capsys.readouterr().err
