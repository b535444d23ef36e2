"""A run's folder made by hand for the tests of its report, and a headless browser to look at pages with."""

import base64
import contextlib
import html
import http.server
import json
import re
import shutil
import subprocess
import tempfile
import threading

import numpy as np

from kdsr_jax.config import to_dict

SECTIONS = (
    *("result", "settings", "data", "curves", "gradients", "teacher", "forgetting", "validation", "breakdown"),
    "examples",
)
PICTURE = "data:image/svg+xml;base64," + base64.b64encode(b'<svg xmlns="http://www.w3.org/2000/svg"/>').decode()
# Texts that would run, load or break something where they were taken for more than text.
HOSTILE = (
    "<script>window.hacked=1;fetch('/stolen')</script>",
    '"><script src=/stolen></script>',
    '"><img src=/stolen onerror=window.hacked=1>',
    "'><svg onload=window.hacked=1>",
    "</title><script>window.hacked=1</script>",
    "</style><style>@import '/stolen'</style>",
    "</svg><image href=/stolen onerror=hacked=1>",
    "]]></desc><script>top.hacked=1</script>",
    "--><iframe src=/stolen></iframe><!--",
    "<link rel=stylesheet href=/stolen>",
    "<meta http-equiv=refresh content='0;url=/stolen'>",
    "<base href=/stolen><form action=/stolen>",
    "<plaintext>",
    "<textarea><math><mtext></form><xmp>",
    "' autofocus onfocus='hacked=1' x='",
    '" onmouseover="hacked=1" style="background:url(/stolen)',
    "javascript:window.hacked=1",
    "data:text/html,<script>hacked=1</script>",
    "{{ 7 * 7 }}{% include 'x' %}{# gone #}",
    "${window.hacked=1}`",
    "&lt;b&gt; &#60;i&#62; &amp;",
    "[Director's Cut] [/]",
    "\u202etxet desrever \u2066",
    "zero\x00byte \x1b[31m \ud800 \uffff",
    "\u043f\u0440\u0438\u0432\u0435\u0442 \u4f60\u597d \U0001f600",
    "w" * 80,
)
METRICS = {"hr@5": 8.0, "hr@20": 21.5, "mrr@5": 4.0, "mrr@20": 6.25, "coverage@20": 61.0}


def make_workdir(folder, config):
    """Write what a finished run of protocol both leaves, checkpoints aside.

    Args:
        folder: an empty folder.
        config: of the run; its fields are shown.
    """
    chunks = [0.5, 0.25, 0.125, 0.125]
    teacher = {
        "reconstruction_error": 0.125,
        "chunk_variance": chunks,
        "perplexity": 6.5,
        "distortion": 0.75,
        "used_codes": 7,
    }
    statistics = {"users": 1234, "items": 56, "interactions": 7890, "average_length": 6.4, "sparsity": 0.9}
    statistics |= {"train_instances": 4000, "test_instances": 40, "modalities": {"image": 55}}
    histogram = {"names": ["4–7", "8–15"], "counts": [1000, 234]}
    overview = {"name": "shop", "statistics": statistics, "history_lengths": histogram, "item_counts": histogram}
    epochs = {"hr@5": 3, "hr@20": 2, "mrr@5": 1, "mrr@20": 2}
    result = {"protocol": "both", "test": METRICS, "paper": {**METRICS, "hr@20": 22.5}, "paper_epochs": epochs}
    result |= {"validation": METRICS, "best_epoch": 2, "epochs": 4, "train_seconds": 61.2, "eval_seconds": 7.9}
    result |= {"parameters": 98765, "device": "1 x cpu", "versions": {"jax": "0.1"}, "seed": 0}
    contents = {
        "config.json": {"config": to_dict(config)},
        "overview.json": overview | {"parameters": 98765, "teacher": {"image": teacher}},
        "selection.json": {"best_epoch": 2, "validation": METRICS},
        "result.json": result,
        "examples.json": make_examples(),
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in make_lines()))
    counts = np.array([0, 0, 3, 3, 9, 20, 40, 80])
    ranks = {
        "rank": np.array([1, 2, 10, 20, 21, 50, 4, 1]),
        "history_length": np.arange(1, 9),
        "target_train_count": counts,
    }
    np.savez(folder / "ranks.npz", evaluated_on="test", epoch=2, **ranks)


