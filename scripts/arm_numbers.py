"""Products of a few weights: made on one machine, compared on another. See ``check_arm``."""

import sys
import time
from dataclasses import replace
from pathlib import Path

import numba
import numpy as np
from gguf import GGMLQuantizationType

ROWS, COLUMNS, ROUNDING = 37, 512, 2e-6


def main() -> None:
    """Run ``make DIRECTORY TYPE...`` or ``compare DIRECTORY TYPE...``."""
    what, directory, *names = sys.argv[1:]
    folder = Path(directory)
    if what == "make":
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
        make(folder, names)
    else:
        compare(folder, names)


def make(folder: Path, names: list[str]) -> None:
    """Write weights, activations and this machine's products."""
    from cpu_kernels import sherry
    from edgeq.runtime.encoders import encode

    generator = np.random.default_rng(0)
    weight = generator.normal(size=(ROWS, COLUMNS)).astype(np.float32)
    np.save(folder / "inputs.npy", generator.normal(size=(3, COLUMNS)).astype(np.float32))
    for name in names:
        if name == sherry.NAME:
            packed = sherry.encode(weight)
        else:
            packed = encode(weight, GGMLQuantizationType[name], np.ones((1, COLUMNS), np.float32))
        np.save(folder / f"{name}.npy", packed)
        np.save(folder / f"{name}-product.npy", products(folder, name))


def compare(folder: Path, names: list[str]) -> None:
    """Multiply here; end with an error where the results differ."""
    from cpu_kernels import isa

    if isa.supported()[0].name == "portable":  # an emulator: its /proc/cpuinfo is another CPU's
        (neon,) = isa._ARM
        isa.supported = lambda: (neon,)
        numba.config.CPU_NAME, numba.config.CPU_FEATURES = neon.cpu, "+dotprod"
    chosen = isa.chosen
    print(f"instructions: {chosen().name}, {chosen().dot}")
    for name in names:
        started = time.perf_counter()
        found, wanted = products(folder, name), np.load(folder / f"{name}-product.npy")
        error = np.abs(found - wanted).max() / np.abs(wanted).max()
        spent = time.perf_counter() - started
        print(f"{name:8s} largest difference {error:.1e} of the largest, {spent:.0f} s", flush=True)
        if not error <= ROUNDING:
            sys.exit(f"{name}: the products differ by {error:.1e}, expected at most {ROUNDING}.")


def products(folder: Path, name: str) -> np.ndarray:
    """Return this machine's products; other families', where there are, must be the same."""
    from cpu_kernels import sherry
    from cpu_kernels.isa import chosen
    from cpu_kernels.lookup_tiles import lookup_layout_of, rearrange_for_lookup
    from cpu_kernels.products import Product
    from cpu_kernels.streams import TOKENS, may_stream
    from cpu_kernels.tiles import rearrange

    inputs = np.load(folder / "inputs.npy")
    packed = np.load(folder / f"{name}.npy")
    if name == sherry.NAME:
        return Product(sherry.rearrange(packed, chosen()), len(inputs))(inputs)
    qtype = GGMLQuantizationType[name]
    tiles = rearrange(qtype, packed, chosen())
    found = Product(tiles, len(inputs))(inputs)
    if may_stream(tiles.layout):
        many = np.resize(inputs, (TOKENS + 1, COLUMNS))
        streamed, dot = (
            Product(replace(tiles, streams=streams), len(many))(many) for streams in (True, False)
        )
        if not np.array_equal(streamed, dot):
            sys.exit(f"{name}: products by tables over tokens differ from those by multiplication.")
    layout = lookup_layout_of(qtype, chosen())
    if layout is not None:
        other = Product(rearrange_for_lookup(layout, packed), len(inputs))(inputs)
        if not np.array_equal(found, other):
            sys.exit(f"{name}: products by lookup differ from those by multiplication.")
    return found


if __name__ == "__main__":
    main()
