"""What results are called wherever they stand: in tables, on pages and in metrics.jsonl."""

PAPER = "paper's protocol (best epoch on test)"
# Key of result.json -> name, as the README has them.
COLUMNS = {"validation": "validation", "test": "test, epoch chosen on validation", "paper": PAPER}
