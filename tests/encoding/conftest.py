from latent_data import make_data, write_caches  # noqa: F401 (fixtures)
