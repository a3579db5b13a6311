"""Names and numbers that cross a process border. Each is stated here and nowhere else."""

from enum import IntEnum, StrEnum
from typing import Final

API_VERSION: Final = "finetune-operator.io/v1alpha1"
GROUP, VERSION = API_VERSION.split("/")
KIND: Final = "FineTuneJob"
PLURAL = "finetunejobs"

FIELD_MANAGER = "finetune-operator"
JOB_LABEL = f"{GROUP}/job"
STAGE_LABEL = f"{GROUP}/stage"
HASH_ANNOTATION = f"{GROUP}/manifest-hash"

CONTROLLER = f"{GROUP}/finetune-operator"
"""This operator's name in `spec.managedBy`."""

TELEMETRY_PORT = 9400
NODE_RANK_VARIABLE = "FINETUNE_NODE_RANK"
MASTER_ADDRESS_VARIABLE = "FINETUNE_MASTER_ADDR"
MASTER_PORT_VARIABLE = "FINETUNE_MASTER_PORT"
"""Environment of a train pod: which of the job's nodes it is, from 0, and where node 0 can be reached."""

MASTER_PORT = 29400
"""Where the processes of several pods meet."""

TERMINATION_MESSAGE_BYTES = 4096
"""The kubelet cuts a termination message at this length."""

NAME_LENGTH = 50
"""A Job's name, <name>-prepare, is a label value, and <name>-train-<index> a host name: both end at 63 characters."""


class Stage(StrEnum):
    """The three child Jobs, in their order."""

    PREPARE = "prepare"
    TRAIN = "train"
    PUBLISH = "publish"


class Phase(StrEnum):
    """Where a FineTuneJob stands; for people. Programs read the conditions."""

    PENDING = "Pending"
    PREPARING = "Preparing"
    QUEUED = "Queued"
    TRAINING = "Training"
    PUBLISHING = "Publishing"
    SUSPENDED = "Suspended"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"

    @property
    def finished(self) -> bool:
        return self in (Phase.SUCCEEDED, Phase.FAILED)


class ConditionType(StrEnum):
    ACCEPTED = "Accepted"
    DATA_READY = "DataReady"
    MEMORY_FITS = "MemoryFits"
    RUNNING = "Running"
    GATE_PASSED = "GatePassed"
    SUSPENDED = "Suspended"
    COMPLETE = "Complete"
    FAILED = "Failed"


class Reason(StrEnum):
    """Why a condition is as it is. The comment says what the user can do."""

    # progress
    VALID = "Valid"
    PREPARED = "Prepared"
    PREPARING = "Preparing"
    QUEUED = "Queued"
    POD_STARTING = "PodStarting"
    POD_RUNNING = "PodRunning"
    TRAINING_STALLED = "TrainingStalled"  # it runs, but says nothing new: look at the log, suspend it to free its GPUs
    BETWEEN_STAGES = "BetweenStages"
    SUCCEEDED = "Succeeded"
    PASSED = "Passed"
    NO_GATE = "NoGate"
    FITS = "Fits"
    LIMIT_UNKNOWN = "LimitUnknown"  # give resources.gpuMemory, or resources.limits.memory on CPU, to have it compared
    SUSPENDED_BY_USER = "SuspendedByUser"
    RESUMED = "Resumed"

    # the user's to mend
    INVALID_SPEC = "InvalidSpec"  # the message names the field
    NAME_CLASH = "NameClash"  # an object of that name is somebody else's: rename the FineTuneJob
    DATA_INVALID = "DataInvalid"  # the message names file and line
    DATA_NOT_FOUND = "DataNotFound"  # a source does not exist or may not be read
    MODEL_INVALID = "ModelInvalid"  # the model does not fit the task, or has no safetensors weights
    MODEL_NOT_FOUND = "ModelNotFound"
    OUTPUT_FAILED = "OutputFailed"  # the artifact could not be pushed to output.uri
    ACCELERATOR_MISSING = "AcceleratorMissing"  # a GPU was asked for, the pod sees none
    INSUFFICIENT_MEMORY = "InsufficientMemory"  # cannot be trained in the memory given: the message has the numbers and what would help
    NON_FINITE_LOSS = "NonFiniteLoss"  # lower the learning rate, look at the data
    GATE_FAILED = "GateFailed"  # trained, but not good enough for evaluation.gate

    # the cluster's
    OOM_KILLED = "OOMKilled"  # raise resources.limits.memory or lower training.microBatchTokens
    EVICTED = "Evicted"  # its node was drained, shut down or short of something: the Job tries again by itself
    PREEMPTED = "Preempted"  # a job of higher priority took its place: it goes on when there is room again
    DISRUPTED = "Disrupted"  # its node was lost, or somebody deleted it: the Job tries again by itself
    IMAGE_NOT_PULLED = "ImageNotPulled"
    UNSCHEDULABLE = "Unschedulable"
    POD_REFUSED = "PodRefused"  # quota, Pod Security or a PriorityClass that does not exist keeps the pod from being made
    FORBIDDEN = "Forbidden"  # quota or missing rights keep the operator from making the Job; it tries again
    CONTAINER_CONFIG = "ContainerConfigError"  # a ConfigMap, Secret or claim that the pod needs is missing
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    INTERRUPTED = "Interrupted"  # SIGTERM: a checkpoint was saved, exit code 75
    STAGE_FAILED = "StageFailed"  # any other exit code


class ExitCode(IntEnum):
    """Exit codes of a trainer pod; after sysexits.h (EX_USAGE, EX_TEMPFAIL)."""

    DONE = 0
    USER_ERROR = 64
    TRY_AGAIN = 75
