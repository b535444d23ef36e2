"""Every command and every piece of code in docs/ runs, in a copy of the repository; links lead somewhere."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from doc_runner import SKIPPED, blocks

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = ("own-shop", "model", "protocols", "extending")
COPIED = ("kdsr_jax", "configs", "tests", "setup.cfg")


@pytest.fixture
def clone(repository, tmp_path):
    """Return a folder with a copy of what the commands use, which they may change."""
    for name in COPIED:
        (shutil.copytree if (repository / name).is_dir() else shutil.copy)(repository / name, tmp_path / name)
    return tmp_path


def run_page(page, clone, *words):
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": str(clone), "COLUMNS": "100"}
    command = [sys.executable, Path(__file__).with_name("doc_runner.py"), DOCS / f"{page}.md", *words]
    done = subprocess.run(command, check=False, cwd=clone, env=environment, capture_output=True, text=True)
    assert done.returncode in (0, SKIPPED), f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    if done.returncode == SKIPPED:
        pytest.skip(f"all but the blocks that need packages ran; {done.stdout.splitlines()[-1]}")


def has_slow_blocks(page):
    return any("slow" in words for _, words, _ in blocks((DOCS / f"{page}.md").read_text()))


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.slow) if has_slow_blocks(page) else page for page in PAGES]
)
def test_a_page_runs(page, clone):
    run_page(page, clone, "--slow")


def test_commands_stand_where_they_are_run():
    for page in DOCS.glob("*.md"):
        for language, words, content in blocks(page.read_text()):
            assert language in ("bash", "python", "diff", "text"), f"{page.name}: {language}"
            assert all(word == "slow" or word.startswith("needs=") for word in words), f"{page.name}: {words}"
            if page.stem in PAGES and language == "text":
                assert "python -m" not in content, f"{page.name}: {content}"


def test_links_lead_somewhere():
    for page in (*DOCS.glob("*.md"), DOCS.parent / "README.md"):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize(
    ("page", "code"),
    [
        ("```python\nx = 1\n```\n```python\nassert x == 1\n```\n```text\nnot run\n```\n", 0),
        ("```python\nassert False\n```\n", 1),
        ("```bash\nfalse\ntrue\n```\n", 1),
        ("```bash\npython -m kdsr_jax.main --config=nowhere.py\n```\n", 2),
        ("```bash slow\nfalse\n```\n", 0),
        ("```bash needs=no_such_module\nfalse\n```\n", SKIPPED),
        (
            "```python\n# a/b.py\nold = 1\n```\n```diff\n+++ b/a/b.py\n@@\n-old = 1\n+new = 2\n```\n```bash\ngrep -x 'new = 2' a/b.py\n```\n",
            0,
        ),
        ("```python\n# a/b.py\nold = 1\n```\n```diff\n+++ b/a/b.py\n@@\n-other = 1\n+new = 2\n```\n", 1),
    ],
)
def test_the_runner_runs_what_it_should(page, code, tmp_path, repository):
    (tmp_path / "page.md").write_text(page)
    command = [sys.executable, repository / "tests" / "doc_runner.py", "page.md"]
    environment = os.environ | {"PYTHONPATH": str(repository)}
    assert subprocess.run(command, check=False, cwd=tmp_path, env=environment, capture_output=True).returncode == code
