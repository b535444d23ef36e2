"""Tables of runs, and the page of all studies."""

import json
import random
import re
import subprocess
import sys

import pytest

from experiments import table1, table2, table3, table4
from experiments.index import parse, write_index
from experiments.readme import PAGES, updated
from experiments.tables import PAPER, markdown, metrics_table, per_modality

PAPERS = "paper's protocol (best epoch on test)"


def run(label, seed, test, paper=None, **changes):
    """Return a row with two metrics (hr@20, mrr@20); the second is a tenth of the first."""

    def metrics(value):
        return None if value is None else {"hr@5": value / 2, "mrr@5": value / 20, "hr@20": value, "mrr@20": value / 10}

    row = {
        "kind": "run",
        "dataset": "beauty",
        "label": label,
        "seed": seed,
        "test": metrics(test),
        "paper": metrics(paper),
    }
    row |= {
        "validation": metrics(test),
        "best_epoch": 10 + seed,
        "epochs": 15,
        "config": {"distill.enabled": label == "KDSR"},
    }
    row |= {"train_seconds": 1000.4, "eval_seconds": 500.0, "versions": {"jax": "0.10.2", "flax": "0.12.8"}}
    return row | {"device": "1 x cpu", "cores": 2, "commit": "abc", "measures": {}, "teacher": {}} | changes


def comparison(label, metric, p, welch=None, by_seed=(-0.75, -0.25)):
    row = {"kind": "comparison", "dataset": "beauty", "label": label, "reference": "KDSR", "metric": metric, "p": p}
    row |= {"difference": -0.5, "low": -0.9, "high": 0.123, "users": 22363, "welch_p": welch}
    return row | {"seeds": list(range(len(by_seed))), "by_seed": list(by_seed)}


ROWS = [
    *(run("SASRec", 0, 14.0, 15.0), run("SASRec", 1, 15.0, 16.0)),
    *(run("SASRM", 0, 12.0, 13.0), run("SASRM", 1, 12.0, 13.0)),
    *(run("KDSR", 0, 16.0, 18.0), run("KDSR", 1, 17.0, 18.0)),
    # All are below 0.05 alone, one after Holm's method.
    *(
        comparison("SASRec", "hr@20", 0.01, 0.2),
        comparison("SASRec", "mrr@20", 0.04),
        comparison("SASRM", "hr@20", 0.03),
    ),
]
METRICS = ("hr@20", "mrr@20")


def tables_of(text):
    """Return the tables of markdown as lists of dicts heading -> cell."""
    found = []
    for block in parse(text):
        if block["kind"] == "table":
            header, *lines = [
                ["".join(piece for _, piece in cell) for cell in row] for row in (block["header"], *block["lines"])
            ]
            found.append([dict(zip(header, line, strict=True)) for line in lines])
    return found


def test_the_honest_protocol_comes_first_then_the_papers_and_its_numbers():
    text = metrics_table(ROWS, METRICS, paper={"beauty": {"SASRec": [14.0681, None]}})
    lines = text.splitlines()
    header = next(line for line in lines if line.startswith("| setting"))
    assert header == (
        f"| setting | hr@20 | mrr@20 | seeds | {PAPERS} | the paper reports | validation mrr@20 | e* | refit epochs | s training, both phases |"
    )
    assert (
        "| SASRec | 14.50 ± 0.71† | 1.45 ± 0.07 | 2 | 15.50 / 1.55 | 14.07 / – | 1.45 | 10, 11 | 15 | 1,000 |" in lines
    )
    assert "| SASRM | 12.00 ± 0.00 | 1.20 ± 0.00 | 2 | 13.00 / 1.30 | – | 1.20 | 10, 11 | 15 | 1,000 |" in lines
    assert "| KDSR | **16.50 ± 0.71** | **1.65 ± 0.07** | 2 | 18.00 / 1.80 | – | 1.65 | 10, 11 | 15 | 1,000 |" in lines
    assert "## beauty" in lines and text.count("teacher's seed") == 1 and text.endswith("\n")


def test_one_seed_has_no_deviation_and_one_setting_no_best():
    text = metrics_table([run("KDSR", 0, 16.0)], METRICS)
    assert "| KDSR | 16.00 | 1.60 | 1 | 1.60 | 10 | 15 | 1,000 |" in text
    assert "the paper reports" not in text and f"| {PAPERS}" not in text and "†" not in text


