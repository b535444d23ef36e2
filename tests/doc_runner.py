"""Run the fenced blocks of a page of docs/ in order, in the working directory, a copy of the repository.

    python doc_runner.py PAGE.md [--slow]

bash     its commands; ``python -m MODULE ...`` in this process, to import jax only once, all others by bash
python   run; one whose first line is ``# a/path.py`` is written to that file instead, without that line
diff     lines of files are replaced; old ones must occur exactly once
others   shown, not run

A word behind the language narrows it: ``slow`` blocks are left out without --slow, ``needs=a,b`` blocks where a module of these
cannot be imported, and then the exit code is 77.
"""

import importlib.util
import itertools
import logging
import pathlib
import re
import runpy
import shlex
import subprocess
import sys

FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SKIPPED = 77
_FILE = re.compile(r"# ([\w/]+\.py)\n")
_NAMES = {"__name__": "__main__"}  # of all python blocks of the page
_COMMAND = re.compile(r"python -m [^|&;<>$]*")


def blocks(page):
    """Yield (language, words behind it, content) of a page's fenced blocks."""
    for language, words, content in FENCE.findall(page):
        yield language, words.split(), content


def main(path, slow):
    """Run a page; return the exit code."""
    skipped = set()
    for language, words, content in blocks(pathlib.Path(path).read_text()):
        if "slow" in words and not slow:
            continue
        needs = [name for word in words if word.startswith("needs=") for name in word[6:].split(",")]
        if missing := [name for name in needs if importlib.util.find_spec(name) is None]:
            skipped.update(missing)
        elif language == "bash":
            _run_shell(content)
        elif language == "python":
            _run_python(content)
        elif language == "diff":
            _apply(content)
    if skipped:
        print("not installed:", ", ".join(sorted(skipped)))
    return SKIPPED if skipped else 0


def _run_shell(content):
    commands = re.sub(r"\\\n\s*", "", content).splitlines()
    for inside, lines in itertools.groupby(commands, lambda line: bool(_COMMAND.fullmatch(line))):
        if not inside:
            subprocess.run(["bash", "-ec", "\n".join(lines)], check=True)
            continue
        for line in lines:
            print("$", line, flush=True)
            _run_module(*shlex.split(line, comments=True)[2:])


def _run_module(name, *words):
    handlers, sys.argv = list(logging.getLogger("kdsr_jax").handlers), [name, *words]
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            raise
    finally:
        logging.getLogger("kdsr_jax").handlers[:] = handlers


def _run_python(content):
    if named := _FILE.match(content):
        file = pathlib.Path(named[1])
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content[named.end() :])
        _forget_modules()
    else:
        exec(compile(content, "<page>", "exec"), _NAMES)  # noqa: S102 - it is what this is for


def _apply(diff):
    for file, changes in re.findall(r"^\+\+\+ b/(\S+)\n((?:[^-].*\n|-[^-].*\n)*)", diff, re.MULTILINE):
        text = pathlib.Path(file).read_text()
        for hunk in re.split(r"^@@.*\n", changes, flags=re.MULTILINE):
            lines = hunk.splitlines(keepends=True)
            old = "".join(line[1:] for line in lines if line[0] in " -")
            assert not lines or text.count(old) == 1, f"{file}: {text.count(old)} times:\n{old}"
            text = text.replace(old, "".join(line[1:] for line in lines if line[0] in " +")) if lines else text
        pathlib.Path(file).write_text(text)
    _forget_modules()


def _forget_modules():
    """Import the package anew at the next command: its files have changed."""
    for name in list(sys.modules):
        if name.split(".")[0] in ("kdsr_jax", "configs"):
            del sys.modules[name]
    importlib.invalidate_caches()


if __name__ == "__main__":
    sys.path.insert(0, "")
    sys.exit(main(sys.argv[1], "--slow" in sys.argv))
