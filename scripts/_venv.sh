# shellcheck shell=bash
# The virtual environment that the scripts share. To be sourced by a script that has set `root`, the repository.
#
# ensure_venv NAME PIP_ARGUMENTS…   makes $venv_dir and installs what the arguments name, pinned by the file $venv_pins;
#                                   NAME is what this set is called. Nothing is done when it is there already.
#
# What is installed and not needed goes again: debug information of compiled packages (_slim.py), setuptools. The demo's
# set takes less than 200 MB so.
#
# Several sets live in one environment: they are pinned by one file, so that none takes from another what it needs.
# Two scripts that start at the same time wait for each other. A checkout that was moved or whose Python is gone gets
# a new environment.

venv_dir=$root/.venv        # scripts/test has others beside it, for other versions
venv_pins=constraints.txt   # from the root; /dev/null: the newest that pyproject.toml allows, looked for every time
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
    local name=$1 stamp python made_for pip pins=(--constraint "$venv_pins" --build-constraint "$venv_pins")
    shift
    [[ $venv_pins != /dev/null ]] || pins=(--upgrade --upgrade-strategy eager)
    stamp=$(cat "$root/pyproject.toml" "$venv_pins" "$root/orchestrator/__init__.py" \
        <(printf '%s\n' "$root" "$pip_version" "$@") | sha256sum)
    made_for=$(cat "$venv_dir/root" 2>/dev/null || printf '%s' "$root")
    if [[ $made_for != "$root" ]] || ! "$venv_dir/bin/python" -c '' 2>/dev/null; then
        python=$(find_python) || return
        say "Making ${venv_dir##*/} with $("$python" --version) …"
        rm -rf "$venv_dir"
        "$python" -m venv "$venv_dir" || return
        printf '%s\n' "$root" >"$venv_dir/root"
    fi
    [[ $venv_pins == /dev/null || $(cat "$venv_dir/stamp-$name" 2>/dev/null) != "$stamp" ]] || return 0
    say "Installing the $name set into ${venv_dir##*/} …"
    pip=("$venv_dir/bin/python" -m pip install -q --disable-pip-version-check)
    { "${pip[@]}" "pip==$pip_version" && "${pip[@]}" "${pins[@]}" "$@" && slim_down; } || {
        say "The installation failed; pip's messages are above. It needs access to a Python package index."
        return 1
    }
    printf '%s\n' "$stamp" >"$venv_dir/stamp-$name"
}

slim_down() {
    # Python 3.11 puts setuptools into every environment; nothing here is built with it.
    if [[ -n $(find "$venv_dir"/lib -path '*/site-packages/setuptools' -maxdepth 4) ]]; then
        "$venv_dir/bin/python" -m pip uninstall -q -y --disable-pip-version-check setuptools || return
    fi
    "$venv_dir/bin/python" "$root/scripts/_slim.py" "$venv_dir"
}

ensure_venv() {
    (
        flock -w "$venv_deadline_s" 9 || { say "Another script has been installing into ${venv_dir##*/} for too long."; exit 1; }
        cd "$root" || exit
        _install "$@" 9>&-
    ) 9<"$root"
}
