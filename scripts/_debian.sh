# shellcheck shell=bash
# Programs from Debian that some tests want. To be sourced by a script that has sourced `_venv.sh`.
#
# install_debian_packages   installs those that are missing, where it may: as root, on Debian, in a container (on a
#                           machine with systemd an installation would start services). Otherwise, without a network,
#                           or past its deadlines, it says what will be missing. It never fails: a test that needs a
#                           program skips itself where the program is not there.
#
# When nothing is missing this takes 50 ms and asks nobody.

debian_packages=(
    strace                # kills and faults at the k-th system call
    rsyslog-elasticsearch # a real shipper of log lines, with rsyslog itself
    prometheus            # promtool, which checks /metrics and the alert rules
    chromium              # the live page in a real browser; nearly all of the size and the time
)
apt_lists_deadline_s=45
apt_load_deadline_s=120   # for 160 MB: a slow mirror must not eat the time of the tests
apt_unpack_deadline_s=120 # 30 s on two busy cores; generous, for what is interrupted here has to be mended by hand

_missing_debian_packages() {
    local package
    for package in "${debian_packages[@]}"; do
        # shellcheck disable=SC2016
        [[ $(dpkg-query --show --showformat='${db:Status-Abbrev}' "$package" 2>/dev/null) == ii* ]] || printf '%s\n' "$package"
    done
}

_load_and_unpack() { # PACKAGE…
    local -x DEBIAN_FRONTEND=noninteractive
    local apt=(apt-get -qq -o Acquire::Retries=1 -o Acquire::http::Timeout=20 -o DPkg::Lock::Timeout=60)
    local install=("${apt[@]}" install --yes --no-install-recommends)
    timeout --kill-after=10 "$apt_lists_deadline_s" "${apt[@]}" update || return
    timeout --kill-after=10 "$apt_load_deadline_s" "${install[@]}" --download-only "$@" || return
    timeout --kill-after=10 "$apt_unpack_deadline_s" "${install[@]}" --no-download "$@"
}

install_debian_packages() {
    local missing why=
    mapfile -t missing < <(_missing_debian_packages)
    ((${#missing[@]} > 0)) || return 0
    if ((EUID != 0)) || ! command -v apt-get >/dev/null || ! grep -qs '^ID=debian$' /etc/os-release; then
        why='only root on Debian can install them'
    elif [[ -d /run/systemd/system ]]; then
        why='installing them on this machine would start services'
    else
        why=$(_load_and_unpack "${missing[@]}" 2>&1) && return 0
        why="apt-get said: $(tail -n 3 <<<"${why:-nothing within its deadline}")"
    fi
    say "Not installed, so tests that need them are skipped: ${missing[*]} ($why)"
}
