"""One step of training, and a chunk of K steps that runs on the device without a look of the host."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kdsr_jax import sparse
from kdsr_jax.models.student import init_student
from kdsr_jax.resident import cut_batch


class TrainState(NamedTuple):
    """All that changes in training, and what goes with it unchanged; a pytree.

    Attributes:
      step: int32, optimizer steps done; with the seed it decides dropout and pair draws.
      seed: [2] uint32, the data of the seed's PRNG key. It is no constant of the programs, so that all seeds share them.
      params: the student's trainable variables.
      frozen: its frozen tables.
      opt_state: of the optimizer.
    """

    step: jax.Array
    seed: jax.Array
    params: Any
    frozen: Any
    opt_state: Any

    @property
    def key(self):
        """PRNG key of the next step."""
        return jax.random.fold_in(jax.random.wrap_key_data(self.seed), self.step)


class Trainer:
    """Compiled functions of one phase; they share the objective and the optimizer.

    Attributes:
      objective: Objective.
      optimizer: optax.GradientTransformation.
      num_slots: target slots of a batch, ``train.batch_size``.
      placement: Placement; states and teachers come and go in the form that they rest in.
      sparse_tables: whether a step works on the rows of its items alone (``sparse``), which needs items drawn for the softmax.
    """

    def __init__(self, objective, optimizer, num_slots, placement, sparse_tables=False):
        self.objective, self.optimizer, self.num_slots, self.placement = objective, optimizer, num_slots, placement
        self.sparse_tables = sparse_tables
        self.run_chunk = jax.jit(self._chunk, static_argnames=("length", "warmup"), donate_argnums=0)
        self.run_chunks = jax.jit(self._chunks, static_argnames=("length", "warmup"), donate_argnums=0)
        self.part_gradient_norms = jax.jit(self._part_gradient_norms, static_argnames="length")

    def init(self, seed, tables, facts=None):
        """Create the state under jit, so that no device ever holds more than its part.

        Args:
          seed: of parameters, dropout and pairs.
          tables: dict modality -> [N + 1, width] initial rows of the modality tables, as ``Placement.put_table`` gives them.
          facts: dict modality -> Facts; None takes every item as covered.

        Returns:
          TrainState at step 0.
        """
        # What lies on the mesh puts the state there too, where a model has no tables; else chunks are compiled twice.
        start = self.placement.put((np.int32(0), _key_data(seed)))
        return jax.jit(lambda *given: self._pack(self._init(*given)))(*start, tables, facts)

    def to_store(self, state):
        """Return a state as checkpoints hold it: without the rows that tables rest with, whatever the mesh."""
        if self.placement.model == 1:
            return state
        shapes = jax.eval_shape(self._unpack, state)
        return jax.jit(self._unpack, out_shardings=self.placement.stored(shapes))(state)

    def from_store(self, state):
        """Return a state that was loaded in the form that it rests in."""
        return state if self.placement.model == 1 else jax.jit(self._pack, donate_argnums=0)(state)

    def stored_shapes(self, tables, facts=None):
        """Return shapes and shardings of a state as checkpoints hold it; tables and facts as for ``init``."""
        shapes = jax.eval_shape(self._init, np.int32(0), _key_data(0), tables, facts)
        shardings = self.placement.stored(shapes)
        return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings)

    def _pack(self, state):
        return self.placement.pack(state)

    def _unpack(self, tree):
        return self.placement.unpack(tree, self.objective.student.num_items)

    def _init(self, step, seed, tables, facts):
        student, key = self.objective.student, jax.random.fold_in(jax.random.wrap_key_data(seed), 2**31 - 1)
        tables = {name: self.placement.unpad(table, student.num_items + 1) for name, table in tables.items()}
        params, frozen = init_student(student, key, tables, facts)
        return TrainState(step, seed, params, frozen, self.optimizer.init(params))

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
            if self.sparse_tables:
                return self._sparse_step(state, resident, teachers, ids, length, warmup)
            given = {"resident": resident, "teachers": teachers, "ids": ids, "length": length, "warmup": warmup}
            return _unless_idle(ids, functools.partial(self._step, **given), state)

        teachers = self._unpack(teachers)
        state, log = jax.lax.scan(step, self._unpack(state), window_ids)
        return self._pack(state), jax.tree.map(self.placement.spread, log)

    def _chunks(self, states, resident, teachers, window_ids, length, warmup=False):
        """Do as ``_chunk`` does with S states at once: they, the ids [S, K, R] and the log have an axis of seeds in front."""
        run = functools.partial(self._chunk, length=length, warmup=warmup)
        return jax.vmap(run, (0, None, None, 0))(states, resident, teachers, window_ids)

    def _step(self, state, *, resident, teachers, ids, length, warmup):
        batch = cut_batch(resident, ids, length, self.num_slots)
        return self._update(state, self.objective.warm_up if warmup else self.objective, teachers, batch)

    def _sparse_step(self, state, resident, teachers, ids, length, warmup):
        """Do as ``_step`` does, or nothing for an idle step, on the rows of the step's items.

        The choice is made among these rows, because one between whole tables copies them.
        """
        batch = cut_batch(resident, ids, length, self.num_slots)
        sampled = jnp.zeros(0, jnp.int32) if warmup else self.objective.draw_items(state.key)
        rows = sparse.touched_rows(self.objective.num_items, batch.history, batch.targets, sampled)
        history, targets, sampled = (sparse.places(rows, items) for items in (batch.history, batch.targets, sampled))
        objective = self.objective.on_rows(rows.size)
        given = {
            "loss": objective.warm_up if warmup else functools.partial(objective, sampled=sampled),
            "teachers": sparse.take(teachers, rows),
            "batch": batch._replace(history=history, targets=targets),
        }
        few, log = _unless_idle(ids, functools.partial(self._update, **given), sparse.take(state, rows))
        return sparse.put(state, few, rows)._replace(frozen=state.frozen), log

    def _update(self, state, loss, teachers, batch):
        loss = jax.value_and_grad(loss, has_aux=True)
        (total, parts), gradient = loss(state.params, state.frozen, teachers, batch, state.key)
        with jax.named_scope("optimizer"):
            updates, opt_state = self.optimizer.update(gradient, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        targets = batch.mask.sum().astype(jnp.float32)
        log = parts | {"loss": total, "gradient_norm": optax.tree.norm(gradient), "targets": targets}
        return state._replace(step=state.step + 1, params=params, opt_state=opt_state), log

    def _part_gradient_norms(self, state, resident, teachers, ids, length):
        """Norm of each weighted loss part's gradient on the modality tables it acts on, for one batch [R] of window ids.

        Returns:
          dict "part on modality" -> scalar; shows whether a distillation term acts at all.
        """
        state, teachers = self._unpack(state), self._unpack(teachers)
        batch = cut_batch(resident, ids, length, self.num_slots)
        names = [f"{name}_embedding" for name in self.objective.student.modalities]

        def parts(tables):
            return self.objective(state.params | tables, state.frozen, teachers, batch, state.key)[1]

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


def _key_data(seed):
    return np.asarray(jax.random.key_data(jax.random.key(seed)))


def _unless_idle(ids, step, state):
    """Return (state, log) of a step, or where all of its window ids are -1 the state as it is and zeros."""
    step = jax.jit(step, inline=True)  # traced once for both
    _, log = jax.eval_shape(step, state)
    idle = {name: jnp.zeros(a.shape, a.dtype) for name, a in log.items()}
    return jax.lax.cond(jnp.any(ids >= 0), step, lambda s: (s, idle), state)
