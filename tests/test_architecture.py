"""Who may import whom, how large things may be, and that nothing heavy is imported before it is needed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "kdsr_jax"
FILES = sorted(PACKAGE.rglob("*.py"))

# The only places that may import a library; a place is a file or a folder of kdsr_jax/.
ONLY_IN = {
    "flax": {"models"},
    "orbax": {"checkpoint.py"},
    "tensorflow_datasets": {"data/shard_writer.py"},
    "array_record": {"data/shards.py"},
    "jinja2": {"report"},
    "markupsafe": {"report"},
    "optuna": {"search.py", "tune.py"},
    "sqlalchemy": {"search.py"},
    "ml_collections": {"main.py", "config.py"},
    "absl": {"main.py", "cli.py"},
    "tensorflow": set(),
    "torch": {"encoders/hub.py"},
    "transformers": {"encoders/hub.py"},
    "sentence_transformers": {"encoders/hub.py"},
    "PIL": {"encoders/pictures.py"},
    "jax2onnx": {"export.py"},
    "onnxruntime": {"export.py"},
}
# What a part of the package may import from the rest of it; parts that are not named here may import any but main.
MAY_IMPORT = {
    "__init__": set(),  # by name, at the first use
    "errors": {"cache"},
    "cache": set(),
    "catalogue": set(),
    "ops": {"ops"},
    "data": {"data", "cache", "catalogue", "errors"},
    "models": {"models", "ops", "errors"},
    "report": {"report", "cli", "config", "data", "errors", "files", "labels"},
    "files": set(),
    "labels": set(),
    "checks": set(),
    "fields": {"checks"},
    "config": {"catalogue", "checks", "errors", "fields"},
    "cli": {"checks", "config", "errors"},
    "main": {"cli", "config", "data", "encode", "errors", "train"},
    "encoders": {"encoders", "data", "errors", "files"},
    "axes": {"cli", "config", "errors"},
    "explore": {"compare", "errors", "explorer", "labels", "recommender", "report"},
    "explorer": {"config", "data", "errors", "explain", "ops", "report"},
}
# What these parts may import from outside of the standard library.
MAY_USE = {
    "__init__": set(),
    "errors": set(),
    "cache": set(),
    "catalogue": set(),
    "ops": {"jax", "chex"},
    "data": {"numpy", "pyarrow", "tensorflow_datasets", "array_record", "rich"},
    "report": {"numpy", "jinja2", "markupsafe"},
    "files": set(),
    "labels": set(),
    "checks": set(),
    "config": {"ml_collections"},
    "cli": {"absl"},
    "axes": set(),
    "explore": set(),
    "explorer": {"numpy"},
    "main": set(),
}


def imports(source):
    """Every module that a source imports, at its top or inside a function, by dotted name."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def part(path):
    """The part of the package that a file belongs to: a folder such as ops, or a module such as train."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def internal(source):
    """The parts of kdsr_jax that a source imports."""
    names = {name.split(".")[1] for name in imports(source) if name.startswith("kdsr_jax.")}
    return {name for name in names if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()}


def external(source):
    """The libraries that a source imports, by their first name."""
    roots = {name.split(".")[0] for name in imports(source)}
    return roots - sys.stdlib_module_names - {"kdsr_jax"}


def functions(path):
    tree = ast.parse(path.read_text())
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def relative(path):
    return path.relative_to(PACKAGE).as_posix()


each_file = pytest.mark.parametrize("path", FILES, ids=relative)


def test_imports_are_found_wherever_they_stand():
    source = (
        "import jax.numpy as jnp\ndef f():\n    from kdsr_jax import train\n    from kdsr_jax.ops.losses import x\n"
    )
    assert imports(source) == {"jax.numpy", "kdsr_jax.train", "kdsr_jax.ops.losses.x"}
    assert external(source) == {"jax"}
    assert "ops" in internal(source)


@each_file
def test_a_library_is_imported_only_in_its_place(path):
    for library in external(path.read_text()) & set(ONLY_IN):
        places = ONLY_IN[library]
        assert any(relative(path) == place or relative(path).startswith(place + "/") for place in places), library


@each_file
def test_a_part_imports_only_what_lies_below_it(path):
    name, source = part(path), path.read_text()
    assert "main" not in internal(source)
    if name not in ("main", "train", "fitting", "tune"):
        assert "train" not in internal(source)
    if name in MAY_IMPORT:
        assert internal(source) <= MAY_IMPORT[name]
    if name in MAY_USE:
        assert external(source) <= MAY_USE[name]


@pytest.mark.parametrize("path", [path for path in FILES if part(path) == "models"], ids=relative)
def test_models_take_layers_with_cheap_gradients(path):
    for layer in ("Dense", "LayerNorm"):
        assert f"nn.{layer}(" not in path.read_text().replace(f"class {layer}(nn.{layer})", ""), (
            f"use models/flat.py: {layer}"
        )


@each_file
def test_every_module_has_a_docstring_and_a_readable_size(path):
    source = path.read_text()
    assert ast.get_docstring(ast.parse(source)), "a module says what it is for"
    assert len(source.splitlines()) <= 350
    for function in functions(path):
        assert function.end_lineno - function.lineno < 60, function.name


@each_file
def test_public_functions_have_docstrings(path):
    tree = ast.parse(path.read_text())
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


def test_main_stays_a_front_door():
    assert len((PACKAGE / "main.py").read_text().splitlines()) <= 80


def loaded_after(code):
    """The heavy libraries in memory when a program of its own has run."""
    heavy = "{'jax', 'jaxlib', 'flax', 'optax', 'orbax', 'tensorflow_datasets', 'numpy', 'pyarrow', 'scipy', 'rich'}"
    program = f"{code}\nimport sys\nprint(*sorted({heavy} & set(sys.modules)), file=sys.stderr)"
    completed = subprocess.run(
        [sys.executable, "-c", program], check=False, cwd=PACKAGE.parent, capture_output=True, text=True, timeout=60
    )
    assert completed.returncode == 0, completed.stderr
    return set(completed.stderr.splitlines()[-1].split())


def test_importing_it_leaves_the_logging_of_a_service_as_it_is():
    program = """
