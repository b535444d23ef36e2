"""What a run says before it trains."""

import jax

from kdsr_jax import reporting
from kdsr_jax.models.student import count_parameters
from kdsr_jax.optim import BODY, TABLES, label_params, path_name, table_rules


def announce(run):
    """Print what is about to be trained: data, model, learning rates and teachers; run is a Run."""
    data, config = run.dataset.interactions, run.config
    tables = f", {config.model.tables} tables of {', '.join(run.student.modalities)}" if run.student.modalities else ""
    distilled = ", distillation" if run.teachers else ""
    reporting.say(
        f"{run.dataset.name}: {data.num_users:,} users, {data.num_items:,} items, {len(data.items):,} interactions; "
        f"{config.model.name}{tables}{distilled}, {count_parameters(run.abstract_params):,} parameters; protocol {config.eval.protocol}"
    )
    for line in _optimizer_groups(run):
        reporting.say(line)
    for name, report in run.teacher_report.items():
        reporting.say(
            f"teacher of {name}: {100 * report['reconstruction_error']:.1f} % of the variance lost in condensing"
            + (f", {report['used_codes']} codes in use, perplexity {report['perplexity']:.1f}" if run.teachers else "")
        )
    reporting.say("compiling; the first epoch of each phase includes it")


def _optimizer_groups(run):
    """Say which learning rate takes which parameters, as the rules sort them."""
    rules = table_rules(run.student.modalities if run.student.tuned else ())
    labels = jax.tree_util.tree_leaves_with_path(label_params(run.abstract_params, rules))
    rate, epochs = run.config.train.learning_rate, run.config.train.ramp_epochs
    names = [path_name(path) for path, label in labels if label == TABLES]
    body = sum(label == BODY for _, label in labels)
    if names:
        ramp = f"{run.config.train.ramp_start * rate:g} rising over {epochs} epochs to " if epochs else ""
        yield f"learning rate {ramp}{run.config.train.ramp_end * rate:g}: {', '.join(names)}"
    yield f"learning rate {rate:g}: {body} other parameters"
