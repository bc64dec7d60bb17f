"""Where there is no GPU, Triton is loaded for its interpreter, before anything else imports it to compile.

The variable is gone again at once: commands that tests start, and `choose_backend`, see the environment as it is.
"""

import os
from importlib.util import find_spec

import torch

if find_spec("triton") is not None and not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ:
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language  # noqa: F401

    del os.environ["TRITON_INTERPRET"]
