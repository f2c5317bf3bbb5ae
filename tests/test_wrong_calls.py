"""Wrong calls of every public function and value: refused in words that name the argument, or exactly right."""

import collections
import importlib
import inspect
import pydoc
import sys
from pathlib import Path

import pytest
import wrong

DOCS = Path(__file__).parents[1] / "docs"
COUNTS: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
CASES = [*wrong.cases()]


@pytest.mark.parametrize("name", wrong.CALLS)
def test_a_wrong_call_is_refused_or_right(name):
    wrong.CALLS[name]()  # as it stands, the call is right
    bad = []
    for case in CASES:
        if case.call == name:
            said = wrong.verdict(case)
            COUNTS[case.wrong.kind][said.partition(":")[0]] += 1
            if said not in ("refused", "right"):
                bad.append(f"{case.argument}, {case.wrong.kind}: {said}")
    assert not bad, "\n".join(bad)


def test_every_public_function_is_tried():
    """By the pages of the reference. A new one goes into `wrong.CALLS`, or the place of its tests into `ELSEWHERE`."""
    sys.path.insert(0, str(DOCS))
    public = importlib.import_module("public")
    sys.path.remove(str(DOCS))
    tried = {name.partition(",")[0].partition("(")[0].rpartition(".")[2] for name in wrong.CALLS}
    left = []
    for path in public.documented():
        found, name = public.load(path) if pydoc.locate(path) else None, path.rpartition(".")[2]
        data = inspect.isclass(found) and (
            hasattr(found, "_fields") or issubclass(found, Exception) or getattr(found, "_is_protocol", False)
        )
        if path.startswith("fm_jax.types.") or data or not (inspect.isclass(found) or inspect.isfunction(found)):
            continue
        if name not in tried and not any(f"{path}.".startswith(f"{each}.") for each in wrong.ELSEWHERE):
            left.append(path)
    assert left == []


def test_there_are_enough_of_each_kind():
    """Prints, by kind, how many of the wrong calls above were refused, and how many were right."""
    kinds = collections.Counter(case.wrong.kind for case in CASES)
    for kind, num in kinds.most_common():
        print(f"{kind}: {num}", dict(COUNTS[kind]))
    print(f"in all: {len(CASES)} wrong calls of {len(wrong.CALLS)} functions and values")
    assert len(CASES) >= 4000
    assert len(kinds) >= 25


def test_a_call_that_says_nothing_is_found(monkeypatch):
    monkeypatch.setitem(wrong.CALLS, "lax", wrong.Call(lambda sigma: 2 * sigma, {"sigma": 1.0}))
    found = {case.wrong.kind: wrong.verdict(case) for case in wrong.cases() if case.call == "lax"}
    assert found["NaN"] == "silent"
    assert found["None"].startswith("obscure: TypeError")
    assert found["list"] == "silent"  # twice the list is no answer


def test_an_error_that_names_no_argument_is_found(monkeypatch):
    def lax(sigma):
        raise ValueError("something must be wrong")

    monkeypatch.setitem(wrong.CALLS, "lax", wrong.Call(lax, {"sigma": 1.0}))
    assert {wrong.verdict(case)[:7] for case in wrong.cases() if case.call == "lax"} == {"obscure"}
