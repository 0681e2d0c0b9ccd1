#!/bin/sh
# Installs what building, tests and `ringway-bench lab` need on Debian 12 or later: by name a linker,
# what libxdp is built with (make to m4, and for the check of aarch64 a compiler that crosses), libpcap, QEMU,
# iperf3, busybox, valgrind, Open vSwitch (a test's oracle) and a few tools; and a cloud kernel, user-mode Linux, promtool and DPDK's
# testpmd, which are unpacked into the cache and never installed. It says what it is going to install, and from where, before it does.
# Safe to run again; it returns at once when nothing is missing.
#
# With RINGWAY_INSTALL=no it says what is missing, with the command that installs it, and fails.
#
# `install-packages.sh zero-copy` unpacks one more kernel (175 MB to download, 200 MB in the cache) for
# `ringway-bench lab --scenario zero-copy`: one whose virtio_net and igb have AF_XDP's zero-copy.
set -eu

tools="gcc libc6-dev make pkg-config zlib1g-dev libelf-dev clang m4 libpcap-dev gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-system-x86 iperf3 busybox-static iproute2 tcpdump tshark xz-utils kmod util-linux valgrind openvswitch-switch"
lock_seconds=120
cache=${XDG_CACHE_HOME:-${HOME:?}/.cache}/ringway
kernels=$cache/kernel
uml=$cache/user-mode-linux
promtool=$cache/promtool
uml_suite=sid
dpdk=$cache/dpdk
zero_copy_suite=trixie-backports
codename=$(. /etc/os-release 2>/dev/null && echo "${VERSION_CODENAME:-}")

die() {
    echo "install-packages: $1" >&2
    exit 1
}

say() {
    echo "install-packages: $1" >&2
}

