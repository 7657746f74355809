import pytest

from latentloom.layout import state_limit


def test_the_stores_limit_comes_from_the_environment(monkeypatch):
    monkeypatch.delenv("LATENTLOOM_STATE_GIB", raising=False)
    assert state_limit() == 50 * 2**30
    monkeypatch.setenv("LATENTLOOM_STATE_GIB", "0.5")
    assert state_limit() == 2**29


@pytest.mark.parametrize("value", ["much", "-1", "nan", "inf"])
def test_a_limit_that_is_no_number_of_gib_is_rejected(monkeypatch, value):
    monkeypatch.setenv("LATENTLOOM_STATE_GIB", value)
    with pytest.raises(ValueError, match=f"LATENTLOOM_STATE_GIB={value} is not a number of GiB; try 50"):
        state_limit()
