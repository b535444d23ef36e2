"""RecBole's SASRec and GRU4Rec beside ours, in one run, on the same targets: seconds an epoch, and quality against time.

    make -C benchmarks/peers                                            # their environment, once
    python -m experiments.peers --config.data.root=PATH                 # speed, by turns
    python -m experiments.peers --config.data.root=PATH --epochs=5      # and so many epochs of theirs in all

Everything is of phase *select*: training targets, validation targets and what stands before each. Speed is measured by turns of
some steps each; an epoch's seconds are those of a step times the steps of its targets. With --epochs, theirs are trained that far
(a killed training goes on at its last epoch) and ranked on validation and, in the end, on test, by their own evaluator and by our metrics on their
scores; then ours is trained from the first step to the best mrr@20 that theirs reached. Writes benchmarks/peers.json and the
tables of docs/performance.md. Machines differ and are shared: read the ratios.
"""

import argparse
import contextlib
import os
import pathlib
import sys

import numpy as np

from experiments import performance
from experiments.processes import Worker, contestant, medians, read_entry, take_turns
from experiments.records import write_json
from kdsr_jax import cli
from kdsr_jax.config import validate
from kdsr_jax.data import load_dataset
from kdsr_jax.data.interactions import train_lengths
from kdsr_jax.data.sequences import evaluation_windows, train_windows
from kdsr_jax.errors import UserError, answer
from kdsr_jax.files import replace_file
from kdsr_jax.report.files import read_json

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "benchmarks"
PYTHON = FOLDER / "peers" / ".venv" / "bin" / "python"
REACHED = 60  # epochs, at most, in which ours must reach their quality
PEERS = {"sasrec": "SASRec", "gru4rec": "GRU4Rec"}
# What both have in common on any data: one softmax over all items, the paper's widths.
SHARED = {"data.max_length": 50, "model.dim": 128, "train.batch_size": 512, "train.learning_rate": 1e-3}
COMMON = {
    "USER_ID_FIELD": "user_id",
    "ITEM_ID_FIELD": "item_id",
    "LIST_SUFFIX": "_list",
    "ITEM_LIST_LENGTH_FIELD": "item_length",
    "load_col": {"inter": ["user_id", "item_id_list", "item_id"]},
    "alias_of_item_id": ["item_id_list"],
    "benchmark_filename": ["train", "valid", "test"],
    "eval_args": {"split": {"RS": [8, 1, 1]}, "order": "TO", "group_by": "user", "mode": "full"},
    "train_neg_sample_args": None,
    "loss_type": "CE",
    "eval_batch_size": 1024,
    "metrics": ["Hit", "MRR", "NDCG"],
    "topk": [5, 10, 20],
    "valid_metric": "MRR@20",
    "reproducibility": False,
    "use_gpu": False,
    "show_progress": False,
    "save_dataset": False,
    "save_dataloaders": False,
}


