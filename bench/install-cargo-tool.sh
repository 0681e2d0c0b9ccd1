#!/bin/sh
# Installs a program that cargo runs (`cargo-deny` for `cargo deny`) from crates.io, if it is missing.
# With RINGWAY_INSTALL=no it says what is missing and stops.
set -eu

tool=$1
cargo=${CARGO:-cargo}

if "$cargo" "${tool#cargo-}" --version >/dev/null 2>&1; then
    exit 0
fi
command="$cargo install --locked $tool"
if [ "${RINGWAY_INSTALL:-yes}" = no ]; then
    echo "install-cargo-tool: $tool is missing; \`$command\` builds it from crates.io" >&2
    exit 1
fi
echo "install-cargo-tool: $tool is missing: building it from crates.io (\`$command\`)" >&2
exec $command
