"""GRU4Rec: its size, its layers by loops and against torch's, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from graph_cases import HISTORIES, ROWS, gate_by_loops, gradients, items_of, rows_reached, states_of
from model_cases import MODALITIES, build, dense, make, shapes, sigmoid

from kdsr_jax.models.backbones.gru4rec import GRU
from kdsr_jax.models.student import count_parameters

pytestmark = pytest.mark.usefixtures("quick_compilation")


def expected_count(student):
    d, w, m = student.dim, student.table_width, len(student.modalities)
    count = (student.num_items + 1) * d  # id table
    count += student.num_layers * 2 * d * 3 * d  # three gates from the input and from the state, no biases
    count += d * d + d  # the map at the end
    if m:
        count += m * (student.num_items + 1) * w + d * d + d + d + 1  # modality tables and the gate that fuses them
    return count


@pytest.mark.parametrize("changes", [{}, {"num_layers": 2}, {"tables": "tuned"}], ids=str)
def test_number_of_parameters(changes):
    student = make("gru4rec", **changes)
    assert count_parameters(shapes(student)[0]) == expected_count(student)


def gru_by_loops(layer, x):
    """Run one layer over x [L, d]."""
    h, states = np.zeros(len(layer["recurrent"])), []
    for vector in x:
        of_input, of_state = (np.split(v, 3) for v in (vector @ layer["input"], h @ layer["recurrent"]))
        reset, update = (sigmoid(of_input[g] + of_state[g]) for g in (0, 1))
        h = (1 - update) * np.tanh(of_input[2] + reset * of_state[2]) + update * h
        states.append(h)
    return np.array(states)


@pytest.mark.parametrize("changes", [{"num_layers": 2}, {"tables": "tuned"}], ids=str)
def test_states_equal_loops(changes):
    student, variables = build("gru4rec", **changes)
    params = jax.tree.map(np.asarray, variables["params"])
    states = states_of(student, variables, HISTORIES)
    for row, got in zip(HISTORIES, states, strict=True):
        own = [params[f"{name}_embedding"]["embedding"][row[row > 0]] for name in ("item", *student.modalities)]
        x = own[0] if len(own) == 1 else np.array([gate_by_loops(params["fuse"], v) for v in zip(*own, strict=True)])
        for index in range(student.num_layers):
            x = gru_by_loops(params["encoder"][f"layer_{index}"], x)
        np.testing.assert_allclose(got[: len(x)], dense(params["encoder"]["out"], x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", [8, 5])
def test_layer_equals_that_of_torch(width):
    torch = pytest.importorskip("torch")
    dim, rng = 8, np.random.default_rng(0)
    theirs = torch.nn.GRU(width, dim, bias=False, batch_first=True)
    params = {"input": rng.normal(size=(width, 3 * dim)), "recurrent": rng.normal(size=(dim, 3 * dim))}
    x, weights = rng.normal(size=(4, 7, width)), rng.normal(size=(4, 7, dim))
    params, x, weights = jax.tree.map(np.float32, (params, x, weights))
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(torch.tensor(params["input"].T))
        theirs.weight_hh_l0.copy_(torch.tensor(params["recurrent"].T))
    expected = theirs(torch.tensor(x))[0]
    (expected * torch.tensor(weights)).sum().backward()

    def total(params):
        states = GRU(dim).apply({"params": params}, jnp.asarray(x))
        return jnp.sum(states * weights), states

    gradient, states = jax.jit(jax.grad(total, has_aux=True))(params)
    np.testing.assert_allclose(states, expected.detach().numpy(), rtol=1e-5, atol=1e-6)
    for name, weight in (("input", theirs.weight_ih_l0), ("recurrent", theirs.weight_hh_l0)):
        np.testing.assert_allclose(gradient[name], weight.grad.numpy().T, rtol=1e-4, atol=1e-4)


def test_gradients_reach_the_tables_they_should():
    gradient = gradients("gru4rec", "tuned")
    for name in ("item", *MODALITIES):
        assert rows_reached(gradient[f"{name}_embedding"]["embedding"]) == items_of(ROWS)
    for leaf in jax.tree.leaves(gradient["encoder"]):
        assert leaf.any()
