"""Metrics and statistics, computed from masks and predictions."""
