"""Histories on the device, and the batches cut from them there: a step receives window ids and nothing else.

All histories stay on the device where they take no large share of its memory; else a chunk of steps brings its own along.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdsr_jax import processes
from kdsr_jax.data.spill import machine_memory

_MEMORY_SHARE = 8  # all histories lie on a device if they take up to an eighth of its memory


class Resident(NamedTuple):
    """Histories and the windows over them; a pytree of device arrays.

    Of all windows, W is their number rounded up by an eighth at most, so that the phases of a run, which differ by few windows,
    have arrays of one shape and share compiled programs; the last entries are zeros that no batch asks for.

    Attributes:
      items: [n] int32, the flat array of histories.
      start, length, first: [W] int32, see ``data.sequences.Windows``.
      instance: [W] int32, number of the window's first target among all targets.
      user_start: [W] int32, where the history that the window is cut from begins in ``items``.
    """

    items: np.ndarray
    start: np.ndarray
    length: np.ndarray
    first: np.ndarray
    instance: np.ndarray
    user_start: np.ndarray


class Batch(NamedTuple):
    """A batch of windows; its S target slots list the counted positions row after row, the rest is padding.

    Attributes:
      history: [R, L] int32, oldest first, right padded with 0.
      slots: [S] int32, counted positions as row * L + position; R * L at padding slots.
      targets: [S] int32, the item each slot predicts; 0 at padding.
      mask: [S] bool, True at real slots.
      instance: [S] int32, number of the slot's target among all targets; -1 at padding.
      end: [S] int32, index of the target in the flat array.
      begin: [S] int32, index in the flat array where the target's whole history begins.
    """

    history: jnp.ndarray
    slots: jnp.ndarray
    targets: jnp.ndarray
    mask: jnp.ndarray
    instance: jnp.ndarray
    end: jnp.ndarray
    begin: jnp.ndarray


def make_resident(interactions, windows):
    """Gather what a phase needs on the device (numpy arrays; the caller places them)."""
    unit = 1 << max(0, len(windows).bit_length() - 4)

    def padded(array):
        return np.pad(array.astype(np.int32), (0, -len(windows) % unit))

    return Resident(
        items=interactions.items,
        start=padded(windows.start),
        length=padded(windows.length),
        first=padded(windows.first),
        instance=padded(_instances(windows)),
        user_start=padded(_user_starts(interactions, windows)),
    )


def place_histories(where, interactions, windows, placement, most_before=0):
    """Say where the histories of a phase lie.

    Args:
      where: ``data.histories``, "device", "host" or "auto".
      interactions: Interactions.
      windows: Windows.
      placement: Placement.
      most_before: length of the longest history before a target where batches are asked for whole histories, 0 elsewhere.

    Returns:
      DeviceHistories or HostHistories.
    """
    if where == "auto":
        memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit") or machine_memory()
        on_host = processes.as_first(np.array(interactions.items.nbytes > memory // _MEMORY_SHARE))
        where = "host" if on_host else "device"
    if where == "device":
        return DeviceHistories(interactions, windows, placement)
    return HostHistories(interactions, windows, placement, most_before)


class DeviceHistories:
    """All histories and windows on the device, for all chunks."""

    def __init__(self, interactions, windows, placement):
        """Put them there."""
        self._placement = placement
        self._resident = placement.put(make_resident(interactions, windows))

    def of(self, window_ids, length):
        """Return what ``cut_batch`` takes for the windows [..., R], -1 for no row: (Resident, ids) on the device."""
        return self._resident, self._placement.put_rows(window_ids)


class HostHistories:
    """Histories that stay where they are, perhaps in a mapped file; only what a chunk reads goes to the device, with it.

    Batches are the same as with ``DeviceHistories`` but for ``end`` and ``begin``, which are indices into what goes there.
    """

    def __init__(self, interactions, windows, placement, most_before):
        """Plan; see ``place_histories``. Where ``most_before`` is 0, ``Batch.begin`` is where the window begins."""
        self._items, self._windows, self._placement = interactions.items, windows, placement
        self._most_before = most_before
        self._instance, self._user_start = _instances(windows), _user_starts(interactions, windows)

    def of(self, window_ids, length):
        """Do as ``DeviceHistories.of`` does; length is that of a row, padding included."""
        windows, width = window_ids.ravel(), max(length, self._most_before) + 1
        real = windows >= 0
        chosen = np.maximum(windows, 0)
        start, count = self._windows.start[chosen].astype(np.int64), self._windows.length[chosen]
        begin = self._user_start[chosen].astype(np.int64) if self._most_before else start
        index = begin[:, None] + np.arange(width)
        inside = real[:, None] & (index <= (start + count)[:, None])
        row = width * np.arange(len(windows), dtype=np.int32)
        resident = Resident(
            items=self._items[np.where(inside, index, 0)].ravel() * inside.ravel(),
            start=row + (start - begin).astype(np.int32),
            length=count,
            first=self._windows.first[chosen],
            instance=self._instance[chosen],
            user_start=row,
        )
        ids = np.where(real, np.arange(len(windows), dtype=np.int32), -1).reshape(window_ids.shape)
        return self._placement.put(resident), self._placement.put_rows(ids)


def _instances(windows):
    """Return the number of each window's first target among all targets, [W] int32."""
    counts = windows.counts
    return (np.cumsum(counts, dtype=np.int64) - counts).astype(np.int32)


def _user_starts(interactions, windows):
    """Return where the history that each window is cut from begins, [W] int32."""
    user = np.searchsorted(interactions.offsets, windows.start, side="right") - 1
    return interactions.offsets[user].astype(np.int32)


def cut_batch(resident, window_ids, length, num_slots):
    """Cut a batch on the device.

    Args:
      resident: Resident.
      window_ids: [R] int32, -1 for an empty row.
      length: L, static.
      num_slots: S, static; the rows count at most S targets.

    Returns:
      Batch.
    """
    row = jnp.maximum(window_ids, 0)
    position = jnp.arange(length)
    index = resident.start[row][:, None] + position[None]
    inside = (window_ids >= 0)[:, None] & (position[None] < resident.length[row][:, None])
    history = jnp.where(inside, resident.items.at[index].get(mode="clip"), 0)
    counted = inside & (position[None] >= resident.first[row][:, None])
    slots = jnp.nonzero(counted.ravel(), size=num_slots, fill_value=counted.size)[0].astype(jnp.int32)
    mask = slots < counted.size
    slot_row, slot_position = row[jnp.minimum(slots // length, row.shape[0] - 1)], slots % length
    end = jnp.where(mask, resident.start[slot_row] + slot_position + 1, 0)
    instance = resident.instance[slot_row] + slot_position - resident.first[slot_row]
    return Batch(
        history=history,
        slots=slots,
        targets=jnp.where(mask, resident.items[end], 0),
        mask=mask,
        instance=jnp.where(mask, instance, -1),
        end=end,
        begin=jnp.where(mask, resident.user_start[slot_row], 0),
    )


def at_slots(states, batch):
    """Return the states [S, d] at a batch's slots from states [R, L, d]; zeros at padding slots."""
    flat = states.reshape(-1, states.shape[-1])
    return flat.at[batch.slots].get(mode="fill", fill_value=0.0)
