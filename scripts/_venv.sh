# shellcheck shell=bash
# The virtual environment that the scripts share. To be sourced by a script that has set `root`, the repository.
#
# ensure_venv NAME PIP_ARGUMENTS…   makes $root/.venv and installs what the arguments name, pinned by constraints.txt;
#                                   NAME is what this set is called. Nothing is done when it is there already.
#
# What is installed and not needed goes again: debug information of compiled packages (_slim.py), setuptools. The demo's
# set takes less than 200 MB so.
#
# Several sets live in one environment: they are pinned by one file, so that none takes from another what it needs.
# Two scripts that start at the same time wait for each other. A checkout that was moved or whose Python is gone gets
# a new environment.

pip_version=26.3            # the first that knows --group is 25.1
venv_deadline_s=900         # that one script waits for another's installation; a cold one takes a minute

say() { printf '%s\n' "$*" >&2; }

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    say "Found no Python >= 3.11 with the module venv (tried python3.11 to python3.13, python3)."
    say "On Debian: apt-get install python3.11 python3.11-venv. To use another Python: PYTHON=/path/to/python3 $0"
    return 1
}

_install() {
    local name=$1 stamp python made_for pip
    shift
    stamp=$(cat "$root/pyproject.toml" "$root/constraints.txt" "$root/orchestrator/__init__.py" \
        <(printf '%s\n' "$root" "$pip_version" "$@") | sha256sum)
    made_for=$(cat "$root/.venv/root" 2>/dev/null || printf '%s' "$root")
    if [[ $made_for != "$root" ]] || ! "$root/.venv/bin/python" -c '' 2>/dev/null; then
        python=$(find_python) || return
        say "Making .venv with $("$python" --version) …"
        rm -rf "$root/.venv"
        "$python" -m venv "$root/.venv" || return
        printf '%s\n' "$root" >"$root/.venv/root"
    fi
    [[ $(cat "$root/.venv/stamp-$name" 2>/dev/null) == "$stamp" ]] && return
    say "Installing the $name set into .venv …"
    pip=("$root/.venv/bin/python" -m pip install -q --disable-pip-version-check)
    (
        cd "$root" && "${pip[@]}" "pip==$pip_version" &&
            "${pip[@]}" --constraint constraints.txt --build-constraint constraints.txt "$@" &&
            slim_down
    ) || {
        say "The installation failed; pip's messages are above. It needs access to a Python package index."
        return 1
    }
    printf '%s\n' "$stamp" >"$root/.venv/stamp-$name"
}

slim_down() {
    # Python 3.11 puts setuptools into every environment; nothing here is built with it.
    if [[ -n $(find "$root"/.venv/lib -path '*/site-packages/setuptools' -maxdepth 4) ]]; then
        "$root/.venv/bin/python" -m pip uninstall -q -y --disable-pip-version-check setuptools || return
    fi
    "$root/.venv/bin/python" "$root/scripts/_slim.py" "$root/.venv"
}

ensure_venv() {
    (
        flock -w "$venv_deadline_s" 9 || { say "Another script has been installing into .venv for too long."; exit 1; }
        _install "$@" 9>&-
    ) 9<"$root"
}
