"""Benchmarks of spectriton against what PyTorch offers; see ``bench/conftest.py`` for the options."""
