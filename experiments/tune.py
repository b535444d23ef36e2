"""Fair tuning: every variant gets the same trials, on a share of the users, judged on validation alone.

    python -m experiments.tune --dataset=beauty --config.data.root=PATH
    python -m experiments.tune --dataset=beauty --variants=kdsr-sasrm --name=lambdas --config.data.root=PATH \\
        --try=distill.lambda_score=1,10 --try=distill.sigma=sigmoid,identity

The trials are GRID, or the product of what the --try words name. Successive halving: all trials train for the first
number of --epochs, the better half goes on to the next, and so forth; the choice is the best of the last round. A
trial's score is its best validation mrr@20 so far. Only phase select is trained, so no test item is looked at.
RESULTS/tuning/DATASET[-NAME].json keeps every trial and round, written after each, so a killed search goes on by the
same command; variants of other searches stay in it. A variant there has
  config   what its trials share, by dotted name
  rungs    the numbers of epochs
  trials   "fields" (what it tries) and "rungs", one object a round: epochs asked for, epochs trained (fewer where
           training stopped early), best_epoch, its validation metrics in percent, seconds of training and evaluation
           since the trial's start, device, cores, versions, commit, data_sha256
  choice   index of a trial, None before the end
"""

import argparse
import dataclasses
import fcntl
import importlib.metadata
import itertools
import os
import pathlib
import re
import sys

from experiments import records, results
from experiments.study import DATASETS, Setting, Study, plan
from experiments.tables import SELECTED_BY, markdown
from kdsr_jax import cli
from kdsr_jax.config import NOT_FINGERPRINTED, fingerprint
from kdsr_jax.errors import UserError, answer
from kdsr_jax.report.files import read_json

VARIANTS = "kdsr-sasrm,tuned-sasrm,sasrm,sasrec"
# Axes of the grid: what each value sets. gru4rec and srgnn have no attention and do not read its rate.
GRID = (
    [(f"train.learning_rate={rate}",) for rate in (5e-4, 1e-3, 2e-3)],
    [(f"model.hidden_dropout={rate}", f"model.attention_dropout={rate}") for rate in (0.2, 0.5)],
)


def main(words=None):
    """Run the command line; returns 0, 1 where a variant failed, 2 after one line about what was wrong in it."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.tune", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--dataset", dest="datasets", required=True, choices=DATASETS)
    parser.add_argument(
        "--variants", default=VARIANTS, help="what stands behind the colon of --config; now %(default)s"
    )
    parser.add_argument("--epochs", default="5,15", help="of each round, rising; now %(default)s")
    parser.add_argument("--fraction", default="0.2", help="of the users; now %(default)s")
    parser.add_argument(
        "--try", dest="tries", action="append", default=[], metavar="FIELD=V1,V2", help="instead of GRID"
    )
    parser.add_argument("--name", default="", help="of the search, in the file's name; a search with --try needs one")
    parser.add_argument("--folder", default="runs/tuning", help="of the runs")
    parser.add_argument("--results", default=str(results.FOLDER), help="folder of all studies' results")
    parser.set_defaults(seeds="0", only="")
    arguments, settings = parser.parse_known_args(words)
    return answer(lambda: tune(arguments, settings))


def tune(arguments, settings):
    """Search for every variant, one after the other, and print the table; returns 0, or 1 if a variant failed."""
    rungs, searches, failed = _rungs(arguments.epochs), {}, []
    if arguments.name and not re.fullmatch(r"\w[\w.-]*", arguments.name):
        raise UserError(f"--name={arguments.name}: must be letters, digits, dots, - and _")
    if arguments.tries and not arguments.name:
        raise UserError("--try needs a --name=NAME for the file of its results")
    study = make_study(arguments, rungs)
    for job in plan(study, arguments, settings):
        _check_free(job, (*study.words, *job.setting.words))
        searches.setdefault(job.setting.variant, []).append(job)
    if not searches:
        raise UserError("there is nothing to tune on")
    name = "-".join(filter(None, (arguments.datasets, arguments.name)))
    file = pathlib.Path(arguments.results) / "tuning" / f"{name}.json"
    entries = {variant: open_entry(file, variant, jobs, rungs) for variant, jobs in searches.items()}
    for variant, jobs in searches.items():
        try:
            search(jobs, entries[variant], lambda variant=variant: merge(file, variant, entries[variant]))
        except UserError as error:  # the other variants go on, and its finished rounds stand
            failed.append(f"failed: {variant}: {error}")
    if file.exists():
        print(f"{name}: {SELECTED_BY} on validation, in percent\n\n{table(read_json(file))}\n\nfile: {file}")
    print("".join(f"{line}\n" for line in failed), end="", file=sys.stderr)
    return 1 if failed else 0


def make_study(arguments, rungs):
    """Return the Study whose settings are all trials of all variants."""
    axes = [_axis(word) for word in arguments.tries] or GRID
    grid = [sum(values, ()) for values in itertools.product(*axes)]
    pairs = itertools.product(arguments.variants.split(","), grid)
    settings = {f"{variant}, {', '.join(words)}": Setting(variant, words) for variant, words in pairs}
    words = (f"data.user_fraction={arguments.fraction}", f"train.epochs={rungs[-1]}")
    return Study(name="tune", title="Tuning", settings=settings, table=None, words=words, work=train_rung)


def open_entry(file, variant, jobs, rungs):
    """Return what the file has of a variant, or the entry of a search that begins.

    Raises:
      UserError: the file holds another search of this variant.
    """
    configs = [records.relevant(job.config) for job in jobs]
    fields = [[word.partition("=")[0] for word in job.setting.words] for job in jobs]
    trials = [
        {"fields": {name: config[name] for name in names}, "rungs": []}
        for config, names in zip(configs, fields, strict=True)
    ]
    shared = {name: value for name, value in configs[0].items() if name not in fields[0]}
    entry = {"config": shared, "rungs": rungs, "trials": trials, "choice": None}
    saved = (read_json(file) or {}).get(variant)
    if saved is None:
        return entry
    same = saved["rungs"] == rungs and [t["fields"] for t in saved["trials"]] == [t["fields"] for t in trials]
    if not same or not results.same_config(saved["config"] | trials[0]["fields"], configs[0]):
        raise UserError(f"{file} holds another search of {variant}; give this one a --name, or delete {variant} there")
    return saved


def search(jobs, entry, write):
    """Do the rounds that are not done yet.

    Args:
      jobs: Jobs of a variant's trials.
      entry: of the variant, changed in place.
      write: called after every trial's round.
    """
    alive = list(range(len(jobs)))
    for number, epochs in enumerate(entry["rungs"]):
        alive = alive if number == 0 else alive[: max(1, len(alive) // 2)]
        for index in alive:
            done = entry["trials"][index]["rungs"]
            if len(done) == number:
                print(f"round {number + 1} of {len(entry['rungs'])}, {epochs} epochs: {jobs[index]}", flush=True)
                done.append(train_rung(jobs[index], epochs))
                write()
        alive.sort(key=lambda index, number=number: -_score(entry["trials"][index], number))
    entry["choice"] = alive[0]
    write()


def train_rung(job, epochs):
    """Train a trial on, up to so many epochs, in its own folder; returns a round as the module's head lists it.

    Raises:
      UserError: see ``train_and_evaluate``; or no epoch was evaluated.
    """
    import jax

    from kdsr_jax import train
    from kdsr_jax.data.digest import data_digests
    from kdsr_jax.phase import PhaseRunner
    from kdsr_jax.workdir import Workdir

    try:
        with Workdir(job.workdir, job.config) as folder:
            run = train.prepare(job.config)
            digest, log = data_digests(run.dataset)
            folder.claim_data(digest, log)
            record = PhaseRunner(run, dataclasses.replace(train.select_phase(run), epochs=epochs), folder).execute()
    finally:
        jax.clear_caches()  # the next trial compiles its own programs
    # A checkpoint may be further on than the file of results, where that was lost.
    evaluations = [e for e in record["evaluations"] if e["epoch"] <= epochs]
    if not evaluations:
        raise UserError(f"--epochs: nothing is evaluated in the first {epochs} epochs; begin with more of them")
    best = max(evaluations, key=lambda e: e["metrics"][SELECTED_BY])
    found = {"epochs": epochs, "trained": min(epochs, record["epoch"]), "best_epoch": best["epoch"]}
    found |= {"validation": best["metrics"], "seconds": record["train_seconds"] + record["eval_seconds"]}
    found |= {"device": f"{jax.device_count()} x {jax.devices()[0].device_kind}", "cores": os.cpu_count()}
    versions = {name: importlib.metadata.version(name) for name in train.VERSIONS}
    return found | {"versions": versions, "commit": records.current_commit(), "data_sha256": digest}


def merge(file, variant, entry):
    """Put a variant's entry into the file; other variants, which other processes may be writing, stay."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(file.parent, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        records.write_json(file, (read_json(file) or {}) | {variant: entry})
    finally:
        os.close(lock)


