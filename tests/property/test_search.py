"""The search itself: each profile runs the property, and says so when it does not hold."""

import pytest
from hypothesis import strategies as st
from search import MINUTES, Search


@pytest.mark.parametrize("profile", ["quick", "long", "fresh"])
def test_a_property_is_searched(profile, monkeypatch):
    monkeypatch.delenv(MINUTES, raising=False)
    if profile == "fresh":
        monkeypatch.setenv(MINUTES, "1")
    drawn = []
    # Long enough for several rounds, each of which has other examples.
    search = Search("a test", None if profile == "quick" else 0.2, is_slow=False)
    search(drawn.append, st.integers(0, 10**9), examples=5)
    at_least = {"quick": 5, "long": 41, "fresh": 101}[profile]
    assert len(drawn) == 5 if profile == "quick" else len(set(drawn)) >= at_least

    def check(number):
        assert number < 100

    with pytest.raises(AssertionError):
        search(check, st.integers(0, 10**9), examples=100)
