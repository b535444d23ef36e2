"""Write a finished run's model as a folder that needs jax (with flatbuffers, for jax.export) and numpy alone.

python -m kdsr_jax.export --workdir=FOLDER --out=FOLDER [--onnx]

The folder holds
  scorer.jaxexport    StableHLO of (variables, item vectors [N, dim], histories [n, max_length] int32) -> scores [n, N]
                      for any n, on cpu, cuda and tpu; histories are item numbers from 1, right padded with 0
  params.safetensors  the variables, by path
  item_vectors.npy    [N, dim] float32, what representations are compared with
  item_ids.json       raw ids; entry j is item number j + 1
  load.py             from raw ids to scores
  scorer.onnx         with --onnx: "histories" [n, max_length] int32 -> "scores" [n, N] for any n, weights included; to rounding
  manifest.json       what it was made of and with, and size and sha256 of each file
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import pathlib
import shutil
import sys
import warnings
from collections.abc import Sequence

from kdsr_jax.errors import Parser, UserError, answer

PLATFORMS = ("cpu", "cuda", "tpu")
VERSIONS = ("jax", "jaxlib", "flax", "numpy")
ONNX_ERROR = 1e-4  # most that an ONNX score may be off, of the largest score


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, 2 after one line about what the user can put right, or 130 after Ctrl-C."""
    parser = Parser(prog="python -m kdsr_jax.export", description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--workdir", required=True, help="of a finished run")
    parser.add_argument("--out", required=True, help="a folder that does not exist yet")
    parser.add_argument("--onnx", action="store_true", help="write scorer.onnx, too (extra onnx)")

    def work():
        arguments = parser.parse_args(words)
        export(arguments.workdir, arguments.out, arguments.onnx)

    return answer(work, "interrupted; nothing was written")


def export(workdir, out, onnx=False):
    """Export a finished run; the folder is there whole or not at all.

    Args:
      workdir: of the run.
      out: the folder to make.
      onnx: write scorer.onnx, too.

    Returns:
      dict, the manifest.

    Raises:
      UserError: ``out`` exists or cannot be written, the run is not finished, the extra "export" or "onnx" is not
        installed, or the model cannot be put into ONNX.
    """
    out = pathlib.Path(out)
    if out.exists():
        raise UserError(f"--out={out}: exists already; give a new folder")
    try:
        import flatbuffers  # noqa: F401 - for jax.export
        from safetensors.numpy import save
    except ImportError as error:
        raise UserError("exports need safetensors and flatbuffers; pip install 'kdsr-jax[export]'") from error
    missing = [name for name in ("jax2onnx", "onnxruntime") if onnx and importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--onnx needs {' and '.join(missing)}; pip install 'kdsr-jax[onnx]'")
    from kdsr_jax.recommender import Recommender

    recommender = Recommender.from_workdir(workdir)
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        manifest = _write(recommender, temporary, save, onnx)
        temporary.rename(out)
    except OSError as error:
        raise UserError(f"--out={out}: cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for name, file in manifest["files"].items():
        print(f"{file['bytes']:>12,}  {file['sha256'][:16]}  {name}")
    print(f"export: {out}")
    return manifest


def _write(recommender, folder, save, onnx):
    import jax
    import numpy as np

    from kdsr_jax.config import fingerprint

    variables, vectors = jax.device_get((recommender.variables, recommender.item_vectors))
    (folder / "scorer.jaxexport").write_bytes(_scorer(recommender, variables, vectors))
    flat = {"/".join(key.key for key in path): a for path, a in jax.tree_util.tree_leaves_with_path(variables)}
    if onnx:
        (folder / "scorer.onnx").write_bytes(_onnx_scorer(recommender))
    content = save({name: np.ascontiguousarray(array) for name, array in flat.items()})
    (folder / "params.safetensors").write_bytes(content)
    np.save(folder / "item_vectors.npy", vectors)
    (folder / "item_ids.json").write_text(json.dumps([str(raw) for raw in recommender.item_ids[1:]]))
    shutil.copyfile(pathlib.Path(__file__).with_name("export_loader.py"), folder / "load.py")
    config = recommender.config
    manifest = {"backbone": config.model.name, "num_items": recommender.num_items, "max_length": config.data.max_length}
    manifest |= {"config_fingerprint": fingerprint(config), "platforms": PLATFORMS}
    manifest |= {"versions": {name: importlib.metadata.version(name) for name in VERSIONS + ("jax2onnx",) * onnx}}
    manifest["files"] = {
        file.name: {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in sorted(folder.iterdir())
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def _scorer(recommender, variables, vectors):
    """Return the serialized scorer, for any number of histories."""
    import jax
    import jax.export

    from kdsr_jax.layout import precision

    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (variables, vectors))
    (rows,) = jax.export.symbolic_shape("n")
    histories = jax.ShapeDtypeStruct((rows, recommender.config.data.max_length), "int32")
    limit = jax.config.jax_traceback_in_locations_limit
    jax.config.update("jax_traceback_in_locations_limit", 0)  # the same bytes wherever this package lies
    try:
        with precision(recommender.config):
            exported = jax.export.export(recommender.score_histories, platforms=PLATFORMS)(*shapes, histories)
    finally:
        jax.config.update("jax_traceback_in_locations_limit", limit)
    return bytes(exported.serialize())


def _onnx_scorer(recommender):
    """Return the scorer with its weights in ONNX, for any number of histories, after a trial of it."""
    import jax
    import jax2onnx
    import numpy as np

    score = recommender.score_histories.__wrapped__  # traced anew: jax2onnx puts its own layers in place of Flax's
    variables, vectors = recommender.variables, recommender.item_vectors
    histories = jax.ShapeDtypeStruct(("n", recommender.config.data.max_length), np.int32)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it says of the libraries that it uses
            for name in ("jax2onnx", "onnx_ir"):  # tracebacks of parts that are not needed; a line a shape
                logging.getLogger(name).setLevel(logging.ERROR)
            model = jax2onnx.to_onnx(
                lambda rows: score(variables, vectors, rows),
                [histories],
                input_names=["histories"],
                output_names=["scores"],
            )
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        version = importlib.metadata.version("jax2onnx")
        raise UserError(
            f"--onnx: jax2onnx {version} cannot convert {recommender.config.model.name} ({reason}); leave --onnx out"
        ) from error
    content = model.SerializeToString()
    _try_onnx(recommender, content)
    return content


def _try_onnx(recommender, content):
    """Score some histories by ONNX and by the model; an error if the scores differ by more than rounding."""
    import numpy as np
    import onnxruntime

    rng, longest = np.random.default_rng(0), recommender.config.data.max_length
    lengths = {1, 2, min(3, longest), longest}
    histories = [rng.integers(1, recommender.num_items, length, np.int32, endpoint=True) for length in lengths]
    expected = recommender.scores(histories)
    rows = np.stack([np.pad(row, (0, longest - len(row))) for row in histories])
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    error = np.abs(session.run(["scores"], {"histories": rows})[0] - expected).max() / np.abs(expected).max()
    if not error < ONNX_ERROR:
        name = recommender.config.model.name
        raise UserError(
            f"--onnx: {name} scores otherwise in ONNX, by {error:.1e} of the largest score; leave --onnx out"
        )


if __name__ == "__main__":
    sys.exit(main())
