"""Flax modules: tables, fusion, backbones, readouts and the student that joins them. The only package that imports flax."""
