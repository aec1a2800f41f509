"""The Unix socket of the consumer API, from the outside in; it knows frames and requests, and no method.

``listener`` (the socket at its path), ``server`` (accepts connections), ``peer`` (who may connect), ``connection`` (one
client), ``requests`` (what a frame asks for), ``send_queue`` (what is on its way to a client), ``sparse_log`` (warnings
that a client could cause thousands of).
"""
