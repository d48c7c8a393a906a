"""Checkpoints and the registry in an object store.

`objects` is the store, `transfer` brings checkpoints there and back, `inputs` what a run begins with, `attempts` is the
fence of a run, `journal` the registry of all hosts, `state` its files on a volume, `cache` what a server keeps of it.

    runs/<run_id>/job.json  weights/…                           what a run begins with
                  attempts/00000002                             each attempt that has begun
                  checkpoints/step-00001234.<digest>/<file>     manifest.json last; <digest>: 16 digits of its SHA-256
    models/<name>/00000012.json                                 a change of the model: versions, aliases, history

There is no rename and no lock: nothing is ever overwritten with other bytes, and what must not happen twice is created
only where nothing is. The volume stays what a process reads; the store is brought to it, and it to the store.
"""
