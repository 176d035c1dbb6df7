"""What the start of an engine leaves out."""

from __future__ import annotations

import subprocess
import sys

# in a process of its own: other tests load the compiler
WITHOUT_COMPILER = """
import sys
import torch
from megascale.engine import deepspeed_engine

compiling = torch.compile
deepspeed_engine._import_its_muon()
assert torch.compile is compiling
from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam
from deepspeed.runtime.zero.muon.original_muon import muon_update
muon_update(torch.ones(4, 4), torch.zeros(4, 4))  # still works, as plain torch
loaded = [name for name in sys.modules if name.startswith("torch._inductor.codegen")]
assert not loaded, loaded
"""


def test_deepspeeds_muon_does_not_load_the_compiler() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_COMPILER], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
