"""Any source of captioned images -> prepared image shards, a manifest, and a table of what was refused.

A *source* (``openmoji``, ``folder``, ``webdataset``, ``parquet``) yields samples: a key, a way to read the image's
bytes, raw captions. ``images`` turns the bytes into prepared pixels ``(S, S, 3)``, ``captions`` cleans the texts,
``shards`` writes and reads the result, and ``ingest`` leads them through one another. What cannot be used is a row of
``rejects``, never a crash.
"""
