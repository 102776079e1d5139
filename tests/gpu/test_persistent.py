"""The persistent CUDA kernels without a GPU: their plan, their exchange under ThreadSanitizer, and their switch.

Their numbers are in tests/gpu/test_cuda_host.py, their registers in tests/gpu/test_cuda_compile.py.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

import fastlstm
from fastlstm.backends import native
from fastlstm.ops.schema import LayerCall, LayerShape

from ..thread_sanitizer import compile_program, run_program
from .test_cuda_host import ROOT, cuda_headers, unavailable_reason

# Streaming multiprocessors, max shared memory of a CTA, max CTAs of a cluster.
H100, A100, RTX4090 = (132, 227 << 10, 16), (108, 163 << 10, 0), (128, 99 << 10, 0)
HOPPER_WITHOUT_CLUSTERS = (*H100[:2], 0)
REGISTERS = 144 << 10  # max bytes of W_hh in a CTA's registers

needs_extension = pytest.mark.skipif(native.extension is None, reason=native.load_error)


def plan(phase, H, B, D=1, element=2, device=H100, P=None, tier=""):
    """(reason there is no plan or "", layout); "description" names the variant and the reason."""
    reason, layout, description = native.extension.persistent_plan(phase, H, P or H, B, D, element, *device, tier)
    return reason, {**layout, "description": description}


@needs_extension
@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize(
    "device",
    [H100, HOPPER_WITHOUT_CLUSTERS, A100, RTX4090],
    ids=["H100", "H100 without clusters", "A100", "RTX4090"],
)
@pytest.mark.parametrize("tier", ["", "A", "B", "D", "S"])
def test_plan_covers_the_layer_and_fits_the_device(phase, device, tier):
    sizes = (1, 7, 32, 33, 100, 128, 256, 384, 512, 640, 768, 1000, 1024, 1536, 2048, 4096, 10**6)
    supported = 0
    for H, B, D, element in itertools.product(sizes, (1, 8, 9, 64, 100, 1000), (1, 2), (2, 4)):
        reason, p = plan(phase, H, B, D, element, device, tier=tier)
        if reason:
            continue
        supported += 1
        details = f"{phase} H={H} B={B} D={D} element={element}: {p}"
        # A: its rows and bytes of K, and those that the warps' iterations cover.
        whole, own = p["ctas_per_group"] * p["units"], 4 * p["units"]
        if phase == "forward":
            rows, K = own, whole
        elif p["cluster"]:
            rows, K = whole, own
        else:
            rows, K = p["units"], 4 * whole
        if phase == "backward" and p["cluster"]:
            covered, covered_K = 8 * 16 * p["iters"], 64 * p["m_tiles"]
        else:
            covered, covered_K = 8 // p["split_k"] * 16 * p["m_tiles"], p["split_k"] * 64 * p["iters"]
        assert covered >= rows, details
        assert covered_K >= K * element, details
        assert whole >= H, details
        assert p["batch_tiles"] * p["n_tiles"] * 8 >= B, details
        assert 1 <= p["groups"] <= p["batch_tiles"], details
        assert p["ctas"] == D * p["groups"] * p["ctas_per_group"], details
        assert p["ctas_per_group"] <= device[2] if p["cluster"] else p["single"] or p["ctas"] <= device[0], details
        assert p["groups"] == p["batch_tiles"] or not (p["cluster"] or p["single"]), details
        assert p["register_iters"] * p["m_tiles"] * 8 * 1024 <= REGISTERS, details
        assert p["shared_bytes"] <= device[1], details
    assert supported > 100


@needs_extension
def test_fit_is_independent_of_the_batch():
    for phase, H, D, element in itertools.product(("forward", "backward"), (64, 700, 1024, 2048, 2100), (1, 2), (2, 4)):
        assert len({bool(plan(phase, H, B, D, element, tier="B")[0]) for B in (1, 8, 64, 777)}) == 1


@needs_extension
def test_plan_limits_on_an_h100():
    """W_hh must fit in the registers and shared memory of one wave of CTAs on an H100."""
    for phase in ("forward", "backward"):
        assert plan(phase, 2048, 128, tier="B")[0] == ""
        assert plan(phase, 1024, 64, element=4, tier="B")[0] == ""
        assert plan(phase, 1024, 64, D=2, tier="B")[0] == ""
        assert "H=2048, 64 MiB" in plan(phase, 2048, 128, element=4)[0]
        assert "of both directions at H=2048" in plan(phase, 2048, 128, D=2)[0]
        assert "H=1000000" in plan(phase, 10**6, 1)[0]
        assert "proj_size" in plan(phase, 64, 8, P=32)[0]
        assert "TF32" in plan(phase, 64, 8, element=0)[0]
        assert "require compute capability 8.0" in plan(phase, 64, 8, device=(0, 0, 0))[0]


@needs_extension
def test_more_units_per_cta_if_they_fit():
    """A CTA's loads per step grow with the CTAs of its group, so the smallest group is fastest."""
    assert plan("forward", 1024, 64)[1]["ctas_per_group"] == 32
    assert plan("forward", 1024, 64, element=4)[1]["ctas_per_group"] == 64
    assert plan("forward", 2048, 64, tier="B")[1]["ctas_per_group"] == 128
    # Batch tiles of 8 rows while all groups run concurrently, then of 16.
    plans = [plan("forward", 512, B, device=HOPPER_WITHOUT_CLUSTERS)[1] for B in (8, 64, 72)]
    assert [p["n_tiles"] for p in plans] == [1, 1, 2]


