"""Which figures compare, and which of two models they show to be better."""

import pytest
from tracked_runs import share

from latentloom.registry.figures import Figures, Share
from latentloom.registry.gate import worse

NOISE = "vp/cosine"


def figures(recall: float | None, val_mae: float | None = None, name: str = "held_out_recall_at_1", **more) -> Figures:
    values = {} if recall is None else share(name, recall, 100)
    return Figures(values | ({} if val_mae is None else {"val_mae": val_mae}), **{"noise": NOISE} | more)


def test_the_interval_of_a_difference_is_newcombes():
    """The worked examples of Newcombe 1998, table II: 56/70 - 48/80 by his method 10."""
    first, second = (Share(*share("a", 56 / 70, 70).values()), Share(*share("a", 48 / 80, 80).values()))
    difference = first.minus(second)
    assert (difference.value, difference.low, difference.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=2e-4)


@pytest.mark.parametrize(
    ("own", "champion", "why"),
    [
        (figures(0.9), figures(0.9), None),
        (figures(0.7, 0.9), figures(0.8, 0.1), None),  # what chance may have done
        (figures(0.6), figures(0.8), "held_out_recall_at_1 is 0.6 (0.50 to 0.69), worse than the champion's 0.8"),
        (figures(None, 0.31), figures(0.9, 0.3), "val_mae is 0.31, worse than the champion's 0.3"),
        (figures(None, 0.29), figures(None, 0.3), None),
        (figures(None, 0.5, noise="vp/uniform"), figures(None, 0.3), None),  # over other noise levels
        (
            figures(0.1, name="new_words_recall_at_1"),
            figures(0.5, name="new_words_recall_at_1"),
            "new_words_recall_at_1",
        ),
    ],
)
def test_recall_decides_beyond_its_interval_and_the_error_only_where_there_is_none(own, champion, why):
    found = worse(own, champion)
    assert found is None if why is None else why in found


def test_figures_come_back_from_tags_of_one_value_each():
    own = figures(0.75, 0.25, data="d", samples=100, seed="0", sampling="diffusion_steps 70", run_id="r")
    assert Figures.of_tags(own.tags("remeasured."), "remeasured.") == own
    assert own.tags()["held_out_recall_at_1_low"] == str(own.values["held_out_recall_at_1_low"])
