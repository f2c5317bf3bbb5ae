"""Experiments: `python -m experiments.<name> --help`. Each module's docstring says what to expect of it."""