@needs_extension
def test_chosen_variant_has_the_lowest_predicted_time():
    """docs/gpu-kernels.md, "Time per step"; the plan has the other variants' predicted times."""
    layout = plan("forward", 512, 64)[1]
    assert (layout["cluster"], layout["ctas_per_group"]) == (1, 16)
    assert layout["description"] == "cluster variant: predicted 2.1 us per step, grid variant 2.9 us per step"
    # Clusters run sequentially; in the grid variant a batch tile's exchange overlaps with another's work.
    assert not plan("forward", 512, 512)[1]["cluster"]
    not_cluster = "; not the cluster variant: a cluster of 17 CTAs exceeds 16"
    assert plan("forward", 513, 64)[1]["description"].startswith("grid variant: predicted 3.")
    assert plan("forward", 513, 64)[1]["description"].endswith(not_cluster)
    assert plan("forward", 513, 64, element=4)[1]["description"].endswith(not_cluster)
    assert plan("forward", 512, 64, device=A100)[1]["description"].endswith(": this GPU has no thread-block clusters")
    assert plan("forward", 512, 64, tier="A")[1]["description"] == "cluster variant: requested (tier=A)"
    assert not plan("forward", 512, 64, tier="B")[1]["cluster"]
    # Clusters need not be co-resident.
    alone = plan("forward", 512, 64, D=2, device=(16, 227 << 10, 16), tier="A")[1]["description"]
    assert alone == "cluster variant: requested (tier=A); not the grid variant: too few SMs"
    # Many batch tiles for few groups: measured slower than a GEMM and a kernel per step.
    for phase, H, B, element in (
        ("forward", 2048, 128, 2),
        ("backward", 2048, 128, 2),
        ("backward", 1024, 64, 4),
        ("forward", 64, 100_000, 2),
    ):
        assert plan(phase, H, B, element=element)[0].startswith("predicted "), (phase, H, B, element)
        assert plan(phase, H, B, element=element, tier="B")[0] == ""


