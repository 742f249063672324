#!/bin/sh
# The night as schedulers call it: tried again where another try can help.
#
#     jobs/night.sh --config my.toml
#
# A failed audit (code 3) is not tried again: the same night gives the same audit; nor is one that a signal ended. At the
# deadline a try is ended as SIGTERM ends it, and the code is 124: the next run goes on where it was. From the
# environment, beside the credentials of the stores: CONREC_TRIES, CONREC_PAUSE, the seconds between two of them, and
# CONREC_DEADLINE, the seconds for all.
set -u
tries=${CONREC_TRIES:-3} pause=${CONREC_PAUSE:-300} deadline=${CONREC_DEADLINE:-21600}
began=$(date +%s) stopped='' child=''
# A shell that waits in the foreground would hear a signal only after the night.
trap 'stopped=143; kill -TERM "$child" 2>/dev/null' TERM
trap 'stopped=130; kill -TERM "$child" 2>/dev/null' INT

attend() {
    "$@" &
    child=$!
    wait "$child"
    code=$?
    if [ -n "$stopped" ]; then
        wait "$child"
        exit "$stopped"
    fi
}

while :; do
    left=$((deadline - $(date +%s) + began))
    [ "$left" -gt 0 ] || exit 124
    attend timeout --kill-after=60 "$left" "${PYTHON:-python}" "$(dirname "$0")/nightly.py" "$@"
    tries=$((tries - 1))
    case $code in 0 | 3 | 124 | 130 | 143) exit "$code" ;; esac
    [ "$tries" -gt 0 ] || exit "$code"
    echo "night.sh: code $code, tried again in $pause s" >&2
    attend sleep "$pause"
done
