"""The first run: daemon, embedded engine and a trainer as processes of their own, watched, drawn and told.

From the ground up: ``progress`` (what the trainer has noted, as values), ``setup`` (folder and config of a run),
``keeper`` (processes that are started again), ``run`` (one run from its start to its end), ``display`` (the terminal)
and ``picture`` (the PNG). The trainer itself is ``examples/curriculum_learning/trainer.py``.
"""
