"""Experiments: `python -m experiments.<name> --help`. Each module's docstring says what to expect of it."""

import sys
from importlib.util import find_spec

if sys.argv[:1] == ["-m"] and (missing := [name for name in ("tyro", "matplotlib", "PIL") if find_spec(name) is None]):
    raise SystemExit(f"experiments need {', '.join(missing)}: pip install 'fm_jax[experiments]'.")
