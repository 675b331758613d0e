"""The command `lechat VERB`, for `python -m lechat_jax.VERB` and `python -m parity.VERB`."""

import sys
from importlib import import_module

import lechat_jax

VERBS = {
    "train": ("lechat_jax.train.command", "train a Mistral, or fine-tune one, and print samples"),
    "generate": ("lechat_jax.generate.command", "continue prompts"),
    "chat": ("lechat_jax.chat.command", "talk with a model by its chat template"),
    "serve": ("lechat_jax.serve.command", "answer requests of OpenAI's API, and a chat page"),
    "eval": ("lechat_jax.eval.command", "perplexity of a text under a model, tasks of lm-eval"),
    "embed": ("lechat_jax.embed.command", "vectors of texts, to compare or to search them"),
    "report": ("lechat_jax.report.command", "compare training runs in one HTML page"),
    "convert": ("parity.convert.command", "move weights between PyTorch's formats and lechat's"),
    "push": ("parity.push", "publish a model on the Hugging Face Hub"),
    "check": ("parity.check.command", "prove that the port is the same function as PyTorch's"),
    "bench": ("parity.bench.command", "speed and memory side by side with PyTorch"),
    "quality": ("parity.quality", "what bfloat16, int8 and int4 cost in quality"),
}


def main() -> None:
    """Runs the command that the first argument names, with the others."""
    verb, *rest = sys.argv[1:] or ["--help"]
    if verb in ("-h", "--help"):
        print("usage: lechat VERB [--help] ...\n")
        print("\n".join(f"  {name:9} {what}" for name, (_, what) in VERBS.items()))
    elif verb == "--version":
        print(f"lechat {lechat_jax.__version__}")
    elif verb in VERBS:
        sys.argv = [f"lechat {verb}", *rest]
        import_module("lechat_jax.cli.flags").run(import_module(VERBS[verb][0]).main)
    else:
        print(f"error: lechat can {', '.join(VERBS)}, not {verb!r}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
