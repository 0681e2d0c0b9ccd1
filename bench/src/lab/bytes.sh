#!/bin/busybox sh
# One end of a transfer of random bytes.
#   bytes make MIB                 makes the file `sent`
#   bytes send ADDRESS PORT        sends it, returns at once
#   bytes listen PORT              takes what one connection brings as the file `received`;
#                                  returns once it listens
#   bytes wait                     waits for the end of that
#   bytes digest sent|received     prints number and hash of a file's bytes
cd /tmp || exit

# until_true TRIES COMMAND…: looks every 30 ms
until_true() {
    tries=$1
    shift
    until "$@"; do
        tries=$((tries - 1))
        [ $tries -gt 0 ] || return 1
        usleep 30000
    done
}

listens() {
    netstat -ltn | grep -q ":$1 "
}

case $1 in
make)
    dd if=/dev/urandom of=sent bs=1M count="$2" 2>/dev/null
    ;;
send)
    nc "$2" "$3" -e cat sent >send.log 2>&1 &
    ;;
listen)
    killall -q -9 nc
    rm -f received complete
    nc -l -p "$2" -e sh -c 'cat >received; touch complete' >listen.log 2>&1 &
    until_true 100 listens "$2" || { cat listen.log; exit 1; }
    ;;
wait)
    until_true 3000 test -f complete || { echo "the connection did not end"; exit 1; }
    ;;
digest)
    # Not wc, which takes ten times as long; of the hashes SHA-512 is among the fastest here.
    echo "$(stat -c %s "$2") $(sha512sum <"$2")"
    ;;
esac
