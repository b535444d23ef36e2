"""Table 1 of the paper: statistics of the data after filtering, beside those that the paper prints.

    python -m experiments.table1 --config.data.root=PATH

Trains nothing.
"""

import sys

from experiments.study import DATASETS, Setting, Study, main
from experiments.tables import NONE, PAPER, markdown
from kdsr_jax.data import load_dataset
from kdsr_jax.data.interactions import statistics

HEADER = ("data", "users", "items", "interactions", "average length", "sparsity", "covered items") + (
    *("train instances", "test instances"),
)


def describe(config, workdir):
    """Return the statistics of a config's data, see ``kdsr_jax.data.interactions.statistics``; writes nothing."""
    dataset = load_dataset(config.data)
    return statistics(dataset.interactions, dataset.features)


def table(rows):
    """Return the table in markdown: what was counted, what the paper prints, and where it contradicts itself."""
    lines = []
    for row in rows:
        lines.append([row["dataset"], *_counted(row["measures"]["table1"])])
        if row["dataset"] in PAPER["table1"]:
            lines.append([f"{row['dataset']}, the paper", *_printed(row["dataset"])])
    wrong = [
        f"{name} {PAPER['table1_average_length'][name]:.2f}, which should be {interactions / users:.2f}"
        for name, (users, _, interactions) in PAPER["table1"].items()
        if f"{interactions / users:.2f}" != f"{PAPER['table1_average_length'][name]:.2f}"
    ]
    return (
        f"{markdown(HEADER, lines) if lines else 'Nothing is counted yet.'}\n\n"
        "A train instance is an item of a user's train part with an item before it, a test instance an item of the "
        f"test part. {len(wrong)} average lengths of the paper do not follow from its own interactions and users: "
        f"{'; '.join(wrong)}.\n"
    )


def _counted(facts):
    covered = ", ".join(f"{name} {count:,}" for name, count in sorted(facts["modalities"].items()))
    counts = [f"{facts[name]:,}" for name in ("users", "items", "interactions")]
    shares = [f"{facts['average_length']:.2f}", f"{100 * facts['sparsity']:.2f} %"]
    return [*counts, *shares, covered or NONE, f"{facts['train_instances']:,}", f"{facts['test_instances']:,}"]


def _printed(name):
    counts = [f"{count:,}" for count in PAPER["table1"][name]]
    return [
        *counts,
        f"{PAPER['table1_average_length'][name]:.2f}",
        f"{PAPER['table1_sparsity'][name]:.2f} %",
        *[NONE] * 3,
    ]


STUDY = Study(
    name="table1",
    title="Table 1: the data",
    settings={"statistics": Setting("kdsr-sasrm")},
    datasets=(*DATASETS[1:], DATASETS[0]),
    work=describe,
    table=table,
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
