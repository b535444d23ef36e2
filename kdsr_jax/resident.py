"""Data that stays on the device, and the batches cut from it there: a step receives window ids and nothing else."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np


class Resident(NamedTuple):
    """All histories and the windows over them; a pytree of device arrays.

    W is the number of windows rounded up by an eighth at most, so that the phases of a run, which differ by few windows, have
    arrays of one shape and share compiled programs; the last entries are zeros that no batch asks for.

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
    counts = windows.counts
    user = np.searchsorted(interactions.offsets, windows.start, side="right") - 1
    unit = 1 << max(0, len(windows).bit_length() - 4)

    def padded(array):
        return np.pad(array.astype(np.int32), (0, -len(windows) % unit))

    return Resident(
        items=interactions.items,
        start=padded(windows.start),
        length=padded(windows.length),
        first=padded(windows.first),
        instance=padded(np.cumsum(counts) - counts),
        user_start=padded(interactions.offsets[user]),
    )


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