def test_runs_without_the_honest_protocol_have_the_papers_alone():
    text = metrics_table([run("KDSR", 0, None, 18.0, best_epoch=None)], METRICS)
    assert (
        f"| setting | seeds | {PAPERS} | refit epochs | s training, both phases |" in text
        and "| KDSR | 1 | 18.00 / 1.80 | 15 | 1,000 |" in text
    )


def test_daggers_and_comparisons_are_adjusted_by_holm():
    text = metrics_table(ROWS, METRICS)
    table = tables_of(text)[1]
    welch = "Welch's p (underpowered below 5 seeds)"
    assert table[0] == {
        "KDSR minus": "SASRec",
        "seeds": "0, 1",
        "hr@20": "−0.50 [−0.90, +0.12] p 0.03 (−0.75, −0.25)",
        "mrr@20": "−0.50 [−0.90, +0.12] p 0.06 (−0.75, −0.25)",
        welch: "0.2 / –",
    }
    assert "p 0.06" in table[1]["hr@20"] and table[1]["mrr@20"] == "–"
    assert "paired over 22,363 users" in text and "for the 3 comparisons" in text
    assert "Welch" not in metrics_table([row | {"welch_p": None} if "welch_p" in row else row for row in ROWS])


@pytest.mark.parametrize(("by_seed", "marked"), [((-0.5, -0.1), True), ((-1.5, 0.5), False), ((-0.5,), False)])
def test_a_dagger_needs_two_seeds_of_one_sign(by_seed, marked):
    runs = [row for row in ROWS if row["kind"] == "run"]
    text = metrics_table([*runs, comparison("SASRec", "hr@20", 1 / 10_001, by_seed=by_seed)], METRICS)
    results, compared = tables_of(text)
    assert results[0]["hr@20"].endswith("†") == marked
    assert compared[0]["hr@20"].startswith("−0.50 [−0.90, +0.12] p ≤ 0.0001")
    assert ("(" in compared[0]["hr@20"]) == (len(by_seed) > 1)


def test_the_gain_is_over_the_baseline_that_validation_chose():
    better_on_test = [
        row | {"test": run("", 0, 99.0)["test"]} if row["label"] == "SASRM" else row for row in ROWS if "test" in row
    ]
    rows = better_on_test + [row for row in ROWS if row["kind"] == "comparison"]
    text = metrics_table(rows, METRICS)
    assert "Best baseline, a setting without distillation, by validation mrr@20: SASRec." in text
    gain = "the mean over hr@20, mrr@20 of KDSR / SASRec − 1, on the seeds that both have"
    assert f"gain of KDSR: +13.8 %, {gain} (0, 1)." in text  # 16.5 / 14.5
    fewer = [row for row in rows if not (row["label"] == "SASRec" and row.get("seed") == 1)]
    assert f"gain of KDSR: +14.3 %, {gain} (0)." in metrics_table(fewer, METRICS)  # 16 / 14
    assert "Best baseline" not in metrics_table([row for row in rows if row["kind"] == "run"])
    undistilled = [
        row | {"config": row["config"] | {"distill.enabled": False}} if "config" in row else row for row in rows
    ]
    assert "Best baseline" not in metrics_table(undistilled, METRICS)


def test_a_run_of_two_labels_counts_once():
    [one] = [row for row in ROWS if row["kind"] == "run" and row["label"] == "SASRec" and row["seed"] == 0]
    one = one | {"workdir": "folder"}
    assert metrics_table([one, one | {"label": "again"}], METRICS).count(" 1 run, ") == 1


def test_runs_of_a_setting_that_differ_besides_their_seeds_are_named():
    assert "Runs of one setting differ" not in metrics_table(ROWS, METRICS)
    config = {"distill.enabled": True, "train.epochs": 3, "eval.topk": [5, 20]}
    rows = [
        *ROWS,
        run("KDSR", 2, 16.0, config=config | {"seed": 2}),
        run("KDSR", 3, 16.0, config=config | {"train.epochs": 50}),
    ]
    text = metrics_table(rows, METRICS)
    assert "**Runs of one setting differ** besides their seeds: KDSR in train.epochs (3, 50)." in text


