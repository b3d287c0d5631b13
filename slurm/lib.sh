# shellcheck shell=bash
# What the sbatch files here share; sourced, never run by itself. In the order of a job:
#   begin_attempt, load_modules, need_file, screen_nodes, servers_key, place_steps, keep_servers, run_step, end_servers (or forget_servers), end_attempt (or end_command)
#
# What it leaves in the run's directory:
#   attempts/1, 2, ...   one folder an attempt: srun.log (what Slurm said), rank-0.log, rank-1.log, ..., server-0.log, ...
#                        times: when it began, in seconds since 1970, for which job; when it ended
#                        screen.log: what the nodes answered to the screening; screen.err: what Slurm and Python said of it
#   attempts/latest      the newest of them
#   attempts/ended       a line for each that has ended: its number, job, newest step, how (exit code, or "term")
#   serving/             the same of the jobs of servers; converting/, evaluating/, reporting/ of convert, evaluate and scaling.sbatch
#   servers/             a file for each server that is up, and the key that they and the trainer have in common

say() { printf '%s %s\n' "$(date '+%F %T')" "$*"; }

# end_job CODE TEXT...: the last line of the main log, and the end of the job.
end_job() {
  local code=$1
  shift
  note_end
  say "END $*"
  exit "$code"
}

# note_end: when the attempt ended, once; nothing before begin_attempt.
note_end() {
  if [ -n "${attempt_dir:-}" ] && [ -z "${end_noted:-}" ]; then
    end_noted=1
    echo "ended $(date +%s.%3N)" >>"$attempt_dir/times"
  fi
}

# begin_attempt RUN_DIR [attempts|serving|...]: makes the folder of this attempt's logs, $attempt_dir.
begin_attempt() {
  attempts=$1/${2:-attempts} run_dir=$1 got_term=0 logs=rank fit=() fit_servers=()
  if ! mkdir -p "$attempts" || [ ! -w "$attempts" ]; then
    end_job 2 "mistake: $attempts cannot be written on $(hostname); is it on the shared file system?"
  fi
  attempt=1
  until mkdir "$attempts/$attempt" 2>/dev/null; do attempt=$((attempt + 1)); done
  attempt_dir=$attempts/$attempt
  echo "began $(date +%s.%3N) ${SLURM_JOB_ID:-none}" >"$attempt_dir/times"
  ln -sfn "$attempt" "$attempts/latest"
  # Slurm sends SIGTERM to ranks and to this shell alike: at scancel, preemption, requeue and the time limit.
  # The ranks write their checkpoint; this shell waits for them.
  trap 'got_term=1 interrupted=1' TERM
  say "attempt $attempt of ${run_dir##*/}: job ${SLURM_JOB_ID:-none} on ${SLURM_JOB_NODELIST:-$(hostname)}, logs in $attempt_dir"
}

# load_modules NAME...: environment modules; a missing one is a mistake, not something to try again.
load_modules() {
  local name
  for name in "$@"; do
    module load "$name" 2>"$attempt_dir/modules.log" ||
      end_job 2 "mistake: module load $name failed on $(hostname): $(one_line <"$attempt_dir/modules.log")"
  done
}

# need_file FILE WHAT: ends the job if the file is not there.
need_file() {
  [ -e "$1" ] || end_job 2 "mistake: $2 $1 is not on $(hostname)"
}

# servers_key RUN_DIR: $GTPO_SERVERS_KEY, by which the trainer's requests are told from those of others; made once for a run.
servers_key() {
  local key=$1/servers/.key partial
  partial=$key.$(hostname).$$
  mkdir -p "$1/servers"
  if [ ! -s "$key" ]; then
    (umask 077; od -A n -t x1 -N 24 /dev/urandom | tr -d ' \n' >"$partial")
    ln "$partial" "$key" 2>/dev/null # of two that come at once, the first decides
    rm -f "$partial"
  fi
  GTPO_SERVERS_KEY=$(cat "$key")
  export GTPO_SERVERS_KEY
}

