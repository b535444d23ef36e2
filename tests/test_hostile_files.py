"""Files written by others: any bytes end in data or in one clear error, and nothing in them is ever run."""

import ast
import gzip
import io
import json
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_strategies

from kdsr_jax.data import arrays
from kdsr_jax.data.arrays import read_arrays
from kdsr_jax.data.features import load_features
from kdsr_jax.data.interactions import build_interactions
from kdsr_jax.data.sources import codes, folder
from kdsr_jax.errors import UserError

ITEM_IDS = np.array(["", *(f"i{n}" for n in range(8))])
RUNS_CODE = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle", "code"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder that all examples of a property overwrite."""
    return tmp_path_factory.mktemp("hostile")


def npy(array=None, header=None, version=(1, 0)):
    """Return the bytes of an .npy file; a header is written as it is, before the array's bytes."""
    stream = io.BytesIO()
    if header is None:
        np.lib.format.write_array(stream, array, version=version, allow_pickle=True)
    else:
        text = header.encode("latin-1")
        stream.write(b"\x93NUMPY" + bytes(version) + len(text).to_bytes(2, "little") + text)
        stream.write(b"" if array is None else array.tobytes())
    return stream.getvalue()


def claim(shape, descr="<f4", fortran=False):
    return f"{{'descr': {descr!r}, 'fortran_order': {fortran}, 'shape': {shape}, }}\n"