def main(words=None):
    """Measure, and write what was measured; returns an exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--models", default=",".join(PEERS), help="of %(default)s; +FIELD=VALUE... behind one sets fields of ours"
    )
    parser.add_argument("--config", default="configs/beauty.py", help="config file; --config.FIELD=VALUE sets a field")
    parser.add_argument("--steps", type=int, default=16, help="of a turn")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each; 0 leaves the speeds as they are")
    parser.add_argument("--epochs", type=int, default=0, help="of theirs, in all; 0 compares no quality")
    parser.add_argument("--python", default=str(PYTHON), help="of their environment")
    parser.add_argument("--folder", default=str(FOLDER / "peers" / ".runs"), help="of their files and checkpoints")
    parser.add_argument("--out", type=pathlib.Path, default=performance.PEERS, help="JSON file")
    arguments, settings = parser.parse_known_args(words)
    return answer(lambda: compare(arguments, settings), "interrupted; finished epochs are kept")


def compare(arguments, settings):
    """Do what the command line asks for.

    Raises:
      UserError: an unknown model or setting, or there is no environment for the peers.
    """
    settings = [*(f"--config.{name}={value}" for name, value in SHARED.items()), *settings]
    entries = {entry: read_entry(entry, settings) for entry in arguments.models.split(",")}
    if unknown := [model for model, _ in entries.values() if model not in PEERS]:
        raise UserError(f"--models: there is no {unknown[0]!r} to compare with; there are {', '.join(PEERS)}")
    if not os.path.exists(arguments.python):
        raise UserError(f"{arguments.python} is missing; run make -C benchmarks/peers, or name another --python")
    configs = {entry: read_config(f"{arguments.config}:{model}", words) for entry, (model, words) in entries.items()}
    config = next(iter(configs.values()))
    name, folder = config.data.name, pathlib.Path(arguments.folder).absolute()
    parts = write_atomic_files(load_dataset(config.data, ()).interactions, folder, name, config.data.max_length)
    saved = read_json(arguments.out) or {}
    for entry, config in configs.items():
        row = saved.setdefault(name, {}).setdefault(entry, {})
        with contextlib.ExitStack() as stack:
            pair = Pair(entry, config, arguments, entries[entry][1], folder, parts, stack)
            if arguments.rounds:
                row |= pair.speed(arguments.rounds, arguments.steps)
                write_json(arguments.out, saved)
            if arguments.epochs:
                for part in pair.quality(row.get("quality", {}), arguments.epochs):
                    row["quality"] = part
                    write_json(arguments.out, saved)
    performance.main()


def their_settings(config):
    """Return RecBole's settings for the model of a config of ours."""
    model, train = config.model, config.train
    sizes = {"hidden_size": model.dim, "MAX_ITEM_LIST_LENGTH": config.data.max_length, "seed": config.seed}
    sizes |= {
        "train_batch_size": train.batch_size,
        "learning_rate": train.learning_rate,
        "weight_decay": train.weight_decay,
    }
    if model.name == "gru4rec":
        own = {"embedding_size": model.dim, "num_layers": model.num_layers, "dropout_prob": model.hidden_dropout}
    else:
        own = {"n_layers": model.num_layers, "n_heads": model.num_heads, "inner_size": 2 * model.dim}
        own |= {"hidden_dropout_prob": model.hidden_dropout, "attn_dropout_prob": model.attention_dropout}
        own |= {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "initializer_range": 0.02}
    return COMMON | sizes | own


def read_config(location, settings):
    """Return the validated config of FILE:VARIANT with further words of the command line."""
    config = cli.load_config(location)
    cli.apply_settings(config, settings)
    validate(config)
    return config


def write_atomic_files(interactions, folder, name, max_length):
    """Write phase select's training and validation targets and the test targets as RecBole's three atomic files.

    Returns:
      dict part -> number of targets. Each row is one target with the items before it, ``max_length`` of them at most.
    """
    offsets, lengths = interactions.offsets, train_lengths(interactions.lengths)
    windows = {
        "train": train_windows(offsets, lengths - 1, max_length, 0, prefixes=True),
        "valid": evaluation_windows(offsets, lengths - 1, lengths, max_length, prefixes=True),
        "test": evaluation_windows(offsets, lengths, interactions.lengths, max_length, prefixes=True),
    }
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    for part, cut in windows.items():
        users = np.searchsorted(offsets, cut.start, side="right") - 1
        lines = ["user_id:token\titem_id_list:token_seq\titem_id:token"]
        for user, start, length in zip(users, cut.start, cut.length, strict=True):
            items = interactions.items[start : start + length + 1].tolist()
            lines.append(f"{user}\t{' '.join(map(str, items[:-1]))}\t{items[-1]}")
        text = "\n".join([*lines, ""]).encode()
        replace_file(place / f"{name}.{part}.inter", lambda file, text=text: file.write(text))
    return {part: len(cut) for part, cut in windows.items()}


