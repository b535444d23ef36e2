"""report.html of a run: plain data out of a workdir, charts as SVG, and one self-contained page."""
