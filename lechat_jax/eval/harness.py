"""lm-evaluation-harness: a model behind its interface, scored and continued in batches.

`lm_eval` (extra `[lm-eval]`) brings the tasks and counts; only what it asks of a model is here. The
numbers are those of its own `hf` model on the same weights, whose conventions these are: BOS before
each text, a context cut at the left, and a text that is scored as a whole in windows that do not
overlap. https://github.com/EleutherAI/lm-evaluation-harness
"""

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lechat_jax.errors import BadInput
from lechat_jax.generate.generator import Generator
from lechat_jax.generate.sampling import Sampling
from lechat_jax.model.scoring import Forward, token_scores
from lechat_jax.tokenizer.jinja_template import OF_VERSION, chat_template, chat_template_in

# By its parts' names, since types are checked where it is not installed.
lm_eval: Any = import_module("lm_eval")
tasks_of: Any = import_module("lm_eval.tasks")
utils: Any = import_module("lm_eval.utils")
model_utils: Any = import_module("lm_eval.models.utils")
TemplateLM: Any = import_module("lm_eval.api.model").TemplateLM

LEAST = 32  # tokens of the shortest row; each next length is twice as long, and compiled once
GREEDY = 0.0  # temperature
BOS, EOS = "<s>", "</s>"  # as all of Mistral's tokenizers spell them

Pair = tuple[Any, list[int], list[int]]  # what it is for the harness; ids of context and target
OnProgress = Callable[[str, int, int], None]


