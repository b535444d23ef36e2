"""Figure 4 of the paper: larger encoders of texts and images, against the width of the embeddings.

    python -m experiments.figure4 --config.data.root=PATH
    python -m experiments.figure4 --config.data.root=PATH --only="text minilm, d=64; text mpnet, d=64"

One modality at a time, KDSR on SASRM. An encoder takes part where PATH/<dataset>/features/<modality>-<encoder>.npz is there;
the paper's own encoders, GLM and LLaMA in their present versions, are among those that are looked for. The planted shop has one encoder a modality.
"""

import sys

from experiments import tables
from experiments.panels import arrange, datasets_of, mean_score, runs_of
from experiments.study import DATASETS, Setting, Study, main
from kdsr_jax.report.charts import line_chart

ENCODERS = {  # modality -> encoders, smallest first
    "text": ("wordllama", "minilm", "mpnet", "t5-base", "t5-large", "glm4-9b", "llama3-8b"),
    "image": ("efficientnet-lite0", "efficientnet-lite2", "resnet18", "resnet50", "swin-t", "resnet101", "swin-b"),
}
PLANTED = "facets"  # what its features files are called
DIMS = (64, 128, 256)
PLANTED_DIMS = (16, 32, 64)  # its features have no more dimensions
METRICS = ("hr@20", "mrr@20")


def _settings():
    found, real = {}, tuple(name for name in DATASETS if name != "planted")
    for modality, encoders in ENCODERS.items():
        places = [(encoder, DIMS, real) for encoder in encoders] + [(PLANTED, PLANTED_DIMS, ("planted",))]
        for encoder, dims, datasets in places:
            for dim in dims:
                words = f"data.modalities={modality}-{encoder}", f"model.dim={dim}"
                found[f"{modality} {encoder}, d={dim}"] = Setting("kdsr-sasrm", words, datasets)
    return found


def table(rows):
    """Return the markdown of all runs, after what the numbers in the figure stand for."""
    keys = []
    for dataset in datasets_of(rows):
        for modality in ENCODERS:
            present = ", ".join(f"{n} {name}" for n, name in enumerate(_present(rows, dataset, modality), 1))
            keys += [f"{dataset}, {modality}: {present}"] if present else []
    notes = f"The figure numbers encoders, smallest first: {'; '.join(keys)}.\n\n" if keys else ""
    return notes + tables.metrics_table(rows)


def figure(rows):
    """Return one ``<svg>`` with a row of charts for each dataset and modality: metric by encoder, a line for each width."""
    drawn = []
    for dataset in datasets_of(rows):
        for modality in ENCODERS:
            present, charts = _present(rows, dataset, modality), []
            for metric in METRICS if present else ():
                series = _points(rows, dataset, modality, present, metric)
                labels = "encoder, by its number in the table", f"{metric} on test, percent"
                charts.append(line_chart(f"{dataset}, {modality}", series, *labels))
            drawn.append(charts)
    return arrange(drawn, "Metrics by encoder and width of the embeddings")


def _present(rows, dataset, modality):
    """Return the encoders of a modality that have runs, smallest first."""
    return [name for name in (*ENCODERS[modality], PLANTED) if _points(rows, dataset, modality, [name], METRICS[0])]


def _points(rows, dataset, modality, encoders, metric):
    """Return dict "d=..." -> [(number of the encoder, mean on test), ...], only what has been run."""
    series = {}
    for dim in sorted({*DIMS, *PLANTED_DIMS}):
        for number, encoder in enumerate(encoders, 1):
            score = mean_score(runs_of(rows, dataset, f"{modality} {encoder}, d={dim}"), "test", metric)
            if score is not None:
                series.setdefault(f"d={dim}", []).append((number, score))
    return series


STUDY = Study(
    name="figure4",
    title="Figure 4: encoders and widths",
    settings=_settings(),
    datasets=("beauty", "ml1m"),
    table=table,
    figure=figure,
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
