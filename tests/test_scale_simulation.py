"""The simulation of many ranks: its limits, and that it asks the package's policy."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest


BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import scale_simulation as simulation  # noqa: E402
import scaling_report  # noqa: E402
from scale_simulation import Network, Setup, efficiency, step_seconds  # noqa: E402


FLAT = [(1.0, 1e6)] * 50
SLOW = Setup("Llama 1B", "h100", "H100 Ethernet", 0)


def test_a_ring_sends_each_byte_twice():
    assert simulation.ring_bytes(100.0, 1) == 0
    assert simulation.ring_bytes(100.0, 2) == 100
    assert simulation.ring_bytes(100.0, 10**9) == pytest.approx(200)
    assert simulation.ring_seconds(0.0, 5, 1.0, 3.0) == 8 * 3.0


def test_a_reduction_over_nodes_is_a_ring_in_each_and_one_over_them():
    network = Network("", 4, inside=10.0, outside=1.0, inside_latency=0.0, outside_latency=0.0)
    assert simulation.all_reduce_seconds(80.0, 1, network) == 0
    inside = simulation.ring_seconds(80.0, 4, 10.0, 0.0)
    assert simulation.all_reduce_seconds(80.0, 4, network) == inside
    assert simulation.all_reduce_seconds(80.0, 8, network) == inside + simulation.ring_seconds(20.0, 2, 1.0, 0.0)


@pytest.mark.parametrize("setup", simulation.SETUPS, ids=lambda setup: setup.name)
def test_one_rank_costs_nothing_and_more_ranks_cost_more(setup):
    assert all(efficiency(setup, k) == 1 for k in simulation.FIXED)
    for k in (1, 16):
        # ZeRO shares the optimizer step, which one rank alone takes whole: seconds of micro-batches only.
        found = [step_seconds(replace(setup, ranks=r), k + 1) - step_seconds(replace(setup, ranks=r), k)
                 if setup.zero else 1 / efficiency(replace(setup, ranks=r), k) for r in simulation.RANKS]  # fmt: skip
        assert found == sorted(found)


@pytest.mark.parametrize("setup", [s for s in simulation.SETUPS if not s.zero], ids=lambda setup: setup.name)
def test_ddp_pays_once_in_a_window(setup):
    many = replace(setup, ranks=1024)
    shares = [efficiency(many, k) for k in (1, 4, 16, 64, 10**6)]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1, abs=1e-3)


def test_zero_pays_in_each_micro_batch():
    many = Setup("Llama 7B", "h100", "H100 Ethernet", 3, ranks=64)
    assert efficiency(many, 10**6) < 0.2


def test_the_slowest_of_more_ranks_is_slower():
    # Means of the largest of n normal numbers, from tables.
    assert simulation.expected_maximum(1) == 0
    assert simulation.expected_maximum(2) == pytest.approx(1 / math.sqrt(math.pi), rel=0.05)
    assert simulation.expected_maximum(100) == pytest.approx(2.508, rel=0.01)


def test_parameters_of_models_that_one_knows():
    found = {name: model.parameters / 1e9 for name, model in simulation.MODELS.items()}
    assert found == pytest.approx({"GPT-2 small": 0.1236, "Llama 1B": 1.2357, "Llama 7B": 6.607}, rel=1e-3)


def test_rooflines_reach_what_devices_do_at_best():
    for name, model in simulation.MODELS.items():
        device = simulation.DEVICES["h100"]
        rate = 6 * model.tokens * model.parameters / (3 * model.forward_seconds(device))
        assert 0.1 < rate / device.flops[simulation.torch.bfloat16] < 0.75, name


def test_a_policy_that_never_moves_is_the_fixed_k():
    run = simulation.adaptive_run(replace(SLOW, ranks=16), FLAT, policy=lambda seen: 2.0)
    assert run.seconds == pytest.approx(simulation.fixed_seconds(replace(SLOW, ranks=16), FLAT, 2))
    assert run.micro_batches == pytest.approx(2 * run.steps)


def test_the_policy_sees_the_cost_of_a_step_and_the_noise():
    seen = []
    setup = replace(SLOW, ranks=16)
    simulation.adaptive_run(setup, FLAT, policy=lambda observation: seen.append(observation) or 2.0)
    micro, step = seen[0].micro_batch_seconds, seen[0].step_seconds
    assert 2 * micro + step == pytest.approx(step_seconds(setup, 2))
    assert seen[0].noise_in_micro_batches == pytest.approx(1e6 / setup.tokens)


def test_goodput_is_near_the_best_fixed_k_where_noise_is_constant():
    setup = replace(SLOW, ranks=16)
    times = [simulation.fixed_seconds(setup, FLAT, k) for k in range(1, 65)]
    found = simulation.adaptive_run(setup, FLAT)
    assert min(times) <= found.seconds <= 1.02 * min(times)
    assert found.micro_batches / found.steps > 1.5


def test_recorded_curves_end_where_the_record_does():
    curves = simulation.recorded_curves()
    assert len(curves) == 5
    for curve in curves:
        assert all(steps > 0 and math.isfinite(noise) for steps, noise in curve)
        assert simulation.scaled(curve, 1e6)[-1][1] == pytest.approx(1e6)
        assert sum(steps for steps, _ in curve) < 1000


def test_the_committed_record_is_what_the_simulation_gives():
    recorded = json.loads((BENCHMARKS / "results" / "scaling" / "simulation.json").read_text())
    row = next(row for row in recorded if row["setup"] == SLOW.name and row["ranks"] == 16)
    assert row["efficiency"]["1"] == pytest.approx(efficiency(replace(SLOW, ranks=16), 1), abs=1e-4)
    page = (BENCHMARKS / "scaling.md").read_text()
    for sentence in (scaling_report.claim_sentence(recorded), scaling_report.gains_sentence(recorded)):
        assert sentence in page
    assert scaling_report.simulation_table(recorded, "10⁶ tokens") in page
    assert "None of this was run" in page


def test_predictions_are_held_against_the_two_ranks_that_were_run():
    rows = scaling_report.check_of_convergence(scaling_report.two_rank_runs())
    errors = [float(row[-1].strip("%")) / 100 for row in rows]
    assert all(abs(error) < 0.15 for error in errors[:2])  # step times
    page = (BENCHMARKS / "scaling.md").read_text()
    assert all(" | ".join(row) in page for row in rows)