def table(content):
    """Return the markdown of a file's content: a line a trial, its score after each round; the choices are bold."""
    most = max(len(entry["rungs"]) for entry in content.values())
    lines = []
    for variant, entry in content.items():
        for index, trial in enumerate(entry["trials"]):
            text = ", ".join(f"{name.rpartition('.')[2]} {value}" for name, value in trial["fields"].items())
            scores = [f"{_score(trial, n):.3f} ({rung['epochs']})" for n, rung in enumerate(trial["rungs"])]
            last = trial["rungs"][-1] if trial["rungs"] else {}
            chosen = f"**{text}**" if index == entry["choice"] else text
            seconds = f"{last['seconds']:,.0f}" if last else ""
            lines.append([variant, chosen, *scores, *[""] * (most - len(scores)), last.get("best_epoch", ""), seconds])
    rounds = [f"round {n + 1} (epochs)" for n in range(most)]
    return markdown(["variant", "trial", *rounds, "best epoch", "s"], lines)


def _score(trial, number):
    return trial["rungs"][number]["validation"][SELECTED_BY]


def _axis(word):
    name, equal, values = word.partition("=")
    if not (name and equal and values):
        raise UserError(f"--try={word}: write --try=FIELD=V1,V2")
    if name in NOT_FINGERPRINTED:
        raise UserError(f"--try={word}: {name} changes no result")
    return [(f"{name}={value}",) for value in values.split(",")]


def _rungs(text):
    parts = [part.strip() for part in text.split(",")]
    rungs = [int(part) for part in parts if part.isdecimal()]
    if len(rungs) < len(parts) or rungs != sorted(set(rungs)) or rungs[0] < 1:
        raise UserError(f"--epochs={text}: write rising whole numbers, such as 5,15")
    return rungs


def _check_free(job, words):
    """Refuse a --config word that overrules what the search sets; such words come last."""
    config = job.config.copy_and_resolve_references()
    cli.apply_settings(config, [f"--config.{word}" for word in words])
    if fingerprint(config) != fingerprint(job.config):
        fields = ", ".join(word.partition("=")[0] for word in words)
        raise UserError(f"{fields}: set by the search, so leave them out of the --config words")


if __name__ == "__main__":
    sys.exit(main())
