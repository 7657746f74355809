"""Any source of captioned images -> prepared image shards, a manifest, and a table of what was rejected.

A *source* (``openmoji``, ``folder``, ``webdataset``, ``parquet``, ``huggingface``) yields samples: a key, a way to read
the image's bytes, raw captions. ``preprocess`` makes each a row of the result: ``images`` turns the bytes into prepared
pixels ``(S, S, 3)``, ``captions`` cleans the texts, ``splits`` chooses the split. ``deduplicator`` keeps each picture
once, ``shards`` writes and reads the result, and ``ingest`` runs them one after another. ``prepared`` knows what
earlier runs made of files that have not changed; ``remote`` reads files at addresses. What cannot be used is a row of
``rejects``, never a crash.
"""