# screen_nodes SPARES SECONDS PYTHON...: each node of the job shows within so long that it is fit, and as long again that it and
# the others reach each other (gtpo_megatron/machine/screen.py), and a spare one takes the place of one that does not. Leaves in
# $fit the nodes to use, as many as the job has without its spares; of a heterogeneous job, its first component's there, and the
# second's, the servers', in $fit_servers. Where they are too few, the job is requeued without those that are unfit, unless all
# are: that is a mistake in what they share. PYTHON: the interpreter, after what srun needs for it.
screen_nodes() {
  local spares=$1 limit=$2 folder=$attempt_dir/screen nodes=() of node unfit=() first="" token i sizes=()
  local -A verdict=() cut=() component=()
  shift 2
  for i in 0 1; do
    mapfile -t of < <(nodes_of_component "$i")
    sizes+=("${#of[@]}") nodes+=("${of[@]}")
    for node in "${of[@]}"; do component[$node]=$i; done
  done
  ask_nodes "$@"
  read_verdicts
  leave_broken_links
  for node in "${nodes[@]}"; do
    if [ "${verdict[$node]-}" = ok ]; then
      if [ "${component[$node]}" = 0 ]; then fit+=("$node"); else fit_servers+=("$node"); fi
    else
      unfit+=("$node")
      if [ -z "${verdict[$node]-}" ]; then verdict[$node]="no answer: $(grep -m 1 -F " $node: " "$attempt_dir/screen.err")"; fi
      first=${first:-"$node: ${verdict[$node]}"}
    fi
  done
  if [ -n "${verdict[stopped]-}" ] || [ "$got_term" = 1 ]; then
    step_code=3
    end_attempt "$retries"
  fi
  for node in "${unfit[@]}"; do say "$node is unfit: ${verdict[$node]}"; done
  if [ "${#fit[@]}" -ge "$((sizes[0] - spares))" ] && [ "${#fit_servers[@]}" = "${sizes[1]}" ]; then
    fit=("${fit[@]:0:sizes[0]-spares}")
    return
  fi
  first_end="${#unfit[@]} of ${#nodes[@]} nodes are unfit, $spares to spare: $first"
  if [ -n "${verdict[alone]-}" ]; then end_job 2 "mistake: no two nodes reach each other: $first; not requeued"; fi
  if [ "${#unfit[@]}" = "${#nodes[@]}" ] && [ "${#nodes[@]}" -gt 1 ]; then end_job 2 "mistake: $first_end; not requeued"; fi
  avoid=$(IFS=,; echo "${unfit[*]}")
  if ! can_do_without "$avoid"; then end_job 2 "mistake: $first_end; Slurm has too few nodes without $avoid: not requeued"; fi
  step_code=unfit
  end_attempt "$retries"
}

# Of screen_nodes: a step on each component, a task a node; what the nodes answer is in $attempt_dir/screen.log, with the time here.
ask_nodes() {
  local i words meet
  mkdir -p "$folder"
  token=${SLURM_JOB_ID:-none}.$$.$RANDOM
  echo "$token" >"$folder/.token"
  meet=${nodes[0]}:$((20000 + 7 * ${SLURM_JOB_ID:-0} % 10000)) # as in gtpo_megatron/cluster/ranks.py, for step 0
  (for i in 0 1; do
     if [ "${sizes[i]}" = 0 ]; then continue; fi
     words=("--nodes=${sizes[i]}" "--ntasks=${sizes[i]}" --ntasks-per-node=1 --kill-on-bad-exit=0 "--wait=$((150 + limit))")
     if [ -n "${SLURM_HET_SIZE:-}" ]; then words+=("--het-group=$i"); fi
     srun "${words[@]}" "$@" -m gtpo_megatron.machine.screen "$folder" "$token" --limit "$limit" --meet "$meet" \
       --nodes "${#nodes[@]}" 2>>"$attempt_dir/screen.err" &
   done
   wait) | while read -r line; do printf '%(%s)T %s\n' -1 "$line"; done >"$attempt_dir/screen.log" &
  wait_for "$!"
}

# nodes_of_component N: the nodes of a component of this job, one a line; a job that is not heterogeneous is its own component 0.
nodes_of_component() {
  local name=SLURM_JOB_NODELIST_HET_GROUP_$1
  if [ -n "${SLURM_HET_SIZE:-}" ]; then
    scontrol show hostnames "${!name}"
  elif [ "$1" = 0 ]; then
    scontrol show hostnames "$SLURM_JOB_NODELIST"
  fi
}

