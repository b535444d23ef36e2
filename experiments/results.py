"""What is known of a study: RESULTS/<study>/runs.jsonl, and the table, the figure and the index that are drawn from it.

RESULTS/ranks/<dataset>/ keeps the rank of every test target of each run, so that runs of several machines or days are compared
user by user when their folders are gone.
"""

import contextlib
import fcntl
import functools
import json
import pathlib
import statistics

from experiments import index, significance
from experiments.records import measure_ranks, own_words, relevant
from kdsr_jax.errors import UserError
from kdsr_jax.files import replace_file
from kdsr_jax.report.charts import write_svg
from kdsr_jax.report.files import read_lines

FOLDER = pathlib.Path(__file__).parent / "results"


class Store:
    """The results of a study.

    Attributes:
      folder: RESULTS/<study>.
      file: its runs.jsonl.
    """

    def __init__(self, root, study):
        """Open a study's results below a folder; nothing is made before there is something to write."""
        self.study, self.root = study, pathlib.Path(root)
        self.folder = self.root / study.name
        self.file = self.folder / "runs.jsonl"

    def rows(self):
        """Return the objects of runs.jsonl in the order of the study."""
        return ordered(read_lines(self.file), self.study)

    def holds(self, job):
        """Say whether a job's run stands in runs.jsonl, with the same config and reference."""
        return any(_key(row) == _key(job) and _is_of(row, job) for row in _runs(self.rows()))

    def found_elsewhere(self, job):
        """Return the row of another study's runs.jsonl that a job's run stands in, or None; not where its folder has to be measured."""
        needs_ranks = self.study.rank_measures and not self._ranks(job).is_file()
        if self.study.measures or needs_ranks or not self.study.trains or job.workdir.exists():
            return None
        for row in _runs(row for file in sorted(self.root.glob("*/runs.jsonl")) for row in read_lines(file)):
            same = (row["dataset"], row["seed"]) == (job.dataset, job.seed)
            if same and (row["test"] or row["paper"]) and _is_of(row, job):
                return row
        return None

    def as_own(self, row, job):
        """Return what ``found_elsewhere`` found as a row of this study."""
        return row | {"measures": measure_ranks(self.study, job.config, self._ranks(job))} | own_words(job)

    def add(self, job, row):
        """Put a run's row in the place of an older one, drop comparisons with that, and draw everything anew.

        Raises:
          UserError: the setting's other seeds ran on other data.
        """
        for other in _runs(self.rows()):
            seeds = _key(other)[:2] == _key(row)[:2] and other["seed"] != row["seed"]
            if seeds and other["data_sha256"] != row["data_sha256"]:
                raise UserError(
                    f"{self.file}: seed {other['seed']} of {row['label']} is of other data named {row['dataset']!r}; "
                    "give another folder with --results"
                )

        def replace(rows):
            kept = [r for r in rows if _key(r) != _key(row)]
            if len(kept) < len(rows):
                kept = [r for r in kept if not _compares(r, row)]
            return [*kept, row]

        if row["test"] and (job.workdir / "ranks.npz").is_file():
            significance.keep_ranks(job.workdir, self._ranks(job))
        self._change(replace)
        self.compare([job])
        self.draw()

    def compare(self, jobs):
        """Compare the study's reference with every other setting, user by user, where that is not done yet.

        Args:
          jobs: on the data sets that are meant; all runs of runs.jsonl on them take part, whatever their seeds.
        """
        configs, files, known = {job.dataset: job.config for job in jobs}, {}, set()
        for row in self.rows():
            if row["kind"] == "comparison":
                if row["reference"] == self.study.reference and ("group" in row) == bool(self.study.groups):
                    known.add((row["dataset"], row["label"], tuple(row["seeds"])))
            elif row["dataset"] in configs and (file := self._ranks(row)).is_file():
                files.setdefault((row["dataset"], row["label"]), {})[row["seed"]] = file
        groups = self.study.groups and functools.cache(lambda dataset: self.study.groups(configs[dataset]))
        made = significance.compare_all(self.study.reference, files, known, groups)
        keys = {_comparison(row) for row in made}

        def replace(rows):
            kept = [r for r in rows if r["kind"] == "run" or r["reference"] == self.study.reference]
            return [*(r for r in kept if _comparison(r) not in keys), *made]

        self._change(replace)

    def draw(self):
        """Write table.md, figure.svg and the index of all studies."""
        rows = self.rows()
        text = f"# {self.study.title}\n\n{self.study.table(rows)}"
        replace_file(self.folder / "table.md", lambda file: file.write(text.encode()))
        svg = self.study.figure(rows) if self.study.figure else ""
        if svg:
            write_svg(self.folder / "figure.svg", svg)
        index.write_index(self.root)

    def expected_seconds(self, job):
        """Return about how long a job takes: the median of the runs of its backbone on its dataset in any study, or None."""
        files = self.root.glob("*/runs.jsonl")
        rows = [row for file in files for row in _runs(read_lines(file)) if row["dataset"] == job.dataset]
        backbone = job.config.model.name
        similar = [row for row in rows if row["config"]["model.name"] == backbone and row.get("train_seconds")]
        return statistics.median(row["train_seconds"] + row["eval_seconds"] for row in similar) if similar else None

    def _ranks(self, run):
        """Return the file that keeps the ranks of a run, a row or a Job; studies that share the run share it."""
        dataset, name = (run["dataset"], run["workdir"]) if isinstance(run, dict) else (run.dataset, run.workdir.name)
        return self.root / "ranks" / dataset / f"{name}.npz"

    def _change(self, change):
        """Replace the rows; other processes that work on the same study wait for each other."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(self.folder):
            rows = ordered(change(read_lines(self.file)), self.study)
            text = "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)
            replace_file(self.file, lambda file: file.write(text.encode()))


def ordered(rows, study):
    """Sort rows by dataset, setting and seed as the study has them; runs before comparisons, settings it lacks left out."""
    labels = list(study.settings)
    known = [row for row in rows if row.get("label") in labels]

    def place(row):
        dataset = row["dataset"]
        rank = study.datasets.index(dataset) if dataset in study.datasets else len(study.datasets)
        return (
            row["kind"] != "run",
            rank,
            dataset,
            labels.index(row["label"]),
            row.get("seed", 0),
            row.get("metric", ""),
        )

    return sorted(known, key=place)


def same_config(saved, current):
    """Say whether a row's config is a job's; a field that is newer than the row must have its default value.

    Args:
      saved, current: fields by dotted name.
    """
    from configs.default import get_config

    saved = relevant(get_config()) | saved
    return all(saved[name] == value for name, value in current.items())


def _is_of(row, job):
    """Say whether a row's run is what a job would do."""
    return row.get("reference", "") == job.reference and same_config(row["config"], relevant(job.config))


def _runs(rows):
    return [row for row in rows if row.get("kind") == "run"]


def _key(run):
    """Return what tells runs of a study apart, of a row or a Job."""
    if isinstance(run, dict):
        return (run["dataset"], run["label"], run["seed"]) if run.get("kind") == "run" else None
    return run.dataset, run.label, run.seed


def _comparison(row):
    if row.get("kind") != "comparison":
        return None
    return row["dataset"], row["label"], row["reference"], row["metric"], row.get("group")


def _compares(row, run):
    return (
        row["kind"] == "comparison"
        and row["dataset"] == run["dataset"]
        and run["label"] in (row["label"], row["reference"])
    )


@contextlib.contextmanager
def _locked(folder):
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
