"""Names of what a training run's folder holds."""

METRICS_FILE = "metrics.jsonl"  # one line for each step or evaluation
CLOCK_FILE = "clock.json"  # what of the budget is used, see `deadline.Clock`
STATUS_FILE = "status.json"  # the worker's state, rewritten every second
BEST_FILE = "best.json"  # the step and folder of the adapter with the lowest eval loss
STOP_FILE = "stop"  # asks the worker to save a checkpoint and end
SESSION_FILE = "session.json"  # the worker's last session: its outcome, or why it cannot go on
OUTCOME_FILE = "outcome.json"  # in the checkpoint that a run ended with
SELF_CHECK_FILE = "self_check.json"  # that packing and adapter work on this model, with this kernel
EASED_FILE = "eased.json"  # the smaller micro batch that the run continues with after the card ran out of memory
WORKING_FILE = "working.json"  # of a run at a URL: names the folder in which each machine works for it
TENSORBOARD_FOLDER, BEST_FOLDER, PACKED_FOLDER = "tensorboard", "best", "packed"
STATE_FILES = (METRICS_FILE, BEST_FILE, CLOCK_FILE, SELF_CHECK_FILE, EASED_FILE)
# Every file that a run makes in its folder (fnmatch), beside those of every step.
OWNS = (
    *(*STATE_FILES, STATUS_FILE, SESSION_FILE, STOP_FILE, WORKING_FILE, "worker.json", "loss_curve.png"),
    *("packed/*", "checkpoints/*", "best/*", "adapter/*", "tensorboard/*", "ray/*"),
)
CHECKPOINTS_FOLDER, WORK_FOLDER = "checkpoints", ".work"  # in a run folder; in it, what is being written
FILES_FILE = "files.json"  # {name: size in bytes} of all others in the checkpoint
