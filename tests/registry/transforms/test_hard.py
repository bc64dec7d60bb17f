"""Hard attention against the definition in plain numpy."""

import numpy as np
import pytest
import torch

from astbench_registry import AttentionShape
from astbench_registry.transforms.conformance import rows_of_weights
from astbench_registry.transforms.registry import build_transform

SHAPE = AttentionShape(3, 3, 5)


@pytest.mark.parametrize("weights", ["renormalised", "uniform", "raw"])
@pytest.mark.parametrize("top_k", [1, 4, 200])
def test_each_row_is_the_oracles(top_k, weights):
    given, visible = rows_of_weights(seed=6)
    got = build_transform("hard", {"top_k": top_k, "weights": weights}, SHAPE)(given, visible).numpy()
    for place in np.ndindex(*given.shape[:3]):
        row = given[place].numpy()
        kept = np.argsort(-row)[:top_k]
        kept = kept[row[kept] > 0]
        wanted = np.zeros_like(row)
        if len(kept):
            wanted[kept] = {
                "renormalised": row[kept] / row[kept].sum(),
                "uniform": 1 / len(kept),
                "raw": row[kept],
            }[weights]
        np.testing.assert_allclose(got[place], wanted, rtol=1e-12)


def test_ties_stay_together():
    row = torch.tensor([0.1, 0.3, 0.2, 0.2, 0.2], dtype=torch.float64)[None, None, None]
    got = build_transform("hard", {"top_k": 2, "weights": "raw"}, AttentionShape(1, 1, 5))(row, row > 0)
    assert got.flatten().tolist() == [0, 0.3, 0.2, 0.2, 0.2]
