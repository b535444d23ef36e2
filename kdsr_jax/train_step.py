"""One step of training, and a chunk of K steps that runs on the device without a look of the host."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kdsr_jax.models.student import init_student
from kdsr_jax.resident import cut_batch


class TrainState(NamedTuple):
    """All that changes in training, and the frozen tables that go with it; a pytree.

    Attributes:
      step: int32, optimizer steps done; with the seed it decides dropout and pair draws.
      params: the student's trainable variables.
      frozen: its frozen tables.
      opt_state: of the optimizer.
    """

    step: jax.Array
    params: Any
    frozen: Any
    opt_state: Any


class Trainer:
    """Compiled functions of one phase; they share the objective, the optimizer and the resident data.

    Attributes:
      objective: Objective.
      optimizer: optax.GradientTransformation.
      num_slots: target slots of a batch, ``train.batch_size``.
    """

    def __init__(self, objective, optimizer, num_slots, seed):
        self.objective, self.optimizer, self.num_slots = objective, optimizer, num_slots
        self._key = jax.random.key(seed)
        self.run_chunk = jax.jit(self._chunk, static_argnames=("length", "warmup"), donate_argnums=0)
        self.part_gradient_norms = jax.jit(self._part_gradient_norms, static_argnames="length")

    def init(self, tables, placement, facts=None):
        """Create the state under jit, replicated over the devices.

        Args:
          tables: dict modality -> [N + 1, width] initial rows of the modality tables.
          placement: Placement.
          facts: dict modality -> Facts; None takes every item as covered.

        Returns:
          TrainState at step 0.
        """
        return jax.jit(self._init, out_shardings=placement.replicated)(tables, facts)

    def _init(self, tables, facts):
        params, frozen = init_student(self.objective.student, jax.random.fold_in(self._key, 2**31 - 1), tables, facts)
        return TrainState(jnp.int32(0), params, frozen, self.optimizer.init(params))

    def _chunk(self, state, resident, teachers, window_ids, length, warmup=False):
        """Run K steps.

        Args:
          state: TrainState, donated.
          resident: Resident.
          teachers: dict modality -> Teacher.
          window_ids: [K, R] int32; a step of -1 only is a no-op that leaves the state as it is.
          length: padded length of the histories, static.
          warmup: True trains on the objective's warm-up instead, static.

        Returns:
          (TrainState, dict name -> [K] float32): every loss part, "loss", "gradient_norm" and "targets"; zeros for no-ops.
        """

        def step(state, ids):
            real = jnp.any(ids >= 0)
            given = {"resident": resident, "teachers": teachers, "ids": ids, "length": length, "warmup": warmup}
            one_step = functools.partial(self._step, **given)
            _, log = jax.eval_shape(one_step, state)
            idle = {name: jnp.zeros(a.shape, a.dtype) for name, a in log.items()}
            return jax.lax.cond(real, one_step, lambda s: (s, idle), state)

        return jax.lax.scan(step, state, window_ids)

    def _step(self, state, *, resident, teachers, ids, length, warmup):
        batch = cut_batch(resident, ids, length, self.num_slots)
        key = jax.random.fold_in(self._key, state.step)
        loss = jax.value_and_grad(self.objective.warm_up if warmup else self.objective, has_aux=True)
        (total, parts), gradient = loss(state.params, state.frozen, teachers, batch, key)
        updates, opt_state = self.optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        targets = batch.mask.sum().astype(jnp.float32)
        log = parts | {"loss": total, "gradient_norm": optax.tree.norm(gradient), "targets": targets}
        return TrainState(state.step + 1, params, state.frozen, opt_state), log

    def _part_gradient_norms(self, state, resident, teachers, ids, length):
        """Norm of each weighted loss part's gradient on the modality tables it acts on, for one batch [R] of window ids.

        Returns:
          dict "part on modality" -> scalar; shows whether a distillation term acts at all.
        """
        batch = cut_batch(resident, ids, length, self.num_slots)
        names = [f"{name}_embedding" for name in self.objective.student.modalities]

        def parts(tables):
            key = jax.random.fold_in(self._key, state.step)
            return self.objective(state.params | tables, state.frozen, teachers, batch, key)[1]

        values, pull_back = jax.vjp(parts, {name: state.params[name] for name in names})
        norms = {}
        for part in values:
            one = {name: jnp.float32(name == part) for name in values}
            weight = self.objective.weight(part)
            gradients = pull_back(one)[0]
            for modality in self.objective.student.modalities:
                if part == "next_item" or part.endswith(f"/{modality}"):
                    norm = optax.tree.norm(gradients[f"{modality}_embedding"])
                    norms[f"{part} on {modality}"] = weight * norm
        return norms
