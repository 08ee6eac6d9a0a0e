"""Imported first by test modules that need the extra `scripts`: skips them, by name, where it is not installed."""

from helpers import skip_without_scripts


skip_without_scripts()
