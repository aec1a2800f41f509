"""The process of a tokenizer: takes ``{"text"}`` or ``{"messages", "kwargs"}``, answers ``{"tokens"}``.

Invariants:

* A template is a program by the model's author: it runs in a sandbox that reads nothing and changes nothing, in a
  process that is killed when it does not end.
* A template writes its special tokens itself. A plain text gets those that the tokenizer adds at its beginning and end.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, Final, NoReturn

from orchestrator.concurrency.processes import ServiceRefused
from orchestrator.errors import TokenizerError

from .files import read_files

__all__ = ["SERVICE", "serve"]

SERVICE: Final = "orchestrator.tokenizer.service.serve"

Render = Callable[[list[dict[str, Any]], dict[str, Any]], str]


class _Refused(ValueError):
    """A template refuses the messages."""


def serve(options: dict[str, Any]) -> Callable[[dict[str, Any], bytes], dict[str, Any]]:
    """Load the tokenizer; ``options`` are ``path``, ``chat_template`` and ``add_generation_prompt``.

    Raises:
        ServiceRefused: it cannot be loaded.
    """
    try:
        import tokenizers

        files = read_files(Path(options["path"]), template=options["chat_template"])
        tokenizer = tokenizers.Tokenizer.from_file(str(files.vocabulary))
        # The file keeps what its maker last used; a prompt is neither cut nor padded without a word.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        render = _renderer(files.template, {**files.special, "add_generation_prompt": options["add_generation_prompt"]})
    except TokenizerError as error:
        raise ServiceRefused(error.message) from error
    except Exception as error:  # the library's own errors have no common type
        raise ServiceRefused(f"cannot load the tokenizer at {options['path']}: {error}") from error

    def call(header: dict[str, Any], _: bytes) -> dict[str, Any]:
        try:
            if "text" in header:
                return {"tokens": tokenizer.encode(header["text"], add_special_tokens=True).ids}
            text = render(header["messages"], header["kwargs"])
            return {"tokens": tokenizer.encode(text, add_special_tokens=False).ids}
        except Exception as error:  # noqa: BLE001 - whatever a template raises costs this prompt
            return {"error": f"{type(error).__name__}: {error}"[:1000]}

    return call


def _renderer(template: str | None, known: dict[str, Any]) -> Render:
    """The template as a function of messages and of values that override the known ones."""
    if template is None:

        def refuse(*_: object) -> NoReturn:
            raise _Refused("the tokenizer has no chat template: set tokenizer.chat_template, or give prompts as text")

        return refuse
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals |= {"raise_exception": _raise, "strftime_now": _now}
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "sort_keys": False}
    compiled = environment.from_string(template)

    def render(messages: list[dict[str, Any]], kwargs: dict[str, Any]) -> str:
        return compiled.render(messages=messages, **{**known, **kwargs})

    return render


def _raise(message: str) -> NoReturn:
    raise _Refused(message)


def _now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)