# Of screen_nodes: ${verdict[NODE]} is "ok" or why not, ${cut[NODE PEER]} is why a node does not reach another,
# ${verdict[stopped]} is set if the job is asked to stop meanwhile.
read_verdicts() {
  local now word clock how text
  while read -r now word node clock how text; do
    if [ "$word" != screen ]; then continue; fi # what libraries print
    case $how in
      ok) verdict[$node]=ok
          if [ "$(cat "$folder/$node" 2>&1)" != "$token" ]; then
            verdict[$node]="what it writes into the run's directory is not seen by $(hostname)"
          elif [ "$((clock - now))" -gt 30 ] || [ "$((now - clock))" -gt 30 ]; then # a lease is good for 120 s
            verdict[$node]="its clock and that of $(hostname) differ by $((clock - now)) s"
          fi ;;
      unfit) verdict[$node]=$text ;;
      cut) cut["$node ${text%% *}"]=${text#* } ;;
      stopped) verdict[stopped]=1 ;;
    esac
  done <"$attempt_dir/screen.log"
}

# Of screen_nodes: of two nodes that do not reach each other one is unfit: that which most others do not reach either; of two
# alike the later, for nothing tells which it is. ${verdict[alone]} is set if of three or more only one would be left.
leave_broken_links() {
  local pair one other node worst most count fit_before
  local -A beyond # of each node those that it does not reach
  fit_before=$(count_fit)
  while :; do
    beyond=() worst="" most=0
    for pair in "${!cut[@]}"; do # either of the two has said so, or both
      one=${pair% *} other=${pair#* }
      if [ "${verdict[$one]-}" = ok ] && [ "${verdict[$other]-}" = ok ]; then
        beyond[$one]+="$other " beyond[$other]+="$one "
      fi
    done
    for node in "${nodes[@]}"; do
      count=$(tr ' ' '\n' <<<"${beyond[$node]-}" | sort -u | grep -c .)
      if [ "$count" != 0 ] && [ "$count" -ge "$most" ]; then most=$count worst=$node; fi
    done
    if [ "$most" = 0 ]; then break; fi
    other=${beyond[$worst]%% *}
    verdict[$worst]="it and $most of $((fit_before - 1)) other nodes do not reach each other: $other: ${cut[$worst $other]-${cut[$other $worst]-}}"
  done
  if [ "$fit_before" -gt 2 ] && [ "$(count_fit)" = 1 ]; then verdict[alone]=1; fi
}

count_fit() { printf '%s\n' "${verdict[@]}" | grep -cx ok; }

# can_do_without NODES: whether Slurm has a place for this job without these nodes and those left out before, now or later.
can_do_without() {
  local before words
  before=$(left_out)
  words=(--test-only "--exclude=${before:+$before,}$1")
  if [ -z "${SLURM_HET_SIZE:-}" ]; then # what the command line says would hold for all components
    words+=("--nodes=$SLURM_NNODES")
    if [ -n "${SLURM_JOB_PARTITION:-}" ]; then words+=("--partition=$SLURM_JOB_PARTITION"); fi
  fi
  sbatch "${words[@]}" "$0" >/dev/null 2>&1
}

# place_steps SERVERS SPARES: which nodes train and which serve, in words of srun: $of_ranks, empty where all nodes of the job
# train, and $of_servers, empty without servers in this job. SERVERS: so many nodes, the first; "component": the second
# component of a heterogeneous job; "jobs" and 0: none here.
# shellcheck disable=SC2034 # used by the files that source this
place_steps() {
  local serving=() tasks=${SLURM_NTASKS_PER_NODE:-${SLURM_NTASKS_PER_NODE_HET_GROUP_0:-1}} cores=
  of_ranks=() of_servers=()
  if [ "${#fit[@]}" = 0 ]; then # not screened
    mapfile -t fit < <(nodes_of_component 0)
    mapfile -t fit_servers < <(nodes_of_component 1)
  fi
  case $1 in
    component)
      if [ "${#fit_servers[@]}" = 0 ]; then end_job 2 "mistake: this job has no second component, whose nodes are to serve"; fi
      of_ranks=(--het-group=0) of_servers=(--het-group=1) serving=("${fit_servers[@]}")
      cores=${SLURM_CPUS_PER_TASK_HET_GROUP_1:-} ;;
    jobs | 0) ;;
    *)
      if [ "${#fit[@]}" -le "$1" ]; then
        end_job 2 "mistake: $1 nodes are to serve, and the job has ${#fit[@]}: no node is left to train"
      fi
      serving=("${fit[@]:0:$1}") fit=("${fit[@]:$1}")
      if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then cores=$((SLURM_CPUS_PER_TASK * tasks)); fi ;; # all of a node's
  esac
  if [ "${#serving[@]}$2" != 00 ]; then
    of_ranks+=("--nodelist=$(IFS=,; echo "${fit[*]}")" "--nodes=${#fit[@]}" "--ntasks=$((${#fit[@]} * tasks))")
  fi
  if [ "${#serving[@]}" != 0 ]; then
    of_servers+=("--nodelist=$(IFS=,; echo "${serving[*]}")" "--nodes=${#serving[@]}" "--ntasks=${#serving[@]}")
    of_servers+=(--ntasks-per-node=1 ${cores:+"--cpus-per-task=$cores"})
  fi
}

