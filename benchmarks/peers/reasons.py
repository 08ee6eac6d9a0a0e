"""Why tests of the suites end otherwise with our classes: what `report.py` writes beside each."""

REASONS: list[tuple[str, str, str, str]] = []