def test_it_says_where_the_runs_ran():
    rows = [*ROWS, run("SASRec", 2, 15.0, device="1 x gpu", cores=8, commit="def+", versions={"jax": "0.11.0"})]
    text = metrics_table(rows)
    assert "Hardware: 1 x cpu, 2 cores; 1 x gpu, 8 cores. Versions: flax 0.12.8, jax 0.10.2, jax 0.11.0." in text
    assert 'Commits: abc, def+ ("+": with changes since). Seeds: 0, 1, 2. 7 runs, 10,503 s' in text


def test_the_text_depends_on_nothing_but_the_rows():
    rng = random.Random(0)

    def shuffled(value):
        if isinstance(value, dict):
            return {name: shuffled(value[name]) for name in rng.sample(list(value), len(value))}
        return value

    assert (
        metrics_table(shuffle_all(ROWS, shuffled)) == metrics_table(ROWS) == metrics_table(json.loads(json.dumps(ROWS)))
    )
    swapped = [row | {"dataset": "toys"} for row in ROWS[:2]] + ROWS
    assert [line for line in metrics_table(swapped).splitlines() if line.startswith("## ")] == ["## toys", "## beauty"]


def shuffle_all(rows, shuffled):
    return [shuffled(row) for row in rows]


def test_no_rows_are_a_sentence():
    for study in (table1, table2, table3, table4):
        assert "| setting" not in study.table([]) and study.table([]).endswith(".\n")
    assert metrics_table([]) == "No run is finished yet.\n" and table2.figure([]) == ""


def test_further_columns_are_means_of_numbers_or_texts():
    def teacher(value):
        return {"teacher": {"text": {"perplexity": value}, "image": {}}}

    rows = [run("vq", 0, 1.0, **teacher(90.0)), run("vq", 1, 1.0, **teacher(80.0)), run("ids", 0, 1.0)]
    extra = {"words": lambda row: f"seed {row['seed']}", "nothing": lambda row: None}
    extra |= per_modality(rows, "perplexity", lambda row: {m: t.get("perplexity") for m, t in row["teacher"].items()})
    (table,) = tables_of(metrics_table(rows, METRICS, extra=extra))
    assert [line["perplexity, text"] for line in table] == ["85", "–"]
    assert table[0]["words"] == "seed 0, seed 1" and "nothing" not in table[0] and "perplexity, image" not in table[0]


def test_the_papers_numbers_are_those_of_the_paper():
    assert PAPER["table2"]["beauty"]["KDSR"] == [7.4156, 4.6355, 14.675, 5.2444]
    assert (
        table2.REPORTED["beauty"]["KDSR (MMSR)"]
        == table2.REPORTED["beauty"]["KDSR"]
        == PAPER["table2"]["beauty"]["KDSR"]
    )
    assert "KDSR (MMSR)" not in table2.REPORTED["ml1m"]
    for study, reported in ((table2, table2.REPORTED), (table3, table3.reported()), (table4, table4.reported())):
        labels = {label for settings in reported.values() for label in settings}
        assert labels <= set(study.STUDY.settings) and study.STUDY.reference in labels
    assert table3.reported()["sports"]["w/o AT"] == [3.418, None, 7.709, None]
    assert table4.reported() == {"beauty": table4.reported()["beauty"]} and len(table4.STUDY.settings) == 12
    assert table4.reported()["beauty"]["kmeans, cosine"] == [7.224, None, 14.743, None]
    assert "KDSR gains +4.4 %" in table2.table([])  # +4.44 by hand from Table 2


def test_table1_stands_beside_the_paper_and_names_its_slips():
    facts = {"users": 22363, "items": 12101, "interactions": 198502, "average_length": 8.8764, "sparsity": 0.999266}
    facts |= {"train_instances": 142197, "test_instances": 33942, "modalities": {"text": 12094}}
    text = table1.table([run("statistics", 0, None, measures={"table1": facts})])
    counted, printed = tables_of(text)[0]
    for name in ("users", "items", "interactions", "average length", "sparsity"):
        assert counted[name] == printed[name]
    assert counted["covered items"] == "text 12,094" and counted["test instances"] == "33,942"
    assert (
        "3 average lengths" in text and "clothing 7.12, which should be 7.08; sports 8.46, which should be 8.32" in text
    )
    assert "toys 8.79, which should be 8.63." in text


