"""What lecture notes claim about batch normalization, measured on real data: `python -m examples.study all`."""
