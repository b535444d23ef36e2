"""Weights that come inside packages: found without importing the package, and read only if their hash is the known one."""

import hashlib
import importlib.util
import pathlib
import pickle
from collections import OrderedDict
from typing import Any

import numpy as np

from kdsr_jax.errors import UserError


def package_file(package: str, path: str, sha256: str, install: str) -> pathlib.Path:
    """Return the path of a package's data file.

    Args:
        package: name of the package; nothing of it is run.
        path: of the file below the package's folder.
        sha256: hash that the file must have, 64 hexadecimal digits.
        install: what installs the package, for the error.

    Raises:
        UserError: the package is not installed, or its file is missing or another one.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the package {package} is not installed; install it with: {install}")
    file = pathlib.Path(spec.submodule_search_locations[0]) / path
    if not file.is_file():
        raise UserError(f"{file}: missing; install the package anew with: {install}")
    with open(file, "rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256:
        raise UserError(f"{file}: is not the file this version knows (sha256 {found[:12]}…, expected {sha256[:12]}…)")
    return file


def require(package: str, install: str) -> Any:
    """Import a package that an extra brings.

    Raises:
        UserError: it is not installed.
    """
    if importlib.util.find_spec(package) is None:
        raise UserError(f"the package {package} is not installed; install it with: {install}")
    return importlib.import_module(package)


def read_pth(file: pathlib.Path) -> dict[str, np.ndarray]:
    """Read the tensors of a .pth file of the form before torch 1.6, without torch and without running anything in it.

    Four pickles (magic number, protocol, sizes, tensors by name) and one with the keys of the storages, behind which
    stand the storages: a 64-bit count and little-endian numbers.

    Args:
        file: of a state_dict of float and long tensors.

    Returns:
        Arrays by name; one without elements' names where there is none.

    Raises:
        pickle.UnpicklingError: it holds anything else.
    """
    with open(file, "rb") as stream:
        for _ in range(3):
            _Tensors(stream).load()
        tensors, keys = _Tensors(stream).load(), _Tensors(stream).load()
        kinds = {key: kind for (_, kind, key, *_), *_ in tensors.values()}
        storages = {}
        for key in keys:
            count = int(np.frombuffer(stream.read(8), "<i8")[0])
            kind = np.dtype(kinds[key])
            storages[key] = np.frombuffer(stream.read(count * kind.itemsize), kind)
    return {name: _view(storages[place[2]], *layout) for name, (place, *layout) in tensors.items()}


def _view(storage, offset, shape, strides):
    bytes_apart = [step * storage.itemsize for step in strides]
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, bytes_apart).copy()


_KNOWN = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): lambda storage, offset, shape, strides, *_: (
        storage,
        offset,
        shape,
        strides,
    ),
    ("torch", "FloatStorage"): "<f4",
    ("torch", "LongStorage"): "<i8",
}


class _Tensors(pickle.Unpickler):
    """Unpickles tensors as (storage, offset, shape, strides), and refuses whatever is no tensor."""

    def find_class(self, module, name):
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"holds {module}.{name}")
        return _KNOWN[module, name]

    def persistent_load(self, place):
        return place
