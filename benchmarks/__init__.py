"""Measurements: what moves, how fast it could go, how fast it goes, and the tables drawn from the records.

Each measurement is a file in `benchmarks/records/`; tables and figures are rendered from these files alone.
"""
