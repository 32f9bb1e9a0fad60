"""Rigs of minutes run when they are asked for."""

import pytest


def pytest_collection_modifyitems(config, items):
    if "cluster" not in config.getoption("markexpr"):
        for item in items:
            if item.get_closest_marker("cluster"):
                item.add_marker(pytest.mark.skip(reason="takes minutes; asked for by: pytest tests/cluster -m cluster"))
