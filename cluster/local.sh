#!/usr/bin/env bash
# A one-node Ray for `ray job submit`, on this machine, beside any other Ray that runs here.
#
#   cluster/local.sh                     start; further arguments go to `ray start`:
#   cluster/local.sh --num-gpus 1
#   cluster/local.sh status
#   cluster/local.sh stop                ends this node only (`ray stop` would end every Ray of yours)
#
# PORT=6379            other nodes join here; two nodes with different ports can run at once
# DASHBOARD_PORT=8265  where jobs are submitted
# DASHBOARD_HOST=127.0.0.1  0.0.0.0 shows the dashboard to the network; the token is still asked for
# NUM_CPUS=8           logical CPUs: tickets, not cores. With too few, Ray Data's actors wait for each other for ever
# STOP_SECONDS=60      how long `stop` waits before it kills
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PORT=${PORT:-6379}
DASHBOARD_PORT=${DASHBOARD_PORT:-8265}
DASHBOARD_HOST=${DASHBOARD_HOST:-127.0.0.1}
STOP_SECONDS=${STOP_SECONDS:-60}
START_SECONDS=180
FOLDER=/tmp/birbal-head-$PORT # short: a socket's path may have 107 characters, and Ray adds 65
RAY_FOLDER=$FOLDER/ray        # Ray makes it writable for everybody; the folder around it is ours alone
STATE=$FOLDER/node.state
LOG=$FOLDER/start.log

say() { printf '%s\n' "$*" >&2; }
fail() {
    say "error: $*"
    exit 1
}

find_ray() {
    if [[ -x $ROOT/.venv/bin/ray ]]; then
        RAY=$ROOT/.venv/bin/ray
    elif ! RAY=$(command -v ray); then
        fail "no Ray: neither $ROOT/.venv/bin/ray (make setup) nor \`ray\` on the PATH"
    fi
    PATH=$(dirname "$RAY"):$PATH # a job's `python` must be the one that has Ray
    export PATH
}

# Ray's processes inherit these; the first eight are birbal_ray/cluster.py's QUIET_ENVIRONMENT.
set_environment() {
    export RAY_DATA_DISABLE_PROGRESS_BARS="${RAY_DATA_DISABLE_PROGRESS_BARS:-1}"
    export RAY_DATA_PARQUET_FOOTER_NUM_ACTORS="${RAY_DATA_PARQUET_FOOTER_NUM_ACTORS:-1}"
    export RAY_worker_niceness="${RAY_worker_niceness:-0}"
    export RAY_DEDUP_LOGS="${RAY_DEDUP_LOGS:-0}"
    export RAY_USAGE_STATS_ENABLED="${RAY_USAGE_STATS_ENABLED:-0}"
    export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="${RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO:-1}"
    export RAY_prestart_worker_first_driver="${RAY_prestart_worker_first_driver:-0}"
    export RAY_ENABLE_AUTO_CONNECT="${RAY_ENABLE_AUTO_CONNECT:-0}"
    # `ray job stop` kills after 3 s unless told otherwise; a training may save for resources.stop_grace (300 s).
    export RAY_JOB_STOP_WAIT_TIME_S="${RAY_JOB_STOP_WAIT_TIME_S:-330}"
    # `ray start` of Ray 2.60 asks for a token only where one exists or this is set.
    export RAY_AUTH_MODE="${RAY_AUTH_MODE:-token}"
    unset RAY_ADDRESS # this node is a head; the variable speaks of another one
}

recorded() { sed -n "s/^$1=//p" "$STATE" 2>/dev/null || true; }

# The node's main process if it lives; a pid that was given to another program doesn't count.
living_pid() {
    local pid
    pid=$(recorded pid)
    if [[ -n $pid && $(ps -o args= -p "$pid" 2>/dev/null) == *"--temp-dir=$RAY_FOLDER"* ]]; then
        echo "$pid"
    fi
}

