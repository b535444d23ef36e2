"""Look at a finished run in the browser: histories, recommendations, their reasons, and what is alike.

python -m kdsr_jax.explore --workdir=FOLDER [--compare=FOLDER] [--port=8017]
"""

import logging
import os
import sys
from collections.abc import Sequence

from kdsr_jax.compare import read_run
from kdsr_jax.errors import Parser, UserError, answer
from kdsr_jax.labels import names_of_runs
from kdsr_jax.report.text import clean

PORT = 8017


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 after Ctrl-C, or 2 after one line about what the user can put right."""
    parser = Parser(prog="python -m kdsr_jax.explore", description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--workdir", required=True, help="of a finished run")
    parser.add_argument("--compare", help="--workdir of a second run on the same data, such as one on item ids alone")
    parser.add_argument("--port", type=int, default=PORT, help="of 127.0.0.1, 0 for any free one; now %(default)s")
    parser.add_argument("--data-root", help="instead of the runs' --config.data.root")
    logging.basicConfig(format="warning: %(message)s")
    return answer(lambda: _work(parser.parse_args(words)), "stopped")


def _work(arguments):
    from kdsr_jax.explorer.server import Server

    folders = [arguments.workdir] + ([arguments.compare] if arguments.compare is not None else [])
    _check_data(folders)
    with Server(arguments.port) as server:
        print(f"loading {' and '.join(map(clean, folders))} ...", flush=True)
        server.answers = _load(folders, arguments.data_root)
        print(f"{server.address}  (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)


def _check_data(folders):
    """Refuse runs on different data."""
    data = {known for folder in folders if (known := read_run(folder).data)}  # what began to read none is not finished
    if len(data) > 1:
        raise UserError(f"--compare={folders[1]}: is a run on other data than {folders[0]}; give one on the same")
    if len(folders) > 1 and os.path.realpath(folders[0]) == os.path.realpath(folders[1]):
        raise UserError(f"--compare={folders[1]}: is the run itself; give another one")


def _load(folders, data_root):
    """Return Answers of the runs."""
    from kdsr_jax.explorer.answers import Answers
    from kdsr_jax.recommender import Recommender

    runs = zip(names_of_runs(folders), folders, strict=True)
    return Answers({name: Recommender.from_workdir(folder, data_root) for name, folder in runs})


if __name__ == "__main__":
    sys.exit(main())