import logging, sys
from kdsr_jax import Recommender
for name in ("absl", "asyncio", None):
    assert logging.getLogger(name).level < logging.CRITICAL, name
assert sys.unraisablehook is sys.__unraisablehook__
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=PACKAGE.parent, timeout=120)


def test_the_package_itself_imports_nothing_heavy():
    assert loaded_after("import kdsr_jax") == set()


def test_help_and_mistakes_are_answered_before_jax_is_imported():
    lines = [
        (["--help"], 0),
        (["--config=configs/nope.py"], 2),
        (["--config=configs/planted.py:sasrek"], 2),
        (["--config=configs/planted.py", "--config.model.dim=7", "--workdir=x"], 2),
    ]
    run = "import sys\nfrom kdsr_jax.main import main\n" + "".join(
        f"sys.argv = ['main', *{words}]\nassert main() == {code}\n" for words, code in lines
    )
    assert not loaded_after(run) & {"jax", "jaxlib", "flax", "optax", "orbax", "tensorflow_datasets", "pyarrow"}


def test_mistakes_of_a_search_are_answered_before_jax_is_imported():
    words = ["--config=configs/planted.py", "--workdir=x", "--try=model.num_heads=3"]
    run = f"from kdsr_jax.tune import main\nassert main({words}) == 2"
    assert not loaded_after(run) & {"jax", "jaxlib", "flax", "optax", "orbax", "numpy", "pyarrow"}


def test_mistakes_of_the_explorer_are_answered_before_jax_is_imported():
    run = "from kdsr_jax.explore import main\nassert main(['--workdir=/nowhere']) == 2"
    assert not loaded_after(run) & {"jax", "jaxlib", "flax", "optax", "orbax"}


def test_data_and_report_know_no_jax():
    assert not loaded_after("import kdsr_jax.data, kdsr_jax.report.page") & {"jax", "jaxlib", "flax", "optax", "orbax"}
