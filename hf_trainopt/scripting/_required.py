"""Imported before the packages that it checks: one error that names the extra, not the first missing module."""

from .requirements import check


check()
