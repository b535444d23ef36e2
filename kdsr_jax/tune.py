"""Search over settings by validation alone, and write the best config to a file that --config= takes.

python -m kdsr_jax.tune --config=FILE[:VARIANT] --workdir=FOLDER [--trials=20] [--try=FIELD=VALUES ...] [--config.FIELD=VALUE ...]

A trial trains phase select of the protocol: on the train parts without their last items, which are its validation targets.
The search never evaluates a test item. A trial counts by the best epoch's metric.
"""

import dataclasses
import logging
import pathlib
import shlex
import sys
import time
from collections.abc import Sequence
from typing import Any

from kdsr_jax import axes, cli
from kdsr_jax.checks import not_among
from kdsr_jax.config import entries_read, flatten, to_dict, validate
from kdsr_jax.errors import Diverged, Parser, UserError, answer, out_of_memory
from kdsr_jax.files import replace_file
from kdsr_jax.labels import SELECT_K, SELECT_METRIC

FLAGS = ("config", "workdir", "trials", "try", "metric", "prune-after", "help")
_SHOWN = 5  # trials in the table at the end


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, 2 after one line about what the user can put right, or 130 after Ctrl-C."""
    parser = Parser(
        prog="python -m kdsr_jax.tune",
        description=(__doc__ or "").splitlines()[0],
        epilog="--config.FIELD=VALUE sets a field for all trials; configs/default.py lists them all.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="FILE[:VARIANT], as kdsr_jax.main takes it")
    parser.add_argument(
        "--workdir", required=True, help="of the search; the same command goes on there, also beside others"
    )
    parser.add_argument(
        "--trials", type=int, default=20, help="of all processes and commands together; now %(default)s"
    )
    parser.add_argument(
        "--try",
        dest="tries",
        action="append",
        default=[],
        metavar="FIELD=VALUES",
        help="LOW..HIGH or V1,V2; without any, learning rate, dropout and, where there are, weights and tables",
    )
    parser.add_argument("--metric", default=SELECT_METRIC, help="of the validation part; now %(default)s")
    parser.add_argument("--prune-after", type=int, default=5, help="epochs that every trial gets; now %(default)s")
    logging.basicConfig(format="warning: %(message)s")
    return answer(
        lambda: _work(*parser.parse_known_args(words)), "interrupted; the same command goes on from the last checkpoint"
    )


def _work(arguments, settings):
    config = cli.load_config(arguments.config)
    cli.apply_settings(config, settings, FLAGS)
    validate(config)
    cli.check_workdir(arguments.workdir)
    if ":" in arguments.workdir:
        raise UserError(f"--workdir={arguments.workdir}: has a colon, behind which --config takes a variant")
    if config.mesh.distributed or config.mesh.coordinator:
        raise UserError("--config.mesh: a search does not join processes; start the command several times instead")
    if arguments.trials < 1:
        raise UserError(f"--trials={arguments.trials}: must be 1 or more")
    if arguments.prune_after < 1:
        raise UserError(f"--prune-after={arguments.prune_after}: must be 1 or more")
    metrics = [f"{name}@{k}" for k in sorted({*config.eval.topk, SELECT_K}) for name in ("hr", "mrr", "ndcg")]
    if arguments.metric not in metrics:
        raise UserError(f"--metric={arguments.metric}: {not_among(arguments.metric, metrics)}")
    searched = axes.read_axes(config, arguments.tries)
    try:
        import optuna  # noqa: F401 - asked for before anything heavy is loaded
    except ImportError as error:
        raise UserError(f'a search needs optuna ({error}); pip install "kdsr-jax[tune]"') from error
    if config.encode.missing:
        from kdsr_jax.encode import encode_missing

        encode_missing(config)
    _search(config, searched, arguments)


def _search(config, searched, arguments):
    """Train trials until there are enough, and print what came out."""
    from kdsr_jax import train
    from kdsr_jax.data.digest import data_digests
    from kdsr_jax.reporting import say
    from kdsr_jax.search import Search, readable

    dataset = train.load_data(config)
    identity = {"config": to_dict(config), "metric": arguments.metric, "data_sha256": data_digests(dataset)[0]}
    identity["tries"] = {axis.name: axis.text() for axis in searched}
    first_epoch = config.model.warmup_epochs  # a warm-up is not evaluated
    with Search(arguments.workdir, config, searched, identity, first_epoch + arguments.prune_after) as search:

        def write_best(ranking, over):
            _write_best(search, ranking[0], over, arguments)

        with readable(search.path):
            while claimed := search.claim(arguments.trials):
                trial, trial_config, folder = claimed
                with folder:
                    say(f"trial {trial.number}: {_shown(trial.params)}")
                    given = dataset if entries_read(trial_config) == entries_read(config) else None
                    state, facts, error = _train_trial(trial, trial_config, given, folder, arguments.metric)
                    search.finish(trial, state, facts, write_best)
                if error:
                    message = f"trial {trial.number}, {_shown(trial.params)}, is given up: {error}"
                    raise UserError(f"{message}; the same command tries others")
                print(_describe(trial, facts, arguments.metric), flush=True)
            search.refresh(write_best)
            _print_best(search, arguments)


def _train_trial(trial, config, dataset, folder, metric):
    """Train a trial to its end, going on from its newest checkpoint; without a dataset, it is loaded.

    Returns:
      (TrialState, facts to keep, None or the UserError that says why these settings do not fit the data or the memory).
    """
    import jax
    from optuna.trial import TrialState

    from kdsr_jax import train
    from kdsr_jax.data.digest import data_digests
    from kdsr_jax.phase import PhaseRunner
    from kdsr_jax.search import Watch

    started = time.perf_counter()
    try:
        try:
            run = train.prepare(config, dataset)
            phase = train.select_phase(run)
            watch = Watch(trial, metric, phase.finished)
            runner = PhaseRunner(run, dataclasses.replace(phase, finished=watch), folder)
        except UserError as error:
            return TrialState.FAIL, {"ended": "failed"}, error
        folder.claim_data(*data_digests(run.dataset))
        try:
            record = runner.execute()
        except Diverged:
            return TrialState.PRUNED, {"ended": "diverged", "seconds": time.perf_counter() - started}, None
        except Exception as error:
            if not (said := out_of_memory(error)):
                raise
            return TrialState.FAIL, {"ended": "failed"}, UserError(said)
        watch.report(record["evaluations"])  # where the last epoch was trained, nobody asks whether to stop
    finally:
        jax.clear_caches()  # the next trial compiles its own programs
    best = max(record["evaluations"], key=lambda evaluation: evaluation["metrics"][metric])
    facts = {"ended": "pruned" if watch.pruned else "done", "value": best["metrics"][metric], "epochs": record["epoch"]}
    facts |= {"epoch": best["epoch"], "metrics": best["metrics"]}
    facts["seconds"] = record["train_seconds"] + record["eval_seconds"]
    return TrialState.PRUNED if watch.pruned else TrialState.COMPLETE, facts, None


def _shown(settings):
    return ", ".join(f"{name} {_number(value)}" for name, value in settings.items())


def _number(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _describe(trial, facts, metric):
    """Return the line of a trial that is over."""
    if "value" not in facts:
        return f"trial {trial.number}: {facts['ended']}, {facts['seconds']:.0f} s; {_shown(trial.params)}"
    found = f"{metric} {facts['value']:.4f} at epoch {facts['epoch']} of {facts['epochs']}"
    return f"trial {trial.number}: {found}, {facts['ended']}, {facts['seconds']:.0f} s; {_shown(trial.params)}"


def _print_best(search, arguments):
    """Print the table of the best trials, where the best config is, and what trains it."""
    from kdsr_jax.reporting import print_columns

    (over, running), ranking = search.counts(), search.ranking()
    if not ranking:
        raise UserError(f"none of {over} trials came to its end; try smaller learning rates in a new --workdir")
    leaves, columns = [name.rpartition(".")[2] for name in ranking[0].params], {}
    names = ranking[0].params if len(set(leaves)) < len(leaves) else leaves
    for trial in ranking[:_SHOWN]:
        facts = trial.user_attrs
        rows = {arguments.metric: f"{trial.value:.4f}", "best epoch": f"{facts['epoch']} of {facts['epochs']}"}
        columns[f"trial {trial.number}"] = rows | dict(zip(names, map(_number, trial.params.values()), strict=True))
    print(f"the best of {over} trials, {len(ranking)} of them to the end; validation, in percent")
    print_columns(columns, "", "")
    if running:
        print(f"{running} more in the hands of other processes, the last of which writes the best config anew")
    print(f"best config: {search.path / 'best.py'}\ntrain it:    {_command(arguments.workdir)}")


def _command(workdir):
    file, folder = pathlib.Path(workdir) / "best.py", f"{workdir.rstrip('/')}-best"
    return f"python -m kdsr_jax.main --config={shlex.quote(str(file))} --workdir={shlex.quote(folder)}"


def _write_best(search, trial, over, arguments):
    """Write best.py: all in which the best trial's config differs from configs/default.py."""
    config = axes.with_settings(search.config, trial.params)
    found = f"{trial.value:.4f} percent, trial {trial.number}, epoch {trial.user_attrs['epoch']}"
    lines = [
        f"The best of {over} trials by {arguments.metric} on validation: {found}.",
        "",
        f"    {_command(arguments.workdir)}",
        "",
        f"It was searched for by kdsr_jax.tune from --config={arguments.config}:",
        "",
        *(f"    {name} = {value!r}" for name, value in trial.params.items()),
    ]
    text = config_file(config, lines)
    try:
        replace_file(search.path / "best.py", lambda file: file.write(text.encode()))
    except OSError as error:
        raise UserError(f"{search.path / 'best.py'}: cannot be written ({error.strerror})") from error


def config_file(config: Any, lines: Sequence[str]) -> str:
    """Return a Python file whose ``get_config`` gives a config, from any working directory.

    Args:
        config: a valid config.
        lines: of its docstring.
    """
    default, fields = (flatten(c.to_dict()) for c in (cli.load_config(str(cli.DEFAULTS)), config))
    for name in ("data.root", "data.manual_dir", "encode.models_folder", "forgetting.reference_workdir"):
        fields[name] = fields[name] and str(pathlib.Path(fields[name]).absolute())
    escaped = "\n".join(line.replace("\\", "\\\\").replace('"', '\\"') for line in lines)
    changes = [f"    config.{name} = {value!r}\n" for name, value in fields.items() if value != default[name]]
    return (
        f'"""{escaped}\n"""\n\nfrom configs import default\n\n\ndef get_config():\n    config = default.get_config()\n'
        f"{''.join(changes)}    return config\n"
    )


if __name__ == "__main__":
    sys.exit(main())
