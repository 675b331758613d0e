"""What is foretold of the memory is what XLA plans for the whole model."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from lechat_jax.checkpoint.weights import weight_shapes
from lechat_jax.config import MistralConfig, preset
from lechat_jax.devices.mesh import make_mesh
from lechat_jax.errors import BadInput
from lechat_jax.train import memory_plan
from lechat_jax.train.command import main
from lechat_jax.train.memory_plan import (
    Memory,
    Parts,
    check_memory,
    compiled,
    needed,
    simulated_mesh,
    summary,
)
from lechat_jax.train.optimizer import usual_rule
from lechat_jax.train.step import StepOptions


@pytest.mark.parametrize("n_layers", [3, pytest.param(6, marks=pytest.mark.slow)])
def test_the_default_job_is_foretold_from_shallow_models(n_layers: int) -> None:
    config = dataclasses.replace(preset("lechat-15m"), n_layers=n_layers)
    options = StepOptions()
    whole, foretold = compiled(config, options, 8, 128), needed(config, options, 8, 128)
    assert foretold.parameters == whole.parameters == 4 * config.n_params
    assert foretold.optimizer == whole.optimizer
    assert foretold.total == pytest.approx(whole.total, rel=0.1)
    assert foretold.activations == pytest.approx(whole.activations, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["fsdp=8", "fsdp=4,tp=2"])
def test_so_is_a_mesh(mesh: str, tiny: MistralConfig) -> None:
    config = dataclasses.replace(tiny, n_layers=8, vocab_size=98)
    options = StepOptions(mesh=make_mesh(mesh))
    whole, foretold = compiled(config, options, 32, 64), needed(config, options, 32, 64)
    assert foretold.parameters == pytest.approx(whole.parameters, rel=1e-3)
    assert foretold.total == pytest.approx(whole.total, rel=0.1)
    assert whole.parameters < 1.1 * 4 * config.n_params / 8


STEPS = """
import json, threading, time
import jax.numpy as jnp, numpy as np
from lechat_jax.config import preset
from lechat_jax.train.memory_plan import compiled
from lechat_jax.data.rows import Rows
from lechat_jax.train.step import StepOptions, init_state, jitted_steps

def resident():
    return 4096 * int(open("/proc/self/statm").read().split()[1])

def watch():
    while True:
        peak.append(max(peak.pop(), resident()))
        time.sleep(0.002)

config, options, B = preset("lechat-15m"), StepOptions(), 32
rows = Rows(np.random.default_rng(0).integers(0, 32000, (1, B, 257)).astype(np.int32))
state, one, many = init_state(config, options, 0), jnp.int32(1), jnp.int32(100)
foretold = compiled(config, options, B, 256)
step = jitted_steps(options).lower(config, options, state, {}, rows, one, many).compile()
before, peak = resident(), [0]
threading.Thread(target=watch, daemon=True).start()
for _ in range(2):
    state, losses = step(state, {}, rows, one, many)
losses.block_until_ready()
print(json.dumps([foretold.total, peak[0] - before + foretold.parameters + foretold.optimizer]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="measured as Linux tells it")
def test_what_is_foretold_is_then_measured() -> None:
    ran = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, check=True)
    foretold, measured = json.loads(ran.stdout)
    assert foretold == pytest.approx(measured, rel=0.1)


def test_a_dry_run_says_what_fits_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = "--dim 16 --n-layers 1 --n-heads 2 --n-kv-heads 2 --head-dim 8 --hidden-dim 24"
    assert main([*flags.split(), "--sliding-window", "6", "--mesh", "fsdp=8", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "lechat-15m on 8 devices, 16 x 128 tokens in float32 with --remat none" in said
    assert "a device of 8 GB has room for it" in said
    assert not list(tmp_path.iterdir())
    with pytest.raises(BadInput, match="instead of --resume"):
        main(["--resume", "there", "--dry-run"])


REMATS: list[StepOptions] = [StepOptions(remat=name) for name in ("none", "full")]


@pytest.fixture(scope="module")
def plans(tiny: MistralConfig) -> dict[StepOptions, Memory]:
    """What XLA plans for 16 rows, and what they are rows of."""
    return {options: compiled(deeper(tiny), options, 16, 256) for options in REMATS}


def deeper(tiny: MistralConfig) -> MistralConfig:
    return dataclasses.replace(tiny, n_layers=4)


def test_what_a_remat_makes_again_is_not_counted(plans: dict[StepOptions, Memory]) -> None:
    none, full = (plans[options].activations for options in REMATS)
    assert full < 0.7 * none


# --- before training ---


@pytest.mark.parametrize("options", REMATS, ids=lambda options: options.remat)
def test_xla_decides_wherever_it_is_not_plain(
    options: StepOptions,
    plans: dict[StepOptions, Memory],
    tiny: MistralConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is certain without asking holds of what XLA plans, from both sides."""
    plan, asked = plans[options], []
    monkeypatch.setattr(memory_plan, "needed", lambda *args: plan)

    def check(free: int | None) -> None:
        check_memory(deeper(tiny), options, 16, 256, free, asking=lambda: asked.append(free))

    check(plan.total)
    with pytest.raises(BadInput, match=r"a training step takes .* GB and .*--remat full\)$"):
        check(plan.total - 1)
    assert asked == [plan.total, plan.total - 1]
    check(100 * plan.total)
    check(None)
    assert len(asked) == 2, "there is plainly room, or nobody knows how much"


def test_what_is_plain_is_refused_without_asking() -> None:
    large, usual = preset("mistral-7b-v0.1"), preset("lechat-15m")
    with pytest.raises(BadInput, match=r"remembers take 87\.95 GB and 24\.00 GB are free; train a"):
        check_memory(large, StepOptions(), 8, 128, 24 * 10**9, asking=pytest.fail)
    with pytest.raises(
        BadInput, match=r"takes at least 265\.65 GB .*--batch.*--accumulate.*--remat"
    ):
        check_memory(usual, StepOptions(), 100_000, 128, 24 * 10**9, asking=pytest.fail)
    check_memory(usual, StepOptions(), 8, 128, 2 * 10**9, asking=pytest.fail)


def test_weights_that_stay_have_no_gradient_and_nothing_is_remembered_of_them() -> None:
    config = preset("mistral-7b-v0.1")
    frozen = {
        n: jax.ShapeDtypeStruct(x.shape, "bfloat16") for n, x in weight_shapes(config).items()
    }
    learning = {"blocks.0.attn.q.lora.a": jax.ShapeDtypeStruct((16, 4096), "float32")}
    options = StepOptions(rule=usual_rule("adamw", "adapters"))
    with pytest.raises(BadInput, match=r"remembers take 14\.48 GB and 14\.00 GB are free"):
        check_memory(config, options, 1, 128, 14 * 10**9, Parts(learning, frozen), pytest.fail)


def test_what_fits_nowhere_is_said() -> None:
    assert "no device of 192 GB has" in summary(Memory(10**12, 0, 0, 0))
    assert "a device of 80 GB has room for it" in summary(Memory(50 * 10**9, 0, 0, 0))


def test_more_devices_than_can_be_simulated_are_refused() -> None:
    jax.devices()  # their number is fixed from now on
    with pytest.raises(BadInput, match="has 64 devices and only 8 can be simulated"):
        simulated_mesh("fsdp=64")