def write_zip(path, entries, compression=zipfile.ZIP_STORED, file_size=None):
    """Write a zip file of (name, bytes); with a file_size its directory claims that of the first."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries:
            archive.writestr(name, content)
        if file_size is not None:
            archive.filelist[0].file_size = file_size
    return path


def refused(path, message):
    with pytest.raises(UserError) as error:
        read_arrays(path, ("a",))
    assert message in str(error.value) and str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


@given(
    values=numpy_strategies.arrays(
        st.sampled_from([np.float16, np.float32, ">f8", np.int8, ">i8", bool, "U3", ">U2", "S4"]),
        numpy_strategies.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
    ),
    fortran=st.booleans(),
    version=st.sampled_from([(1, 0), (2, 0)]),
    compression=st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]),
)
def test_arrays_come_back_as_numpy_reads_them(place, values, fortran, version, compression):
    if fortran:
        values = np.asfortranarray(values)
    if values.dtype.kind == "U" and any(0xD800 <= ord(c) < 0xE000 for text in values.flat for c in text):
        return  # those are refused, see below
    path = write_zip(place / "good.npz", [("a.npy", npy(values, version=version)), ("b.npy", b"?")], compression)
    read = read_arrays(path, ("a",))["a"]
    assert read.shape == values.shape and read.dtype == values.dtype.newbyteorder("=")
    np.testing.assert_array_equal(read, values)


@pytest.fixture
def no_allocation(monkeypatch):
    """Let setting memory aside for an array fail the test."""
    monkeypatch.setattr(arrays.np, "empty", lambda *_, **__: pytest.fail("memory was set aside"))


TERABYTES = claim((2**40, 4))


@pytest.mark.usefixtures("no_allocation")
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_header_that_claims_terabytes_is_refused_before_allocation(tmp_path, compression):
    content = npy(np.zeros(64, np.float32), TERABYTES)
    entries = [("a.npy", content)]
    refused(write_zip(tmp_path / "a.npz", entries, compression), "claims the shape [1099511627776, 4] of float32")
    claimed = len(content) - 256 + 2**44
    refused(write_zip(tmp_path / "a.npz", entries, compression, claimed), "claims 17,592,186,044,")


@pytest.mark.usefixtures("no_allocation")
def test_more_than_the_machine_has_is_refused_before_allocation(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "machine_memory", lambda: 100_000)
    bomb = npy(np.zeros(1_000_000, np.float32))
    path = write_zip(tmp_path / "a.npz", [("a.npy", bomb)], zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10_000
    refused(path, "array 'a' needs 4,000,000 bytes, more than this machine has")


@pytest.mark.usefixtures("no_allocation")
@pytest.mark.parametrize(
    ("header", "message"),
    [
        (claim((-4,)), "claims the shape [-4]"),
        (claim((-4, -4)), "claims the shape"),
        (claim((3,)), "claims the shape [3] of float32, which is not what the file holds"),
        (claim((10**30,)), "claims the shape"),
        (claim((2**63, 2**63, 0)), "claims the shape"),
        (claim((10**12,), "<U0"), "holds values of type <U0"),
        (claim((4,), "|O"), "it holds pickled (object) arrays, which are not read"),
        (claim((4,), "<c8"), "holds values of type complex64"),
        (claim((4,), "<M8[s]"), "holds values of type datetime64[s]"),
        ("{'descr': [('x', '<f4'), ('y', '|O')], 'fortran_order': False, 'shape': (4,), }", "pickled (object)"),
        ("{'descr': [('x', '<f4')], 'fortran_order': False, 'shape': (4,), }", "holds values of type"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': __import__('os').system('true'), }", "not a readable"),
        ("[" * 5000, "not a readable .npz"),
        ("{" * 60_000, "not a readable .npz"),
        ("", "not a readable .npz"),
    ],
)
def test_bad_headers(tmp_path, header, message):
    refused(write_zip(tmp_path / "a.npz", [("a.npy", npy(np.zeros(4, np.float32), header))]), message)


def test_objects_and_version_3_are_refused(tmp_path):
    refused(write_zip(tmp_path / "a.npz", [("a.npy", npy(np.array(["a", None], object)))]), "pickled (object)")
    refused(write_zip(tmp_path / "a.npz", [("a.npy", npy(np.ones(1), version=(3, 0)))]), "version (3, 0)")


@pytest.mark.parametrize("code", [0x110000, 2**32 - 1, 0xD800, 0xDFFF])
def test_strings_of_broken_characters_are_refused(tmp_path, code):
    codes = npy(np.array([97, code], np.uint32), claim((2,), "<U1"))
    refused(write_zip(tmp_path / "a.npz", [("a.npy", codes)]), "array 'a' holds broken characters")


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_odd_entries_are_refused_or_ignored(tmp_path):
    good = npy(np.ones(2))
    path = tmp_path / "below" / "a.npz"
    path.parent.mkdir()
    odd = ["../../escaped.npy", "/tmp/escaped.npy", "C:\\x.npy", "a.npy/", "a\x1b[31m.npy", "b/../a.npy"]
    write_zip(path, [("a.npy", good), *((name, good) for name in odd)])
    assert read_arrays(path, ("a",))["a"].tolist() == [1, 1]
    assert sorted(tmp_path.rglob("*")) == [path.parent, path]
    write_zip(path, [(name, good) for name in odd])
    refused(path, "array 'a' is missing; the file has: ")
    assert "\x1b" not in str(pytest.raises(UserError, read_arrays, path, ("a",)).value)
    refused(write_zip(path, [("a.npy", good), ("a.npy", good)]), "more than one array 'a'")
    refused(write_zip(path, [("a.npy", good)], zipfile.ZIP_LZMA), "compressed in another way")


def test_a_wrong_checksum_is_found(tmp_path):
    path = write_zip(tmp_path / "a.npz", [("a.npy", npy(np.arange(100.0)))])
    content = bytearray(path.read_bytes())
    content[400] ^= 1
    path.write_bytes(content)
    refused(path, "Bad CRC-32")


# --- any bytes ------------------------------------------------------------------------------------------------------

CSV = b"user_id,item_id,timestamp,rating\n" + b"".join(b"u%d,i%d,%d,5\n" % (n % 3, n % 8, n) for n in range(30))
ITEMS = b"".join(json.dumps({"item_id": f"i{n}", "title": "T\u00e9 \U0001f600"}).encode() + b"\n" for n in range(8))


def parquet():
    stream = io.BytesIO()
    columns = {"user_id": [f"u{n % 3}" for n in range(30)], "item_id": [n % 8 for n in range(30)]}
    pa.parquet.write_table(pa.table(columns | {"timestamp": np.arange(30.0)}), stream)
    return stream.getvalue()


def features():
    stream = io.BytesIO()
    np.savez_compressed(stream, item_id=ITEM_IDS[1:], features=np.ones((8, 2), np.float32))
    return stream.getvalue()


@st.composite
def damaged(draw, whole):
    """Bytes that were a good file, after flips, cuts, repetitions and insertions."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        kind = draw(st.sampled_from(["flip", "set", "cut", "insert", "repeat", "drop"]))
        if kind == "flip" and at < len(content):
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set" and at < len(content):
            content[at] = draw(st.sampled_from([0, 10, 13, 34, 44, 127, 128, 255]))
        elif kind == "cut":
            del content[at:]
        elif kind == "insert":
            content[at:at] = draw(st.binary(max_size=20))
        elif kind == "repeat":
            content[at:at] = content[max(0, at - 20) : at]
        elif kind == "drop":
            del content[at : at + draw(st.integers(1, 20))]
    return bytes(content)


