"""Where a step's time goes: own times by hand, parts by scope, and the command from end to end."""

import json

import pytest

from experiments import costs


def event(name, start, duration, thread=1):
    return {"ph": "X", "pid": 1, "tid": thread, "ts": start, "dur": duration, "args": {"hlo_op": name}}


def test_an_operations_own_time_is_without_those_it_calls():
    events = [
        *(event("loop", 0, 10_000), event("product", 1_000, 3_000), event("sum", 2_000, 500)),
        *(event("product", 5_000, 1_000), event("product", 20_000, 2_000), event("loop", 0, 4_000, thread=2)),
        {"ph": "X", "pid": 1, "tid": 1, "ts": 0, "dur": 50_000, "args": {}},  # of the host
        {"ph": "M", "pid": 1, "tid": 1, "args": {"name": "thread"}},
    ]
    expected = {"loop": 10 - 4 + 4, "product": 3 - 0.5 + 1 + 2, "sum": 0.5}
    assert costs.own_times(reversed(events)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("scope", "part"),
    [
        ("jit(_chunk)/while/body/jvp(encoder)/Student.encode/encoder/layer_0/inner/dot_general", "encoder"),
        ("jit(_chunk)/while/body/transpose(jvp(next_item))/Student.candidate_vectors/encoder/pad", "next_item"),
        ("jit(_chunk)/while/body/jvp(distillation)/text_head.code_logits/dot_general", "distillation"),
        ("jit(_chunk)/while/body/optimizer/add", "optimizer"),
        ("jit(_chunk)/while/body/next_items/add", costs.REST),
        ("", costs.REST),
    ],
)
def test_an_operation_belongs_to_the_outermost_scope(scope, part):
    assert costs.part_of(scope) == part


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_a_step_is_taken_apart(repository, tmp_path, capsys):
    config = f"{repository}/configs/planted.py:kdsr-gru4rec"
    tiny = ["--config.data.planted.num_users=60", "--config.data.planted.num_items=40", "--config.data.k_core=1"]
    tiny += ["--config.model.dim=8", "--config.data.max_length=4"]
    assert costs.main([f"--configs={config}", *tiny, f"--out={tmp_path / 'costs.json'}"]) == 0
    found = json.loads((tmp_path / "costs.json").read_text())["rows"][config]
    assert all(found["parts"][part] > 0 for part in ("encoder", "next_item", "distillation", "optimizer"))
    assert found["parts"]["clusters"] == 0
    assert len(found["operations"]) == 3
    printed = capsys.readouterr().out
    assert f"| `{config}` | 4 |" in printed
    assert "%" in printed
