"""MKL's modes of reproducibility on this processor: which keep the law of `ncf_dist.products`, and how fast they are.

    .venv/bin/python -m benchmarks.mkl_modes

For each mode a process of its own: whether a row of a product has the same bits wherever it stands, and GFLOP/s of
float32 products on one thread, the best of seven. `default` is MKL's own, which sets no mode.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

from ncf_dist.machine import processor
from ncf_dist.products import BLOCKS, LAYERS, MODE, ROWS, numbers, repeats

MODES = ("default", "AUTO", "AVX512", "AVX2", "AVX2,STRICT", "COMPATIBLE")
SHAPES = ((256, 64, 1024), (256, 128, 1024), (16, 32, 4096), (4096, 128, 256), (1024, 64, 32), (256, 8, 1024))
"""Rows, inputs and outputs of what is timed."""
OPERATIONS, REPEATS = 3e8, 7


def measure() -> str:
    """The rest of the line of this process's mode."""
    import torch
    from torch.nn.functional import linear

    torch.set_num_threads(1)
    broken, rates = 0, []
    with torch.no_grad():
        for rows, inputs, outputs in LAYERS + BLOCKS:
            x = numbers(ROWS, inputs)[torch.arange(rows) % ROWS]
            broken += not repeats(found := linear(x, numbers(outputs, inputs)), found.shape[1])
        for rows, inputs, outputs in SHAPES:
            x, weight = torch.rand(rows, inputs), torch.rand(outputs, inputs)
            operations = 2 * rows * inputs * outputs
            calls, seconds = max(1, int(OPERATIONS / operations)), []
            for _ in range(REPEATS):
                start = time.perf_counter()
                for _ in range(calls):
                    linear(x, weight)
                seconds.append((time.perf_counter() - start) / calls)
            rates.append(operations / min(seconds) / 1e9)
    law = f"breaks it in {broken}" if broken else "keeps it"
    return f"{law:<14}" + "".join(f"{rate:>14.1f}" for rate in rates)


def main() -> None:
    if "--one" in sys.argv:
        return print(f"{sys.argv[-1]:<14}{measure()}")
    print(f"{processor()}\n{'':<14}{'the law':<14}" + "".join(f"{'x'.join(map(str, shape)):>14}" for shape in SHAPES))
    for mode in MODES:
        # An empty value is MKL's default; a missing one would be set by the import of ncf_dist.
        environment = {**os.environ, MODE: "" if mode == "default" else mode}
        command = [sys.executable, "-m", "benchmarks.mkl_modes", "--one", mode]
        subprocess.run(command, env=environment, check=True)


if __name__ == "__main__":
    main()
