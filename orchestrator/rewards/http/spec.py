"""What a config says of a reward that is a server."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from orchestrator.rewards.port import Reward
from orchestrator.rewards.spec import RewardSpec
from orchestrator.schema.fields import check_host, key_variable, problem
from orchestrator.schema.kinds import Kind

from .reward import HttpReward

__all__ = ["HttpSpec"]


def _endpoint_url(value: str) -> str:
    right = 'write "http://HOST:PORT/PATH"'
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError as error:
        raise problem(f"{value!r} is not a URL: {error}", right) from error
    if parts.scheme not in ("http", "https") or not parts.hostname or re.search(r"\s", value) or port == 0:
        raise problem(f"{value!r} is not the URL of a server", right)
    if parts.username is not None or parts.password is not None:
        raise problem("a URL with a user name or password would show them in logs", f"{right}, and use api_key_env")
    check_host(parts.hostname)
    if parts.fragment:
        raise problem(f"{value!r} has a fragment, which is not sent to the server", right)
    return value


EndpointUrl = Annotated[str, AfterValidator(_endpoint_url)]


class HttpSpec(RewardSpec):
    """A reward that is a server."""

    known_as = "servers"

    kind: Literal["http"] = Field(description="http: a reward server, by its url.")
    url: EndpointUrl = Field(description="URL that requests are posted to, such as http://gpu-7:9000/score.")
    api_key_env: Annotated[str, Field(min_length=1), AfterValidator(key_variable)] | None = Field(
        None, description="Environment variable with the server's API key; null: no key is needed."
    )

    @model_validator(mode="before")
    @classmethod
    def _has_a_url(cls, raw: Any) -> Any:
        if isinstance(raw, Mapping) and raw.get("url") is None:
            raise problem("a reward of kind http needs a url", "add url: http://HOST:PORT/PATH")
        return raw

    @classmethod
    def misplaced(cls, keys: Sequence[str], owner: type[Kind], raw: Mapping[str, Any]) -> PydanticCustomError:
        """The path of a function."""
        return problem(f"{keys[0]} is for functions, not for a reward of kind http", f"remove {keys[0]} or kind")

    @property
    def name(self) -> str:
        """The address."""
        return self.url

    def build(self, *, directory: Path | None) -> Reward:
        """A client of the server.

        Raises:
            ValueError: the environment has no key.
        """
        return HttpReward(
            self.url,
            key=self.key,
            timeout_s=self.timeout_s,
            concurrency=self.concurrency,
            group=self.group,
            api_key_env=self.api_key_env,
        )
