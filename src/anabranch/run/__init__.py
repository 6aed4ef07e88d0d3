"""The keyed runtime: any cell, one state a key, replayed or live."""