# keep_servers RETRIES SRUN...: servers as a step in the background. A step that ends is started again, unless it ended with
# 0 (the run is complete), 2 (a mistake), or within a minute more than RETRIES times in a row: then run_step ends the ranks.
keep_servers() {
  local retries=$1
  shift
  forget_servers # of an attempt whose first node was lost
  trap 'interrupted=1' USR2
  (
    trap 'kill "$!" 2>/dev/null; wait; exit 0' TERM
    quick=0
    while :; do
      SECONDS=0
      "$@" 2>>"$attempt_dir/servers.log" &
      wait "$!"
      code=$?
      if [ "$code" = 0 ]; then exit 0; fi
      if [ "$SECONDS" -lt 60 ]; then quick=$((quick + 1)); else quick=0; fi
      if [ "$code" = 2 ] || [ "$quick" -gt "$retries" ]; then break; fi
      say "the servers ended with $code after $SECONDS s; started again"
    done
    echo "$code" >"$attempt_dir/servers.ended"
    while kill -USR2 $$ 2>/dev/null; do
      sleep 1 &
      wait "$!"
    done
  ) &
  keeper=$!
}

# end_servers: ends what keep_servers began.
end_servers() {
  if [ -n "${keeper:-}" ]; then
    kill "$keeper" 2>/dev/null
    wait "$keeper"
    forget_servers
  fi
}

