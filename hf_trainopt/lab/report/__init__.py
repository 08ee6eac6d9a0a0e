"""What runs have done, as a page, pictures and a table; from their output folders alone. docs/report.md."""

from .report import Report, make_report


__all__ = ["Report", "make_report"]
