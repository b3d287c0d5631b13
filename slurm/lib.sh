# shellcheck shell=bash
# What the sbatch files here share; sourced, never run by itself. In the order of a job:
#   begin_attempt, load_modules, need_file, run_step, end_attempt
#
# What it leaves in the run's directory:
#   attempts/1, 2, ...   one folder an attempt: srun.log (what Slurm said), rank-0.log, rank-1.log, ...
#   attempts/latest      the newest of them
#   attempts/ended       a line for each that has ended: its number, job, newest step, how (exit code, or "term")

say() { printf '%s %s\n' "$(date '+%F %T')" "$*"; }

# end_job CODE TEXT...: the last line of the main log, and the end of the job.
end_job() {
  local code=$1
  shift
  say "END $*"
  exit "$code"
}

# begin_attempt RUN_DIR: makes the folder of this attempt's logs, $attempt_dir.
begin_attempt() {
  attempts=$1/attempts run_dir=$1 got_term=0
  if ! mkdir -p "$attempts" || [ ! -w "$attempts" ]; then
    end_job 2 "mistake: $attempts cannot be written on $(hostname); is it on the shared file system?"
  fi
  attempt=1
  until mkdir "$attempts/$attempt" 2>/dev/null; do attempt=$((attempt + 1)); done
  attempt_dir=$attempts/$attempt
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

# run_step SRUN...: runs a step and waits for it, whatever signals come meanwhile. Sets $step_code to what ended it:
# the exit code of the first rank that ended badly. srun's own is the highest of all, and those ended in its wake,
# by a signal, have a higher one.
run_step() {
  local code first
  "$@" 2>"$attempt_dir/srun.log" &
  while :; do
    interrupted=0
    wait "$!"
    code=$?
    [ "$interrupted" = 0 ] && break
  done
  cat "$attempt_dir/srun.log"
  first_end=$(grep -m 1 -oE '[^ ]+: tasks? [0-9][0-9,-]*: .*' "$attempt_dir/srun.log")
  first=${first_end##*exit code }
  step_code=$code
  if [ "$code" != 0 ] && [[ $first =~ ^[0-9]+$ ]]; then step_code=$first; fi
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

# requeue WHY: the same job again, from the newest checkpoint.
requeue() {
  local answer
  if answer=$(scontrol requeue "$SLURM_JOB_ID" 2>&1); then end_job 0 "$1; requeued"; fi
  end_job 3 "$1; cannot be requeued ($(one_line <<<"$answer")): submit again to go on"
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
  log=$(grep -lm 1 '^gtpo-megatron: ' "$attempt_dir"/rank-*.log 2>/dev/null | head -n 1)
  if [ -n "$log" ]; then
    sed -n '/^gtpo-megatron: /,$p' "$log" | head -n 20 | one_line
  else
    echo "$(why)."
  fi
}

why() { echo "${first_end:-srun ended with $step_code}; logs in $attempt_dir"; }

# The end of the log of the rank that ended first.
show_end_of_log() {
  local rank
  rank=$(sed -n 's/.*tasks\{0,1\} \([0-9][0-9]*\).*/\1/p' <<<"$first_end")
  if [ -s "$attempt_dir/rank-$rank.log" ]; then tail -n 20 "$attempt_dir/rank-$rank.log"; fi
}

one_line() { tr -s ' \n' ' '; }
