#!/usr/bin/env bash
# Package:   xllamacpp 2026.10.11549 (llama.cpp's own template engine), model made with gguf 0.19.0; jinja2 3.1.6
# Guess:     a chat template without tojson prints a list or a dictionary as Python does, on the server too.
# Behaviour: llama.cpp joins a list's items without a separator, prints nothing for a dictionary and for none, and its
#            default() replaces none, which jinja2's keeps. No error: the tools are just missing from the prompt.
# Seen:      jinja2 "[1, 'a']|{'name': 'f'}|None|None", llama.cpp '1a|||x'
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3}
"$python" -m pip install --quiet --no-compile --disable-pip-version-check --target "$work/lib" \
    xllamacpp==2026.10.11549 gguf==0.19.0 numpy==2.4.6 jinja2==3.1.6 2> "$work/log" || { cat "$work/log" >&2; exit 1; }
export TMPDIR=$work PYTHONPATH=$work/lib:${0%/*}
timeout 120 "$python" -B - 2> "$work/log" <<'PYTHON' || { tail -n 20 "$work/log" >&2; exit 1; }
import jinja2
from _tiny_llama import with_server

TEMPLATE = "{{ [1, 'a'] }}|{{ {'name': 'f'} }}|{{ none }}|{{ none | default('x') }}"


def check(ask):
    right = jinja2.Template(TEMPLATE).render(messages=[])
    seen = ask("/apply-template", {"messages": [{"role": "user", "content": "q"}]})[1]["prompt"]
    print(f"jinja2: {right}\nllama.cpp: {seen}")
    assert right == "[1, 'a']|{'name': 'f'}|None|None" and seen == "1a|||x"


with_server(check, template=TEMPLATE)
PYTHON
