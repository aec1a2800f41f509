# syntax=docker/dockerfile:1

# The daemon alone, for engines that run elsewhere:
#
#   docker build -t rollout-orchestrator .
#   docker run -v ./config.yaml:/etc/orchestrator/config.yaml:ro -v state:/var/lib/orchestrator \
#       -v run:/run/orchestrator --stop-timeout 60 rollout-orchestrator
#
# Relative paths in a config are relative to the config file, whose directory belongs to root here. So it says
#
#   run: {state_dir: /var/lib/orchestrator/state}
#   consumer: {socket: /run/orchestrator/orchestrator.sock}
#
# The trainer mounts /run/orchestrator as well, and runs as the same user (10001): nobody else may open the socket.

# -- everything that is installed, in a virtual environment that is copied as a whole -----------------------------------
FROM python:3.11-slim-bookworm AS builder

# `prompts` reads Parquet. `prompts,demo` would add the embedded engine, which also needs Debian's libgomp1 below.
ARG EXTRAS=prompts

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1

WORKDIR /src
RUN python -m venv /opt/orchestrator
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY orchestrator ./orchestrator
# What the wheel carries beside the package: example configs, and the demo's trainer.
COPY config ./config
COPY examples ./examples
# Not editable: a wheel is built and installed, and /src is not needed any more.
RUN /opt/orchestrator/bin/python -m pip install --constraint constraints.txt ".[${EXTRAS}]" \
    && /opt/orchestrator/bin/orchestrator --version

# -- what runs ---------------------------------------------------------------------------------------------------------
FROM python:3.11-slim-bookworm

LABEL org.opencontainers.image.title="rollout-orchestrator" \
      org.opencontainers.image.description="The daemon between inference servers and a reinforcement-learning trainer" \
      org.opencontainers.image.licenses="Apache-2.0"

RUN groupadd --gid 10001 orchestrator \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/orchestrator \
        --shell /usr/sbin/nologin orchestrator \
    && install -d -m 0755 /etc/orchestrator \
    && install -d -o 10001 -g 10001 -m 0750 /var/lib/orchestrator /run/orchestrator

# The same path as in the builder, and the same python below it: scripts and links of the environment stay right.
COPY --from=builder /opt/orchestrator /opt/orchestrator

# ORCHESTRATOR_SOCKET is where `orchestrator status` and the other commands find the daemon, the health check included.
ENV PATH=/opt/orchestrator/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    ORCHESTRATOR_SOCKET=/run/orchestrator/orchestrator.sock

USER 10001:10001
# Dotted paths of a config are imported from the working directory: mount rewards and schedules below it, or install them.
WORKDIR /var/lib/orchestrator
VOLUME ["/var/lib/orchestrator", "/run/orchestrator"]

# Clean stop: launching ends, what is in flight is parked, the last snapshot is written, within 50 seconds.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=3 CMD ["orchestrator", "status"]

ENTRYPOINT ["orchestrator"]
CMD ["run", "/etc/orchestrator/config.yaml"]
