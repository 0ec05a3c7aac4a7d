"""The slow oracle that the tests of metrics share."""

import numpy as np
import pytest


def one_query_at_a_time(x, labels, k, query=None, gallery=None):
    """Hit rate in float64, without matrices; query, gallery: masks or None."""
    x, labels = np.asarray(x, np.float64), np.asarray(labels)
    everyone = np.arange(len(x))
    asked = everyone if query is None else everyone[query]
    offered = everyone if gallery is None else everyone[gallery]
    hits = []
    for q in asked:
        others = offered[offered != q]
        near = others[np.argsort(((x[others] - x[q]) ** 2).sum(1), kind="stable")[:k]]
        hits.append((labels[near] == labels[q]).any())
    return float(np.mean(hits))


@pytest.fixture
def hit_rate():
    return one_query_at_a_time
