"""Choice of configuration: legality, geometry, cost, and what `explain` shows. Pure Python, no GPU."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from marlin.errors import UnsupportedError
from marlin.runtime import Problem, TileConfig, all_configs, candidates, make_plan, why_illegal
from marlin.runtime.config import MAX_WORKSPACE_BYTES, Config, resident_blocks
from marlin.runtime.cost import cost_us, geometry
from marlin.runtime.driver import DeviceInfo
from marlin.runtime.problem import DTYPES, KINDS

H200 = DeviceInfo(0, "NVIDIA H200", (9, 0), 132, 232448, 60 << 20, 1_980_000, 4.917e12)
A100 = DeviceInfo(0, "NVIDIA A100", (8, 0), 108, 166912, 40 << 20, 1_410_000, 1.9e12)
RTX4090 = DeviceInfo(0, "NVIDIA GeForce RTX 4090", (8, 9), 128, 101376, 72 << 20, 2_520_000, 1.0e12)
V100 = DeviceInfo(0, "Tesla V100", (7, 0), 80, 98304, 6 << 20, 1_530_000, 0.9e12)
PROBLEM = Problem(16, 4096, 4096, 128, "float16", "w4a16_sp24")
TILES = Path(__file__).parent.parent / "benchmarks" / "records" / "tiles-nvidia-h200.json"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"m": 0}, "M must lie in 1..65536; got M=0. Split the tokens."),
        ({"m": 65537}, "M must lie in 1..65536; got M=65537. Split the tokens."),
        ({"n": 4}, "N must be a positive multiple of 8; got N=4. Pad the rows."),
        ({"k": 48}, "K must be a positive multiple of 32; got K=48. Pad the columns."),
        ({"k": 4160}, "K must be a multiple of group_size=128; got K=4160. Use a smaller group_size."),
        ({"group_size": 16}, "group_size must be one of (32, 64, 128, -1); got 16."),
        ({"dtype": "float32"}, "dtype must be one of ('float16', 'bfloat16'); got 'float32'. Cast the activations."),
        ({"kind": "w8a16"}, "kind must be one of ('w4a16_sp24', 'w4a16_dense'); got 'w8a16'."),
    ],
)
def test_why_illegal_names_the_value_and_the_way_out(change: dict, text: str) -> None:
    problem = PROBLEM._replace(**change)
    assert why_illegal(all_configs("w4a16_sp24")[0], problem, H200) == text
    with pytest.raises(ValueError) as error:
        make_plan(problem, H200)
    assert str(error.value) == f"{problem.kind}: {text}"


def test_why_illegal_names_the_gpu_when_it_is_too_old() -> None:
    reason = why_illegal(all_configs("w4a16_sp24")[0], PROBLEM, V100)
    assert reason == "the GPU must have compute capability 8.0 or newer; got 7.0 (Tesla V100)."
    with pytest.raises(UnsupportedError, match=r"compute capability 8\.0 or newer"):
        make_plan(PROBLEM, V100)


def test_why_illegal_names_shared_memory_when_a_tile_does_not_fit() -> None:
    config = TileConfig(16, 128, 256, 6, 1, 2, 4, 1)
    reason = why_illegal(config, PROBLEM, RTX4090)
    assert reason is not None
    assert reason.startswith("16x128x256_s6_w124_c1 needs ")
    assert reason.endswith("of shared memory a block; NVIDIA GeForce RTX 4090 gives 101376.")


@pytest.mark.parametrize("device", [H200, A100, RTX4090], ids=lambda d: d.name)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_every_problem_has_a_legal_plan_on_every_supported_gpu(device: DeviceInfo, kind: str, group_size: int) -> None:
    for m in (1, 7, 16, 17, 64, 65, 300, 4096, 65536):
        for n, k in ((8, 128), (72, 640), (4096, 4096), (28672, 4096), (4096, 28672)):
            plan = make_plan(Problem(m, n, k, group_size, DTYPES[0], kind), device)
            assert why_illegal(plan.config, plan.problem, device) is None
            assert plan.workspace_bytes <= MAX_WORKSPACE_BYTES


@pytest.mark.parametrize("config", all_configs("w4a16_sp24"), ids=lambda c: c.tag)
def test_geometry_gives_every_chunk_to_exactly_one_block(config: Config) -> None:
    for m, n, k in ((1, 8, 32), (16, 4096, 4096), (100, 6144, 4096), (257, 200, 14336), (4096, 4096, 1024)):
        problem = Problem(m, n, k, -1, "float16", "w4a16_sp24")
        shape = geometry(config, problem, H200)
        assert 1 <= shape.grid and (config.cluster or shape.grid <= resident_blocks(config, problem, H200))
        if config.cluster:
            assert shape.stripe_chunks * config.cluster == shape.num_chunks, "a block stays within a tile"
        tiles, chunks = shape.num_m_tiles * shape.num_n_tiles, shape.num_chunks
        owner: dict[tuple[int, int], int] = {}
        for block in range(shape.grid):
            begin = min(block * shape.stripe_chunks, shape.num_split_tiles * chunks)
            end = min(begin + shape.stripe_chunks, shape.num_split_tiles * chunks)
            units = [divmod(unit, chunks) for unit in range(begin, end)]
            whole = [shape.num_split_tiles + wave * shape.grid + block for wave in range(shape.num_whole_tiles)]
            units += [(tile, chunk) for tile in whole for chunk in range(chunks)]
            assert len(units) <= shape.local_chunks
            assert len({tile for tile, _ in units[: end - begin]}) <= 2, "a stripe meets at most two tiles"
            for unit in units:
                assert unit not in owner
                owner[unit] = block
        assert len(owner) == tiles * chunks


def test_plan_needs_no_workspace_when_no_tile_is_split() -> None:
    config = TileConfig(128, 128, 64, 4, 1, 4, 1, 2)
    plan = make_plan(Problem(128, 264 * 128, 4096, 128, "float16", "w4a16_sp24"), H200, config)
    assert (plan.workspace_bytes, plan.num_tickets) == (0, 0)
    assert plan.geometry.num_whole_tiles == 1


def test_candidates_are_sorted_and_say_why_the_rest_is_out() -> None:
    rows = candidates(PROBLEM, RTX4090)
    costs = [row.us for row in rows if row.us is not None]
    assert costs == sorted(costs) and costs
    assert all(row.reason for row in rows if row.us is None)
    assert {row.config for row in rows} == set(all_configs("w4a16_sp24"))


def _timings() -> list[tuple[Problem, Config, float]]:
    record = json.loads(TILES.read_text())
    configs = {config.tag: config for kind in KINDS for config in all_configs(kind)}
    rows = []
    for row in record["rows"]:
        problem = Problem(row["m"], row["n"], row["k"], 128, "float16", row["op"])
        if row["config"] in configs:
            rows.append((problem, configs[row["config"]], row["us"]))
    assert len(rows) > 500, "the record must hold timings of the tiles in use"
    return rows


def test_cost_model_follows_the_timings_it_is_fitted_to() -> None:
    errors = [abs(math.log(cost_us(config, problem, H200) / us)) for problem, config, us in _timings()]
    assert sum(errors) / len(errors) < 0.07
    assert max(errors) < 0.35


def test_cost_model_picks_a_config_near_the_best_timed_one() -> None:
    timed: dict[Problem, list[tuple[float, float]]] = {}
    for problem, config, us in _timings():
        timed.setdefault(problem, []).append((cost_us(config, problem, H200), us))
    regrets = [min(rows)[1] / min(us for _, us in rows) for rows in timed.values() if len(rows) > 1]
    assert sum(regrets) / len(regrets) < 1.06


def test_hopper_kernels_are_chosen_on_hopper_alone() -> None:
    assert make_plan(PROBLEM, H200).config.family == "sm90"
    assert make_plan(PROBLEM._replace(k=4128, group_size=32), H200).config.family == "sm80", "K is no multiple of 64"
    assert make_plan(PROBLEM, A100).config.family == "sm80"
    config = all_configs("w4a16_sp24")[-1]
    reason = f"{config.tag} needs compute capability 9.0; got 8.0 (NVIDIA A100)."
    assert why_illegal(config, PROBLEM, A100) == reason
    reason = f"{config.tag} needs K to be a multiple of 64; got K=4128."
    assert why_illegal(config, PROBLEM._replace(k=4128, group_size=32), H200) == reason
