"""Experiments built from training runs: comparisons, studies, the demonstration, and the reports of each."""