def read_log(path):
    build_interactions(folder.load_log(path.parent), 1)


READERS = {
    "interactions.csv": (CSV, read_log),
    "interactions.csv.gz": (gzip.compress(CSV, mtime=0), read_log),
    "interactions.parquet": (parquet(), read_log),
    "part.parquet": (parquet(), lambda path: build_interactions(folder.load_log(path.parent.parent), 1)),
    "items.jsonl": (ITEMS, lambda path: folder.load_items(path.parent, ITEM_IDS)),
    "items.jsonl.gz": (gzip.compress(ITEMS, mtime=0), lambda path: folder.load_items(path.parent, ITEM_IDS)),
    "text-x.npz": (features(), lambda path: load_features(path, ITEM_IDS)),
}


def try_reading(place, name, content):
    """Read a file; return whether that gave data, or one clear line that names it."""
    path = place / name / ("interactions" if name.startswith("part.") else "") / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    try:
        READERS[name][1](path)
    except UserError as error:
        assert str(error).strip() and len(str(error)) < 10_000
        str(error).encode()
        return False
    return True


@pytest.mark.parametrize("name", READERS)
def test_the_good_files_are_read(place, name):
    assert try_reading(place, name, READERS[name][0])


def any_bytes(name, examples):
    """Return a property of a reader over damaged and made-up files."""

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(content=st.one_of(damaged(READERS[name][0]), damaged(READERS[name][0]), st.binary(max_size=200)))
    def check(place, content):
        try_reading(place, name, content)

    return check


@pytest.mark.parametrize("name", READERS)
def test_any_bytes_give_data_or_one_error(place, name):
    any_bytes(name, 150)(place)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_many_more_bytes_give_data_or_one_error(place, name):
    any_bytes(name, 2000)(place)


# JSON values of every kind, and text that is nearly JSON.
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda part: (
        st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=4) | st.just("item_id"), part, max_size=3)
    ),
)


@given(lines=st.lists(JSON | st.fixed_dictionaries({"item_id": JSON}), max_size=5))
def test_any_json_lines_give_items_or_one_error(place, lines):
    try_reading(place, "items.jsonl", "\n".join(json.dumps(line) for line in lines).encode())


@pytest.mark.parametrize(
    "line",
    [b"[" * 100_000, b'{"item_id": ' + b"9" * 5000 + b"}", b'{"a":' * 50_000, b'{"item_id": "\\ud800"}\n' * 2, b"\xff"],
)
def test_json_lines_that_upset_parsers_are_one_error(place, line):
    assert not try_reading(place, "items.jsonl", line)


CELL = (
    st.none()
    | st.text(st.characters(codec="utf-8"), max_size=6)
    | st.sampled_from(["", "NA", "nan", "1e5", "\0", "a\n"])
)
ROWS = st.lists(st.tuples(CELL, CELL, CELL), min_size=1, max_size=6)


