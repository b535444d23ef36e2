"""Scores histories with an exported model. Needs jax (its export: flatbuffers) and numpy: python load.py ID ID ..."""

import functools
import json
import pathlib
import sys

import jax.export
import numpy as np


def load(folder=pathlib.Path(__file__).parent):
    """Return (score, item_ids): score maps lists of raw ids, oldest first, to [n, N] numbers; column j is item_ids[j]'s."""
    folder = pathlib.Path(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    data = (folder / "params.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    kinds, variables = {"F32": np.float32, "I32": np.int32, "BOOL": np.bool_}, {"params": {}, "frozen": {}}
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__":
            begin, end = (start + place for place in entry["data_offsets"])
            *parents, leaf = name.split("/")
            home = functools.reduce(lambda place, part: place.setdefault(part, {}), parents, variables)
            home[leaf] = np.frombuffer(data[begin:end], kinds[entry["dtype"]]).reshape(entry["shape"])
    call = jax.jit(jax.export.deserialize(bytearray((folder / "scorer.jaxexport").read_bytes())).call)
    vectors, item_ids = np.load(folder / "item_vectors.npy"), json.loads((folder / "item_ids.json").read_text())
    number, longest = {raw: place for place, raw in enumerate(item_ids, 1)}, manifest["max_length"]

    def score(histories):
        rows = [[number[raw] for raw in history][-longest:] for history in histories]
        return np.asarray(call(variables, vectors, np.array([r + [0] * (longest - len(r)) for r in rows], np.int32)))

    return score, item_ids


if __name__ == "__main__":
    scorer, ids = load()
    row = scorer([sys.argv[1:]])[0]
    print(*(f"{ids[place]}\t{row[place]:.3f}" for place in np.argsort(-row)[:10]), sep="\n")
