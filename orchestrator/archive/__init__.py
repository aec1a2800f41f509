"""The archive: what was trained on, one file a batch, for people and their tools to read.

:class:`Archiver` writes it beside the run; :mod:`.reading` reads it, with a daemon or without one.
"""

from .archiver import Archiver, ArchiveStatistics
from .names import ArchivedStep, list_steps
from .reading import Excerpt, find_step, read_groups, read_samples
from .survey import SourceSurvey, StepSurvey, survey

__all__ = [
    "ArchiveStatistics",
    "ArchivedStep",
    "Archiver",
    "Excerpt",
    "SourceSurvey",
    "StepSurvey",
    "find_step",
    "list_steps",
    "read_groups",
    "read_samples",
    "survey",
]
