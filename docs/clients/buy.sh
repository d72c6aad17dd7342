#!/bin/sh
# Buy, and know whether it worked: buy.sh URL USER PRODUCT [QUANTITY]
#
# Prints the order id (exit 0), the reason of a refusal (1), or how to go on (3).
# Environment: PATIENCE, seconds to go on trying (90); KEY, to go on with an earlier purchase.

random() { od -An -N2 -tu2 /dev/urandom | tr -d ' '; }
extract() { printf '%s\n' "$answer" | sed -n "s/$1/\1/p"; }

if [ $# -lt 3 ] || [ $# -gt 4 ]; then
    echo "usage: buy.sh URL USER PRODUCT [QUANTITY]" >&2
    exit 2
fi
purchase="{\"userId\": \"$2\", \"productId\": $3, \"quantity\": ${4:-1}}"
# One key per intent, the same in every attempt.
key=${KEY:-$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')}
deadline=$(($(date +%s) + ${PATIENCE:-90}))
longest=1

while :; do
    # Headers, body and, as the last line, the status; no answer in 5 s: nobody knows the outcome.
    answer=$(curl -si --max-time 5 -w '\nstatus=%{http_code}' "$1/purchase" \
        -H 'Content-Type: application/json' -H "Idempotency-Key: $key" -d "$purchase")
    status=$(extract '^status=\(.*\)$')
    order=$(extract '.*"orderId": *\([0-9]*\).*')
    case $status:$order in
    200:?*)
        echo "$order"
        exit 0
        ;;
    000:* | 200: | 429:* | 5??:*) ;; # not the last word
    *)
        code=$(extract '.*"code": *"\([a-z_]*\)".*')
        echo "refused: ${code:-$status}"
        exit 1
        ;;
    esac
    retry_after=$(extract '^[Rr]etry-[Aa]fter: *\([0-9]*\).*')
    # A random part keeps a crowd that failed together from coming back together.
    wait=$((${retry_after:-0} + $(random) % (longest + 1)))
    longest=$((longest < 8 ? 2 * longest : 8))
    if [ $(($(date +%s) + wait)) -gt "$deadline" ]; then
        echo "undecided: go on with KEY=$key, or see $1/purchase/orders/$2"
        exit 3
    fi
    sleep "$wait"
done