class HarnessModel(TemplateLM):
    """A loaded model as the harness asks for one.

    Attributes:
        max_length: tokens of a context with its continuation at most.
        max_gen_toks: tokens of an answer, unless a task says how many.
        batch: rows that are scored or continued at a time.
    """

    max_gen_toks = 256

    def __init__(
        self,
        model: Generator,
        folder: Path,
        max_length: int,
        batch: int,
        on_progress: OnProgress = lambda what, done, of: None,
    ) -> None:
        super().__init__()
        if model.tokenizer is None:
            raise BadInput(f"{folder} has no tokenizer, so no task can be read")
        self.model, self.folder, self.on_progress = model, folder, on_progress
        self.max_length, self.batch = max_length, batch
        self.text = model.tokenizer
        dtype = str(model.weights["norm.scale"].dtype)
        self.forward = Forward(dtype="bfloat16" if dtype == "bfloat16" else "float32")

    @property
    def eot_token_id(self) -> int:
        """EOS."""
        return self.text.eos_id

    @property
    def prefix_token_id(self) -> int:
        """BOS, which a text without a context is scored behind."""
        return self.text.bos_id

    @property
    def tokenizer_name(self) -> str:
        """What the harness tells its caches of rendered chats apart by."""
        return f"lechat {self.folder}"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """The ids of a text behind BOS, or of what the chat template made."""
        if add_special_tokens is False:
            return self.text.encode(string)
        if string.startswith(BOS):
            return self.text.encode_rendered(string)
        return [self.text.bos_id, *self.text.encode(string)]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The Jinja template: the model's own, or that of the version of its tokenizer."""
        return self._template if chat_template else None

    @functools.cached_property
    def _template(self) -> str:
        if own := chat_template_in(self.folder):
            return own
        if self.text.version not in OF_VERSION:
            raise BadInput(
                f"{self.folder} has no chat template; put chat_template.jinja of where the model "
                "comes from into it"
            )
        return chat_template(self.text.version, self.text.starts_anew)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the text that the model reads."""
        environment = ImmutableSandboxedEnvironment(  # a template comes from anywhere
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _refuse
        return environment.from_string(self._template).render(
            messages=chat_history,
            add_generation_prompt=add_generation_prompt,
            bos_token=BOS,
            eos_token=EOS,
        )

    def _loglikelihood_tokens(
        self, requests: list[Pair], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation in nats, and whether greedy decoding makes it."""
        longest = self.max_length + 1
        rows = [(context + target)[-longest:] for _, context, target in requests]
        found: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        for done, part in _batches(order, self.batch):
            self.on_progress("scoring", done, len(rows))
            log_probs, is_greedy = self._scores([rows[i] for i in part])
            for i, own, greedy in zip(part, log_probs, is_greedy, strict=True):
                end = len(rows[i]) - 1
                scored = slice(max(0, end - len(requests[i][2])), end)
                found[i] = float(own[scored].sum()), bool(greedy[scored].all())
        return found

    def _scores(
        self, rows: Sequence[Sequence[int]]
    ) -> tuple[Float[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
        """The scores of each token behind the first; rows are filled up to a length of few."""
        T = LEAST
        while T < max(map(len, rows)) - 1:
            T *= 2
        ids = np.zeros((self.batch, T + 1), np.int32)
        for row, own in zip(ids, rows, strict=False):
            row[: len(own)] = own
        scores = token_scores(
            self.model.config, self.forward, self.model.weights, ids[:, :-1], ids[:, 1:]
        )
        log_probs, is_greedy = (np.asarray(leaf)[: len(rows)] for leaf in scores)
        return log_probs.astype(np.float64), is_greedy

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text in nats, in windows that do not overlap."""
        pairs: list[Pair] = []
        texts: list[int] = []  # whose each pair is
        for i, request in enumerate(requests):
            windows = utils.get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
            )
            for context, target in map(utils.make_disjoint_window, windows):
                pairs.append((None, context, target))
                texts.append(i)
        totals = [0.0] * len(requests)
        for i, (nats, _) in zip(texts, self._loglikelihood_tokens(pairs), strict=True):
            totals[i] += nats
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The answer to each context, up to a stop text, EOS or a number of tokens."""
        found = [""] * len(requests)
        asked = [
            model_utils.normalize_gen_kwargs(request.args[1], self.max_gen_toks)
            for request in requests
        ]
        alike: dict[str, list[int]] = {}
        for i, how in enumerate(asked):
            alike.setdefault(repr(sorted(how.items())), []).append(i)
        done = 0
        for group in alike.values():
            for _, part in _batches(group, self.batch):
                self.on_progress("answering", done, len(requests))
                contexts = [requests[i].args[0] for i in part]
                for i, answer in zip(part, self._answers(contexts, asked[part[0]]), strict=True):
                    found[i] = answer
                done += len(part)
        return found

    def _answers(self, contexts: Sequence[str], how: Mapping[str, Any]) -> Iterator[str]:
        """Continues contexts that are asked for in the same way."""
        n = how["max_gen_toks"]
        if n >= self.max_length:
            raise BadInput(
                f"a task wants answers of {n} tokens, and --block allows {self.max_length} of "
                "context and answer; give it more"
            )
        prompts = [self.tok_encode(text)[-(self.max_length - n) :] for text in contexts]
        sampling = Sampling(
            temperature=how.get("temperature", GREEDY) if how.get("do_sample") else GREEDY,
            top_k=int(how.get("top_k") or 0),
            top_p=float(how.get("top_p") or 1.0),
        )
        samples = self.model.generate(prompts, n, sampling, stop=[s for s in how["until"] if s])
        for sample in samples:
            answer = self.text.decode(sample.ids)  # as a text of its own, like transformers'
            for stop in filter(None, (*how["until"], EOS)):
                answer = answer.split(stop)[0]
            yield answer


def _refuse(message: str) -> None:
    """What chat templates call for a conversation that they have no words for."""
    raise BadInput(f"the chat template refuses a task's conversation: {message}")


def _batches(order: Sequence[int], batch: int) -> Iterator[tuple[int, list[int]]]:
    """Parts of so many, and how many were before each."""
    for start in range(0, len(order), batch):
        yield start, list(order[start : start + batch])


def evaluate(
    model: HarnessModel,
    tasks: Sequence[str],
    include_path: Path | None,
    fewshot: int | None,
    limit: int | None,
    chat: bool,
) -> dict[str, Any]:
    """Runs tasks of the harness: its results, as JSON types, and as its table.

    Raises:
        BadInput: a task is not known, or its data cannot be read.
    """
    manager = tasks_of.TaskManager(include_path=None if include_path is None else str(include_path))
    known = set(manager.all_tasks)
    if unknown := [task for task in tasks if task not in known]:
        raise BadInput(
            f"lm_eval knows no task {', '.join(unknown)}; `lm_eval ls tasks` lists them, and "
            "--include-path names a folder with your own"
        )
    try:
        found = lm_eval.simple_evaluate(
            model=model,
            tasks=list(tasks),
            num_fewshot=fewshot,
            limit=limit,
            apply_chat_template=chat,
            task_manager=manager,
            log_samples=False,
        )
    except (OSError, ValueError) as error:  # of the package that reads a task's data
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadInput(f"a task of {', '.join(tasks)} cannot be run: {reason}") from error
    kept = {key: found[key] for key in ("results", "versions", "n-shot", "n-samples")}
    plain = json.loads(json.dumps(kept, default=utils.handle_non_serializable))
    return {**plain, "table": utils.make_table(found)}