# PID and all that it started, from one look: those whose parent died meanwhile would be missed by a second one.
family_of() {
    ps -eo pid=,ppid= | awk -v root="$1" '
        { parent[$1] = $2 }
        END {
            for (pid in parent) {
                at = pid
                while (at != root && at in parent) at = parent[at]
                if (at == root) print pid
            }
        }'
}

# In the state file with the time they began: by that a pid is known again.
remember_family() { # PID
    ps -o pid=,lstart= -p "$(family_of "$1" | paste -s -d, -)" | sed 's/^ */member=/' >>"$STATE"
}

kill_remembered() {
    local pid began
    recorded member | while read -r pid began; do
        [[ $(ps -o lstart= -p "$pid" 2>/dev/null) != "$began" ]] || kill -KILL "$pid" 2>/dev/null || true
    done
}

listens() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

# The agent that takes jobs is there some seconds after the dashboard; a submit before it gets HTTP 500. It writes down
# the port that it drew (on the node's own address, not on 127.0.0.1). `ray start` may still give up after that.
takes_jobs() {
    compgen -G "$RAY_FOLDER/session_latest/dashboard_agent_listen_port_*" >/dev/null &&
        listens "$DASHBOARD_PORT" && grep -q "Ray runtime started" "$LOG"
}

end_node() { # PID. Ray takes up to 30 s to drain the node, then its processes end one by one
    local pid=$1 family waited=0
    family=$(family_of "$pid")
    kill -TERM "$pid" 2>/dev/null || true
    while [[ $waited -lt $STOP_SECONDS ]] && any_lives "$family"; do
        sleep 1
        waited=$((waited + 1))
        family="$family $(family_of "$pid")"
    done
    for pid in $family; do
        kill -KILL "$pid" 2>/dev/null || true
    done
}

any_lives() {
    local pid
    for pid in $1; do
        kill -0 "$pid" 2>/dev/null && return 0
    done
    return 1
}

start() {
    local pid cpus client_port=10001 attempt
    pid=$(living_pid)
    [[ -z $pid ]] || fail "this node runs already (pid $pid, port $PORT): stop it, or set PORT and DASHBOARD_PORT"
    find_ray
    set_environment
    if [[ -e $FOLDER ]]; then
        [[ -O $FOLDER && ! -L $FOLDER ]] || fail "$FOLDER belongs to somebody else: take another PORT"
        say "removing what a node that ended by itself left in $FOLDER"
        kill_remembered
        rm -rf -- "$FOLDER"
    fi
    if listens "$PORT"; then fail "port $PORT is taken, perhaps by another Ray: set PORT"; fi
    if listens "$DASHBOARD_PORT"; then fail "port $DASHBOARD_PORT is taken by something else: set DASHBOARD_PORT"; fi
    mkdir -m 700 "$FOLDER"
    if [[ $RAY_AUTH_MODE == token ]]; then
        (umask 077 && "$RAY" get-auth-token --generate >/dev/null 2>"$LOG") || fail "no token could be made: see $LOG"
    fi
    cpus=${NUM_CPUS:-$(getconf _NPROCESSORS_ONLN)}
    [[ -n ${NUM_CPUS:-} || $cpus -ge 8 ]] || cpus=8
    while listens "$client_port"; do client_port=$((client_port + 1)); done
    trap 'say "interrupted: ending the node"; end_node "$(recorded pid)"; rm -rf -- "$FOLDER"; exit 130' INT TERM
    for attempt in 1 2 3; do
        # --block: one process whose end is the end of all the others. 0: a free port; two nodes would fight for one.
        nohup "$RAY" start --head --block --temp-dir="$RAY_FOLDER" --port="$PORT" --num-cpus="$cpus" \
            --dashboard-host="$DASHBOARD_HOST" --dashboard-port="$DASHBOARD_PORT" --dashboard-agent-listen-port=0 \
            --ray-client-server-port="$client_port" --min-worker-port=0 --max-worker-port=0 --disable-usage-stats "$@" \
            </dev/null >>"$LOG" 2>&1 &
        pid=$!
        printf 'pid=%s\ndashboard=%s\nstarted=%s\n' "$pid" "http://127.0.0.1:$DASHBOARD_PORT" "$(date)" >"$STATE"
        say "starting Ray with $cpus logical CPUs (pid $pid, log $LOG)"
        if comes_up "$pid"; then
            trap - INT TERM
            remember_family "$pid"
            tell_commands
            return
        fi
        # Ray gives a node 30 s to start, which a busy machine may need longer for.
        if [[ $attempt -eq 3 ]] || ! grep -q "timed out during startup" "$LOG"; then break; fi
        say "Ray did not start within its 30 s, the machine is busy: once more"
        mv "$LOG" "$LOG.$attempt"
        rm -rf -- "$RAY_FOLDER"
    done
    tail -n 20 "$LOG" >&2
    rm -rf -- "$FOLDER"
    fail "Ray did not start; its last words are above"
}

