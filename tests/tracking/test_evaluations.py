"""An evaluation is a run of its own, below its training's, once, whatever the store does meanwhile."""

import pytest
from logged_runs import IMAGE, all_stored, client, logged_images, logged_steps
from projects import tiny_params

from latentloom.params import Params
from latentloom.tracking import delivery
from latentloom.tracking.delivery import PARENT_TAG, sync
from latentloom.tracking.evaluations import EVALUATED_TAG, STEP, evaluation_run
from latentloom.tracking.journal import journals
from latentloom.tracking.provenance import HASH_TAG, Provenance, save_run_record
from latentloom.tracking.runs import new_run
from latentloom.tracking.store import experiment_id

MODEL = "m" * 64
FIGURES = {"val_mae": 0.5, "held_out_recall_at_1": 0.75}


def train(root, key=None) -> str:
    """Log a training of ``MODEL`` and what this machine records of it; the run's id, where there is one."""
    with new_run(root, name="a training", key=key) as run:
        run.log_metrics({"train/mae": 0.4}, 8)
        run.set_tags({HASH_TAG: MODEL})
    save_run_record(root, Provenance(model_sha256=MODEL, run_key=run.key))
    return run.id


def evaluate(root, figures=FIGURES, **settings) -> None:
    params = tiny_params()
    params["evaluate"] |= settings
    with evaluation_run(root, Params.model_validate(params), MODEL, figures) as run:
        run.log_image(IMAGE, "evaluation", STEP)


def evaluations(root) -> list:
    own = client(root)
    return own.search_runs([experiment_id(own, root)], f"tags.`{EVALUATED_TAG}` = '{MODEL}'")


def test_it_lies_below_its_training_under_the_experiments_name_and_leaves_the_trainings_run_as_it_was(
    root, monkeypatch
):
    training = train(root)
    before = all_stored(root, training)
    monkeypatch.setenv("DVC_EXP_NAME", "mild")
    evaluate(root, class_guidance=1.0)
    assert all_stored(root, training) == before
    (run,) = evaluations(root)
    assert (run.info.run_name, run.info.status) == ("mild", "FINISHED")
    assert (run.data.tags[PARENT_TAG], run.data.tags["dvc.experiment"]) == (training, "mild")
    assert HASH_TAG not in run.data.tags  # it made no model
    assert (run.data.params["evaluate.class_guidance"], run.data.params["seed"]) == ("1.0", "0")
    assert "evaluate.prompts" not in run.data.params
    assert run.data.metrics == {f"evaluate/{name}": value for name, value in FIGURES.items()}
    assert logged_steps(root, run.info.run_id, "evaluate/val_mae") == logged_images(root, run.info.run_id) == [STEP]


def test_the_same_again_adds_nothing_and_other_settings_or_figures_are_another_run(root):
    train(root)
    evaluate(root)
    (first,) = evaluations(root)
    before = all_stored(root, first.info.run_id)
    assert first.info.run_name == f"evaluation of {MODEL[:8]}"
    evaluate(root)
    assert [run.info.run_id for run in evaluations(root)] == [first.info.run_id]
    assert all_stored(root, first.info.run_id) == before
    assert list(journals(root).iterdir()) == []
    evaluate(root, class_guidance=1.0)
    evaluate(root, FIGURES | {"val_mae": 0.6})
    assert len(evaluations(root)) == 3


def test_while_the_store_is_away_it_waits_for_its_training_and_nothing_is_lost_or_doubled(root, monkeypatch):
    def unreachable(root):
        raise ConnectionError("the store is away")

    with monkeypatch.context() as away, pytest.warns(UserWarning, match="the store is away"):
        away.setattr(delivery, "open_client", unreachable)
        train(root, key="f" * 32)  # by name it would come behind its evaluation
    with pytest.warns(UserWarning, match="is still to be delivered"):
        evaluate(root)
    assert evaluations(root) == []
    assert [synced.waits for synced in sync(root)] == [False, False]
    (run,) = evaluations(root)
    parent = client(root).get_run(run.data.tags[PARENT_TAG])
    assert parent.data.tags[HASH_TAG] == MODEL
    assert logged_steps(root, run.info.run_id, "evaluate/val_mae") == [STEP]
    before = all_stored(root, run.info.run_id)
    evaluate(root)
    assert all_stored(root, run.info.run_id) == before


def test_of_a_training_that_the_store_does_not_have_it_is_a_run_by_itself(root):
    evaluate(root)
    (run,) = evaluations(root)
    assert PARENT_TAG not in run.data.tags