# forget_servers: takes back the names of this job's servers that were killed before they could (gtpo_megatron/registry.py).
forget_servers() {
  local name names=(-e "\"job_id\": \"$SLURM_JOB_ID\"")
  for name in "${!SLURM_JOB_ID_HET_GROUP_@}"; do names+=(-e "\"job_id\": \"${!name}\""); done
  grep -l -s -F "${names[@]}" "$run_dir"/servers/*.json | xargs -r rm -f --
}

# watch_ranks SRUN_PID SECONDS: ends the step when a rank, once it has begun, gives no sign of life for so long
# (gtpo_megatron/cluster/pulse.py), after all have written their stacks to their logs. Notes the ranks in $attempt_dir/hung.
# What time it is says the file system alone: the clocks of the nodes need not agree.
watch_ranks() {
  local step=$1 age=0 silent
  trap 'kill "$!" 2>/dev/null; exit 0' TERM
  touch "$attempt_dir/pulse/.then"
  while :; do
    sleep 5 &
    wait "$!"
    age=$((age + 5))
    if [ "$age" -le "$2" ]; then continue; fi
    silent=$(silent_ranks)
    if [ -n "$silent" ]; then # they, and this shell, may have waited for the file system alone
      sleep 10 &
      wait "$!"
      silent=$(silent_ranks)
    fi
    if [ -n "$silent" ] && ! grep -qE "$end_of_task" "$attempt_dir/srun.log"; then
      echo "$silent" >"$attempt_dir/hung"
      say "no sign of life for $2 s from rank.node $(one_line <<<"$silent")- all are asked for their stacks, and ended"
      kill -USR2 "$step" # srun passes it on
      sleep 5 &
      wait "$!"
      kill -TERM "$step" # srun kills them
      return
    fi
    touch "$attempt_dir/pulse/.then"
    age=0
  done
}

# The ranks, as RANK.NODE, whose sign of life is older than the file .then.
silent_ranks() { (cd "$attempt_dir/pulse" && find . -type f ! -name '.*' ! -newer .then -printf '%f\n' | sort -n); }

end_of_task='[^ ]+: tasks? [0-9][0-9,-]*: .*' # how srun says that one has ended badly

# wait_for PID: waits for a process's end, whatever signals come meanwhile; its exit code in $code. It is asked to end when the
# servers have ended for good.
wait_for() {
  while :; do
    interrupted=0
    if [ -s "$attempt_dir/servers.ended" ]; then kill -TERM "$1" 2>/dev/null; fi
    wait "$1"
    code=$?
    [ "$interrupted" = 0 ] && break
  done
}

# run_step SRUN...: runs a step and waits for it, whatever signals come meanwhile. Sets $step_code to what ended it:
# the exit code of the first rank that ended badly. srun's own is the highest of all, and those ended in its wake,
# by a signal, have a higher one. With $hung_after, ranks that hang for so many seconds end it.
run_step() {
  local code first step watcher=
  export GTPO_PULSE=
  if [ "${hung_after:-0}" != 0 ]; then
    GTPO_PULSE=$attempt_dir/pulse
    mkdir -p "$GTPO_PULSE"
  fi
  "$@" 2>"$attempt_dir/srun.log" &
  step=$!
  if [ -n "$GTPO_PULSE" ]; then
    watch_ranks "$step" "$hung_after" &
    watcher=$!
  fi
  wait_for "$step"
  if [ -n "$watcher" ]; then
    kill "$watcher" 2>/dev/null
    wait "$watcher"
  fi
  cat "$attempt_dir/srun.log"
  first_end=$(grep -m 1 -oE "$end_of_task" "$attempt_dir/srun.log")
  first=${first_end##*exit code }
  step_code=$code
  if [ "$code" != 0 ] && [[ $first =~ ^[0-9]+$ ]]; then step_code=$first; fi
  if [ "$step_code" != 0 ] && [ -s "$attempt_dir/servers.ended" ]; then
    step_code=$(cat "$attempt_dir/servers.ended") logs=server
    first_end=$(grep -E "$end_of_task" "$attempt_dir/servers.log" | tail -n 1)
  fi
  if [ "$step_code" != 0 ] && [ -s "$attempt_dir/hung" ]; then
    step_code=hung first_end="rank.node $(one_line <"$attempt_dir/hung")gave no sign of life for $hung_after s"
    if [ "$(wc -l <"$attempt_dir/hung")" -lt "$(find "$GTPO_PULSE" -name '[0-9]*' | wc -l)" ]; then
      avoid=$(sed 's/^[0-9]*\.//' "$attempt_dir/hung" | sort -u | paste -sd,)
      can_do_without "$avoid" || avoid= # rather there again than never
    fi # where all were silent, it may be the file system
  fi
}

# end_attempt RETRIES: acts on $step_code, says what ended the attempt and what comes next, and ends the job.
end_attempt() {
  local how=$step_code step stuck
  step=$(newest_step)
  if [ "$got_term" = 1 ] && [ "$step_code" != 0 ]; then how=term; fi
  echo "$attempt ${SLURM_JOB_ID:-none} $step $how" >>"$attempts/ended"
  stuck=$(attempts_without_a_step)
  case $how in
    0) end_job 0 "complete at step $step" ;;
    2) end_job 2 "mistake: $(message_of_ranks) Mend it and submit again; this job is not requeued" ;;
    term) end_job 3 "asked by Slurm to end at step $step (scancel, preemption or time limit); after a preemption Slurm" \
      "requeues the job itself, otherwise submit again to go on" ;;
    3) if [ "$stuck" -gt "$1" ]; then
         end_job 1 "stopped $stuck times without a new step after step $step; not requeued: is the time limit too short?"
       fi
       requeue "stopped after step $step" ;;
    *) show_end_of_log
       if [ "$stuck" -gt "$1" ]; then
         end_job 1 "failed $stuck times without a new step after step $step, not requeued: $(why)"
       fi
       requeue "failed at step $step: $(why)" ;;
  esac
}

# end_command RESULT: the same for a command that is not requeued, but submitted again.
end_command() {
  local how=$step_code
  if [ "$got_term" = 1 ] && [ "$step_code" != 0 ]; then how=term; fi
  echo "$attempt ${SLURM_JOB_ID:-none} $(newest_step) $how" >>"$attempts/ended"
  case $how in
    0) end_job 0 "complete: $1" ;;
    2) end_job 2 "mistake: $(message_of_ranks) Mend it and submit again" ;;
    term) end_job 3 "asked by Slurm to end (scancel, preemption or time limit): submit again" ;;
    *) show_end_of_log
       end_job 1 "failed: $(why)" ;;
  esac
}

# requeue WHY: the same job again, all its components, from the newest checkpoint, without the nodes $avoid.
requeue() {
  local answer
  trap '' TERM # of the requeue: what is started here ignores it too, and has the time until SIGKILL
  note_end
  if answer=$(scontrol requeue "$SLURM_JOB_ID" 2>&1); then
    if [ -n "${avoid:-}" ]; then leave_out "$avoid"; fi
    end_job 0 "$1; requeued${avoid:+ without $avoid}"
  fi
  end_job 3 "$1; cannot be requeued ($(one_line <<<"$answer")): submit again to go on"
}

# The nodes that this job does not get, as Slurm writes them: for all components of a heterogeneous one.
left_out() { scontrol --oneliner show job "$SLURM_JOB_ID" | sed -n '1s/.* ExcNodeList=\([^ ]*\).*/\1/p' | grep -vF '(null)'; }

# leave_out NODES: this job, which waits in the queue, does not get these nodes. Slurm changes the list of a waiting job alone.
leave_out() {
  local before answer
  before=$(left_out)
  answer=$(scontrol update "jobid=$SLURM_JOB_ID" "excnodelist=${before:+$before,}$1" 2>&1) ||
    say "Slurm does not leave out $1: $(one_line <<<"$answer")"
}

# The newest step that the metrics know; 0 without one.
newest_step() {
  local step
  step=$(tail -n 1 "$run_dir/metrics.jsonl" 2>/dev/null | sed -n 's/^{"step": *\([0-9][0-9]*\).*/\1/p')
  echo "${step:-0}"
}

# How many attempts of this job in a row, up to the last, made no step beyond those before; "term" does not count.
attempts_without_a_step() {
  awk -v job="${SLURM_JOB_ID:-none}" \
    '$2 == job && $4 != "term" { if ($3 > best) { best = $3; n = 0 } else n++ } END { print n + 0 }' "$attempts/ended"
}

# What the ranks printed as their mistake, in one line.
message_of_ranks() {
  local log
  log=$(grep -lm 1 '^gtpo-megatron: ' "$attempt_dir/$logs"-*.log 2>/dev/null | head -n 1)
  if [ -n "$log" ]; then
    sed -n '/^gtpo-megatron: /,$p' "$log" | head -n 20 | one_line
  else
    echo "$(why)."
  fi
}

why() {
  if [ "$step_code" = 4 ]; then printf 'ranks waited for each other in vain: '; fi # STUCK of gtpo_megatron/errors.py
  echo "${first_end:-srun ended with $step_code}; logs in $attempt_dir"
}

# The end of the log of the rank that ended first.
show_end_of_log() {
  local rank
  rank=$(sed -n 's/.*tasks\{0,1\} \([0-9][0-9]*\).*/\1/p' <<<"$first_end")
  if [ -s "$attempt_dir/$logs-$rank.log" ]; then tail -n 20 "$attempt_dir/$logs-$rank.log"; fi
}

one_line() { tr -s ' \n' ' '; }
