"""The `Examples:` of every public name run, as a reader would type them in."""

from __future__ import annotations

import doctest
import functools
import inspect
import warnings

import pytest

import mi_hops

NAMES = [
    name
    for name in mi_hops.__all__
    if not inspect.ismodule(getattr(mi_hops, name)) and name != "__version__"
]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _models_are_loaded_once():
    load = mi_hops.load_model
    mi_hops.load_model = functools.cache(load)
    yield
    mi_hops.load_model = load


@pytest.mark.parametrize("name", NAMES)
def test_examples_of(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # examples write files
    thing = getattr(mi_hops, name)
    text = inspect.cleandoc(thing.__doc__ or "")
    test = doctest.DocTestParser().get_doctest(text, {}, name, None, None)
    assert test.examples, f"mi_hops.{name} has no Examples: block"
    said: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.append)
    assert not said, "".join(said)
