"""The floor that is counted by hand, against the products that a step's program holds."""

import jax
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

from experiments import floor
from experiments.complexity import equal_histories
from experiments.contestant import Contestant


def products(jaxpr, times=1):
    """Count the operations of all products of matrices in a program, those of loops as often as they run."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * times * equation.outvars[0].aval.size * int(np.prod([shape[axis] for axis in contracted]))
        inner = times * equation.params.get("length", 1) if equation.primitive.name == "scan" else times
        for value in jax.tree.leaves(equation.params, is_leaf=lambda v: isinstance(v, ClosedJaxpr | Jaxpr)):
            if isinstance(value, ClosedJaxpr | Jaxpr):
                total += products(value.jaxpr if isinstance(value, ClosedJaxpr) else value, inner)
    return total


@pytest.fixture(scope="module")
def contestant(tiny, quick_compilation):
    """Return a function variant -> Contestant whose batches have no padding: equal histories, one step a chunk."""

    def make(variant):
        words = "data.planted.num_items=40", "train.batch_size=20", "train.steps_per_call=1", "distill.pair_budget=0"
        config = tiny(*words, variant=variant)
        return Contestant(config, equal_histories(config))

    return make


def program(contestant):
    """The program of one training step."""
    return jax.make_jaxpr(contestant.runner.train_chunk, static_argnums=1)(contestant.state, 0).jaxpr


@pytest.mark.parametrize("variant", [":sasrec", ":gru4rec"])
def test_hand_count_is_what_the_program_multiplies(variant, contestant):
    model = contestant(variant)
    counted = floor.count(model.work())
    assert sum(counted["flops"].values()) == products(program(model))


def test_sasrec_by_numbers(contestant):
    work = contestant(":sasrec").work()
    counted = floor.count(work)
    # 5 rows of 4 inputs and targets; 40 items, width 8, one layer: four maps of 8 x 8 and two of 8 x 16.
    assert work["maps"] == 4 * 64 + 2 * 128
    assert counted["flops"] == {
        "encoder": 6 * 20 * 512,
        "attention": 12 * 5 * 16 * 8,
        "softmax": 6 * 20 * 40 * 8,
        "codes": 0,
    }
    assert counted["bytes"] == 32 * work["parameters"]
    assert floor.seconds(counted, {"gflops": 1e-9, "gbytes": 1e-9}) == sum(counted["flops"].values()) + counted["bytes"]


@pytest.mark.slow
def test_distillation_is_counted_but_never_more_than_is_done(contestant):
    plain, distilled = (contestant(f":{kind}-sasrm") for kind in ("tuned", "kdsr"))
    least = [floor.count(model.work())["flops"] for model in (plain, distilled)]
    done = [products(program(model)) for model in (plain, distilled)]
    assert least[0]["codes"] == 0 and 0 < least[1]["codes"] <= done[1] - done[0]
    assert all(sum(flops.values()) <= amount for flops, amount in zip(least, done, strict=True))
    # 30 pairs, and the map of Eq. 2 for each of 20 inputs.
    assert least[1]["codes"] == 6 * (30 * (64 + 8 * 8) + 20 * 64)
