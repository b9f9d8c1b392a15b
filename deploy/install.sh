#!/usr/bin/env bash
# Install hoberproxy under systemd, or bring it to another version; see deploy/README.md.
set -euo pipefail

usage() {
    cat <<'END'
usage: deploy/install.sh [--dry-run] [--python PYTHON] [--wheel FILE]
       deploy/install.sh [--dry-run] --uninstall [--purge]

  --wheel FILE     install this wheel instead of one built from the checkout, which is compiled
                   where gcc and Python's headers are
  --python PYTHON  make the environment with this Python, 3.11 or newer (python3)
  --uninstall      stop the service and remove the program; config, keys and records stay
  --purge          with --uninstall: remove those and the user too
  --dry-run        print what would be done, and do nothing

The program goes to /opt/hoberproxy, the units to /etc/systemd/system, a config to
/etc/hoberproxy unless there is one. Run it again after a change: what is done already is left
alone, and a running service goes over to the new program without dropping a stream.
END
}

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CHECKOUT=$(dirname "$HERE")
PREFIX=/opt/hoberproxy
ETC=/etc/hoberproxy
STATE=/var/lib/hoberproxy
UNITS=(hoberproxy.socket hoberproxy.service)
declare -A FILES=(
    [hoberproxy.service]=/etc/systemd/system/hoberproxy.service
    [hoberproxy.socket]=/etc/systemd/system/hoberproxy.socket
    [hoberproxy.sysusers]=/etc/sysusers.d/hoberproxy.conf
    [hoberproxy.tmpfiles]=/etc/tmpfiles.d/hoberproxy.conf
)

dry_run=
uninstall=
purge=
python=python3
wheel=

say() { printf 'hoberproxy: %s\n' "$*"; }
fail() {
    printf 'install.sh: %s\n' "$*" >&2
    exit 1
}
run() { # every command that changes something
    printf '  + %s\n' "$*"
    [ -n "$dry_run" ] || "$@"
}
show() { systemctl show --value --property="$1" hoberproxy.service; }
is_active() { systemctl is-active --quiet hoberproxy.service 2>/dev/null; }

parse_arguments() {
    while [ $# -gt 0 ]; do
        case $1 in
            --dry-run) dry_run=yes ;;
            --uninstall) uninstall=yes ;;
            --purge) purge=yes ;;
            --python | --wheel)
                [ $# -ge 2 ] || fail "$1 needs a value"
                if [ "$1" = --python ]; then python=$2; else wheel=$2; fi
                shift
                ;;
            -h | --help)
                usage
                exit 0
                ;;
            *)
                usage >&2
                exit 2
                ;;
        esac
        shift
    done
    [ -z "$purge" ] || [ -n "$uninstall" ] || fail "--purge goes with --uninstall"
}

check_machine() {
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
        fail "$python is not Python 3.11 or newer; name one with --python"
    # The service sees no home folders.
    local home
    home=$("$python" -c 'import os, sys; print(os.path.realpath(sys.executable))')
    case $home in
        /home/* | /root/* | /run/user/*)
            fail "$home is in a home folder, where the service cannot see it; name another with --python"
            ;;
    esac
    [ -n "$dry_run" ] || check_root
}

check_root() {
    [ "$(id -u)" = 0 ] || fail "must be root (or --dry-run)"
    [ -d /run/systemd/system ] || fail "systemd does not run this machine"
}

# The program: each version in a folder of its own, so that processes that still answer with the
# old one keep their files; one link says which is the one to start.

# Named by what it is made of, so that the same again is not built again.
name_release() {
    local made_of version
    if [ -n "$wheel" ]; then
        [ -f "$wheel" ] || fail "no such wheel: $wheel"
        version=$(basename "$wheel" | cut -d - -f 2)
        made_of=$(sha256sum <"$wheel")
    else
        [ -f "$CHECKOUT/pyproject.toml" ] || fail "no checkout here; name a wheel with --wheel"
        build=$("$python" "$CHECKOUT/hatch_build.py") || fail "that cannot be built here"
        version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' "$CHECKOUT/hoberproxy/__init__.py")
        made_of=$("$python" -VV && echo "${build%%:*}" && hash_sources)
    fi
    name=$version-$(sha256sum <<<"$made_of" | cut -c 1-12)
    release=$PREFIX/releases/$name
}

hash_sources() {
    cd "$CHECKOUT"
    find hatch_build.py pyproject.toml README.md CHANGELOG.md LICENSE hoberproxy bench -type f \
        ! -path '*/__pycache__/*' -exec sha256sum {} + | sort
}

build_wheel() {
    if [ "$build" = compiled ]; then
        say "building it from the checkout, compiled: that takes about two minutes and 1 GB of memory"
    else
        say "building it from the checkout, $build"
    fi
    if [ -n "$dry_run" ]; then
        wheel=hoberproxy-VERSION.whl
        return
    fi
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    run "$python" -m venv "$work/venv"
    run "$work/venv/bin/pip" --disable-pip-version-check wheel --quiet --no-deps \
        --wheel-dir "$work" "$CHECKOUT"
    wheel=$(echo "$work"/hoberproxy-*.whl)
}

install_program() {
    if [ -f "$release/.complete" ] && "$release/bin/hoberproxy" version >/dev/null 2>&1; then
        say "$name is installed"
    else
        [ -n "$wheel" ] || build_wheel
        say "installing $name"
        run rm -rf "$release"
        run mkdir -p "$PREFIX/releases" "$PREFIX/bin"
        run "$python" -m venv "$release"
        run "$release/bin/pip" --disable-pip-version-check install --quiet "$wheel"
        run "$release/bin/hoberproxy" version
        run touch "$release/.complete"
    fi
    if [ "$(readlink "$PREFIX/bin/hoberproxy" || true)" != "$release/bin/hoberproxy" ]; then
        if is_active; then check_config; fi
        # Renamed into place: there is a program to start at every moment.
        run ln -sfn "$release/bin/hoberproxy" "$PREFIX/bin/.hoberproxy.new"
        run mv -fT "$PREFIX/bin/.hoberproxy.new" "$PREFIX/bin/hoberproxy"
        is_new_program=yes
    fi
    remove_old_releases "$release"
}

check_config() { # by the new program, with the variables that the running one has
    local variables
    printf '  + %s\n' "$release/bin/hoberproxy check --config $ETC/hoberproxy.toml"
    [ -z "$dry_run" ] || return 0
    mapfile -d '' -t variables <"/proc/$(show MainPID)/environ"
    env -i "${variables[@]}" "$release/bin/hoberproxy" check --config "$ETC/hoberproxy.toml" ||
        fail "the new program does not take the config; the old one stays"
}

remove_old_releases() { # all but this one, the one before it, and those that processes still use
    local old kept=
    [ -d "$PREFIX/releases" ] || return 0
    while IFS= read -r old; do
        if [ "$old" = "$1" ] || is_used "$old"; then continue; fi
        if [ -z "$kept" ]; then kept=$old; else run rm -rf "$old"; fi
    done < <(find "$PREFIX/releases" -mindepth 1 -maxdepth 1 -type d -printf '%T@ %p\n' |
        sort -rn | cut -d ' ' -f 2-)
}

is_used() { grep -qas "^$1/bin/python" /proc/[0-9]*/cmdline; }

