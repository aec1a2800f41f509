"""What runs inside slime's process, without the daemon: data source, log function, reward-cap filter.

Invariants:

* It uses the standard library, ``orchestrator.core`` and the modules below it. slime, torch and pyarrow are imported
  only when something needs them, so that these modules can be imported and tested without them.
* Nothing here runs in the daemon, and the daemon imports nothing from here.
"""
