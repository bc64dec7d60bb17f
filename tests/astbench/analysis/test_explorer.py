"""What the explorer holds, read back, against the facts that it was made of."""

import base64

import numpy as np
import torch

from astbench.analysis.explorer import Explorer
from astbench.analysis.rows import row_facts
from tests.astbench.analysis.test_rows import call_of, chosen


def test_read_back():
    call = call_of("causal_self", padded=True)
    layout, rows = chosen(call), torch.tensor([2, 9, 17, 21])
    facts = row_facts(call, layout, rows)
    explorer = Explorer([f"t{n}" for n in range(23)])
    explorer.add("first", facts, rows, 4)
    explorer.add("second", facts, rows, 4)
    explorer.add("of other tokens", facts, rows[:2], 4)
    found = explorer.result("pooled_topk")
    assert found["rows"] == [2, 9, 17, 21] and found["real"] == [True, True, True, False]
    assert list(found["layers"]) == ["first", "second"] and len(found["tokens"]) == 23
    layer = found["layers"]["second"]
    shape = (layer["heads"], 4, layer["blocks"])
    assert shape == (4, 4, 6) and layer["block_size"] == 4
    mass = np.frombuffer(base64.b64decode(layer["mass"]), np.uint8).reshape(shape)
    torch.testing.assert_close(torch.tensor((mass / 255.0) ** 2).float(), facts.mass_of_block[0], rtol=0, atol=2 / 255)
    bits = np.frombuffer(base64.b64decode(layer["chosen"]), np.uint8).reshape(4, 4, 1)
    assert torch.tensor(np.unpackbits(bits, axis=-1, count=6)).bool().equal(facts.chosen[0])
    assert facts.chosen[0].any() and not facts.chosen[0].all()
