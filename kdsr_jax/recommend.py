"""Recommend to a typed history, or to users of the shop, by a finished run.

python -m kdsr_jax.recommend --workdir=FOLDER --history="ID,ID" [-k 10]
python -m kdsr_jax.recommend --workdir=FOLDER --users=all --out=recommendations.parquet
"""

import hashlib
import json
import logging
import pathlib
import shutil
import sys
import time
from collections.abc import Sequence

from kdsr_jax.config import fingerprint
from kdsr_jax.errors import Parser, UserError, answer
from kdsr_jax.files import replace_file

USERS = 4096  # of a part; what a killed command loses at most
FIRST = 512  # histories whose exact lists approximate ones are compared with


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, 2 after one line about what the user can put right, or 130 after Ctrl-C."""
    parser = Parser(
        prog="python -m kdsr_jax.recommend", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--workdir", required=True, help="of a finished run")
    parser.add_argument("--history", help="raw item ids, oldest first, separated by commas")
    parser.add_argument("--users", help="raw user ids, separated by commas, or all: their histories to the last item")
    parser.add_argument("--out", help="with --users: a parquet file to write; without it, the lists are printed")
    parser.add_argument("-k", type=int, default=10, help="length of a list; now %(default)s")
    parser.add_argument("--seen", action="store_true", help="also recommend what the history holds")
    parser.add_argument("--approximate", action="store_true", help="faster lists on TPUs; their recall is printed")
    parser.add_argument("--data-root", help="instead of the run's --config.data.root")
    logging.basicConfig(format="warning: %(message)s")
    return answer(lambda: _work(parser.parse_args(words)))


def _work(arguments):
    if (arguments.history is None) == (arguments.users is None):
        raise UserError("give either --history or --users")
    if arguments.out and arguments.users is None:
        raise UserError("--out: goes with --users; a --history is answered on the screen")
    from kdsr_jax.recommender import Recommender

    recommender = Recommender.from_workdir(arguments.workdir, arguments.data_root)
    if arguments.history is not None:
        ids = [word.strip() for word in arguments.history.split(",") if word.strip()]
        if arguments.approximate:
            _say_recall(recommender, recommender.numbers([ids], unknown="ignore"), arguments)
        _print(recommender, recommender.recommend(ids, arguments.k, **_options(arguments)))
        return
    users = _choose_users(recommender, arguments.users)
    data = recommender.dataset.interactions
    if arguments.approximate:
        _say_recall(recommender, _histories(data, users[:FIRST]), arguments)
    if arguments.out:
        _write(recommender, users, arguments)
        return
    for user in users:
        (history,) = _histories(data, [user])
        print(f"user {data.user_ids[user]}, {len(history)} items, the newest {data.item_ids[history[-1]]}")
        raw = data.item_ids[history]
        _print(recommender, recommender.recommend(raw, arguments.k, **_options(arguments)))


def _options(arguments):
    return {"exclude_seen": not arguments.seen, "approximate": arguments.approximate}


def _histories(data, users):
    return [data.items[data.offsets[user] : data.offsets[user + 1]] for user in users]


def _say_recall(recommender, histories, arguments):
    """Print which share of the exact lists the approximate ones hold, of the first histories."""
    recall = recommender.recall(histories, arguments.k, exclude_seen=not arguments.seen)
    print(f"approximate lists hold {recall:.2%} of the exact ones, of {len(histories):,} histories", file=sys.stderr)


def _print(recommender, recommendations):
    """Print a line an item: place, id, score and, where the data is at hand, title."""
    try:
        titles = [recommender.title(item) for item, _ in recommendations]
    except UserError as error:
        logging.getLogger("kdsr_jax").warning("no titles: %s", error)
        titles = [""] * len(recommendations)
    width = max((len(item) for item, _ in recommendations), default=0)
    for place, ((item, score), title) in enumerate(zip(recommendations, titles, strict=True), 1):
        shown = "".join(letter if letter.isprintable() else " " for letter in title)
        print(f"{place:>3}  {item:<{width}}  {score:8.3f}  {shown}".rstrip())


def _choose_users(recommender, words):
    """Return the numbers of the users that --users names."""
    data = recommender.dataset.interactions
    if words == "all":
        return list(range(data.num_users))
    known = {str(raw): number for number, raw in enumerate(data.user_ids)}
    wanted = [word.strip() for word in words.split(",") if word.strip()]
    if unknown := [raw for raw in wanted if raw not in known]:
        raise UserError(f"--users: there is no user {unknown[0]!r}")
    if not wanted:
        raise UserError("--users: name one, or all")
    return [known[raw] for raw in wanted]


def _write(recommender, users, arguments):
    """Write user_id, item_ids and scores of every user, in parts that a killed command goes on from."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from kdsr_jax.data.digest import data_digests

    out = pathlib.Path(arguments.out)
    data, parts = recommender.dataset.interactions, out.with_name(out.name + ".parts")
    job = [
        fingerprint(recommender.config),
        _model_digest(recommender),
        data_digests(recommender.dataset),
        arguments.k,
        arguments.seen,
        arguments.approximate,
        users,
    ]
    key = hashlib.sha256(json.dumps(job).encode()).hexdigest()
    recommender.check_k(arguments.k)  # before there are parts
    if out.is_dir():
        raise UserError(f"--out={out}: is a folder; name a file")
    started, done = time.perf_counter(), 0
    try:
        parts.mkdir(parents=True, exist_ok=True)
        if (parts / "job").exists() and (parts / "job").read_text() != key:
            raise UserError(f"{parts}: holds parts of another command; finish that or delete the folder")
        replace_file(parts / "job", lambda file: file.write(key.encode()))
        files = [parts / f"{begin:012}.parquet" for begin in range(0, len(users), USERS)]
        for number, file in enumerate(files):
            if file.exists():
                continue
            mine = users[number * USERS : (number + 1) * USERS]
            items, scores = recommender.top_items(_histories(data, mine), arguments.k, **_options(arguments))
            columns = {
                "user_id": [str(data.user_ids[user]) for user in mine],
                "item_ids": [[str(raw) for raw in data.item_ids[row[row > 0]]] for row in items],
                "scores": [row[found > 0].tolist() for row, found in zip(scores, items, strict=True)],
            }
            table = pa.table(columns, schema=_schema(pa))
            replace_file(file, lambda stream, table=table: pq.write_table(table, stream))
            done += len(mine)
            print(f"{min((number + 1) * USERS, len(users)):,} of {len(users):,} users", file=sys.stderr)
        seconds = time.perf_counter() - started
        replace_file(out, lambda stream: _join(pa, pq, files, stream))
        shutil.rmtree(parts)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from error
    print(f"{out}: {len(users):,} users, {arguments.k} items each")
    if done:
        print(f"{done:,} users in {seconds:.1f} s, {done / seconds:,.0f} users/s, compilation included")


def _model_digest(recommender):
    """Return the sha256 of the model's numbers: other features give other ones, with the same config and log."""
    import jax
    import numpy as np

    digest = hashlib.sha256()
    for array in jax.tree.leaves(recommender.variables):
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def _schema(pa):
    return pa.schema(
        [("user_id", pa.string()), ("item_ids", pa.list_(pa.string())), ("scores", pa.list_(pa.float32()))]
    )


def _join(pa, pq, files, stream):
    """Copy the parts into one file, a part at a time."""
    with pq.ParquetWriter(stream, _schema(pa)) as writer:
        for file in files:
            writer.write_table(pq.read_table(file))


if __name__ == "__main__":
    sys.exit(main())
