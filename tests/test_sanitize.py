"""The compute-sanitizer job without a GPU: what it tries, and how it reads a tool's output."""

from __future__ import annotations

import dataclasses

import pytest

from marlin.runtime import all_configs
from marlin.runtime.driver import DeviceInfo
from marlin.runtime.expansion import all_expand_variants
from marlin.runtime.problem import KINDS
from marlin.runtime.rowwise import all_rowwise_variants
from tests.gpu import sanitize

H100 = DeviceInfo(0, "H100", (9, 0), 132, 232448, 50 << 20, 1830000, 3.35e12)
DONE = "24 launches, all results within the bound\n"


def test_plans_hold_every_family_kind_and_way_to_share_a_tile() -> None:
    plans = list(sanitize.plans(H100))
    seen = {(plan.problem.kind, plan.config.family, plan.config.cluster) for plan in plans}
    assert seen == {(kind, config.family, config.cluster) for kind in KINDS for config in all_configs(kind)}
    assert {plan.problem.m for plan in plans} == set(sanitize.ALL_M)
    assert any(plan.num_tickets for plan in plans), "some tiles must be split over blocks"
    assert all(plan.geometry.num_n_tiles == 2 and plan.problem.k > 2 * plan.config.block_k for plan in plans)
    assert len({plan.variant for plan in plans}) <= 24, "the set is reduced"


def test_expanded_holds_every_kernel_that_expands() -> None:
    plans = list(sanitize.expanded(H100))
    assert [plan.expansion.variant for plan in plans if plan.expansion] == all_expand_variants()


def test_between_holds_every_kernel_that_works_row_by_row() -> None:
    assert {plan.variant for plan, _ in sanitize.between(H100)} == set(all_rowwise_variants())
    assert not any(plan.variant.early for plan, _ in sanitize.between(dataclasses.replace(H100, arch=(8, 0))))


@pytest.mark.parametrize(
    ("text", "status", "words"),
    [
        (DONE + "========= ERROR SUMMARY: 0 errors\n", "clean", "ERROR SUMMARY: 0 errors; " + DONE.strip()),
        (
            DONE + "========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)\n",
            "found",
            "RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)",
        ),
        ("========= ERROR SUMMARY: 0 errors\n", "did not run", "ERROR SUMMARY: 0 errors"),
        (
            "========= COMPUTE-SANITIZER\n========= Target application terminated before first call\n",
            "did not run",
            "========= Target application terminated before first call",
        ),
        ("", "did not run", "no output"),
    ],
)
def test_judge_takes_only_a_finished_run_without_errors_for_clean(text: str, status: str, words: str) -> None:
    assert sanitize.judge("memcheck", text, 1.0) == ("memcheck", status, 1.0, words)


def test_main_says_that_the_tool_is_absent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sanitize, "find_tool", lambda: None)
    assert sanitize.main([]) == 2
    assert capsys.readouterr().out.startswith("compute-sanitizer: absent. Install the CUDA toolkit, or pip install ")
