"""The configuration: names, defaults and bounds of every key, loading, and what a config promises before a run begins.

:func:`load_config` is the way in; :func:`examine` looks further, at what the config names: functions, prompt files, and
the weights of the coming steps. ``docs/configuration.md`` describes every key.
"""

from orchestrator.engines.spec import EngineSpec

from .differences import Difference, differences, with_fixed
from .document import Config, sampling_header, sampling_params
from .load import LoadedConfig, load_config, read_config
from .metrics import sink_options
from .run_time import (
    engine_as_json,
    engine_specs,
    in_effect,
    parse_engine,
    parse_source,
    source_as_json,
    with_source,
    without_sources,
)
from .sections import Sampling
from .sources import Source

__all__ = [
    "Config",
    "Difference",
    "EngineSpec",
    "LoadedConfig",
    "Sampling",
    "Source",
    "differences",
    "engine_as_json",
    "engine_specs",
    "in_effect",
    "load_config",
    "parse_engine",
    "parse_source",
    "read_config",
    "sampling_header",
    "sampling_params",
    "sink_options",
    "source_as_json",
    "with_fixed",
    "with_source",
    "without_sources",
]