class Pair:
    """One of theirs and ours, each in a process that ends with a contextlib.ExitStack."""

    def __init__(self, entry, config, arguments, settings, folder, parts, stack):
        self.folder, self.model, name = folder, config.model.name, config.data.name
        self.ours = contestant(self.model)
        stack.callback(self.ours.close)
        self.hardware = self.ours.ask("machine")
        place = f"{arguments.config}:{self.model}"
        self.work = self.ours.ask("start", config=place, settings=settings, phase="select")
        script = str(FOLDER / "peers" / "recbole_worker.py")
        self.theirs = Worker(PEERS[self.model], [arguments.python, script], cwd=folder)
        stack.callback(self.theirs.close)
        self._start = {
            "model": PEERS[self.model],
            "settings": their_settings(config),
            "folder": str(folder),
            "name": name,
        }
        self._start["checkpoint"] = str(folder / f"{name}-{entry}.pt")
        self.facts = self.theirs.ask("start", **self._start)
        sizes = [self.facts["targets"], *self.facts["evaluated"].values(), self.facts["items"]]
        if sizes != [*parts.values(), self.work["items"]] or self.work["targets"] != parts["train"]:
            raise UserError(f"{self.model}: RecBole reads {sizes} targets and items of {parts}")

    def speed(self, rounds, steps):
        """Take turns; returns medians, and every round's seconds an epoch."""
        load, workers = os.getloadavg()[0], {"theirs": self.theirs, "ours": self.ours}
        arguments = {name: {"steps": steps} for name in workers}
        self.theirs.ask("turn", steps=2)
        turns = take_turns(workers, rounds, arguments)
        share = self.facts["steps"] / steps
        times = {"theirs": [{"epoch": turn["seconds"] * share, "cpu": turn["cpu"] * share} for turn in turns["theirs"]]}
        times["ours"] = [{name: turn[name] for name in ("epoch", "cpu")} for turn in turns["ours"]]
        middle = {name: medians(times[name]) for name in workers}
        ratios = [
            {name: theirs[name] / ours[name] for name in ours}
            for theirs, ours in zip(times["theirs"], times["ours"], strict=True)
        ]
        return self._facts(load) | middle | {"ratio": medians(ratios), "rounds": times, "steps of a turn": steps}

    def quality(self, so_far, epochs):
        """Train theirs to so many epochs, then ours to the quality that theirs had; yields the record as it grows."""
        trained = self.theirs.ask("start", **self._start)["epochs"]  # afresh: turns have trained it, too
        record = {"checks": {}, "theirs": so_far.get("theirs", [])[:trained]}
        if len(record["theirs"]) < trained:
            raise UserError(f"{self._start['checkpoint']}: has {trained} epochs of which nothing is known; remove it")
        for _ in range(trained, epochs):
            seconds = self.theirs.ask("epoch")["seconds"]
            metrics, ranking = self._ranked("valid")
            record["theirs"].append({"seconds": seconds, "ranking": ranking, "load": os.getloadavg()[0]} | metrics)
            yield record
            self.theirs.ask("save")
        for part in ("valid", "test"):
            own = self.theirs.ask("evaluate", part=part)["metrics"]
            record["checks"][part] = {
                "own": {name: 100 * value for name, value in own.items()},
                "ours": self._ranked(part)[0],
            }
        target = max(epoch["mrr@20"] for epoch in record["theirs"])
        record |= {"target": target, "load": os.getloadavg()[0]}
        record["ours"] = self.ours.ask("reach", target=target, epochs=REACHED)
        yield record

    def _ranked(self, part):
        """Return our metrics on their ranks of a part's targets, in percent, and the seconds of the ranking."""
        from kdsr_jax.evaluate import summarise

        file = self.folder / f"{self.model}-ranks.npz"
        seconds = self.theirs.ask("rank", part=part, file=str(file))["seconds"]
        with np.load(file) as arrays:
            return summarise(arrays["rank"], (5, 10, 20)), seconds

    def _facts(self, load):
        facts = {
            "hardware": self.hardware,
            "torch": self.facts["torch"],
            "threads": self.facts["threads"],
            "load": load,
        }
        facts |= {"targets": self.work["targets"], "steps": {"theirs": self.facts["steps"], "ours": self.work["steps"]}}
        return facts | {"parameters": {"theirs": self.facts["parameters"], "ours": self.work["parameters"]}}


if __name__ == "__main__":
    sys.exit(main())