@needs_extension
def test_stepwise_prediction_grows_with_the_batch():
    """Launch overhead for small layers, and GEMM and memory time of B rows for large ones."""

    def steps(phase, H, B, D=1, element=2):
        return float(plan(phase, H, B, D, element)[0].removeprefix("predicted ").split(" us")[0])

    assert steps("forward", 2048, 128) == 20.1  # loading W_hh into the SMs
    assert steps("forward", 512, 512) == 12.0
    assert steps("forward", 1024, 1024) == 38.8
    assert steps("backward", 1024, 1024) == 27.6
    assert steps("forward", 1024, 1024, element=4) > steps("forward", 1024, 1024)
    for phase in ("forward", "backward"):
        assert steps(phase, 1024, 4096) == pytest.approx(4 * steps(phase, 1024, 1024), rel=0.01)


@needs_extension
def test_single_blocks():
    """Up to 128 units in 16 bits, four rows per CTA, on any device; only on request until measured."""
    for phase, device in itertools.product(("forward", "backward"), (H100, A100, RTX4090)):
        for H, B, D in itertools.product((1, 32, 100, 128), (1, 4, 5, 64, 1000), (1, 2)):
            reason, p = plan(phase, H, B, D, device=device, tier="S")
            case = f"{phase}, {device}, H={H}, B={B}, D={D}"
            assert (reason, p["description"]) == ("", "single-block variant: requested (tier=S)"), case
            assert (p["single"], p["ctas_per_group"], p["ctas"]) == (1, 1, D * -(-B // 4)), case
            assert not plan(phase, H, B, D, device=device)[1]["single"]
        assert not plan(phase, 129, 16, device=device, tier="S")[1]["single"]
        assert not plan(phase, 128, 16, element=4, device=device, tier="S")[1]["single"]


@needs_extension
def test_data_flags():
    """One batch tile of 8 rows per group; only on request until measured."""
    for phase, element in itertools.product(("forward", "backward"), (2, 4)):
        reason, p = plan(phase, 512, 64, element=element, tier="D")
        assert (reason, p["description"]) == ("", "grid variant with data flags: requested (tier=D)")
        assert (p["data_flag"], p["cluster"], p["n_tiles"], p["groups"], p["batch_tiles"]) == (1, 0, 1, 8, 8)
        assert not plan(phase, 512, 64, element=element)[1]["data_flag"]
        assert not plan(phase, 512, 64, element=element, tier="B")[1]["data_flag"]
        more_tiles = plan(phase, 512, 72, element=element, tier="D")[1]
        assert not more_tiles["data_flag"]
        assert more_tiles["description"].startswith("grid variant: requested (tier=D)")
        assert more_tiles["description"].endswith(
            "; no data flags: the SMs hold fewer groups than there are batch tiles of 8 rows"
        )
        many_sms = (1 << 27, *H100[1:])
        assert plan(phase, 1024, 40_000, element=element, device=many_sms, tier="D")[1]["data_flag"]
        too_large = plan(phase, 1024, 600_000, element=element, device=many_sms, tier="D")[1]
        assert not too_large["data_flag"]
        assert too_large["description"].endswith("; no data flags: the exchange buffer would have 4 GiB or more")
        no_sms = plan(phase, 512, 8, D=2, element=element, device=(16, 227 << 10, 16), tier="D")[1]
        assert no_sms["description"].endswith("; not the grid variant: too few SMs; no data flags: too few SMs")


@needs_extension
def test_set_persistent_switches_the_kernels():
    before = native.extension.persistent_enabled()
    if "cuda" not in native.devices:
        with pytest.raises(RuntimeError, match="must be built for cuda"):
            native.set_persistent(True)
    with pytest.raises(RuntimeError, match="tier must be A, B, D, S or empty, got C"):
        native.set_persistent(False, tier="C")
    call = LayerCall(torch.device("cuda"), torch.bfloat16, 64, LayerShape(64, 64, 1, True), False, False)
    native.set_persistent(False)
    try:
        assert native.kernels(call, 1).startswith("step by step: persistent kernels were turned off")
    finally:
        native.extension.enable_persistent(before, "")
    assert fastlstm.explain(fastlstm.LSTM(3, 4), torch.zeros(2, 2, 3)).kernels == ""


@needs_extension
def test_explain_names_the_kernels(monkeypatch):
    class Extension:
        persistent_plan = staticmethod(native.extension.persistent_plan)
        persistent_enabled = staticmethod(lambda: True)
        persistent_tier = staticmethod(lambda: "")

    class Gpu:
        multi_processor_count, shared_memory_per_block_optin, major = *H100[:2], 9

    monkeypatch.setattr(native, "extension", Extension)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Gpu)

    def explained(H, dtype, B=64):
        shape = LayerShape(H, H, 1, True)
        return native.kernels(LayerCall(torch.device("cuda"), dtype, H, shape, lengths=False, reset_mask=False), B)

    assert "forward in clusters of 16 CTAs (cluster variant: predicted 2.1 us" in explained(512, torch.bfloat16)
    assert "backward in clusters of 16 CTAs (cluster variant: predicted 2." in explained(512, torch.bfloat16)
    assert "forward in groups of 32 CTAs (grid variant: predicted" in explained(1024, torch.bfloat16)
    assert "; not the cluster variant: a cluster of 32 CTAs exceeds 16)" in explained(1024, torch.bfloat16)
    assert "forward step by step: predicted 20" in explained(2048, torch.bfloat16, B=128)
    assert "have persistent kernels" in explained(512, torch.float64)
    assert "does not fit" in explained(4096, torch.float16)
    masked = LayerCall(
        torch.device("cuda"), torch.bfloat16, 64, LayerShape(64, 64, 1, True), recurrent_mask=True, zoneout_c=True
    )
    expected = "step by step: recurrent_dropout, zoneout is not implemented in the persistent kernels"
    assert native.kernels(masked, 64) == expected
    Gpu.major = 8
    assert "this GPU has no thread-block clusters" in explained(512, torch.float16)
    Gpu.major = 7
    assert "require compute capability 8.0 and cooperative launch" in explained(512, torch.float16)


@pytest.fixture(scope="module")
def simulation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of tests/gpu/cuda_host/simulation.cpp compiled with ThreadSanitizer."""
    if reason := unavailable_reason():
        pytest.skip(reason)
    return compile_program(
        [ROOT / "tests" / "gpu" / "cuda_host" / "simulation.cpp"],
        tmp_path_factory.mktemp("simulation") / "simulation",
        "-Wno-unknown-pragmas",
        *(f"-I{ROOT / folder}" for folder in ("tests/gpu/cuda_host", "csrc")),
        f"-isystem{cuda_headers()}",
    )


@pytest.mark.toolchain
@pytest.mark.parametrize(("first_seed", "delay_us"), [(10, 0), (3000, 300), (6000, 100), (9000, 100)])
def test_exchange_has_no_races(simulation, first_seed, delay_us):
    """Ten layers of random sizes, masks and launches: ThreadSanitizer is silent, the numbers the step-wise kernels'."""
    ran = run_program(simulation, first_seed, 10, delay_us)
    assert ran.returncode == 0, ran.stderr[-4000:]


@pytest.mark.toolchain
@pytest.mark.parametrize("held", ["clears", "all"])
def test_data_flags_have_no_races_if_stores_wait_for_a_fence(simulation, held):
    """Three layers of several CTAs per group that use each slot again; tests/gpu/test_planted_faults.py has faults."""
    ran = run_program(simulation, 12000, 3, 100, held)
    assert ran.returncode == 0, ran.stderr[-4000:]


@pytest.mark.toolchain
@pytest.mark.parametrize("seed", [25, 3, 18, 9007], ids=["flags", "clusters", "clusters of 16 rows", "data flags"])
def test_lost_flag_or_push_traps_instead_of_hanging(simulation, seed):
    """CTA 1 sends nothing and reports nothing; the layers have two CTAs or more per group."""
    ran = run_program(simulation, seed, 1, 0, "silent")
    assert ran.returncode == 3, ran.stderr[-4000:]
    assert "timed out waiting for epoch" in ran.stderr
    assert "CTA 1 timed out" not in ran.stderr
