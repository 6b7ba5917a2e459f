# Ends this machine when nobody needs it any more, whatever happened to the launcher. Runs as root from the first boot on.
# `watchdog` in watch.py puts the settings in front: FOLDER, the times MAX DONE FAILED HUNG BOOT LEASE HOLD and TICK in seconds,
# CLOCK (a file that begins with the seconds since boot), IMDS (address of the metadata service), OFF (the command that ends the machine).
trap '' PIPE HUP
export LC_ALL=C
declare -A seen since told
now=0 last='' lived=0

log() { # To the console of the machine, and to a file if there is room
    echo "fastimagenet watchdog: $*"
    echo "$(date -u +%FT%TZ) $*" >> "$FOLDER/watch/log"
} 2>/dev/null

# Time

read_clock() { # Seconds since boot in $now, seconds watched in $lived
    local up
    read -r up _ < "$CLOCK"
    up=${up%%.*}
    [[ $up =~ ^[0-9]+$ ]] || return
    now=$((10#$up))
    if [ -z "$last" ]; then
        [ -f "$FOLDER/watch/age" ] && read -r lived < "$FOLDER/watch/age"
        [[ $lived =~ ^[0-9]+$ ]] && lived=$((10#$lived)) || lived=0
        last=$now
    fi
    ((now > last)) && lived=$((lived + now - last))
    last=$now
} 2>/dev/null

save_clock() { echo "$lived" > "$FOLDER/watch/age.tmp" && mv -T "$FOLDER/watch/age.tmp" "$FOLDER/watch/age"; } 2>/dev/null

age() { # $age: for how many seconds thing $1 has been in state $2
    if [[ ${seen[$1]-never} != "$2" ]]; then seen[$1]=$2 since[$1]=$now; fi
    local began=${since[$1]}
    age=$((now - began))
}

look() { timeout -s KILL 10 stat -c '%y %s' "$1" 2>/dev/null; }

# Runs

processes() { timeout -s KILL 10 grep -lzsxF "FASTIMAGENET_RUN=$1" /proc/[0-9]*/environ | cut -d/ -f3; }

moved() { # MiB that the processes of run $1 have read and written, also what was in memory already
    local pid key value sum=0
    for pid in $(processes "$1"); do
        while read -r key value; do
            case $key in rchar:|wchar:|read_bytes:|write_bytes:) [[ $value =~ ^[0-9]+$ ]] && sum=$((sum + value)) ;; esac
        done < "/proc/$pid/io"
    done 2>/dev/null
    echo $((sum >> 20))
}

find_runs() { # The $active ones, and the $newest of all; who only looks at curves keeps no machine
    local dir run
    active=() newest=''
    for dir in "$FOLDER"/runs/*/; do
        run=${dir%/}
        [ -f "$run/run.sh" ] && [[ ${run##*/} != tensorboard-* ]] || continue
        [ -f "$run/status" ] && [ -s "$run/status" ] || active+=("$run")
        if [ -z "$newest" ] || [ "$run/run.sh" -nt "$newest/run.sh" ]; then newest=$run; fi
    done
}

quiet_time() { # $quiet: seconds since any active run made progress
    local run
    quiet=$now
    for run in "${active[@]}"; do
        age "$run" "$(look "$run/log") $(moved "$run")"
        ((age < quiet)) && quiet=$age
    done
}

# Spot notice

imds() { curl -sf -m 2 --noproxy '*' "${@:2}" "${IMDS%/}/latest/$1" 2>/dev/null; }

tell_runs() { # SIGUSR1 to those processes of active runs that handle it: it is signal 10, bit 9
    local run pid mask
    for run in "${active[@]}"; do
        for pid in $(processes "$run"); do
            mask=$(sed -n 's/^SigCgt:[[:space:]]*//p' "/proc/$pid/status" 2>/dev/null)
            [[ $mask =~ ^[0-9a-f]+$ ]] && ((16#$mask & 0x200)) && [ -z "${told[$pid]}" ] || continue
            kill -USR1 "$pid" 2>/dev/null && told[$pid]=1 && log "SIGUSR1 to process $pid of $run"
        done
    done
}

spot_notice() {
    local token note file="$FOLDER/watch/interrupted"
    token=$(imds api/token -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60') || return
    note=$(imds meta-data/spot/instance-action -H "X-aws-ec2-metadata-token: $token") && [ -n "$note" ] || return
    [ -n "${told[notice]}" ] || log "EC2 takes this machine back: $note"
    told[notice]=1
    [ -s "$file" ] || { echo "$note" > "$file.tmp" && mv -T "$file.tmp" "$file"; } 2>/dev/null
    tell_runs
}

# Decision

judge() { # $why: the reason to end the machine, empty if there is none
    local rc age lease quiet idle
    why=''
    if ((${#active[@]})); then
        age idle "$now"
        quiet_time
        ((quiet >= HUNG)) && why="hung: no progress for $quiet s in ${active[*]##*/}"
        return
    fi
    age lease "$(look "$FOLDER/watch/lease")"
    lease=$age
    if [ -n "$newest" ]; then
        read -r rc < "$newest/status"
        age idle "$newest $(look "$newest/status")"
        idle=$((age < lease ? age : lease))
        if [ "$rc" = 0 ]; then ((idle >= DONE)) && why="run ${newest##*/} is done and nobody came for $idle s"
        else ((idle >= FAILED)) && why="run ${newest##*/} failed with exit code $rc and nobody came for $idle s"; fi
    elif [ -e "$FOLDER/watch/lease" ]; then ((lease >= LEASE)) && why="the launcher is gone for $lease s and nothing runs"
    else ((lease >= BOOT)) && why="no launcher and no run for $lease s since boot"; fi
}

held() { # Did a person ask to keep the machine, less than an hour ago?
    local age
    [ -e "$FOLDER/watch/hold" ] && age hold "$(look "$FOLDER/watch/hold")" && ((age < HOLD))
}

off() { # $1: why
    log "power off: $1"
    timeout 120 bash -c "$OFF"
}

tick() {
    [ -d "$FOLDER/watch" ] || { mkdir -p "$FOLDER/watch"; chown --reference="$FOLDER/.." "$FOLDER" "$FOLDER/watch"; } 2>/dev/null
    read_clock || return
    find_runs
    spot_notice
    judge
    held && why=''
    ((lived >= MAX)) && why="the time is used up, $MAX s"
    [ -n "$why" ] && off "$why"
    save_clock
}

log "at most $MAX s"
while :; do
    tick
    sleep "$TICK"
done
exit 1
