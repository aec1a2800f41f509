"""The demo: daemon, embedded engine and a trainer as processes of their own, supervised, displayed and plotted.

From the bottom up: ``progress`` (what the trainer recorded, as values), ``setup`` (folder and config of a run),
``keeper`` (processes that are restarted), ``run`` (one run from start to end), ``display`` (the terminal) and
``picture`` (the PNG). The trainer itself is ``examples/curriculum_learning/trainer.py``.
"""