installed() {
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

missing_tools() {
    for name in $tools; do
        # busybox-static and busybox exclude each other; only the static one can be an initramfs.
        installed "$name" || printf '%s ' "$name"
    done | sed 's/ $//'
}

apt() {
    DEBIAN_FRONTEND=noninteractive apt-get -q -y -o "DPkg::Lock::Timeout=$lock_seconds" "$@"
}

# The machine's own entry for the release, with another suite: mirror and key stay as they are.
# Prints nothing if there is none.
own_entry_with_suite() {
    for file in /etc/apt/sources.list.d/*.sources; do
        [ -f "$file" ] || continue
        awk -v release="$codename" -v suite="$1" '
            BEGIN { RS = ""; FS = "\n" }
            {
                ours = 0; off = 0
                for (i = 1; i <= NF; i++) {
                    if ($i ~ "^Suites:.*[ \t]" release "([ \t]|$)") ours = 1
                    if (tolower($i) ~ /^enabled:[ \t]*no/) off = 1
                }
                if (!ours || off) next
                for (i = 1; i <= NF; i++) {
                    if ($i ~ /^#/) continue
                    if ($i ~ /^Suites:/) $i = "Suites: " suite
                    if ($i ~ /^Types:/) $i = "Types: deb"
                    print $i
                }
                exit
            }' "$file"
    done | sed '/^Types:/{x;s/^/x/;/^xx/{x;Q};x}'
}

own_line_with_suite() {
    cat /etc/apt/sources.list /etc/apt/sources.list.d/*.list 2>/dev/null |
        sed -n "s/^\(deb[ \t].*[ \t]\)$codename\([ \t].*\)\$/\1$1\2/p" | head -n 1
}

# The suite that packages are taken from, if it is not the release's own. Debian 12's own QEMU is too old
# for reconnect-ms and conflicts with the qemu-utils of backports.
choose_suite() {
    suite=
    if [ "$codename" = bookworm ]; then
        suite=$codename-backports
    fi
}

known_suite() {
    apt-cache policy | grep -q "[ ,=]$1[/,]"
}

add_suite() {
    list=/etc/apt/sources.list.d/ringway-$1
    entry=$(own_entry_with_suite "$1")
    if [ -n "$entry" ]; then
        printf '%s\n' "$entry" >"$list.sources"
        say "added the suite $1 in $list.sources"
        return
    fi
    entry=$(own_line_with_suite "$1")
    [ -n "$entry" ] || die "no source entry for $codename to copy; add the suite $1 to apt's sources and run this again"
    printf '%s\n' "$entry" >"$list.list"
    say "added the suite $1 in $list.list"
}

# Says what is missing and where it will come from.
tell_plan() {
    if [ -n "$missing" ]; then
        say "missing, to be installed: $missing"
    fi
    if ! have_kernel; then
        say "missing, to be unpacked into $kernels and not installed: a guest kernel (linux-image-cloud-amd64)"
    fi
    if ! have_uml; then
        say "missing, to be unpacked into $uml and not installed: user-mode-linux with its libc, of $uml_suite"
    fi
    if ! have_dpdk; then
        say "missing, to be unpacked into $dpdk and not installed: dpdk-testpmd (dpdk-dev) with its libraries"
    fi
    if ! have_promtool; then
        say "missing, to be unpacked into $cache and not installed: promtool (of prometheus)"
    fi
    if [ -n "$suite" ] && ! known_suite "$suite"; then
        say "apt gets the suite $suite, in /etc/apt/sources.list.d"
    fi
}

# What apt would download for these packages and what they depend on, as it writes it: 65.7 MB.
download_size() {
    LC_ALL=C apt-get -q --assume-no ${suite:+-t "$suite"} install --no-install-recommends "$@" 2>/dev/null |
        sed -n 's/^Need to get \(.*\) of archives\.$/\1/p'
}

# The size of one package's file, in MB.
package_size() {
    apt-cache show "$1" 2>/dev/null |
        awk '/^Size:/ { printf "%d MB", $2 / 1e6; exit }'
}

refresh_lists() {
    [ -z "${refreshed:-}" ] || return 0
    if [ -n "$suite" ] && ! known_suite "$suite"; then
        add_suite "$suite"
    fi
    say "reading package lists"
    apt update >&2 || die "apt-get update failed; check this machine's apt sources and network"
    refreshed=yes
}

# The package that linux-image-cloud-amd64 stands for, newest suite first.
concrete_kernel() {
    apt-cache ${suite:+-t "$suite"} depends --important linux-image-cloud-amd64 2>/dev/null |
        sed -n 's/.*Depends: \(linux-image-[0-9][^ ]*\)$/\1/p' | head -n 1
}

# A folder of its own in $1, $work, which goes with this program or with the next one.
begin_work() {
    mkdir -p "$1"
    rm -rf "${work:-}"
    work=$(mktemp -d "$1/.unpack.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    trap 'exit 130' INT TERM
    chmod 755 "$work"
}

# Unpacks all packages in $work/debs into $work/root.
unpack_debs() {
    for deb in "$work"/debs/*.deb; do
        dpkg-deb -x "$deb" "$work/root"
    done
}

unpack_kernel() {
    refresh_lists
    package=$(concrete_kernel)
    if [ -z "$package" ] && [ -n "$suite" ]; then
        suite=
        package=$(concrete_kernel)
    fi
    [ -n "$package" ] || die "apt knows no linux-image-cloud-amd64; check this machine's apt sources"
    begin_work "$kernels"
    say "downloading $package, $(package_size "$package")"
    (cd "$work" && apt ${suite:+-t "$suite"} -o APT::Sandbox::User=root download "$package" >&2) ||
        die "downloading $package failed; check the network and run this again"
    dpkg-deb -x "$work"/*.deb "$work/root"
    rm -f "$work"/*.deb
    rm -rf "${kernels:?}/$package"
    mv "$work/root" "$kernels/$package"
    ln -sfn "$package" "$kernels/current"
}

# As apt, and apt-cache, but of the suite alone, with lists in $work: this machine's stay as they are.
suite_apt() {
    program=$1
    shift
    "$program" -q -o "Dir::Etc::SourceList=/dev/null" -o "Dir::Etc::SourceParts=$work/sources" \
        -o "Dir::State=$work/state" -o "Dir::State::Status=$work/status" \
        -o "Dir::Cache=$work/cache" -o APT::Sandbox::User=root "$@"
}

# A folder in $work for suite_apt, with the suite's lists. $1 is the suite, $2 what to do without it.
begin_suite() {
    begin_work "$cache"
    mkdir -p "$work/sources" "$work/state/lists/partial" "$work/cache/archives/partial" "$work/debs"
    : >"$work/status"
    entry=$(own_entry_with_suite "$1")
    if [ -n "$entry" ]; then
        printf '%s\n' "$entry" >"$work/sources/suite.sources"
    else
        entry=$(own_line_with_suite "$1")
        [ -n "$entry" ] || die "no source entry for $codename to copy; $2"
        printf '%s\n' "$entry" >"$work/sources/suite.list"
    fi
    say "reading the package lists of $1 (this machine's stay as they are)"
    suite_apt apt-get update >&2 || die "reading $1 failed; check this machine's apt sources and network"
}

# Downloads packages of the suite and unpacks them into $work/root.
unpack_from_suite() {
    say "downloading $* (unpacked into the cache, not installed)"
    (cd "$work/debs" && suite_apt apt-get download "$@" >&2) ||
        die "downloading $* failed; check the network and run this again"
    unpack_debs
}

# Kernel, modules and what else makes one version: newer releases have them in packages of their own.
unpack_zero_copy_kernel() {
    begin_suite "$zero_copy_suite" "unpack a kernel of Linux 6.14 or later with igb into $kernels/zero-copy"
    mkdir -p "$kernels"
    package=$(suite_apt apt-cache depends --important linux-image-amd64 |
        sed -n 's/.*Depends: \(linux-image-[0-9][^ ]*\)$/\1/p' | head -n 1)
    [ -n "$package" ] || die "$zero_copy_suite has no linux-image-amd64"
    parts=$(suite_apt apt-cache depends --important "$package" |
        sed -n 's/.*Depends: \(linux-\(binary\|modules\)-[0-9][^ ]*\)$/\1/p')
    # shellcheck disable=SC2086  # a list of names
    unpack_from_suite "$package" $parts
    rm -rf "${kernels:?}/$package"
    mv "$work/root" "$kernels/$package"
    ln -sfn "$package" "$kernels/zero-copy"
}

# It wants the libc of its own suite, and finds it in the folder in which it is started: by an interpreter
# whose name is as long as the usual one's.
unpack_uml() {
    begin_suite "$uml_suite" "unpack user-mode-linux into $uml/root"
    unpack_from_suite user-mode-linux libc6
    libraries=$(dirname "$(find "$work/root/usr/lib" -name libc.so.6 | head -n 1)")
    mkdir -p "$work/uml"
    LC_ALL=C sed 's#/lib64/ld-linux-x86-64\.so\.2#././././././././././ld-u.so#' \
        "$work/root/usr/bin/linux.uml" >"$work/uml/linux"
    chmod 755 "$work/uml/linux"
    cp "$libraries/libc.so.6" "$work/uml/"
    cp "$libraries/ld-linux-x86-64.so.2" "$work/uml/ld-u.so"
    for module in failover net_failover virtio_net; do
        cp "$(find "$work/root/usr/lib/uml/modules" -name "$module.ko" | head -n 1)" "$work/uml/"
    done
    rm -rf "${uml:?}"
    mv "$work/uml" "$uml"
    rm -rf "$work"
}

# What a package depends on, by name.
depends() {
    apt-cache depends --important "$@" | sed -n 's/^ *Depends: \([a-z0-9][^ ]*\)$/\1/p' | sort -u
}

# dpdk-dev with what its testpmd needs, rather than installed: that would bring headers of 30 libraries, udev
# and rdma-core.
unpack_dpdk() {
    refresh_lists
    needed=$(depends dpdk-dev | grep -Ev '^(libdpdk-dev|python3)$')
    abi=$(echo "$needed" | sed -n 's/^librte-ethdev//p')
    [ -n "$abi" ] || die "apt knows no dpdk-dev; check this machine's apt sources"
    libraries=$(apt-cache depends --recurse --important "librte-net-virtio$abi" $needed |
        sed -n 's/^\(librte-[^ ]*\)$/\1/p' | sort -u)
    others=$(for name in $needed; do
        case $name in librte-*) ;; *) installed "$name" || echo "$name" ;; esac
    done)
    begin_work "$cache"
    mkdir "$work/debs"
    say "downloading dpdk-dev and libraries of DPDK, 6 MB (unpacked into the cache, not installed)"
    # shellcheck disable=SC2086  # lists of names
    (cd "$work/debs" && apt -o APT::Sandbox::User=root download dpdk-dev $libraries $others >&2) ||
        die "downloading dpdk-dev failed; check the network and run this again"
    unpack_debs
    ln -s usr/bin/dpdk-testpmd "$work/root/testpmd"
    (cd "$work/root" && ln -s usr/lib/*-linux-gnu* lib && ln -s lib/dpdk/pmds-* drivers)
    lacks=$(LD_LIBRARY_PATH=$work/root/lib ldd "$work/root/testpmd" | sed -n 's/ => not found//p' | sort -u)
    [ -z "$lacks" ] || die "dpdk-testpmd lacks "$lacks
    rm -rf "${dpdk:?}"
    mv "$work/root" "$dpdk"
    rm -rf "$work"
}

have_dpdk() {
    [ -e "$dpdk/testpmd" ]
}

# Prometheus itself would run as a service.
unpack_promtool() {
    refresh_lists
    begin_work "$cache"
    say "downloading prometheus, $(package_size prometheus), for promtool"
    (cd "$work" && apt -o APT::Sandbox::User=root download prometheus >&2) ||
        die "downloading prometheus failed; check the network and run this again"
    dpkg-deb -x "$work"/*.deb "$work/root"
    mv "$work/root/usr/bin/promtool" "$promtool"
    rm -rf "$work"
}

have_promtool() {
    [ -x "$promtool" ]
}

have_uml() {
    [ -e "$uml/linux" ] || [ "$(uname -m)" != x86_64 ]
}

have_zero_copy_kernel() {
    ls "$kernels"/zero-copy/boot/vmlinuz-* "$kernels"/zero-copy/usr/lib/modules/*/vmlinuz 2>/dev/null | grep -q .
}

have_kernel() {
    ls "$kernels"/current/boot/vmlinuz-* >/dev/null 2>&1
}

case ${1:-} in
"") ;;
zero-copy)
    if ! have_zero_copy_kernel; then
        [ "${RINGWAY_INSTALL:-yes}" != no ] ||
            die "a kernel with zero-copy is missing in $kernels (RINGWAY_INSTALL=no); \`sh bench/install-packages.sh zero-copy\` unpacks it there"
        unpack_zero_copy_kernel
    fi
    say "all there"
    exit 0
    ;;
