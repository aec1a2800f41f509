"""The methods of the consumer API, one file a subject: ``batches``, ``run``, ``engines``, ``checkpoints``, ``sources``.

Each has one class, whose ``methods()`` is its part of the service's table, and the protocol of what it asks of the
daemon. ``params`` has the types that check what a request brings, ``table`` what the classes share.
"""
