"""What looks at runs from outside: compare, report, doctor. Nothing that trains imports it."""
