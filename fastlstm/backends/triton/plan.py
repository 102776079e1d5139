"""Which kernel runs a layer, and with which tiles: `choose` reads a fixed table, so no call waits for autotuning.

The choice depends on H, dtype, precision and the device, not on T or B. docs/triton.md describes how to tune the table.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Tiles:
    """Compile-time options of a kernel. Resident kernels have no BLOCK_N and BLOCK_K."""

    block_b: int  # rows of the batch per tile
    block_n: int  # units per tile
    block_k: int  # K per iteration
    warps: int
    stages: int = 1  # software pipelining of the product's loads
    registers: int | None = None  # NVIDIA: max per thread; None: ptxas may spill for occupancy

    def fitted(self, align: int) -> Tiles:
        """Return tiles for H divisible by `align`: an odd H has scalar loads, which take more registers."""
        return self if align > 1 else replace(self, block_k=max(16, self.block_k // 4))


@dataclass(frozen=True)
class Row:
    """A row of the table: kernel and tiles of layers up to `max_h` units."""

    kernel: str  # "resident", "streamed" or "step"
    max_h: int
    shared: int  # max KiB of shared memory of the kernels (checked by tests/gpu/test_triton_aot.py)
    forward: Tiles
    backward: Tiles


ANY = 1 << 30
RESIDENT, RESIDENT_WIDE = Tiles(16, 0, 0, warps=4), Tiles(16, 0, 0, warps=8, registers=255)

# First row with H <= max_h and shared <= the device's. Keys: (target, kind), kind "half" for fp16 and bf16, "tf32" or
# "ieee" for fp32. "hip" is AMD; other devices use "cuda", with rows selected by shared memory.
TABLE: dict[tuple[str, str], tuple[Row, ...]] = {
    ("cuda", "half"): (
        Row("resident", 64, 44, RESIDENT, RESIDENT),
        Row("resident", 128, 148, RESIDENT_WIDE, RESIDENT_WIDE),
        Row("streamed", 256, 96, Tiles(16, 64, 64, 8, 3, 255), Tiles(16, 64, 64, 8, 3, 255)),
        Row("step", ANY, 96, Tiles(64, 16, 128, 4, 3), Tiles(32, 32, 128, 4, 3)),
    ),
    ("cuda", "tf32"): (
        Row("resident", 32, 26, RESIDENT, RESIDENT),
        Row("resident", 64, 84, RESIDENT_WIDE, RESIDENT_WIDE),
        Row("streamed", 192, 96, Tiles(16, 32, 64, 8, 2, 255), Tiles(16, 32, 64, 8, 2, 255)),
        Row("step", ANY, 96, Tiles(32, 16, 64, 4, 3), Tiles(32, 16, 64, 4, 3)),
    ),
    # Tensor cores have no IEEE fp32; a resident W_hh would be unrolled into one huge block of FMAs.
    ("cuda", "ieee"): (
        Row("streamed", 128, 48, Tiles(16, 32, 16, 8, 2), Tiles(16, 32, 16, 8, 2, 255)),
        Row("step", ANY, 48, Tiles(32, 16, 16, 4, 2), Tiles(32, 16, 16, 4, 2)),
    ),
    ("hip", "half"): (
        Row("resident", 64, 16, RESIDENT, RESIDENT),
        Row("streamed", 256, 64, Tiles(16, 64, 64, 4, 2), Tiles(16, 64, 64, 4, 2)),
        Row("step", ANY, 64, Tiles(64, 16, 64, 4, 2), Tiles(32, 32, 64, 4, 2)),
    ),
    # gfx942 has IEEE fp32 in its matrix cores.
    ("hip", "ieee"): (
        Row("resident", 32, 16, RESIDENT, RESIDENT),
        Row("streamed", 192, 64, Tiles(16, 32, 32, 4, 2), Tiles(16, 32, 32, 4, 2)),
        Row("step", ANY, 64, Tiles(32, 16, 32, 4, 2), Tiles(32, 16, 32, 4, 2)),
    ),
}


def choose(target: str, kind: str, H: int, shared: int) -> Row:
    """Return the row for H units on a device with `shared` KiB of shared memory per thread block."""
    rows = TABLE["hip" if target == "hip" else "cuda", kind]
    return next((row for row in rows if row.max_h >= H and row.shared <= shared), rows[-1])


def alignment(H: int) -> int:
    """Return the largest power of two up to 8 that divides H: the widest loads are 8 halves, or 4 floats twice."""
    return min(8, H & -H)
