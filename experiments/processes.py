"""Processes that answer requests, and taking turns among them, so that two numbers of one run can be compared."""

import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

from kdsr_jax.errors import UserError


class Worker:
    """A process that gets a JSON object a line and answers each with one."""

    def __init__(self, name, command, **popen):
        self.name = name
        self._said = tempfile.TemporaryFile()  # noqa: SIM115, it lives as long as the process
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._said, "text": True}
        self._process = subprocess.Popen(command, **pipes, **popen)

    def ask(self, do, **arguments):
        """Return what the process answers to a request.

        Raises:
          UserError: it answers with an error, or has ended.
        """
        try:
            print(json.dumps({"do": do} | arguments), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            pass  # why it ended is told below
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._said.seek(0)
            last = self._said.read().decode(errors="replace").strip().splitlines()[-1:]
            raise UserError(f"{self.name}: the process ended with {self._process.returncode}: {''.join(last)}")
        answer = json.loads(line)
        if "error" in answer:
            raise UserError(f"{self.name}: {answer['error']}")
        return answer

    def close(self):
        """End the process."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._said.close()


SCRIPT = pathlib.Path(__file__).resolve().with_name("contestant.py")


def contestant(name, tree=None, **environment):
    """Start experiments/contestant.py as a Worker, with the package of another tree of the project where one is given."""
    tree = str(tree or SCRIPT.parent.parent)
    # A device's memory is shared by all that take turns.
    settings = {"PYTHONPATH": tree, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | environment
    return Worker(name, [sys.executable, "-P", str(SCRIPT)], cwd=tree, env=os.environ | settings)


def read_entry(entry, settings):
    """Return (variant, words) of VARIANT+FIELD=VALUE...: the words are --config.FIELD=VALUE, settings first."""
    variant, *changes = entry.split("+")
    return variant, [*settings, *(f"--config.{change}" for change in changes)]


def in_turns(names, rounds):
    """Yield all names once a round, every other round backwards, so that none always comes after the same other one."""
    for number in range(rounds):
        yield from list(names)[:: -1 if number % 2 else 1]


def take_turns(workers, rounds, arguments):
    """Let workers take turns; see ``in_turns``.

    Args:
      workers: dict name -> Worker.
      rounds: turns of each.
      arguments: dict name -> what its turn takes.

    Returns:
      dict name -> list of answers, one a round.
    """
    answers = {name: [] for name in workers}
    for name in in_turns(workers, rounds):
        answers[name].append(workers[name].ask("turn", **arguments.get(name, {})))
    return answers


def medians(answers):
    """Return the median of every number over a list of equally built dicts, nested ones too."""
    first = answers[0]
    return {
        key: medians([a[key] for a in answers])
        if isinstance(first[key], dict)
        else statistics.median(a[key] for a in answers)
        for key in first
    }
