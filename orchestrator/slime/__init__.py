"""What the parts of slime's surface share: options, samples, prompts, the draw of sources, checkpoints.

Invariants:

* Standard library and floors 0 and 1 only. slime, torch and pyarrow are imported when something needs them, so that
  the surface can be imported, tested and read without them.
* Nothing here runs in the daemon, and nothing here is read by it.
"""
