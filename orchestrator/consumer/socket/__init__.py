"""The Unix socket: connections, frames, who may come in."""
