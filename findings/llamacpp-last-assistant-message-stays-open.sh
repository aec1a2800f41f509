#!/usr/bin/env bash
# Package:   xllamacpp 2026.10.11549 (llama.cpp's server), model made with gguf 0.19.0; jinja2 3.1.6 for comparison
# Guess:     /apply-template renders the messages as the template says: a finished assistant turn is closed by its end
#            token, and add_generation_prompt opens the next one.
# Behaviour: a last message of the assistant is taken for the beginning of the answer: its end token is cut off and
#            add_generation_prompt, true or false, changes nothing. Two of them at the end are refused (400).
# Seen:      jinja2 '<user>q<|end|><assistant>a<|end|>', the server '<user>q<|end|><assistant>a'
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3}
"$python" -m pip install --quiet --no-compile --disable-pip-version-check --target "$work/lib" \
    xllamacpp==2026.10.11549 gguf==0.19.0 numpy==2.4.6 jinja2==3.1.6 2> "$work/log" || { cat "$work/log" >&2; exit 1; }
export TMPDIR=$work PYTHONPATH=$work/lib:${0%/*}
timeout 120 "$python" -B - 2> "$work/log" <<'PYTHON' || { tail -n 20 "$work/log" >&2; exit 1; }
import jinja2
from _tiny_llama import TEMPLATE, with_server

MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def check(ask):
    right = jinja2.Template(TEMPLATE).render(messages=MESSAGES, add_generation_prompt=False)
    seen = [
        ask("/apply-template", {"messages": MESSAGES, "add_generation_prompt": opened})[1]["prompt"]
        for opened in (False, True)
    ]
    status = ask("/apply-template", {"messages": [*MESSAGES, MESSAGES[-1]]})[0]
    print(f"jinja2: {right}\nserver: {seen[0]} (with add_generation_prompt: {seen[1]})\ntwo at the end: {status}")
    assert right == "<user>q<|end|><assistant>a<|end|>"
    assert seen == ["<user>q<|end|><assistant>a"] * 2 and status == 400


with_server(check)
PYTHON