@given(rows=ROWS, kinds=st.tuples(*[st.sampled_from(["string", "int", "float", "list", "time", "bool", "binary"])] * 3))
def test_parquet_of_any_types_gives_data_or_one_error(place, rows, kinds):
    make = {
        "string": lambda texts: pa.array(texts, pa.string()),
        "int": lambda texts: pa.array([None if t is None else len(t) for t in texts], pa.uint64()),
        "float": lambda texts: pa.array([None if t is None else float(len(t)) or np.inf for t in texts]),
        "list": lambda texts: pa.array([None if t is None else [t] for t in texts], pa.list_(pa.string())),
        "time": lambda texts: pa.array([None if t is None else len(t) for t in texts], pa.timestamp("us", "UTC")),
        "bool": lambda texts: pa.array([None if t is None else bool(t) for t in texts], pa.bool_()),
        "binary": lambda texts: pa.array([None if t is None else t.encode() for t in texts], pa.binary()),
    }
    columns = [make[kind](list(column)) for kind, column in zip(kinds, zip(*rows, strict=True), strict=True)]
    stream = io.BytesIO()
    pa.parquet.write_table(pa.table(columns, ["user_id", "item_id", "timestamp"]), stream)
    try_reading(place, "interactions.parquet", stream.getvalue())


def test_one_endless_id_among_many_is_refused_before_it_multiplies(place, monkeypatch):
    lines = ["user_id,item_id", *(f"u{n},i" for n in range(100)), f"{'x' * 10_000},i"]
    content = "\n".join(lines).encode()
    (place / "long").mkdir()
    (place / "long" / "interactions.csv").write_bytes(content)
    assert folder.load_log(place / "long").user_names[-1] == "x" * 10_000
    monkeypatch.setattr(codes, "_MOST_CHARACTERS", 500_000)
    with pytest.raises(UserError, match="'user_id' 'xxxxxxxxxxxxxxxxxxxx'... has 10,000 characters, too many"):
        folder.load_log(place / "long")


# --- no deserializer that runs code ---------------------------------------------------------------------------------


def code_runners(source):
    """List the calls and imports of a module through which a file could run code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            found += [name for name in names if name.partition(".")[0] in RUNS_CODE]
        elif isinstance(node, ast.Name) and node.id in ("eval", "exec", "__import__"):
            found.append(node.id)
        elif isinstance(node, ast.Attribute) and node.attr in ("read_pickle", "to_pickle", "unsafe_load", "full_load"):
            found.append(node.attr)
        elif isinstance(node, ast.Attribute) and node.attr in ("load", "load_all"):
            if isinstance(node.value, ast.Name) and node.value.id in ("yaml", "torch"):
                found.append(f"{node.value.id}.{node.attr}")
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            found.append("allow_pickle")
    return found


def test_no_module_holds_a_deserializer_that_runs_code(repository):
    sources = [file for part in ("kdsr_jax", "configs", "experiments") for file in (repository / part).rglob("*.py")]
    assert len(sources) > 40
    # Reads weights that are known by their hash, and finds no class but those of a list of its own.
    restricted = repository / "kdsr_jax" / "encoders" / "packages.py"
    for file in sources:
        assert code_runners(file.read_text()) == (["pickle"] if file == restricted else []), file


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import marshal as m",
        "import shelve",
        "np.load(file, allow_pickle=True)",
        "np.load(file, allow_pickle=trusted)",
        "eval(text)",
        "exec(text)",
        "run = eval",
        "yaml.load(text)",
        "from joblib import load",
        "pandas.read_pickle(file)",
        "torch.load(file)",
    ],
)
def test_the_search_for_deserializers_finds_them(source):
    assert code_runners(source)


def test_the_search_for_deserializers_leaves_others_alone():
    assert code_runners("jax.eval_shape(f); np.load(f, allow_pickle=False); json.load(f); yaml.safe_load(t)") == []
