"""Receipts of what requests used: signed, chained, and shown to each party only as far as it concerns that party."""
