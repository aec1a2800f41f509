"""Loading: a path in, a checked :class:`Config` out, or one error that names everything that is wrong.

Invariants:

* Nothing is imported, opened (but the config file itself) or connected to for what the config says; ``examine`` does
  that, for ``check`` and for the daemon.
* A config that loads keeps every promise of ``proofs.py``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from orchestrator.errors import ConfigError, ConfigProblem

from .document import Config, ConfigFile, normalise
from .forms import find_form_problems
from .messages import to_findings
from .proofs import find_contradictions
from .text import ConfigText, Finding, Location, key_path, read_text

__all__ = ["LoadedConfig", "load_config", "read_config"]


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """A config together with the text that it was read from, for problems that are found later.

    ``origins`` says where the file has what the flat form keeps elsewhere.
    """

    config: Config
    text: ConfigText
    origins: dict[Location, Location] = field(default_factory=dict)

    def problem(self, finding: Finding) -> ConfigProblem:
        """The finding with the key and line under which the user knows it."""
        location = finding.location
        for end in range(len(location), 0, -1):
            if (origin := self.origins.get(location[:end])) is not None:
                location = origin if end == len(location) else (*origin, *location[end:])
                break
        return _at(self.text, Finding(location, finding.message, finding.hint))

    def error(self, findings: Iterable[Finding]) -> ConfigError:
        """All findings as one error."""
        return _error(self.text.file, [self.problem(finding) for finding in findings])


def load_config(path: Path) -> Config:
    """Read and check a config file.

    Raises:
        ConfigError: with every problem found: line, key, what is wrong, what would be right.
    """
    return read_config(path).config


def read_config(path: Path) -> LoadedConfig:
    """As :func:`load_config`, keeping what is needed to name lines later."""
    text = read_text(path)
    problems = [*text.problems, *(_at(text, finding) for finding in find_form_problems(text.data))]
    try:
        # The directory is resolved, the file is not: a link to a config file stands where the link is.
        file = ConfigFile.model_validate(text.data, context={"directory": path.absolute().parent.resolve()})
    except ValidationError as error:
        problems += [_at(text, finding) for finding in to_findings(error)]
    if problems:
        raise _error(text.file, problems)
    try:
        config, origins = normalise(file)
    except ValidationError as error:
        raise _error(text.file, [_at(text, finding) for finding in to_findings(error)]) from None
    loaded = LoadedConfig(config, text, origins)
    if findings := list(find_contradictions(config)):
        raise loaded.error(findings)
    return loaded


def _at(text: ConfigText, finding: Finding) -> ConfigProblem:
    return ConfigProblem(
        key_path(finding.location), finding.message, text.line_of(finding.location), finding.hint.removesuffix(".")
    )


def _error(file: str, problems: list[ConfigProblem]) -> ConfigError:
    """Problems in the order of their lines, each once."""
    unique = list(dict.fromkeys(problems))
    return ConfigError(file, sorted(unique, key=lambda problem: problem.line or 0))
