"""What a run prints: plain lines away from a terminal, names as they are, and tables that say whose protocol it is."""

import io
import sys

import pytest

from kdsr_jax import reporting

METRICS = {"hr@5": 1.25, "mrr@20": 0.5}
RESULT = {
    "seed": 3,
    "test": METRICS | {"coverage@20": 25.0},
    "paper": None,
    "validation": None,
    "best_epoch": 4,
    "parameters": 1234,
    "train_seconds": 10.2,
    "eval_seconds": 1.7,
    "device": "1 x cpu",
}
LINE = {
    "phase": "refit",
    "epoch": 2,
    "losses": {"loss": 5.5, "next_item": 3.25, "holistic/image": 0.0004, "gradient_norm": 0.9},
    "targets_per_second": 12345.6,
    "evaluated_on": "test",
    "metrics": METRICS | {"ndcg@5": 7.0},
}


@pytest.fixture
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


@pytest.mark.parametrize("text", ["[bold]shop[/bold]", "a :smile: b", "back\\", "[/]", "x" * 500, "12 of [3, 4]"])
def test_lines_are_printed_as_they_are(capsys, text):
    reporting.say(text)
    assert capsys.readouterr() == ("", text + "\n")


def test_epoch_line_has_losses_speed_and_metrics():
    text = reporting.describe_epoch(LINE, 9)
    assert text.startswith("refit epoch 2/9  loss 5.5000 (next_item 3.25 holistic/image 0.0004)")
    assert text.endswith("12,346 targets/s  test: hr@5 1.25 mrr@20 0.50")


def test_epoch_without_evaluation_shows_no_metrics():
    assert "hr@" not in reporting.describe_epoch(LINE | {"metrics": None}, 9)


def test_progress_is_silent_away_from_a_terminal(capsys):
    with reporting.EpochProgress("select", 1, 3, 2) as progress:
        progress.advance(10, {"loss": 1.0})
    assert capsys.readouterr() == ("", "")


def test_progress_on_a_terminal_shows_phase_epoch_speed_and_losses(monkeypatch, wide):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal)
    with reporting.EpochProgress("select", 2, 3, 2, METRICS) as progress:
        progress.advance(10, {"loss": 1.5, "holistic/image": 0.25})
    shown = terminal.getvalue()
    for part in (
        "select epoch 2 of at most 3",
        "targets/s",
        "loss 1.5",
        "holistic/image 0.25",
        reporting.main_metrics(METRICS),
    ):
        assert part in shown


@pytest.mark.parametrize("text", ["[Director's Cut]", "[/]", "[/red]", "a :smile: b", "[link=http://x]y[/link]"])
def test_nothing_is_markup_wherever_it_stands(monkeypatch, capsys, wide, text):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    reporting.print_metrics({text: {text: 1.0}}, text)
    assert capsys.readouterr().out.count(text) == 3
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal)
    with reporting.EpochProgress(text, 2, 3, 2, {f"hr@5 {text}": 1.0}) as progress:
        progress.advance(10, {text: 1.5})
    shown = terminal.getvalue()
    assert f"{text} epoch 2" in shown and f"{text} 1.5" in shown and f"hr@5 {text} 1.00" in shown


def test_result_of_the_validation_protocol(capsys, wide):
    reporting.print_result(RESULT | {"validation": METRICS | {"coverage@20": 50.0}}, "runs/[red]a")
    out, err = capsys.readouterr()
    assert err == "" and "validation" in out and "test" in out and "paper" not in out
    assert "epoch 4 chosen on validation, 1,234 parameters, 10 s training, 2 s evaluation on 1 x cpu" in out
    assert out.endswith("run: runs/[red]a\nreport: runs/[red]a/report.html\n")
    rows = [[cell.strip() for cell in row.split("│")[1:-1]] for row in out.splitlines()]
    assert ["coverage@20", "50.0000", "25.0000"] in rows and ["mrr@20", "0.5000", "0.5000"] in rows


def test_result_of_the_papers_protocol_is_labelled(capsys, wide):
    reporting.print_result(RESULT | {"test": None, "paper": METRICS, "best_epoch": None}, "runs/a")
    out, _ = capsys.readouterr()
    assert "paper's protocol (best epoch on test)" in out
    assert "validation" not in out and "1.2500" in out


def test_both_protocols_stand_side_by_side(capsys, wide):
    reporting.print_result(RESULT | {"paper": METRICS}, "runs/a")
    rows = [[cell.strip() for cell in row.split("│")[1:-1]] for row in capsys.readouterr().out.splitlines()]
    assert ["hr@5", "1.2500", "1.2500"] in rows and ["coverage@20", "25.0000", ""] in rows


def test_table_title_is_not_markup(capsys, wide):
    reporting.print_metrics({"test, epoch 4": METRICS}, "[red] seed 3")
    assert "[red] seed 3" in capsys.readouterr().out
