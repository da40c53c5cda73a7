"""Scan and slice classifiers, one file per network."""