# Waits until jobs can be submitted; false when Ray ended instead, or took too long and was ended.
comes_up() { # PID
    local waited=0
    until takes_jobs; do
        kill -0 "$1" 2>/dev/null || return 1
        if [[ $waited -ge $START_SECONDS ]]; then
            say "Ray takes no jobs after $START_SECONDS s"
            end_node "$1"
            return 1
        fi
        sleep 1
        waited=$((waited + 1))
    done
}

tell_commands() {
    local size=tiny submit="ray job submit --address http://127.0.0.1:$DASHBOARD_PORT --working-dir . --"
    local tasks="$ROOT/birbal_ray/sample_tasks"
    if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then size=full; fi
    local score=configs/score/tiny.yaml train=configs/train/tiny.yaml
    if [[ $size == full ]]; then
        score=configs/score/mistral-7b.yaml train=configs/train/mistral-7b-qlora.yaml tasks=$ROOT/natural-instructions
    fi
    cat <<TEXT
Ray is up: dashboard http://127.0.0.1:$DASHBOARD_PORT (it asks for the token: ray get-auth-token)

From $ROOT, with $(dirname "$RAY") on the PATH; absolute paths, a job runs in a copy of this folder:
  export RAY_AUTH_MODE=$RAY_AUTH_MODE
  $submit python jobs/score.py --config $score --tasks $tasks --output $ROOT/runs/score
  $submit python jobs/train.py --config $train --mix $ROOT/runs/mix --output $ROOT/runs/train

End a job with \`ray job stop ID\`: a training saves a checkpoint first. Then: cluster/local.sh stop
TEXT
}

stop() {
    local pid
    [[ -e $STATE ]] || fail "no node on port $PORT was started by this script"
    pid=$(living_pid)
    if [[ -n $pid ]]; then
        say "stopping the node on port $PORT (pid $pid)"
        end_node "$pid"
    else
        say "the node on port $PORT had ended by itself; its last words:"
        tail -n 10 "$LOG" >&2 || true
        kill_remembered # its agents notice only after a minute
    fi
    rm -rf -- "$FOLDER"
}

status() {
    local pid
    pid=$(living_pid)
    if [[ -z $pid ]]; then
        [[ ! -e $STATE ]] || say "the node on port $PORT ended by itself; last words in $LOG"
        fail "no node of this script runs on port $PORT"
    fi
    find_ray
    set_environment
    echo "pid $pid, dashboard $(recorded dashboard), folder $FOLDER, since $(recorded started)"
    "$RAY" status --address "127.0.0.1:$PORT"
}

case ${1:-start} in
    stop | status)
        [[ $# -eq 1 ]] || fail "$1 takes no arguments"
        "$1"
        ;;
    -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}" ;;
    start | -*)
        [[ ${1:-} != start ]] || shift
        start "$@"
        ;;
    *) fail "unknown word '$1': start (also with arguments for \`ray start\`), status, stop" ;;
esac
