#!/bin/sh
# Counts what a frame costs from ring to ring, both guests and the switch, in instructions of the
# fixed run, and fails if it is more than instructions.txt allows. Unlike times, the counts are the
# same to a digit in each run, whatever else the machine does.
#
#     instructions.sh           compares
#     instructions.sh update    writes bounds a little above today's counts
set -eu
cd "$(dirname "$0")"

bounds=instructions.txt
bursts=1000
# For a compiler's whims; an allocation, a system call or a second look-up costs more.
slack=12
# Only the loop is counted, not what is set up before it.
runner='["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", "--collect-atstart=no", "--toggle-collect=*fixed*counted*"]'

die() {
    echo "guard: $1" >&2
    exit 1
}

# Sets `count` for frames of a layout and size, and `variant` to the one of the hot loops that ran.
measure() {
    output=$(cargo --config "target.'cfg(unix)'.runner = $runner" bench --locked --quiet \
        -p ringway-dataplane --bench fixed -- "$bursts" "$2" "$1" 2>&1 </dev/null) ||
        die "the fixed run failed:
$output"
    all=$(echo "$output" | sed -n 's/.*Collected : //p')
    [ "${all:-0}" -gt 0 ] || die "nothing was counted: is the loop of fixed.rs still called counted?"
    frames=$(echo "$output" | sed -n 's/^frames: //p')
    count=$(((all + frames / 2) / frames))
    variant=$(echo "$output" | sed -n 's/^variant: //p')
}

# Prints `layout/bytes variant instructions bound` of each case; no bound is 0.
measure_all() {
    for case in split/64 split/1500 packed/64 packed/1500; do
        measure "${case%/*}" "${case#*/}"
        bound=$(awk -v case="$case" -v variant="$variant" '$1 == case && $2 == variant { print $3 }' "$bounds")
        echo "$case $variant $count ${bound:-0}"
    done
}

compare() {
    counts=$(measure_all)
    echo "$counts" | awk '
        BEGIN { printf "%-12s %-10s %18s %6s\n", "case", "variant", "instructions/frame", "bound" }
        { printf "%-12s %-10s %18d %6d\n", $1, $2, $3, $4 }'
    over=$(echo "$counts" | awk '$3 > $4 { printf " %s (%d, not %d)", $1, $3, $4 }')
    [ -z "$over" ] || die "more instructions per frame than allowed:$over
  hint: callgrind_annotate shows where they went; if they are worth it, or nobody counted this variant yet, \`make guard-update\` and say why in the commit"
}

# Other variants' bounds stay.
update() {
    counts=$(measure_all)
    variant=$(echo "$counts" | awk 'NR == 1 { print $2 }')
    kept=$(awk -v variant="$variant" '/^#/ || $2 != variant' "$bounds")
    {
        echo "$kept"
        echo "$counts" | awk -v slack="$slack" '{ printf "%-12s %-10s %6d\n", $1, $2, $3 + slack }'
    } >"$bounds"
    cat "$bounds"
}

case ${1:-compare} in
compare) compare ;;
update) update ;;
*) die "what is $1? (compare, update)" ;;
esac
