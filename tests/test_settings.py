"""Switches of the process: what the environment says, once, and what Python says after it."""

from __future__ import annotations

import pytest

from marlin import settings


@pytest.fixture(autouse=True)
def _unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "_batch_invariant", None)
    monkeypatch.delenv("MARLIN_BATCH_INVARIANT", raising=False)


@pytest.mark.parametrize(("text", "on"), [(None, False), ("0", False), ("1", True)])
def test_batch_invariant_is_what_the_environment_says_when_first_asked(
    monkeypatch: pytest.MonkeyPatch, text: str | None, on: bool
) -> None:
    if text is not None:
        monkeypatch.setenv("MARLIN_BATCH_INVARIANT", text)
    assert settings.batch_invariant() is on
    monkeypatch.setenv("MARLIN_BATCH_INVARIANT", "0" if on else "1")
    assert settings.batch_invariant() is on, "the environment is read once"


def test_set_batch_invariant_overrides_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARLIN_BATCH_INVARIANT", "1")
    settings.set_batch_invariant(False)
    assert settings.batch_invariant() is False
    settings.set_batch_invariant(True)
    assert settings.batch_invariant() is True


def test_batch_invariant_refuses_other_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARLIN_BATCH_INVARIANT", "yes")
    for _ in range(2):
        with pytest.raises(ValueError) as error:
            settings.batch_invariant()
        assert str(error.value) == "MARLIN_BATCH_INVARIANT: it must be 0 or 1; got 'yes'."