def make_lines():
    """Return lines of metrics.jsonl of both phases, epoch 0 of each among them."""
    lines = []
    for phase in ("select", "refit"):
        for epoch in range(5):
            line = {
                "phase": phase,
                "epoch": epoch,
                "forgetting": {"image": {"features": 1 - epoch / 20, "ids": epoch / 9}},
            }
            if epoch:
                parts = {"next_item": 5 / epoch, "holistic/image": 1e-4 / epoch, "dissected/image": 4 - epoch / 9}
                line["losses"] = parts | {"loss": 6 / epoch, "gradient_norm": 0.5}
                line["learning_rates"] = {"body": 1e-3, "modality_tables": 1e-3 * epoch / 4}
                line["gradient_norms"] = {"next_item on image": 0.25, "holistic/image on image": 1e-5 * epoch}
                line["targets_per_second"] = 1000.0 * epoch
                line["metrics"] = {name: value + epoch for name, value in METRICS.items()}
                line["evaluated_on"] = {"select": "validation", "refit": "test"}[phase]
            lines.append(line)
    return lines


def make_examples():
    """Return the content of an examples.json: two users, one of them with the target among the recommendations."""
    reason = {"image": {"item": 2, "score": -0.25, "code": 5}}
    recommendations = [
        {"item": 3, "score": 2.5, "taken": False, "because": reason},
        {"item": 2, "score": 1.5, "taken": True, "because": {}},
    ]
    users = [
        {"user": f"u{n}", "length": 30, "history": [1, 2], "target": n, "rank": n, "recommendations": recommendations}
        for n in (3, 4)
    ]
    items = {str(n): {"id": f"i{n}", "title": f"Title {n}", "picture": PICTURE if n < 3 else None} for n in range(1, 5)}
    return {"users": users, "items": items}


def find_browser():
    """Return the path of a Chromium, or None."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


# Runs in a page around the one that is looked at; the policy of the latter does not reach it.
_LOOK = """
const found = {};
const look = (name, width, frame) => {
  const inner = frame.contentWindow, page = inner.document;
  found[`${name} ${width}`] = {
    overflow: page.documentElement.scrollWidth - page.documentElement.clientWidth,
    sections: Object.fromEntries([...page.querySelectorAll('section')].map(s => [s.id, s.textContent.length])),
    charts: page.querySelectorAll('svg.chart').length,
    pictures: [...page.images].map(i => i.src.slice(0, 15)),
    elements: [...new Set([...page.querySelectorAll('*')].map(e => e.tagName.toLowerCase()))],
    handlers: [...page.querySelectorAll('*')].flatMap(e => e.getAttributeNames()).filter(n => n.startsWith('on')),
    text: page.documentElement.textContent,
    title: page.title,
    hacked: typeof inner.hacked !== 'undefined' || typeof window.hacked !== 'undefined',
  };
  document.getElementById('out').textContent = JSON.stringify(found);
};
for (const name of NAMES) for (const width of WIDTHS) {
  const frame = document.createElement('iframe');
  frame.onload = () => look(name, width, frame);
  Object.assign(frame, {src: `/${name}?${width}`, width, height: 800});
  document.body.append(frame);
}
"""


@contextlib.contextmanager
def _serve(pages):
    """Serve pages, dict path -> HTML, on a local port; yields (port, list of the paths asked for)."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            page = pages.get(self.path.partition("?")[0])
            self.send_response(404 if page is None else 200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write((page or "").encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port, asked
        server.shutdown()


def look(pages, widths=(360, 1200)):
    """Load pages in frames of some widths, all in one start of the browser, which takes some seconds.

    Args:
        pages: dict name -> HTML.
        widths: in CSS pixels.

    Returns:
        (dict (name, width) -> what _LOOK finds, dict name -> lines on the console, paths that the server was asked for).
    """
    script = f"const NAMES = {json.dumps(list(pages))}, WIDTHS = {json.dumps(widths)};{_LOOK}"
    around = f'<!DOCTYPE html><link rel="icon" href="data:,"><body><pre id="out"></pre><script>{script}</script>'
    served = {f"/{name}": page for name, page in pages.items()}
    with _serve({"/": around, **served}) as (port, asked), tempfile.TemporaryDirectory() as profile:
        quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic"]
        arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--enable-logging=stderr", *quiet]
        arguments += [f"--user-data-dir={profile}", "--dump-dom", f"http://127.0.0.1:{port}/"]
        done = subprocess.run([find_browser(), *arguments], capture_output=True, timeout=120, check=True)
    dom, noise = done.stdout.decode(), done.stderr.decode(errors="replace")
    found = re.search(r'<pre id="out">(.*?)</pre>', dom, re.DOTALL).group(1)
    lines = [line for line in noise.splitlines() if "CONSOLE" in line]
    console = {name: [line for line in lines if f"/{name}?" in line] for name in pages}
    console[""] = [line for line in lines if not any(f"/{name}?" in line for name in pages)]
    found = {tuple(key.split()): value for key, value in json.loads(html.unescape(found)).items()}
    return {(name, int(width)): value for (name, width), value in found.items()}, console, asked
