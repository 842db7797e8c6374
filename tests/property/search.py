"""How long hypothesis searches: the quick profile, the long one, or minutes of fresh seeds.

What CI runs finds what the code is to blame for, not what the day's seed is.

| environment | what runs |
|---|---|
| nothing | the same few examples in every run |
| HYPOTHESIS_PROFILE=long | the same seeds in the same order, for 10 minutes in all at the most |
| MAPO_KERNELS_PROPERTY_MINUTES=30 | fresh seeds for so many minutes in all |
| MAPO_KERNELS_PROPERTY_BLOB=... | the one example of a failure; choose its test by name |

The minutes are shared by the properties that were collected, each on each of its backends; with
`pytest -n` every worker takes its part of them at the same time.
"""

import itertools
import os
import random
import time

import hypothesis
from hypothesis import HealthCheck, settings

MINUTES, BLOB = "MAPO_KERNELS_PROPERTY_MINUTES", "MAPO_KERNELS_PROPERTY_BLOB"
_PROFILES = ("quick", "long")
_COMMON = {
    "deadline": None,
    "database": None,
    "print_blob": True,
    "report_multiple_bugs": False,
    "suppress_health_check": [
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.filter_too_much,
        HealthCheck.large_base_example,
    ],
}
# An example costs this much more in the interpreter.
_INTERPRETER_SHARE = 4
# Of the long profile: a fast machine finds nothing that another has not seen.
_ROUNDS = 3


def minutes():
    """How many minutes to search in all; None for the quick profile."""
    profile = os.environ.get("HYPOTHESIS_PROFILE") or "quick"
    if profile not in _PROFILES:
        raise ValueError(f"HYPOTHESIS_PROFILE: expected one of {_PROFILES}, got {profile!r}")
    given = os.environ.get(MINUTES)
    if given is not None:
        return float(given)
    return 10.0 if profile == "long" else None


class Search:
    """Runs one property, on one backend, for as long as it may take.

    Args:
        name: how pytest calls the test, for the line that says how to repeat a failure.
        seconds: its part of the minutes, or None for the quick profile.
        is_slow: whether kernels run in the interpreter.
    """

    def __init__(self, name, seconds, is_slow):
        self.name, self.seconds, self.is_slow = name, seconds, is_slow

    def __call__(self, check, strategy, examples=40):
        """Search for a draw from `strategy` that makes `check` fail."""

        def given():
            # hypothesis takes one seed and one set of settings for each.
            def property_of(drawn):
                check(drawn)

            return hypothesis.given(strategy)(property_of)

        if BLOB in os.environ:
            blob = os.environ[BLOB].encode()
            once = settings(**_COMMON)(given())
            hypothesis.reproduce_failure(hypothesis.__version__, blob)(once)()
        elif self.seconds is None:
            number = max(2, examples // _INTERPRETER_SHARE) if self.is_slow else examples
            settings(max_examples=number, derandomize=True, **_COMMON)(given())()
        else:
            self._until_the_time_is_over(given, examples)

    def _until_the_time_is_over(self, given, examples):
        end = time.monotonic() + self.seconds
        source = random.SystemRandom() if MINUTES in os.environ else random.Random(0)
        number = examples if self.is_slow else 4 * examples
        for i in itertools.count(1):
            # Each round has new examples, and hypothesis' own memory does not grow over hours.
            seeded = hypothesis.seed(source.getrandbits(64))(given())
            try:
                settings(max_examples=number, **_COMMON)(seeded)()
            except Exception as error:
                notes = "\n".join(getattr(error, "__notes__", ()))
                print(f"{self.name}: to repeat, set {BLOB} to the text b'...' in\n{notes}")
                raise
            if time.monotonic() >= end or (i == _ROUNDS and MINUTES not in os.environ):
                return
