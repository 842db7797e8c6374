import pytest
from backends import HAS_GPU, INTERPRETS
from search import Search, minutes
from strategies import is_interpreted

RUNS = {"eager": True, "interpreter": INTERPRETS, "gpu": HAS_GPU}


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    searches = [item for item in items if "search" in getattr(item, "fixturenames", ())]
    config.n_searches = sum(RUNS[item.callspec.params["device"]] for item in searches)


@pytest.fixture
def search(request, device):
    """Looks for a counterexample of a property on `device`: see `search.Search`."""
    total = minutes()
    seconds = None if total is None else 60 * total / request.config.n_searches
    return Search(request.node.nodeid, seconds, is_interpreted(device))
