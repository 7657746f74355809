from tracked_runs import empty_store, project_root, tiny_unets, train  # noqa: F401 (fixtures)
