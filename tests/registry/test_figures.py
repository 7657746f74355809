"""Which figures compare, and which of two models they show to be better."""

import pytest
from tracked_runs import share

from latentloom.params import RegistryParams
from latentloom.registry.figures import Figures, Share, in_the_same_way
from latentloom.registry.gate import objections, worse
from latentloom.tracking.provenance import Provenance

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


def test_figures_compare_only_where_both_were_measured_in_the_same_way():
    measured = {"data": "d", "samples": 100, "seed": "0", "sampling": "diffusion_steps 70"}
    own = figures(0.75, **measured)
    assert own.differences(figures(0.5, **measured)) == []
    others = {"data": "e", "samples": 50, "seed": None, "sampling": "diffusion_steps 20"}
    for way, other in others.items():
        (found,) = own.differences(figures(0.5, **measured | {way: other}))
        assert found.endswith(f"({measured[way]} against {other or 'not known'})")
    known = [figures(0.4, **measured | {"data": "e"}), figures(0.5, **measured)]
    assert in_the_same_way([own], known) == (own, known[1])
    assert in_the_same_way([own], known[:1]) is None


@pytest.mark.parametrize(
    ("recall", "copied", "why"),
    [
        (0.05, 0.3, ""),  # beyond both limits by chance, perhaps
        (0.0, 0.0, "held_out_recall_at_1 is 0 (0.00 to 0.04), below 0.1 (registry.min_held_out_recall_at_1)"),
        (0.5, 0.4, "copied_share is 0.4 (0.31 to 0.50), above 0.25 (registry.max_copied_share)"),
        (0.5, None, "copied_share is not known: set evaluate.held_out_captions"),
        (None, None, "run `dvc repro evaluate`"),
    ],
)
def test_what_lies_beyond_a_limit_with_its_whole_interval_is_objected_to(recall, copied, why):
    limits = RegistryParams(min_held_out_recall_at_1=0.1, max_copied_share=0.25)
    values = figures(recall).values | ({} if copied is None else share("copied_share", copied, 100))
    found = objections(Figures(values), Provenance(failed_checks=[]), limits)
    assert [why in objection for objection in found] == [True] * bool(why)
