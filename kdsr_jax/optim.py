"""Adam with a learning rate of its own for the modality tables, raised linearly (paper Section 3.3, Asynchronous Training)."""

import re

import jax
import jax.numpy as jnp
import optax

BODY, TABLES = "body", "modality_tables"


def table_rules(modalities):
    """Return the path rules that send modality tables, and only these, to the ramped group.

    Args:
      modalities: names of the modalities with tuned tables.

    Returns:
      List of (regular expression, label), first full match wins; the last rule takes every other parameter.
    """
    return [(rf"{re.escape(name)}_embedding/embedding", TABLES) for name in modalities] + [(r".*", BODY)]


def label_params(params, rules):
    """Label each parameter by the first rule whose expression matches its whole path.

    Args:
      params: tree of arrays.
      rules: list of (regular expression, label).

    Returns:
      Tree of labels with the structure of params.

    Raises:
      ValueError: a parameter matches no rule, or a rule takes no parameter (it would silently do nothing).
    """
    used = set()

    def label(path, _):
        name = path_name(path)
        for index, (pattern, group) in enumerate(rules):
            if re.fullmatch(pattern, name):
                used.add(index)
                return group
        raise ValueError(f"no optimizer rule covers parameter {name}")

    labels = jax.tree_util.tree_map_with_path(label, params)
    idle = [rules[i][0] for i in range(len(rules)) if i not in used]
    if idle:
        raise ValueError(f"optimizer rules that match no parameter: {idle}")
    return labels


def path_name(path):
    """Return a tree path as 'module/submodule/parameter'."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def embedding_ramp(learning_rate, ramp_steps, start=0.1, end=1.0):
    """Return the learning rate of the modality tables as a function of the step.

    Args:
      learning_rate: epsilon, the rate of all other parameters.
      ramp_steps: steps until the last rate, eta epochs of steps; 0 means no ramp.
      start: share of epsilon at step 0 (the paper's 0.1).
      end: share of epsilon after the ramp (the paper's 1; with 0.25 and no ramp, the constant rate of the official code).

    Returns:
      Schedule step -> rate, linear from start * epsilon to end * epsilon, constant after.
    """
    if ramp_steps == 0:  # optax.linear_schedule would stay at the start value forever
        return optax.constant_schedule(end * learning_rate)
    return optax.linear_schedule(start * learning_rate, end * learning_rate, ramp_steps)


def decay_where_used(weight):
    """Add weight times each parameter to its gradient (coupled L2), in rows, along the last axis, that have a gradient.

    Adam divides by the size of what it is given: alone, the decay would bring a row down at the full learning rate however small
    the weight is, such as the features of an item that no history holds.
    """

    def decay(gradient, param):
        used = jnp.any(gradient != 0, axis=-1, keepdims=True) if gradient.ndim else gradient != 0
        return gradient + weight * param * used

    return optax.stateless(lambda updates, params: jax.tree.map(decay, updates, params))


def make_optimizer(settings, modalities, steps_per_epoch):
    """Build the optimizer: clipping, coupled L2 and Adam over all parameters, then a learning rate per group.

    Args:
      settings: the config's train group (attributes).
      modalities: names of the modalities with tuned tables.
      steps_per_epoch: real steps of an epoch, to count the ramp in epochs.

    Returns:
      (optax.GradientTransformation, dict label -> schedule of its learning rate).
    """
    rate, rules = settings.learning_rate, table_rules(modalities)
    schedules = {BODY: optax.constant_schedule(rate)}
    if modalities:
        shares = settings.ramp_start, settings.ramp_end
        schedules[TABLES] = embedding_ramp(rate, settings.ramp_epochs * steps_per_epoch, *shares)
    rates = {label: optax.scale_by_learning_rate(schedule) for label, schedule in schedules.items()}
    # Clipping and decay stand before Adam and outside the groups: a group of its own would clip by its own norm.
    steps = [optax.clip_by_global_norm(settings.clip_norm)] if settings.clip_norm else []
    steps += [decay_where_used(settings.weight_decay)] if settings.weight_decay else []
    steps += [optax.scale_by_adam(), optax.multi_transform(rates, lambda params: label_params(params, rules))]
    return optax.chain(*steps), schedules
