"""Scans: the contract, readers, data-set adapters, phantom, integrity, splits, store."""
