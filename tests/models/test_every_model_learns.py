"""What every model can learn, through data, batches, training and evaluation as in a run, and what none of them may."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from kdsr_jax import cli, train
from kdsr_jax.config import BACKBONES, validate
from kdsr_jax.data import Dataset
from kdsr_jax.data.features import Features
from kdsr_jax.data.interactions import Interactions
from kdsr_jax.evaluate import summarise
from kdsr_jax.models.backbones import sasrec
from kdsr_jax.phase import PhaseRunner

NUM_ITEMS = 100
# Of many lengths, so that several targets stand in a window, where one could be seen; the longest ones have the positions of
# all test targets in training, too. Logs of one size share compiled programs.
LENGTHS = [*np.random.default_rng(2).integers(5, 17, size=260), *[24] * 40]
SIZES = (
    *("data.max_length=16", "model.dim=32", "model.num_layers=1", "model.num_clusters=8", "model.cluster_links=2"),
    *("teacher.autoencoder=pca", "teacher.num_splits=4", "teacher.num_codes=8", "teacher.num_pairs=1000"),
    *("model.hidden_dropout=0", "model.attention_dropout=0", "train.batch_size=128", "train.learning_rate=0.005"),
    "forgetting.num_pairs=0",
)


def each_model(*quickly):
    """Parametrise a test by every model; all but these are slow."""
    marks = {name: () if name in quickly else pytest.mark.slow for name in BACKBONES}
    return pytest.mark.parametrize("name", [pytest.param(name, marks=marks[name]) for name in BACKBONES])


def make_dataset(rows, num_items):
    """A dataset of one history a row of items 1..num_items, and random features of all items."""
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    users, names = np.arange(len(rows)).astype(str), np.arange(num_items + 1).astype(str)
    log = Interactions(np.concatenate(rows).astype(np.int32), offsets, users, names)
    rng, has_feature = np.random.default_rng(1), np.arange(num_items + 1) > 0
    features = {}
    for modality in ("image", "text"):
        values = rng.normal(size=(num_items + 1, 64)).astype(np.float32)
        features[modality] = Features(values * has_feature[:, None], has_feature)
    return Dataset("made-up", log, features)


def learn(repository, variant, dataset, epochs, *settings, by_heart=False):
    """Train a variant for some epochs; returns (metrics in percent, ranks) of the test targets, or the train targets."""
    config = cli.load_config(f"{repository}/configs/default.py:{variant}")
    cli.apply_settings(config, [f"--config.{setting}" for setting in (*SIZES, *settings)])
    validate(config)
    run = train.prepare(config, dataset)
    phase = train.refit_phase(run, epochs)
    if by_heart:
        phase = dataclasses.replace(phase, evaluation=phase.train)
    runner = PhaseRunner(run, phase, folder=None)
    state = runner.new_state()
    for epoch in range(1, epochs + 1):
        state, _ = runner.train_epoch(state, epoch)
    for name in state.params:
        if name.endswith("_embedding"):
            assert not np.any(state.params[name]["embedding"][0]), name  # padding stays zero
    return runner.evaluate(state)


@each_model("gru4rec", "srgnn")
@pytest.mark.usefixtures("quick_compilation")
def test_32_sequences_are_learned_by_heart(repository, name):
    # No two have the same item at the same place: mmsr, whose attention to the node itself saturates, tells them by no more.
    rng = np.random.default_rng(6)
    rows = np.stack([rng.permutation(NUM_ITEMS)[:32] for _ in range(7)], axis=1) + 1
    ranks = learn(repository, name, make_dataset(rows, NUM_ITEMS), 80, "train.batch_size=64", by_heart=True)[1]
    assert len(ranks) == 32 * 5  # train parts of 6 items
    assert summarise(ranks, [1])["hr@1"] > 95


def random_rows():
    """Histories without any order."""
    rng = np.random.default_rng(3)
    return [rng.integers(1, NUM_ITEMS + 1, size=length) for length in LENGTHS]


def excess(metrics, ranks):
    """How far hr@20 lies above that of a model that knows nothing of its targets, in standard deviations of the latter."""
    share = 20 / NUM_ITEMS  # of each target on its own, so their number is binomial
    return (metrics["hr@20"] / 100 - share) / np.sqrt(share * (1 - share) / len(ranks))


@each_model("gru4rec")
@pytest.mark.usefixtures("quick_compilation")
def test_a_random_log_cannot_be_predicted(repository, name):
    metrics, ranks = learn(repository, f"tuned-{name}", make_dataset(random_rows(), NUM_ITEMS), 12)
    assert len(ranks) > 1.5 * len(LENGTHS)
    assert abs(excess(metrics, ranks)) < 4.5


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_a_model_that_sees_the_target_would_be_found_out(repository, monkeypatch):
    def see_everything(valid):
        return jnp.broadcast_to(valid[:, None, None, :], (len(valid), 1, valid.shape[1], valid.shape[1]))

    monkeypatch.setattr(sasrec, "causal_mask", see_everything)
    assert excess(*learn(repository, "tuned-sasrec", make_dataset(random_rows(), NUM_ITEMS), 12)) > 6


@each_model("gru4rec")
@pytest.mark.usefixtures("quick_compilation")
def test_the_only_possible_next_item_is_found(repository, name):
    rng = np.random.default_rng(3)
    cycle, starts = rng.permutation(NUM_ITEMS) + 1, rng.integers(NUM_ITEMS, size=len(LENGTHS))
    rows = [cycle[(start + np.arange(length)) % NUM_ITEMS] for start, length in zip(starts, LENGTHS, strict=True)]
    metrics, _ = learn(repository, f"tuned-{name}", make_dataset(rows, NUM_ITEMS), 30)
    assert metrics["hr@5"] > 90