# Units, users, folders, config

install_files() {
    local source target
    for source in "${!FILES[@]}"; do
        target=${FILES[$source]}
        if cmp -s "$HERE/$source" "$target"; then
            say "$target is up to date"
        else
            run install -D -m 644 "$HERE/$source" "$target"
            is_new_unit=yes
        fi
    done
    if [ -n "$is_new_unit" ]; then
        run systemd-sysusers "${FILES[hoberproxy.sysusers]}"
        run systemd-tmpfiles --create "${FILES[hoberproxy.tmpfiles]}"
        run systemctl daemon-reload
    fi
    if [ -e "$ETC/hoberproxy.toml" ]; then
        say "$ETC/hoberproxy.toml is left as it is"
    else
        run install -D -m 644 "$HERE/hoberproxy.toml" "$ETC/hoberproxy.toml"
    fi
}

take_over() {
    if ! is_active; then
        say "installed. Next: edit $ETC/hoberproxy.toml, put a provider's key into $ETC/keys, and"
        say "  systemctl enable --now ${UNITS[*]}"
    elif [ -n "$is_new_program" ]; then
        say "the running service goes over to the new program"
        run systemctl kill --kill-whom=main --signal=USR2 hoberproxy.service
        [ -n "$dry_run" ] || await_upgrade
    else
        say "the service runs this program"
    fi
    if [ -n "$is_new_unit" ] && is_active; then
        say "the changed unit holds from the next start on (systemctl restart hoberproxy)"
    fi
}

await_upgrade() {
    local tries
    for tries in {1..60}; do
        sleep 1
        if [ "$(show ActiveState)" = active ] &&
            grep -qas "^$release/bin/python" "/proc/$(show MainPID)/cmdline"; then
            say "it serves: $(show StatusText)"
            return
        fi
    done
    journalctl --unit=hoberproxy --lines=5 --output=cat --no-pager >&2
    fail "after $tries s it still runs the old program; above is the end of its journal"
}

remove_all() {
    local unit source installed=()
    for unit in "${UNITS[@]}"; do
        [ ! -e "/etc/systemd/system/$unit" ] || installed+=("$unit")
    done
    # Together: a socket that is left would start the service again.
    [ "${#installed[@]}" = 0 ] || run systemctl disable --now "${installed[@]}"
    for source in "${!FILES[@]}"; do
        [ ! -e "${FILES[$source]}" ] || run rm -f "${FILES[$source]}"
    done
    [ ! -e "$PREFIX" ] || run rm -rf "$PREFIX"
    if [ -n "$purge" ]; then
        run rm -rf "$ETC" "$STATE" /etc/systemd/system/hoberproxy.{service,socket}.d
        ! getent passwd hoberproxy >/dev/null || run userdel hoberproxy
    fi
    run systemctl daemon-reload
    if [ -n "$purge" ]; then
        say "uninstalled, with config, keys and records"
    else
        say "uninstalled; $ETC and $STATE are left (--purge removes them)"
    fi
}

is_new_program=
is_new_unit=
build=
name=
release=
parse_arguments "$@"
if [ -n "$uninstall" ]; then
    [ -n "$dry_run" ] || check_root
    remove_all
else
    check_machine
    name_release
    install_program
    install_files
    take_over
fi