*) die "no such set of packages: $1; there is zero-copy, and all else without a name" ;;
esac

missing=$(missing_tools)
if [ -z "$missing" ] && have_kernel && have_uml && have_promtool && have_dpdk; then
    exit 0
fi
choose_suite
install="sudo -E sh bench/install-packages.sh"
command -v apt-get >/dev/null 2>&1 && command -v dpkg-deb >/dev/null 2>&1 ||
    die "no apt here: install QEMU 9.2 or later, iperf3, a static busybox, iproute2, tcpdump, xz, kmod and valgrind, and unpack a Debian cloud kernel into $kernels/current"
if [ "${RINGWAY_INSTALL:-yes}" = no ]; then
    tell_plan
    die "nothing was installed (RINGWAY_INSTALL=no); \`$install\` installs it"
fi
[ "$(id -u)" = 0 ] || die "missing: ${missing:-a guest kernel, user-mode Linux, promtool or testpmd}; installing takes root: \`$install\`"

tell_plan
if [ -n "$missing" ]; then
    refresh_lists
    # shellcheck disable=SC2086  # a list of names
    say "installing $missing, $(download_size $missing) to download with what they depend on"
    # shellcheck disable=SC2086  # a list of names
    apt ${suite:+-t "$suite"} install --no-install-recommends $missing >&2 ||
        die "installing $missing failed; see apt's message above"
fi
have_kernel || unpack_kernel
have_uml || unpack_uml
have_promtool || unpack_promtool
have_dpdk || unpack_dpdk
say "all there"
