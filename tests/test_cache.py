"""Compiled programs are kept for the next process, where the user has not said otherwise and the folder can be written."""

import os
import subprocess
import sys
import tempfile

import pytest

from kdsr_jax import cache
from kdsr_jax.cache import keep_compiled

VARIABLE = "JAX_COMPILATION_CACHE_DIR"


def test_compiled_programs_are_kept_in_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("KDSR_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(VARIABLE)
    keep_compiled()
    assert os.environ[VARIABLE] == str(tmp_path / "cache" / "compiled")


@pytest.mark.parametrize("said", ["", "elsewhere"])
def test_what_the_user_says_of_compiled_programs_holds(monkeypatch, said):
    monkeypatch.setenv(VARIABLE, said)
    keep_compiled()
    assert os.environ[VARIABLE] == said


def test_without_a_home_the_named_folder_holds_or_a_temporary_one(monkeypatch, tmp_path):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(cache.Path, "home", homeless)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("KDSR_CACHE", str(tmp_path))
    assert cache.cache_folder() == tmp_path
    monkeypatch.delenv("KDSR_CACHE")
    assert cache.cache_folder() == cache.Path(tempfile.gettempdir()) / "kdsr_jax"


def test_a_folder_that_cannot_be_written_is_done_without(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("KDSR_CACHE", str(tmp_path / "file" / "below"))
    monkeypatch.delenv(VARIABLE)
    keep_compiled()
    assert VARIABLE not in os.environ


def test_output_that_nobody_reads_to_its_end_is_no_mistake(repository):
    script = "from kdsr_jax.errors import answer; raise SystemExit(answer(lambda: print(*['line'] * 10**6, sep='\\n')))"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", script], cwd=repository, stdout=pipe, stderr=pipe) as process:
        assert process.stdout.readline() == b"line\n"
        process.stdout.close()
        assert (process.wait(60), process.stderr.read()) == (1, b"")


def test_a_command_finds_the_programs_of_the_last_one(tmp_path, repository):
    script = (
        "from kdsr_jax.errors import answer\n"
        "def work():\n"
        "    import jax\n"
        "    jax.monitoring.register_event_listener(lambda name, **_: print(name))\n"
        "    jax.jit(lambda x: x * 2 + 1)(1.0)\n"
        "answer(work)\n"
    )
    environment = os.environ | {"KDSR_CACHE": str(tmp_path)}
    del environment[VARIABLE]

    def hits():
        words = [sys.executable, "-c", script]
        done = subprocess.run(words, cwd=repository, env=environment, capture_output=True, text=True, check=True)
        return done.stdout.count("/cache_hits")

    assert hits() == 0
    assert hits() == 1