def test_table1_counts_the_data(tiny):
    facts = table1.describe(tiny(), None)
    assert (facts["users"], facts["interactions"], facts["modalities"]) == (48, 528, {"image": 35})
    assert "| 48 | 36 | 528 | 11.00 | 69.44 % | image 35 |" in table1.table(
        [run("x", 0, None, measures={"table1": facts})]
    )


def test_the_figure_has_a_bar_a_model_and_metric():
    rows = [*ROWS, run("<KDSR>", 0, None, 9.0), run("<b>", 0, 4.0)]
    svg = table2.figure(rows)
    assert svg.count("<rect") == 2 * 4 and "<b>" not in svg and "&lt;b&gt;: 4.00" in svg and "NaN" not in svg
    bars = [float(width) for width in re.findall(r'<rect class="fill s0".*? width="([\d.]+)"', svg)]
    assert bars[0] / bars[1] == pytest.approx(14.5 / 12, abs=0.01)


def test_markdown_is_read_back_as_it_was_written():
    cells = [["a|b", "**1**", "`c|`"], ["x\\", "2 \n 3", ""]]
    (block,) = parse(markdown(["h", "i", "j"], cells))
    assert block["header"] == [[("plain", "h")], [("plain", "i")], [("plain", "j")]]
    assert block["lines"][0] == [[("plain", "a|b")], [("bold", "1")], [("code", "c|")]]
    assert block["lines"][1] == [[("plain", "x\\")], [("plain", "2 3")], []]


def test_blocks_of_markdown():
    blocks = parse("# One **two**\n\nthree\nfour `five`\n- six\n- seven\n\n| no table\n## end")
    assert [block["kind"] for block in blocks] == ["heading", "paragraph", "list", "paragraph", "heading"]
    assert blocks[0]["text"] == [("plain", "One "), ("bold", "two")]
    assert blocks[1]["text"] == [("plain", "three four "), ("code", "five")]
    assert blocks[2]["items"] == [[("plain", "six")], [("plain", "seven")]]
    assert parse("") == [] and parse("| a |\n| --- |")[0]["lines"] == []


def test_the_page_escapes_what_it_shows_and_holds_the_pictures(tmp_path):
    hostile = '<script>alert("x")</script> & **</td>** \x00'
    for name in ("zoo", "figure1", "table2", 'q"uote&'):
        (tmp_path / name).mkdir()
        text = metrics_table([run(hostile, 0, 1.0, dataset=hostile)])
        (tmp_path / name / "table.md").write_text(f"# Of {name} {hostile}\n\n{text}")
    (tmp_path / "table2" / "figure.svg").write_text('<svg viewBox="-10 -10 760 200"></svg>')
    (tmp_path / "empty").mkdir()
    write_index(tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert "<script" not in page and "\x00" not in page and "**" not in page
    assert "&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt;" in page and "<strong>&lt;/td&gt;</strong>" in page
    titles = re.findall(r"<h2>Of (\S+)", page)
    assert titles == ["table2", "figure1", "q&#34;uote&amp;", "zoo"] and "empty" not in page
    assert page.count("<img ") == 1 and 'src="data:image/svg+xml;base64,' in page and 'width="760"' in page
    assert 'href="q%22uote%26/runs.jsonl"' in page


def test_a_page_without_studies_says_so(tmp_path):
    write_index(tmp_path / "new")
    assert "No study has results yet." in (tmp_path / "new" / "index.html").read_text()


def test_tables_and_page_need_no_jax():
    program = "import sys, experiments.index, experiments.tables, experiments.table2; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize("name", PAGES)
def test_pages_have_the_tables_of_today(name, repository):
    text, make = (repository / name).read_text(), PAGES[name]
    assert updated(text, make) == text
    before, between, after = re.split("(?<=<!-- studies -->\n)|(?=<!-- /studies -->)", text)
    assert "| KDSR | " in between
    assert updated(f"{before}{between.replace('KDSR', 'other')}{after}", make) == text
    assert updated("before\n<!-- studies -->\nold\n<!-- /studies -->\nafter\n", make, repository / "tests") == (
        "before\n<!-- studies -->\n\n<!-- /studies -->\nafter\n"
    )
